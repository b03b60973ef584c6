"""Renders images from pyramid levels in plain torch: bilinear sum over levels, colour decorrelation, sigmoid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Colour correlation of natural images as used for feature visualisation, before division by its largest column norm.
_CORRELATION = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))


_LARGEST_NORM = max(math.sqrt(sum(row[c] ** 2 for row in _CORRELATION)) for c in range(3))
COLOR = tuple(tuple(value / _LARGEST_NORM for value in row) for row in _CORRELATION)


def color_matrix(dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """The fixed 3x3 colour decorrelation D, divided by its largest column norm."""
    return torch.tensor(COLOR, dtype=dtype, device=device)


def render(levels: Sequence[Tensor], size: int) -> Tensor:
    """sigmoid(2 * D(sum_k bilinear(level_k -> size))): levels (N, channels, r_k, r_k) -> (N, channels, size, size) in 0..1.

    ``align_corners=False``; D is applied to 3 channels, and left out for grey images.
    Source: arXiv 2511.16674 and 2602.05391.
    """
    total: Tensor = sum(
        (
            level
            if level.shape[-1] == size
            else F.interpolate(level, (size, size), mode="bilinear", align_corners=False)
            for level in levels
        ),
        start=torch.zeros((), dtype=levels[0].dtype, device=levels[0].device),
    )
    if total.shape[1] == 3:
        # Sums instead of a matrix product, which autocast would compute in low precision, also in a backward pass.
        red, green, blue = total.unbind(1)
        total = torch.stack([r * red + g * green + b * blue for r, g, b in COLOR], dim=1)
    return torch.sigmoid(2 * total)


def unrender(images: Tensor, margin: float = 0.02) -> Tensor:
    """The level of full size, (N, channels, S, S), that `render` shows as ``images`` (N, channels, S, S), whose values are in 0..1.

    Values within ``margin`` of 0 or 1 are moved there: black and white themselves have no level, and near them the gradient vanishes.
    """
    total = torch.logit(images.clamp(margin, 1 - margin)) / 2
    if total.shape[1] == 3:
        inverse = torch.linalg.inv(color_matrix(torch.float64)).to(total)
        total = torch.einsum("ij,njhw->nihw", inverse, total)
    return total
