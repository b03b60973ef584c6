"""Finds and loads the compiled libraries, and registers the operations: their schemas, the Triton backend, fake kernels, derivatives.

``sfm_fast::NAME`` is the C++ operation (CPU, and CUDA from its own library); ``sfm_fast::triton_NAME`` the same in Triton.
A library that wasn't built is left out without a warning (`sfm_fast.explain` says so); one that can't be loaded warns once. They lie
beside the package's files, or in the folder that SFM_FAST_LIBRARIES names.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .schemas import SCHEMAS

_FOLDER = Path(os.environ.get("SFM_FAST_LIBRARIES") or Path(__file__).resolve().parent.parent)
_fragment = torch.library.Library("sfm_fast", "FRAGMENT")
problems: dict[str, str] = {}  # backend -> why its operations are not there


def _load(name: str) -> str | None:
    """Load ``_C`` or ``_C_cuda``; None when it's there, else why not."""
    files = sorted(path for path in _FOLDER.glob(f"{name}.*so") if path.name.split(".")[0] == name)
    if not files:
        return "was not built (no compiler at installation?)"
    try:
        torch.ops.load_library(str(files[0]))
    except (OSError, RuntimeError) as error:
        reason = f"can't be loaded: {str(error).splitlines()[0]}"
        warnings.warn(
            f"sfm_fast: {files[0].name} {reason}; falling back to other backends", RuntimeWarning, stacklevel=2
        )
        return reason
    return None


def _load_all() -> None:
    if reason := _load("_C"):
        problems["cpu"] = f"the C++ library {reason}"
        problems["cuda"] = "the CUDA library needs the C++ library"
    elif torch.version.cuda is None:
        problems["cuda"] = "this torch has no CUDA"
    elif reason := _load("_C_cuda"):
        problems["cuda"] = f"the CUDA library {reason}"
    if importlib.util.find_spec("triton") is None:
        problems["triton"] = "triton is not installed"
    else:
        _register_triton()


def triton_interpreter() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors (TRITON_INTERPRET=1 when the process started)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _register_triton() -> None:
    keys = ("CUDA", "CPU") if triton_interpreter() else ("CUDA",)
    for name, schema in SCHEMAS.items():
        _fragment.define(f"triton_{name}{schema}")
        for key in keys:
            _fragment.impl(f"triton_{name}", _triton_kernel(name), key)


def _triton_kernel(name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        # Imported at the first call: triton takes a second to import, and most processes never use it.
        module = importlib.import_module(f"sfm_fast.kernels.{name.removesuffix('_backward')}")
        return getattr(module, name)(*arguments)

    return call


_load_all()


def operation(backend: str, name: str) -> Any:
    """The overload of ``name`` that ``backend`` ("cpu", "cuda" or "triton") runs."""
    full = f"triton_{name}" if backend == "triton" else name
    return getattr(torch.ops.sfm_fast, full).default


def registered(name: str) -> Iterator[tuple[str, str]]:
    """(backend, qualified name) of every form in which operation ``name`` exists here: the C++ one is "cpu" on GPUs too."""
    if "cpu" not in problems:
        yield "cpu", f"sfm_fast::{name}"
    if "triton" not in problems:
        yield "triton", f"sfm_fast::triton_{name}"


def register(
    name: str,
    fake: Callable[..., Any],
    *,
    triton_fake: Callable[..., Any] | None = None,
    setup: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Give every form of operation ``name`` its fake kernel and, with ``setup`` and ``backward``, its derivative.

    fake: what the operation gives, without computing it; ``triton_fake`` where Triton's takes other scratch memory.
    setup: ``setup(ctx, inputs, output)`` saves what the derivative needs. backward: ``backward(backend, ctx, *gradients)`` gives the
    gradients of all inputs. Both are what compiled code runs; eager calls go through an autograd function of the file's own.
    """
    for backend, qualified in registered(name):
        chosen = triton_fake if triton_fake is not None and backend == "triton" else fake
        torch.library.register_fake(qualified, chosen, lib=_fragment)
        if backward is not None:
            bound = functools.partial(backward, backend)
            torch.library.register_autograd(qualified, bound, setup_context=setup)
