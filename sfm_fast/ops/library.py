"""Finds and loads the compiled libraries, and registers the operations: schemas, fake kernels, the Triton backend.

``sfm_fast::NAME`` is the C++ operation (CPU, and CUDA from its own library); ``sfm_fast::triton_NAME`` the same in Triton.
A library that wasn't built is passed over in silence (`sfm_fast.explain` says so); one that won't load warns once. They lie
beside the package's files, or in the folder that SFM_FAST_LIBRARIES names.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..reference.flow_alignment import CLASS
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


def _fake_class_means(features: Tensor, order: Tensor | None, offsets: Tensor | None, shift: Tensor) -> Tensor:
    classes = features.shape[0] if offsets is None else offsets.shape[0] - 1
    return shift.new_empty((classes, features.shape[1]))


def _fake_class_means_backward(
    grad: Tensor, order: Tensor | None, offsets: Tensor | None, num_items: int, dtype: torch.dtype
) -> Tensor:
    return grad.new_empty((num_items, grad.shape[1]), dtype=dtype)


def _fake_flow_alignment(
    features: Tensor,
    order: Tensor | None,
    offsets: Tensor | None,
    centers: Tensor,
    shift: Tensor,
    kind: int,
    eps: float,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = centers.shape[0] if kind == CLASS else 1
    return centers.new_empty(()), centers.new_empty((2, rows)), centers.new_empty((2, centers.shape[1]))


def _fake_flow_alignment_backward(
    grad_output: Tensor,
    features: Tensor,
    order: Tensor | None,
    offsets: Tensor | None,
    centers: Tensor,
    shift: Tensor,
    rows: Tensor,
    columns: Tensor,
) -> Tensor:
    return features.new_empty(features.shape)


def _fake_pair_alignment(
    a: Tensor,
    b: Tensor,
    groups: Tensor | None,
    row_start: int,
    row_stop: int,
    eps: float,
    need_gradient: bool,
    high: bool,
) -> tuple[Tensor, Tensor]:
    rows = row_stop - row_start if need_gradient else 0
    return a.new_empty((), dtype=torch.float64), a.new_empty((rows, a.shape[1]))


def _fake_render(levels: list[Tensor], rows: Tensor | None, size: int, dtype: torch.dtype) -> Tensor:
    images = levels[0].shape[0] if rows is None else rows.shape[0]
    return levels[0].new_empty((images, levels[0].shape[1], size, size), dtype=dtype)


def _fake_render_backward(grad: Tensor, images: Tensor, sides: list[int]) -> Tensor:
    floats = images.shape[1] * sum(side * side for side in sides)
    return grad.new_empty((images.shape[0], floats), dtype=torch.float32)


def _fake_augment(
    images: Tensor, boxes: Tensor, noise_items: Tensor, size: int, mean: Tensor, std: Tensor, *rest: Any
) -> Tensor:
    return images.new_empty((boxes.shape[0], mean.shape[0], size, size), dtype=rest[-1])


def _fake_augment_backward(
    grad: Tensor,
    boxes: Tensor,
    std: Tensor,
    images: int,
    channels: int,
    height: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    return grad.new_empty((images, channels, height, width), dtype=dtype)


# Of the images that the C++ operations render at once on a GPU; csrc/cuda/render_augment.cu has the same number.
CANVAS_BYTES = 26 << 20


def _images_at_once(images: int | torch.SymInt, channels: int, canvas: int, canvases: int) -> Any:
    """How many images have a canvas (or ``canvases``) at a time in `render_augment` on CUDA: what fits, by sixteens."""
    fit = CANVAS_BYTES // (4 * canvases * channels * canvas * canvas)
    return torch.sym_min(images, fit // 16 * 16 if fit >= 16 else max(fit, 1))


def _count_images(levels: list[Tensor], rows: Tensor | None) -> int:
    return levels[0].shape[0] if rows is None else rows.shape[0]


def _fake_render_augment(
    levels: list[Tensor],
    rows: Tensor | None,
    canvas: int,
    boxes: Tensor,
    noise_items: Tensor,
    size: int,
    mean: Tensor,
    std: Tensor,
    *rest: Any,
    in_blocks: bool = True,
) -> Tensor:
    if levels[0].device.type != "cpu":  # a GPU's kernels take canvases as scratch: whoever counts memory must see it
        count, channels = _count_images(levels, rows), levels[0].shape[1]
        levels[0].new_empty(
            (_images_at_once(count, channels, canvas, 1) if in_blocks else count, channels, canvas, canvas)
        )
    return levels[0].new_empty((boxes.shape[0], mean.shape[0], size, size), dtype=rest[-1])


def _fake_render_augment_backward(
    grad: Tensor,
    levels: list[Tensor],
    rows: Tensor | None,
    canvas: int,
    boxes: Tensor,
    std: Tensor,
    *,
    in_blocks: bool = True,
) -> Tensor:
    count, channels = _count_images(levels, rows), levels[0].shape[1]
    floats = channels * sum(level.shape[-1] ** 2 for level in levels)
    gradient = grad.new_empty((count, floats), dtype=torch.float32)
    if levels[0].device.type != "cpu":
        at_once = _images_at_once(count, channels, canvas, 2) if in_blocks else count
        grad.new_empty((2, at_once, channels, canvas, canvas), dtype=torch.float32)
    return gradient


_FAKES: dict[str, Callable[..., Any]] = {
    "class_means": _fake_class_means,
    "class_means_backward": _fake_class_means_backward,
    "flow_alignment": _fake_flow_alignment,
    "flow_alignment_backward": _fake_flow_alignment_backward,
    "pair_alignment": _fake_pair_alignment,
    "render": _fake_render,
    "render_backward": _fake_render_backward,
    "augment": _fake_augment,
    "augment_backward": _fake_augment_backward,
    "render_augment": _fake_render_augment,
    "render_augment_backward": _fake_render_augment_backward,
}

_load_all()


def operation(backend: str, name: str) -> Any:
    """The overload of ``name`` that ``backend`` ("cpu", "cuda" or "triton") runs."""
    full = f"triton_{name}" if backend == "triton" else name
    return getattr(torch.ops.sfm_fast, full).default


def registered() -> list[tuple[str, str]]:
    """(name, qualified name) of every operation that exists here, C++ and Triton."""
    prefixes = [*([] if "cpu" in problems else [""]), *([] if "triton" in problems else ["triton_"])]
    return [(name, f"sfm_fast::{prefix}{name}") for prefix in prefixes for name in SCHEMAS]


for _name, _qualified in registered():
    _fake = _FAKES[_name]
    if "triton_render_augment" in _qualified:  # all canvases at once
        _fake = functools.partial(_fake, in_blocks=False)
    torch.library.register_fake(_qualified, _fake, lib=_fragment)
