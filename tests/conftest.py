"""Keep tests small: one thread is faster for tensors of this size, and leaves the other cores alone."""

import os

import gpu_selection
import lost_context
import numpy as np
import pytest
import torch

# Before anything imports triton: without a GPU its kernels run in the interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    if torch.cuda.is_available():
        config.pluginmanager.register(lost_context.LostContext())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, Triton's kernels are tested on it (test_gpu.py) and can't take CPU tensors."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if not INTERPRETED and "triton" in (parameters.get("backend"), str(parameters.get("prefix", "")).strip("_")):
            item.add_marker(pytest.mark.skip(reason="Triton runs on the GPU here, see test_gpu.py"))
        if item.path.name in ("test_gpu.py", "test_gpu_images.py") and gpu_selection.is_quick(item, parameters):
            item.add_marker(pytest.mark.gpu_quick)
    if torch.cuda.is_available():
        gpu_selection.longest_first(items)


@pytest.fixture
def maximum_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """tl.maximum(NaN, x) is x on a GPU, and in the interpreter; Triton 3.6's interpreter says NaN."""
    if INTERPRETED:
        from triton.runtime.interpreter import InterpreterBuilder

        monkeypatch.setattr(InterpreterBuilder, "create_maxnumf", lambda self, a, b: self.binary_op(a, b, np.fmax))
        monkeypatch.setattr(InterpreterBuilder, "create_minnumf", lambda self, a, b: self.binary_op(a, b, np.fmin))
