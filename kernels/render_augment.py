"""Rendering and views in one operation: the canvas is not kept, and the backward renders it again."""

import torch
from torch import Tensor

from .augment import augment, augment_backward
from .render import render, render_backward


def render_augment(
    levels: list[Tensor],
    rows: Tensor | None,
    canvas: int,
    boxes: Tensor,
    noise_items: Tensor,
    size: int,
    mean: Tensor,
    std: Tensor,
    noise_mean: float,
    noise_std: float,
    seed: int,
    step: int,
    stream: int,
    dtype: torch.dtype,
) -> Tensor:
    """``augment`` applied to ``render`` with ``canvas`` pixels in float32."""
    images = render(levels, rows, canvas, torch.float32)
    return augment(images, boxes, noise_items, size, mean, std, noise_mean, noise_std, seed, step, stream, dtype)


def render_augment_backward(
    grad: Tensor, levels: list[Tensor], rows: Tensor | None, canvas: int, boxes: Tensor, std: Tensor
) -> Tensor:
    """Gradient (M, c sum_k r_k^2) float32 of the levels of the rendered images."""
    images = render(levels, rows, canvas, torch.float32)
    count, channels, height, width = images.shape
    gradient = augment_backward(grad, boxes, std, count, channels, height, width, torch.float32)
    return render_backward(gradient, images, [level.shape[-1] for level in levels])
