"""The synthetic images as parameters: a pyramid of levels, or plain pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..reference import philox
from ..reference.render import render

PARAMETRIZATIONS = ("pyramid", "pixel")


def level_sizes(size: int, parametrization: str) -> list[int]:
    """Sides of all levels a run will come to: 1, 2, 4, … and last ``size`` itself, or ``size`` alone for "pixel"."""
    if parametrization not in PARAMETRIZATIONS:
        raise InputError(f"parametrization must be one of {PARAMETRIZATIONS}, got {parametrization!r}")
    if size < 1:
        raise InputError(f"size must be at least 1 pixel, got {size}")
    if parametrization == "pixel":
        return [size]
    sizes = [1]
    while sizes[-1] < size:
        sizes.append(min(2 * sizes[-1], size))
    return sizes


class SyntheticImages(nn.Module):
    """``num_images`` images of ``channels`` x ``size`` x ``size``, rendered from their live levels.

    Level k, of K live ones, starts as N(0, 1)/K; `grow` adds the next finer level and rescales the older by K/(K+1), so
    that the sum keeps its variance. Random numbers are keyed by seed, level and image. Source: arXiv 2511.16674.
    """

    def __init__(
        self, num_images: int, channels: int, size: int, *, parametrization: str = "pyramid", seed: int = 0
    ) -> None:
        super().__init__()
        if num_images < 1 or channels not in (1, 3):
            raise InputError(f"wanted at least 1 image of 1 or 3 channels, got {num_images} of {channels}")
        self.num_images, self.channels, self.size, self.seed = num_images, channels, size, seed
        self.sizes = level_sizes(size, parametrization)
        self.levels = nn.ParameterList()
        self.grow()

    @property
    def fully_grown(self) -> bool:
        return len(self.levels) == len(self.sizes)

    @torch.no_grad()
    def grow(self) -> None:
        """Add the next level; no-op where all are live. Optimiser state of the old levels is void afterwards."""
        if self.fully_grown:
            return
        live = len(self.levels)
        for level in self.levels:
            level.mul_(live / (live + 1))
        device = self.levels[0].device if live else None
        side = self.sizes[live]
        items = torch.arange(self.num_images, device=device)
        values = philox.normal(
            items, self.channels * side * side, seed=self.seed, stream=philox.Stream.INITIAL_IMAGES, step=live
        )
        self.levels.append(nn.Parameter(values.view(self.num_images, self.channels, side, side) / (live + 1)))

    def forward(self) -> Tensor:
        """All images, (num_images, channels, size, size) in 0..1."""
        return render(list(self.levels), self.size)
