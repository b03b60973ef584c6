"""Chooses the backend that runs an operation, and explains the choice."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ..errors import InputError
from ..settings import ALIGNMENTS as ALIGNMENTS
from ..settings import METRICS as METRICS
from . import library

BACKENDS = ("torch", "cpu", "triton", "cuda")
CUDA_PIXELS = 2048  # largest side of a canvas, whose strips must fit into shared memory
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Choice:
    """The backend that runs a call, and for every other backend the reason why it doesn't."""

    backend: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reasons[self.backend]}"]
        return "\n".join(lines + [f"not {name}: {why}" for name, why in self.reasons.items() if name != self.backend])


def explain(
    features: torch.Tensor,
    *,
    alignment: str = "global",
    metric: str = "cosine",
    backend: str = "auto",
    grouped: bool = False,
) -> Choice:
    """The backend that would run a loss on ``features``, and why the others wouldn't.

    Depends only on device, dtype and kind of loss, never on timing. ``grouped``: whether the call has ``groups``; for the decoupled
    loss the choice is that of metric "mse". (Inside ``torch.func`` transforms plain torch always runs.) Raises ``InputError`` for
    an unknown name, a metric that the alignment doesn't have, or if the named backend doesn't support the call.
    """
    check_names(alignment, metric, backend)
    if not isinstance(features, torch.Tensor):
        raise InputError(f"features must be a tensor, got {type(features).__name__}")
    if not isinstance(grouped, bool):
        raise InputError(f"grouped must be True or False, got {type(grouped).__name__}")
    return choose(features.device.type, features.dtype, backend, alignment, metric, grouped)


def check_names(alignment: str, metric: str, backend: str) -> None:
    """Raise ``InputError`` unless the three are known names, and the alignment has the metric."""
    for name, value, known in (
        ("alignment", alignment, ALIGNMENTS),
        ("metric", metric, METRICS),
        ("backend", backend, ("auto", *BACKENDS)),
    ):
        if not isinstance(value, str) or value not in known:
            raise InputError(f"{name} must be one of {known}, got {value!r}")
    if alignment == "anchored" and metric != "cosine":
        raise InputError(
            f"metric must be 'cosine' for alignment 'anchored', got {metric!r}: decoupled_flow_loss is the squared error"
        )


def explain_images(
    images: torch.Tensor, *, dtype: torch.dtype | None = None, side: int = 1, backend: str = "auto"
) -> Choice:
    """Like `explain`, for `render`, `augment` and `render_augment` on ``images``, or on levels like them.

    dtype: of the result, if it isn't that of ``images``. side: largest side of an image or a view, in pixels.
    """
    if not isinstance(backend, str) or backend not in ("auto", *BACKENDS):
        raise InputError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    if not isinstance(images, torch.Tensor):
        raise InputError(f"images must be a tensor, got {type(images).__name__}")
    widest = torch.float64 if dtype == torch.float64 else images.dtype
    return choose(images.device.type, widest, backend, large=side > CUDA_PIXELS)


def choose(
    device: str,
    dtype: torch.dtype,
    backend: str,
    alignment: str = "",
    metric: str = "",
    grouped: bool = False,
    large: bool = False,
) -> Choice:
    """`explain` for names that are checked."""
    choice = _choice.__wrapped__ if torch.compiler.is_compiling() else _choice  # a cache can't be traced
    return choice(device, dtype, alignment, metric, backend, grouped, large)


@functools.lru_cache(maxsize=1024)
def _choice(
    device: str, dtype: torch.dtype, alignment: str, metric: str, backend: str, grouped: bool, large: bool
) -> Choice:
    call = f"{device}, {dtype}" + (f", alignment {alignment!r}, metric {metric!r}" if alignment else "")
    against = {name: _against(name, device, dtype, metric, grouped) for name in BACKENDS}
    if large and against["cuda"] is None:
        against["cuda"] = f"supports sides of at most {CUDA_PIXELS} pixels"
    able = [name for name in ("cpu", "cuda", "triton", "torch") if against[name] is None]
    # Triton's interpreter is for tests, so it only runs if it is requested by name.
    automatic = next(name for name in able if name != "triton" or device != "cpu")
    chosen = automatic if backend == "auto" else backend
    if against[chosen] is not None:
        raise InputError(
            f"backend={backend!r} can't run this call: {against[chosen]}; backend='auto' would use {automatic!r}"
        )
    reasons = {}
    for name in BACKENDS:
        passed_over = "another backend was requested" if backend != "auto" else f"{automatic!r} has priority here"
        reasons[name] = f"runs this call ({call})" if name == chosen else against[name] or passed_over
    return Choice(chosen, reasons)


def _against(name: str, device: str, dtype: torch.dtype, metric: str, grouped: bool) -> str | None:
    """Why backend ``name`` can't run a call, or None if it can."""
    if name == "torch":
        return None
    if name in library.problems:
        return library.problems[name]
    if name == "cpu" and device != "cpu":
        return f"runs on CPU tensors, not on {device}"
    if name == "cuda" and (device != "cuda" or torch.version.hip is not None):
        return f"runs on NVIDIA GPUs, not on {device if device != 'cuda' else 'AMD'}"
    if name == "triton" and device != "cuda" and not (device == "cpu" and library.triton_interpreter()):
        return f"runs on NVIDIA and AMD GPUs, not on {device} (except in tests, with TRITON_INTERPRET=1)"
    if dtype not in _KERNEL_DTYPES:
        return f"supports float32, bfloat16 and float16, not {dtype}"
    if grouped and metric == "mse":
        return "doesn't support the mean squared error with groups"
    return None
