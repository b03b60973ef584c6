"""Renders images from pyramid levels in one pass on a compiled backend, and computes the gradient of all levels in another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_indices, check_levels, check_side, check_view_dtype
from ..reference import render as reference
from .backends import explain_images
from .library import operation, register


def render(
    levels: Sequence[Tensor],
    size: int,
    *,
    rows: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """sigmoid(2 * D(sum_k bilinear(level_k -> size))): images in 0..1 from pyramid levels.

    Args:
        levels: K tensors (N, channels, r_k, r_k) float32 (float64 runs in plain torch), 1 or 3 channels, r_k <= size; slices
            ``level[i:j]`` and views of one larger buffer are read in place. Differentiable.
        size: side of the images in pixels.
        rows: (M,) int64 indices of the images, in any order; None: all. The other images get zero gradients.
        dtype: of the images: float32, bfloat16 or float16; None: that of the levels.
        backend: "auto", "torch", "cpu", "triton" or "cuda".

    Returns (M, channels, size, size). D is the fixed colour decorrelation, left out for grey images. No image-sized temporary is
    stored per level. Every run gives the same bits. The backward reads the rendered images, so pixels that round to 0 or 1 in
    bfloat16 or float16 get gradient 0 (`render_augment` renders again in float32). Raises ``InputError`` if an argument has another
    form. Source: arXiv 2511.16674.
    """
    check_side("size", size)
    levels = check_levels(levels, size)
    check_view_dtype(dtype)
    if rows is not None:
        check_indices("rows", rows, len(levels[0]), levels[0].device)
    chosen = choose(levels[0], dtype, size, backend)
    dtype = levels[0].dtype if dtype is None else dtype
    if chosen == "torch":
        with no_autocast(levels[0].device):
            return reference.render(levels if rows is None else [level[rows] for level in levels], size).to(dtype)
    if torch.compiler.is_compiling():
        images: Tensor = operation(chosen, "render")(list(levels), rows, size, dtype)
    else:
        images = _Render.apply(chosen, rows, size, dtype, *levels)
    return images


def choose(images: Tensor, dtype: torch.dtype | None, side: int, backend: str) -> str:
    """The backend of a call; plain torch inside torch.func's transforms, which the kernels don't support."""
    chosen = explain_images(images, dtype=dtype, side=side, backend=backend).backend
    return "torch" if torch._C._are_functorch_transforms_active() else chosen


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context that disables autocast, which would compute in low precision."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def split_levels(flat: Tensor, channels: int, sides: Sequence[int]) -> list[Tensor]:
    """Views (M, channels, r_k, r_k) of (M, channels * sum r_k^2), whose rows hold an image's levels one after the other."""
    parts = flat.split([channels * side * side for side in sides], dim=1)
    return [part.unflatten(1, (channels, side, side)) for part, side in zip(parts, sides, strict=True)]


def level_gradients(flat: Tensor, levels: Sequence[Tensor], rows: Tensor | None) -> list[Tensor | None]:
    """The gradients of the levels for autograd, from the flat gradient of the chosen images."""
    parts = split_levels(flat, levels[0].shape[1], [level.shape[-1] for level in levels])
    if rows is None:
        return [*parts]
    return [torch.zeros_like(level).index_add_(0, rows, part) for level, part in zip(levels, parts, strict=True)]


def reference_gradients(
    images: Callable[[list[Tensor]], Tensor], levels: Sequence[Tensor], grad: Tensor
) -> list[Tensor | None]:
    """Gradients through plain torch, which can be differentiated again (create_graph=True)."""
    wanted = [level for level in levels if level.requires_grad]
    gradients = iter(torch.autograd.grad(images(list(levels)), wanted, grad, create_graph=True))
    return [next(gradients) if level.requires_grad else None for level in levels]


def _backward(backend: str, saved: tuple[Tensor, ...], size: int, grad: Tensor) -> list[Tensor | None]:
    images, rows, *levels = saved
    if torch.is_grad_enabled():
        return reference_gradients(
            lambda tensors: reference.render(tensors if rows is None else [level[rows] for level in tensors], size).to(
                images.dtype
            ),
            levels,
            grad,
        )
    flat = operation(backend, "render_backward")(grad, images, [level.shape[-1] for level in levels])
    return level_gradients(flat, levels, rows)


class _Render(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, rows: Tensor | None, size: int, dtype: torch.dtype, *levels: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            images: Tensor = operation(backend, "render")(list(levels), rows, size, dtype)
        ctx.backend, ctx.size = backend, size
        ctx.save_for_backward(images, rows, *levels)
        return images

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *_backward(ctx.backend, ctx.saved_tensors, ctx.size, grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    levels, rows, ctx.size, _ = inputs
    ctx.save_for_backward(output, rows, *levels)


def _registered_backward(backend: str, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _backward(backend, ctx.saved_tensors, ctx.size, grad), None, None, None


def _fake(levels: list[Tensor], rows: Tensor | None, size: int, dtype: torch.dtype) -> Tensor:
    images = levels[0].shape[0] if rows is None else rows.shape[0]
    return levels[0].new_empty((images, levels[0].shape[1], size, size), dtype=dtype)


def _fake_backward(grad: Tensor, images: Tensor, sides: list[int]) -> Tensor:
    floats = images.shape[1] * sum(side * side for side in sides)
    return grad.new_empty((images.shape[0], floats), dtype=torch.float32)


register("render", _fake, setup=_setup_context, backward=_registered_backward)
register("render_backward", _fake_backward)
