"""Keep tests small: one thread is faster for tensors of this size, and leaves the other cores alone."""

import os

import pytest
import torch

# Before anything imports triton: without a GPU its kernels run in the interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, Triton's kernels are tested on it (test_gpu.py) and can't take CPU tensors."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if not INTERPRETED and "triton" in (parameters.get("backend"), str(parameters.get("prefix", "")).strip("_")):
            item.add_marker(pytest.mark.skip(reason="Triton runs on the GPU here, see test_gpu.py"))
