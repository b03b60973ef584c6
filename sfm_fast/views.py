"""Draws random views of images for a step (flip, crop, noise), which can be replayed without stored random numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import philox
from .errors import InputError
from .philox import Stream
from .settings import Augmentation as Augmentation

NOISE_MEAN, NOISE_STD, NOISE_PROBABILITY = 0.5, 0.2, 0.5


FLIP_PROBABILITY = 0.5


LOG_ASPECT = (math.log(3 / 4), math.log(4 / 3))


@dataclass(frozen=True)
class Views:
    """V = A * M views of M images; view v shows image v % M.

    boxes: (V, 4) float32, (x0, dx, y0, dy): column j of a view shows the image at column x0 + j * dx, row i at row
        y0 + i * dy, in pixels, where 0 is the centre of the first pixel. dx < 0 mirrors; outside the image is zero. A box that
        isn't finite shows zeros (in plain torch: nan).
    noise_items: (V,) int64, the counter of a view's noise (below 2**32), or negative for no noise.
    size: side of the views in pixels.
    mean, std: (channels,) float32 of the backbone; grey images are repeated to that number of channels.
    seed, step, stream: keys of the noise. noise_mean, noise_std: its mean and standard deviation.
    """

    boxes: Tensor
    noise_items: Tensor
    size: int
    mean: Tensor
    std: Tensor
    seed: int = 0
    step: int = 0
    stream: int = Stream.AUGMENT_NOISE
    noise_mean: float = NOISE_MEAN
    noise_std: float = NOISE_STD

    def select(self, chosen: Tensor | slice) -> Views:
        """Some of the views, which must again be the same number for each image."""
        return replace(self, boxes=self.boxes[chosen], noise_items=self.noise_items[chosen])


def draw_views(
    items: Tensor,
    image_size: int | tuple[int, int],
    size: int,
    mean: Tensor,
    std: Tensor,
    *,
    seed: int,
    step: int,
    augmentation: Augmentation = Augmentation(),
    streams: tuple[int, int] = (Stream.AUGMENT_PARAMETERS, Stream.AUGMENT_NOISE),
) -> Views:
    """The random views at ``step`` of images whose side, or (height, width), is ``image_size``.

    items: (V,) int64 ids below 2**32, the counters of the views' random numbers; two views of one image in one step need different
        ids. View v belongs to image v % M: for A views of M images, use ``torch.arange(A * M)``.
    size: side of the views in pixels. mean, std: (channels,) of the backbone. seed in [0, 2**64), step in [0, 2**32).
    streams: for the random numbers of boxes and noise; different ones of `philox.Stream` are independent.

    Raises ``InputError`` if an argument has another form.
    """
    if not isinstance(items, Tensor) or items.dtype != torch.int64 or items.ndim != 1:
        raise InputError(f"items must be a 1-D int64 tensor, got {getattr(items, 'dtype', type(items).__name__)}")
    if not isinstance(image_size, tuple):
        image_size = (image_size, image_size)
    if not all(isinstance(side, (int, torch.SymInt)) and side >= 1 for side in (size, *image_size)):
        raise InputError(
            f"size and image_size must be whole numbers of pixels, at least 1, got {size} and {image_size}"
        )
    if not 0 <= step < 2**32 or not 0 <= seed < 2**64:
        raise InputError(f"step must be in [0, 2**32) and seed in [0, 2**64), got {step} and {seed}")
    u = philox.uniform(items, 8, seed=seed, stream=streams[0], step=step)
    area = augmentation.min_area + (augmentation.max_area - augmentation.min_area) * u[:, 0]
    aspect = torch.exp(LOG_ASPECT[0] + (LOG_ASPECT[1] - LOG_ASPECT[0]) * u[:, 1])
    width, height = torch.sqrt(area * aspect), torch.sqrt(area / aspect)
    # The centre is drawn so that the crop is inside the image; a side longer than the image extends beyond it and shows zeros there.
    x, y = (1 - width) * (2 * u[:, 2] - 1), (1 - height) * (2 * u[:, 3] - 1)
    mirrored = (u[:, 4] < FLIP_PROBABILITY) & augmentation.flip
    width = torch.where(mirrored, -width, width)
    noisy = (u[:, 5] < NOISE_PROBABILITY) & augmentation.noise
    boxes = torch.stack(
        [*_pixels(width, x, image_size[1], size), *_pixels(height, y, image_size[0], size)], dim=1
    ).float()
    noise_items = torch.where(noisy, items, -1)
    return Views(boxes, noise_items, size, mean, std, seed, step, streams[1])


def _pixels(scale: Tensor, center: Tensor, source: int, size: int) -> tuple[Tensor, Tensor]:
    """(origin, step) in pixels of x = scale * u + center, both in -1..1 (align_corners=False), for ``size`` samples u."""
    step = scale * (source / size)
    return ((center + 1) * source - 1) / 2 + step * (1 - size) / 2, step
