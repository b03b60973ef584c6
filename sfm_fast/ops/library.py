"""Loads the compiled libraries, and registers the operations with schemas, Triton backend, fake kernels and derivatives.

``sfm_fast::NAME`` is the C++ operation (CPU, and CUDA from its own library); ``sfm_fast::triton_NAME`` the same in Triton.
A library that wasn't built is skipped without a warning (`sfm_fast.explain` says so); one that can't be loaded warns once. They are
searched in the package's folder, or in the folder SFM_FAST_LIBRARIES.
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

from ..errors import reason_of
from .schemas import SCHEMAS

_FOLDER = Path(os.environ.get("SFM_FAST_LIBRARIES") or Path(__file__).resolve().parent.parent)
_fragment = torch.library.Library("sfm_fast", "FRAGMENT")
problems: dict[str, str] = {}  # backend -> why its operations aren't available


def _load(name: str) -> str | None:
    """Load ``_C`` or ``_C_cuda``; returns None, or the reason why it isn't available."""
    files = sorted(path for path in _FOLDER.glob(f"{name}.*so") if path.name.split(".")[0] == name)
    if not files:
        return "was not built (no compiler at installation?)"
    try:
        torch.ops.load_library(str(files[0]))
    except (OSError, RuntimeError) as error:
        reason = f"can't be loaded: {reason_of(error)}"
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
        # Imported at the first call, because importing triton takes a second and most processes never use it.
        module = importlib.import_module(f"sfm_fast.kernels.{name.removesuffix('_backward')}")
        return getattr(module, name)(*arguments)

    return call


_load_all()


def operation(backend: str, name: str) -> Any:
    """The torch operation of ``name`` for ``backend`` ("cpu", "cuda" or "triton")."""
    full = f"triton_{name}" if backend == "triton" else name
    return getattr(torch.ops.sfm_fast, full).default


def registered(name: str) -> Iterator[tuple[str, str]]:
    """(backend, qualified name) of every available form of operation ``name``; the C++ one is "cpu", also on GPUs."""
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
    """Register the fake kernel and, with ``setup`` and ``backward``, the derivative of every form of operation ``name``.

    fake: returns empty results of the right form; ``triton_fake`` if Triton's kernels use other scratch memory.
    setup: ``setup(ctx, inputs, output)`` saves what the derivative needs. backward: ``backward(backend, ctx, *gradients)`` returns
    the gradients of all inputs. Compiled code uses both; eager calls use an autograd function in the operation's file.
    """
    for backend, qualified in registered(name):
        chosen = triton_fake if triton_fake is not None and backend == "triton" else fake
        torch.library.register_fake(qualified, chosen, lib=_fragment)
        if backward is not None:
            bound = functools.partial(backward, backend)
            torch.library.register_autograd(qualified, bound, setup_context=setup)
