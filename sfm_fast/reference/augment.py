"""Random views of images in plain torch: flip, crop, noise and normalisation, replayable without stored random numbers.

Source: arXiv 2511.16674 and 2602.05391. Random numbers are counter-based (`philox`), keyed by seed, step and image, so the
view of an image doesn't depend on how a batch is split.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import philox
from ..views import Views
from .sampling import sample


def augment(images: Tensor, views: Views, dtype: torch.dtype | None = None) -> Tensor:
    """The views, normalised for a backbone: images (M, channels, H, W) in 0..1 -> (V, backbone channels, size, size).

    Differentiable in ``images``. Computes in float32 (float64 for float64 images) and rounds once at the end, to ``dtype`` or that of
    the images: 16-bit positions would be off by pixels, and torch's sampling in 16 bits gives NaN next to some edges.
    """
    dtype = images.dtype if dtype is None else dtype
    images = images.to(torch.float64 if images.dtype == torch.float64 else torch.float32)
    height, width = images.shape[-2:]
    if not len(views.boxes):  # affine_grid doesn't accept empty batches
        return normalize(images[:0, :, :1, :1].expand(-1, -1, views.size, views.size), views.mean, views.std).to(dtype)
    if len(images) != len(views.boxes):
        images = images.repeat(len(views.boxes) // len(images), 1, 1, 1)
    x0, dx, y0, dy = views.boxes.double().unbind(1)
    zero, size = torch.zeros_like(x0), views.size
    # To grid_sample's coordinates -1..1, in float64 and rounded once, so that the grid is as accurate as the dtype allows.
    theta = torch.stack(
        [
            dx * size / width, zero, (2 * x0 + dx * (size - 1) + 1) / width - 1,
            zero, dy * size / height, (2 * y0 + dy * (size - 1) + 1) / height - 1,
        ],
        dim=1,
    ).view(-1, 2, 3).to(images.dtype)  # fmt: skip
    grid = F.affine_grid(theta, [len(images), images.shape[1], size, size], align_corners=False)
    shown = sample(images, grid)
    chosen = (views.noise_items >= 0).nonzero().flatten()
    if len(chosen):
        shape = shown.shape[1:]
        noise = philox.normal(
            views.noise_items[chosen], shape.numel(), seed=views.seed, stream=views.stream, step=views.step
        )
        noise = views.noise_mean + views.noise_std * noise
        shown = shown.index_add(0, chosen, noise.view(-1, *shape).to(shown.dtype))
    return normalize(shown, views.mean, views.std).to(dtype)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std per channel; grey images are repeated to the backbone's channels."""
    if images.shape[1] == 1 and len(mean) > 1:
        images = images.expand(-1, len(mean), -1, -1)
    column = (1, -1, 1, 1)
    return (images - mean.to(images).view(column)) / std.to(images).view(column)
