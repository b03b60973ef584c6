"""The image path without this package: levels upsampled one by one and added, views by grid_sample, noise by randn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sfm_fast.reference.render import color_matrix
from sfm_fast.views import Views


def render(levels: Sequence[Tensor], size: int) -> Tensor:
    """Adds up every level at full size, then multiplies the channels by a matrix. (The methods' public code stacks and
    sums the levels, which takes a third more time and three times the memory.)"""
    total = F.interpolate(levels[0], (size, size), mode="bilinear")
    for level in levels[1:]:
        total = total + F.interpolate(level, (size, size), mode="bilinear")
    images, channels = total.shape[:2]
    if channels == 3:
        pixels = total.permute(0, 2, 3, 1).reshape(-1, 3) @ color_matrix(total.dtype, total.device).T
        total = pixels.reshape(images, size, size, 3).permute(0, 3, 1, 2)
    return torch.sigmoid(2 * total)


def augment(images: Tensor, views: Views) -> Tensor:
    """Flip, crop, noise, normalise, one operation after the other; the noise is torch's, and masks are stored for the backward."""
    size, (height, width) = views.size, images.shape[-2:]
    x0, dx, y0, dy = views.boxes.unbind(1)
    mirrored = dx < 0
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    x0, dx = torch.where(mirrored, width - 1 - x0, x0), dx.abs()
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 0, 2] = dx * size / width, (2 * x0 + dx * (size - 1) + 1) / width - 1
    theta[:, 1, 1], theta[:, 1, 2] = dy * size / height, (2 * y0 + dy * (size - 1) + 1) / height - 1
    grid = F.affine_grid(theta, [len(images), images.shape[1], size, size], align_corners=False)
    shown = F.grid_sample(images, grid, align_corners=False)
    noisy = (views.noise_items >= 0).float().view(-1, 1, 1, 1)
    shown = shown + noisy * (views.noise_mean + views.noise_std * torch.randn_like(shown))
    return (shown - views.mean.view(1, -1, 1, 1)) / views.std.view(1, -1, 1, 1)


def render_augment(levels: Sequence[Tensor], size: int, views: Views) -> Tensor:
    return augment(render(levels, size), views)
