"""Renders views directly from pyramid levels: `augment` of `render`, without images stored between forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..checks import check_indices, check_levels, check_side, check_view_dtype, check_views
from ..reference import augment as reference_augment
from ..reference import render as reference_render
from ..views import Views
from .augment import view_arguments
from .backends import explain_images
from .library import operation, register
from .render import choose, level_gradients, no_autocast, reference_gradients


def render_augment(
    levels: Sequence[Tensor],
    canvas: int,
    views: Views,
    *,
    rows: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """``augment(render(levels, canvas, rows=rows), views)``, fused: images exist only row by row (on a GPU: during the call).

    Arguments as in `render` and `augment`; ``canvas`` is the side of the images, ``views.size`` that of the views. The backward
    renders again instead of storing the images. With ``rows``, views are of the chosen images. Returns (V, backbone channels, size, size).
    """
    check_side("canvas", canvas)
    levels = check_levels(levels, canvas)
    check_view_dtype(dtype)
    if rows is not None:
        check_indices("rows", rows, len(levels[0]), levels[0].device)
    images = len(levels[0] if rows is None else rows)
    check_views(views, images, levels[0].shape[1], levels[0].device)
    chosen = choose(levels[0], dtype, max(canvas, views.size), backend)
    dtype = levels[0].dtype if dtype is None else dtype
    if chosen == "torch":
        return _plain(list(levels), rows, canvas, views).to(dtype)
    if torch.compiler.is_compiling():
        arguments = view_arguments(views)
        result: Tensor = operation(chosen, "render_augment")(list(levels), rows, canvas, *arguments, dtype)
    else:
        result = _RenderAugment.apply(chosen, rows, canvas, views, dtype, *levels)
    return result


def render_augment_backward(
    grad: Tensor, levels: Sequence[Tensor], canvas: int, views: Views, *, backend: str = "auto"
) -> Tensor:
    """Gradients of the levels as one tensor (M, channels * sum r_k^2), with an image's levels one after the other.

    The same as autograd of `render_augment` on these ``levels``, but without a graph, for steps that handle gradients themselves.
    """
    chosen = explain_images(levels[0], side=max(canvas, views.size), backend=backend).backend
    if chosen != "torch":
        flat: Tensor = operation(chosen, "render_augment_backward")(
            grad, list(levels), None, canvas, views.boxes, views.std
        )
        return flat
    with torch.enable_grad():
        leaves = [level.detach().requires_grad_() for level in levels]
        shown = _plain(leaves, None, canvas, views).to(grad.dtype)
        return torch.cat([part.flatten(1) for part in torch.autograd.grad(shown, leaves, grad)], dim=1)


def _plain(levels: list[Tensor], rows: Tensor | None, canvas: int, views: Views) -> Tensor:
    if rows is not None:
        levels = [level[rows] for level in levels]
    with no_autocast(levels[0].device):
        return reference_augment.augment(reference_render.render(levels, canvas), views)


def _backward(backend: str, saved: tuple[Tensor, ...], canvas: int, views: Views, grad: Tensor) -> list[Tensor | None]:
    boxes, std, rows, *levels = saved
    views = replace(views, boxes=boxes, std=std)
    if torch.is_grad_enabled():
        return reference_gradients(lambda tensors: _plain(tensors, rows, canvas, views).to(grad.dtype), levels, grad)
    flat = operation(backend, "render_augment_backward")(grad, levels, rows, canvas, views.boxes, views.std)
    return level_gradients(flat, levels, rows)


class _RenderAugment(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, rows: Tensor | None, canvas: int, views: Views, dtype: torch.dtype, *levels: Tensor
    ) -> Tensor:
        arguments = view_arguments(views)
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = operation(backend, "render_augment")(list(levels), rows, canvas, *arguments, dtype)
        ctx.backend, ctx.canvas, ctx.views = backend, canvas, views
        ctx.save_for_backward(views.boxes, views.std, rows, *levels)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *[None] * 5, *_backward(ctx.backend, ctx.saved_tensors, ctx.canvas, ctx.views, grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    levels, rows, ctx.canvas, boxes, _, _, _, std = inputs[:8]
    ctx.save_for_backward(boxes, std, rows, *levels)


def _registered_backward(backend: str, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    boxes, std, rows, *levels = ctx.saved_tensors
    flat = operation(backend, "render_augment_backward")(grad, levels, rows, ctx.canvas, boxes, std)
    return level_gradients(flat, levels, rows), *[None] * 13


# Memory for the images that the C++ operations render at once on a GPU; the same number as in csrc/kinds.h.
CANVAS_BYTES = 26 << 20


def _images_at_once(images: int | torch.SymInt, channels: int, canvas: int, canvases: int) -> Any:
    """Number of images rendered at a time by `render_augment` on CUDA with ``canvases`` canvases each: a multiple of 16 that fits."""
    fit = CANVAS_BYTES // (4 * canvases * channels * canvas * canvas)
    return torch.sym_min(images, fit // 16 * 16 if fit >= 16 else max(fit, 1))


def _count_images(levels: list[Tensor], rows: Tensor | None) -> int:
    return levels[0].shape[0] if rows is None else rows.shape[0]


def _fake(
    levels: list[Tensor],
    rows: Tensor | None,
    canvas: int,
    *views_and_dtype: Any,
    in_blocks: bool = True,
) -> Tensor:
    boxes, _, size, mean = views_and_dtype[:4]
    if (
        levels[0].device.type != "cpu"
    ):  # the GPU kernels use canvases as scratch memory, which predictions of memory must include
        count, channels = _count_images(levels, rows), levels[0].shape[1]
        levels[0].new_empty(
            (_images_at_once(count, channels, canvas, 1) if in_blocks else count, channels, canvas, canvas)
        )
    return levels[0].new_empty((boxes.shape[0], mean.shape[0], size, size), dtype=views_and_dtype[-1])


def _fake_backward(
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


def _all_at_once(fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake kernel for Triton, whose kernels render all images at once."""
    return functools.partial(fake, in_blocks=False)


register("render_augment", _fake, triton_fake=_all_at_once(_fake), setup=_setup_context, backward=_registered_backward)
register("render_augment_backward", _fake_backward, triton_fake=_all_at_once(_fake_backward))
