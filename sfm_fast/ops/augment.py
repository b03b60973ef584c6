"""Views of images (crop, flip, noise, normalisation) in one pass on a compiled backend, and the gradient to the images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..checks import check_images, check_view_dtype, check_views
from ..reference import augment as reference
from ..views import Views
from .library import operation, register
from .render import choose, no_autocast


def augment(images: Tensor, views: Views, *, dtype: torch.dtype | None = None, backend: str = "auto") -> Tensor:
    """Views of images, normalised for a backbone; `sfm_fast.draw_views` draws random ones.

    Args:
        images: (M, channels, H, W) in 0..1, float32, bfloat16, float16 (float64 runs in plain torch); differentiable.
        views: V = A * M views; view v shows image v % M.
        dtype: of the result: float32, bfloat16 or float16; None: that of the images.
        backend: "auto", "torch", "cpu", "triton" or "cuda".

    Returns (V, backbone channels, size, size). The noise depends only on ``views``: it is the same on every backend up to rounding
    and with any batch split, and it isn't stored. Every run gives the same bits. Raises ``InputError`` if an argument has another form.
    """
    check_images(images)
    check_views(views, len(images), images.shape[1], images.device)
    check_view_dtype(dtype)
    chosen = choose(images, dtype, views.size, backend)
    dtype = images.dtype if dtype is None else dtype
    if chosen == "torch":
        with no_autocast(images.device):
            return reference.augment(images, views, dtype)
    if torch.compiler.is_compiling():
        result: Tensor = operation(chosen, "augment")(images, *view_arguments(views), dtype)
    else:
        result = _Augment.apply(chosen, views, dtype, images)
    return result


def view_arguments(views: Views) -> tuple[Any, ...]:
    """The operations' arguments for ``views``, between the images and the dtype."""
    seed = views.seed - (1 << 64) if views.seed >= 1 << 63 else views.seed  # the operations' integers are signed
    return (
        views.boxes, views.noise_items, views.size, views.mean, views.std, views.noise_mean, views.noise_std, seed,
        views.step, int(views.stream),
    )  # fmt: skip


class _Adjoint(torch.autograd.Function):
    """The gradient to the images; it is linear in ``grad``, so its derivative is `augment` without mean and noise."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, views: Views, shape: tuple[int, ...], dtype: torch.dtype, grad: Tensor
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = operation(backend, "augment_backward")(grad, views.boxes, views.std, *shape, dtype)
        ctx.backend, ctx.views, ctx.dtype = backend, views, grad.dtype
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        views = ctx.views
        unshifted = replace(
            views, noise_items=torch.full_like(views.noise_items, -1), mean=torch.zeros_like(views.mean)
        )
        return None, None, None, None, _Augment.apply(ctx.backend, unshifted, ctx.dtype, grad)


class _Augment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, views: Views, dtype: torch.dtype, images: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = operation(backend, "augment")(images, *view_arguments(views), dtype)
        ctx.constants = backend, views, tuple(images.shape), images.dtype
        ctx.save_for_backward(views.boxes, views.std)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (boxes, std), (backend, views, shape, dtype) = ctx.saved_tensors, ctx.constants
        return None, None, None, _Adjoint.apply(backend, replace(views, boxes=boxes, std=std), shape, dtype, grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, boxes, _, _, _, std = inputs[:6]
    ctx.shape, ctx.dtype = tuple(images.shape), images.dtype
    ctx.save_for_backward(boxes, std)


def _registered_backward(backend: str, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    result = operation(backend, "augment_backward")(grad, *ctx.saved_tensors, *ctx.shape, ctx.dtype)
    return result, *[None] * 11


def _fake(
    images: Tensor, boxes: Tensor, noise_items: Tensor, size: int, mean: Tensor, std: Tensor, *rest: Any
) -> Tensor:
    return images.new_empty((boxes.shape[0], mean.shape[0], size, size), dtype=rest[-1])


def _fake_backward(
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


register("augment", _fake, setup=_setup_context, backward=_registered_backward)
register("augment_backward", _fake_backward)
