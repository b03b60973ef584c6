"""The synthetic images as parameters: a pyramid of levels, or plain pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import philox
from ..errors import InputError
from ..ops.render import render, split_levels
from ..reference.render import unrender
from .config import PARAMETRIZATIONS

_PICTURES_AT_ONCE = 64
_VALUES_AT_ONCE = 1 << 20  # drawing random numbers in plain torch takes some hundred bytes per number


def level_sizes(size: int, parametrization: str) -> list[int]:
    """Sides of all levels of a run: 1, 2, 4, … and finally ``size``; only ``size`` for "pixel"."""
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


def class_labels(classes: int, ipc: int, device: torch.device | str = "cpu") -> Tensor:
    """(classes * ipc,) int64, the labels of a run's images: those of a class lie together, so that a range of images has whole classes."""
    return torch.arange(classes, device=device).repeat_interleave(ipc)


def floats_per_image(channels: int, sizes: Sequence[int]) -> int:
    """Number of values in the levels of one image."""
    return channels * sum(side * side for side in sizes)


class SyntheticImages(nn.Module):
    """``num_images`` images of ``channels`` x ``size`` x ``size``, rendered from their live levels.

    Level k, of K live ones, starts as N(0, 1)/K; `grow` adds the next finer level and rescales the older ones by K/(K+1), so
    that the sum keeps its variance. Random numbers are keyed by seed, level and image. Source: arXiv 2511.16674.

    Each row of ``pyramid`` (num_images, floats) holds all levels of one image, one after the other, so a micro-batch, its gradient
    and its optimiser state are each one contiguous block. ``levels`` are views of it.
    """

    def __init__(
        self,
        num_images: int,
        channels: int,
        size: int,
        *,
        parametrization: str = "pyramid",
        seed: int = 0,
        device: torch.device | str = "cpu",
        pinned: bool = False,
    ) -> None:
        """``device``, ``pinned``: memory of the pyramid."""
        super().__init__()
        if num_images < 1 or channels not in (1, 3):
            raise InputError(f"images must be at least 1, with 1 or 3 channels, got {num_images} with {channels}")
        self.num_images, self.channels, self.size, self.seed = num_images, channels, size, seed
        self.sizes = level_sizes(size, parametrization)
        self.live, self.pinned = 0, pinned
        self.pyramid = nn.Parameter(torch.empty(num_images, 0, device=device), requires_grad=False)
        self.grow()

    @property
    def live_sizes(self) -> list[int]:
        return self.sizes[: self.live]

    @property
    def fully_grown(self) -> bool:
        return self.live == len(self.sizes)

    @property
    def levels(self) -> list[Tensor]:
        """The live levels, each a view (num_images, channels, side, side) of ``pyramid``."""
        return self.split(self.pyramid)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Rows of the pyramid's layout, as views of their levels."""
        return split_levels(flat, self.channels, self.live_sizes)

    @torch.no_grad()
    def grow(self) -> None:
        """Add the next level; does nothing if all are live. The optimiser's state is invalid afterwards."""
        if self.fully_grown:
            return
        live, side = self.live, self.sizes[self.live]
        before, added = self.pyramid.data, self.channels * side * side
        self.allocate(live + 1)
        torch.mul(before, live / (live + 1), out=self.pyramid.data[:, : before.shape[1]])
        at_once = max(1, _VALUES_AT_ONCE // added)
        for begin in range(0, self.num_images, at_once):
            end = min(begin + at_once, self.num_images)
            items = torch.arange(begin, end, device=before.device)
            values = philox.normal(items, added, seed=self.seed, stream=philox.Stream.INITIAL_IMAGES, step=live)
            torch.div(values, live + 1, out=self.pyramid.data[begin:end, before.shape[1] :])

    @torch.no_grad()
    def start_from(self, pictures: Tensor) -> None:
        """Make all levels live, with which the images look like ``pictures`` (num_images, channels, size, size) in 0..1, up to `unrender`'s margin.

        The level of full size holds them and the others are 0: updates by Adam depend on the gradient alone, not on how they are divided.
        """
        self.allocate(len(self.sizes))
        finest = self.channels * self.size**2
        for begin in range(0, self.num_images, _PICTURES_AT_ONCE):
            rows = self.pyramid.data[begin : begin + _PICTURES_AT_ONCE]
            part = unrender(pictures[begin : begin + _PICTURES_AT_ONCE]).flatten(1)
            rows[:, :-finest] = 0
            rows[:, -finest:] = part.to(rows.device)

    @torch.no_grad()
    def allocate(self, live: int) -> None:
        """Make the first ``live`` levels live with uninitialised values, to be filled by `grow`, from pictures or from a checkpoint."""
        floats = floats_per_image(self.channels, self.sizes[:live])
        self.pyramid.data = torch.empty(self.num_images, floats, device=self.pyramid.device, pin_memory=self.pinned)
        self.live = live

    @torch.no_grad()
    def pictures(self, pyramid: Tensor | None = None, at_once: int = _PICTURES_AT_ONCE) -> Tensor:
        """All images, (num_images, channels, size, size) in 0..1 in host memory, rendered a few at a time.

        ``pyramid``: rendered instead of the images' own pyramid; of the same shape.
        """
        rows = self.pyramid.data if pyramid is None else pyramid
        parts = [render(self.split(block), self.size).cpu() for block in rows.split(at_once)]
        return torch.cat(parts)
