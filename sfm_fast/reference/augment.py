"""Random views of images in plain torch: flip, affine crop, noise, normalise; replayable without stored randomness.

Source: arXiv 2511.16674 and 2602.05391. Every random number is counter-based (`philox`), keyed by seed, step and image,
so the view of an image doesn't depend on how a batch is split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import philox
from .philox import Stream

NOISE_MEAN, NOISE_STD, NOISE_PROBABILITY = 0.5, 0.2, 0.5
FLIP_PROBABILITY = 0.5
AREA = (0.08, 1.0)
LOG_ASPECT = (math.log(3 / 4), math.log(4 / 3))


@dataclass(frozen=True)
class Augmentation:
    """What a view may do. ``noise=False`` is the flip-and-crop of evaluation; area (min, max) as a fraction of the image."""

    min_area: float = AREA[0]
    max_area: float = AREA[1]
    flip: bool = True
    noise: bool = True


def view_parameters(
    items: Tensor, augmentation: Augmentation, *, seed: int, step: int, stream: int
) -> tuple[Tensor, Tensor]:
    """Affine maps (N, 2, 3) float32 and noise flags (N,) bool of the views of images ``items`` (N,) int64 at ``step``."""
    u = philox.uniform(items, 8, seed=seed, stream=stream, step=step)
    area = augmentation.min_area + (augmentation.max_area - augmentation.min_area) * u[:, 0]
    aspect = torch.exp(LOG_ASPECT[0] + (LOG_ASPECT[1] - LOG_ASPECT[0]) * u[:, 1])
    width, height = torch.sqrt(area * aspect), torch.sqrt(area / aspect)
    # The crop's centre keeps it inside the image; a side longer than the image overhangs, and reads zeros there.
    x, y = (1 - width) * (2 * u[:, 2] - 1), (1 - height) * (2 * u[:, 3] - 1)
    mirrored = (u[:, 4] < FLIP_PROBABILITY) & augmentation.flip
    zero = torch.zeros_like(width)
    theta = torch.stack([torch.where(mirrored, -width, width), zero, x, zero, height, y], dim=1).view(-1, 2, 3)
    noisy = (u[:, 5] < NOISE_PROBABILITY) & augmentation.noise
    return theta.float(), noisy


def augment(
    images: Tensor,
    items: Tensor,
    size: int,
    mean: Tensor,
    std: Tensor,
    *,
    seed: int,
    step: int,
    augmentation: Augmentation = Augmentation(),
    parameter_stream: int = Stream.AUGMENT_PARAMETERS,
    noise_stream: int = Stream.AUGMENT_NOISE,
) -> Tensor:
    """One view of every image, normalised for a backbone.

    Args:
        images: (N, channels, H, W) in 0..1; differentiable.
        items: (N,) int64 ids of the images, the counters of their random numbers. Two views of one image in one step
            need two ids.
        size: side of the views in pixels.
        mean, std: (backbone channels,) of the backbone; grey images are repeated to that many channels.
        seed, step: keys of the random numbers, with the two streams.

    Returns (N, backbone channels, size, size).
    """
    theta, noisy = view_parameters(items, augmentation, seed=seed, step=step, stream=parameter_stream)
    grid = F.affine_grid(theta.to(images.dtype), [len(images), images.shape[1], size, size], align_corners=False)
    views = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    chosen = noisy.nonzero().flatten()
    if len(chosen):
        shape = views.shape[1:]
        noise = philox.normal(items[chosen], shape.numel(), seed=seed, stream=noise_stream, step=step)
        views = views.index_add(0, chosen, (NOISE_MEAN + NOISE_STD * noise).view(-1, *shape).to(views.dtype))
    return normalize(views, mean, std)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std per channel; grey images are repeated to the backbone's channels."""
    if images.shape[1] == 1 and len(mean) > 1:
        images = images.expand(-1, len(mean), -1, -1)
    column = (1, -1, 1, 1)
    return (images - mean.to(images).view(column)) / std.to(images).view(column)
