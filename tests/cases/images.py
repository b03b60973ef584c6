"""The registry of inputs that tests and benchmarks of the image operations share: pyramids, canvases and views of every kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfm_fast.ops.render import split_levels
from sfm_fast.reference.render import render
from sfm_fast.views import Views

# (origin, step) along one axis of a source of ``side`` pixels for a view of ``size``.
AXES: dict[str, Callable[[int, int], tuple[float, float]]] = {
    "whole": lambda side, size: ((side / size - 1) / 2, side / size),
    "crop": lambda side, size: (0.2 * side + 0.37, 0.5 * side / size),
    "mirrored": lambda side, size: (0.9 * side - 0.6, -0.7 * side / size),
    "overhanging": lambda side, size: (-0.3 * side - 0.4, 1.6 * side / size),
    "zoomed": lambda side, size: (0.4 * side, 0.05),
    "reduced": lambda side, size: (0.3, 4.0),
    "constant": lambda side, size: (0.37 * side, 0.0),
    "right-of-it": lambda side, size: (1e9, 1.0),
    "left-of-it": lambda side, size: (-1e30, -2.0),
    "touching": lambda side, size: (-float(size), 1.0),  # ends at -1, where the weight is zero
}


def make_boxes(kinds: Sequence[str], count: int, height: int, width: int, size: int) -> Tensor:
    """(count, 4) boxes whose kinds, an axis "crop" or two "crop/zoomed" (columns, rows), take turns."""
    rows = []
    for v in range(count):
        columns, _, vertical = kinds[v % len(kinds)].partition("/")
        rows.append([*AXES[columns](width, size), *AXES[vertical or columns](height, size)])
    return torch.tensor(rows, dtype=torch.float32).view(count, 4)


def make_views(
    kinds: Sequence[str], count: int, height: int, width: int, size: int, channels: int, noise: bool = True
) -> Views:
    """Views with noise in every other one."""
    items = torch.arange(count) * 1_000_003 + 5
    items[1::2] = -1
    return Views(
        make_boxes(kinds, count, height, width, size),
        items if noise else torch.full_like(items, -1),
        size,
        mean=torch.linspace(0.3, 0.6, channels),
        std=torch.linspace(0.2, 0.4, channels),
        seed=2**63 + 11,
        step=2**32 - 2,
    )


@dataclass(frozen=True)
class ImageInputs:
    """Arguments of `render` and `render_augment`; ``images`` are the rendered ones, for `augment`."""

    levels: list[Tensor]
    rows: Tensor | None
    canvas: int
    views: Views

    @property
    def images(self) -> Tensor:
        return render([level if self.rows is None else level[self.rows] for level in self.levels], self.canvas)


def plain_levels(flat: Tensor, channels: int, sides: Sequence[int]) -> list[Tensor]:
    return [level.contiguous() for level in split_levels(flat, channels, sides)]


def _slices(flat: Tensor, channels: int, sides: Sequence[int]) -> list[Tensor]:
    nan = torch.full((2, flat.shape[1]), float("nan"))
    return [level[2:-2] for level in plain_levels(torch.cat([nan, flat, nan]), channels, sides)]


def _strided(flat: Tensor, channels: int, sides: Sequence[int]) -> list[Tensor]:
    """Every other pixel of something larger, and rows and columns exchanged in memory."""
    strided = []
    for level in plain_levels(flat, channels, sides):
        wide = torch.full((*level.shape[:2], 3 * level.shape[2], 2 * level.shape[3]), float("nan")).transpose(2, 3)
        wide[:, :, ::2, 1::3] = level
        strided.append(wide[:, :, ::2, 1::3])
    return strided


def _offset(flat: Tensor, channels: int, sides: Sequence[int]) -> list[Tensor]:
    return [
        torch.cat([torch.full((3,), float("nan")), level.flatten()])[3:].view(level.shape)
        for level in plain_levels(flat, channels, sides)
    ]


def _expanded(flat: Tensor, channels: int, sides: Sequence[int]) -> list[Tensor]:
    """The same level for all images; then one value for all channels or columns."""
    levels = plain_levels(flat, channels, sides)
    shapes = [level.shape for level in levels]
    cuts = [levels[0][:1], levels[1][:, :1], *(level[..., :1] for level in levels[2:])]
    return [cut.expand(shape) for cut, shape in zip(cuts, shapes, strict=True)]


@dataclass(frozen=True)
class ImageCase:
    """One input of the image operations; ``make()`` gives the same tensors each time."""

    name: str
    canvas: int
    sides: tuple[int, ...]
    channels: int
    size: int
    kinds: tuple[str, ...] = ("crop", "mirrored/crop")
    images: int = 2
    views_each: int = 1
    backbone: int | None = None  # channels of the views, where the images are grey
    rows: tuple[int, ...] | None = None
    lay_out: Callable[[Tensor, int, Sequence[int]], list[Tensor]] = plain_levels

    def make(self) -> ImageInputs:
        generator = torch.Generator().manual_seed(sum(self.name.encode()))
        floats = self.channels * sum(side * side for side in self.sides)
        flat = torch.randn(self.images, floats, generator=generator) / len(self.sides) ** 0.5
        levels = self.lay_out(flat, self.channels, self.sides)
        rows = None if self.rows is None else torch.tensor(self.rows)
        count = self.views_each * (self.images if rows is None else len(rows))
        views = make_views(self.kinds, count, self.canvas, self.canvas, self.size, self.backbone or self.channels)
        return ImageInputs(levels, rows, self.canvas, views)


_PYRAMID = (1, 2, 4, 8, 16)
IMAGE_CASES = (
    ImageCase("one-pixel", 1, (1,), 1, 1, images=1),
    ImageCase("smallest", 3, (1, 3), 3, 2),
    ImageCase("tiny", 5, (1, 2, 5), 3, 7),
    ImageCase("grey", 28, (*_PYRAMID, 28), 1, 28, images=3),
    ImageCase("colour", 32, (*_PYRAMID, 32), 3, 24, ("crop", "mirrored", "whole"), images=3, views_each=3),
    ImageCase("odd", 33, (3, 7, 33, 13), 3, 19, ("overhanging", "whole/mirrored"), views_each=2),
    ImageCase("same-side-again", 7, (7, 7, 1, 6, 6), 3, 9, ("whole",)),
    ImageCase("no-finest-level", 41, (3,), 3, 30, ("crop",), images=1),
    ImageCase("sixteen-levels", 24, tuple(range(2, 18)), 1, 12),
    ImageCase("wide", 131, (1, 5, 64, 131), 3, 70, ("crop", "overhanging"), images=2),
    ImageCase("grey-to-colour", 17, (2, 17), 1, 21, images=2, views_each=2, backbone=3),
    ImageCase("zoomed", 20, (4, 20), 3, 37, ("zoomed", "zoomed/reduced")),
    ImageCase("reduced", 65, (5, 65), 1, 18, ("reduced", "reduced/crop")),
    ImageCase("constant", 16, (4, 16), 3, 33, ("constant", "constant/crop")),
    ImageCase("outside", 12, (3, 12), 3, 9, ("right-of-it", "crop/left-of-it", "touching", "crop"), views_each=2),
    ImageCase("flat-buffer", 18, (1, 9, 18), 3, 11, images=4, lay_out=split_levels),
    ImageCase("slices", 18, (1, 9, 18), 3, 11, images=3, lay_out=_slices),
    ImageCase("strided", 18, (1, 9, 18), 3, 11, images=3, lay_out=_strided),
    ImageCase("storage-offset", 18, (1, 9, 18), 3, 11, images=3, lay_out=_offset),
    ImageCase("expanded", 18, (2, 9, 18), 3, 11, images=3, lay_out=_expanded),
    ImageCase("rows", 18, (1, 9, 18), 3, 11, images=6, views_each=2, rows=(4, 0, 4, 5, 1)),
    ImageCase("rows-of-flat-buffer", 15, (2, 15), 1, 16, images=5, rows=(3, 3, 0), lay_out=split_levels),
)


@dataclass(frozen=True)
class ViewCase:
    """Images that no pyramid gives: not square, of many channels, strided. ``make(dtype)`` gives images and views."""

    name: str
    shape: tuple[int, int, int, int]
    size: int
    kinds: tuple[str, ...] = ("crop", "mirrored/overhanging")
    views_each: int = 1
    backbone: int | None = None
    change: Callable[[Tensor], Tensor] = lambda images: images

    def make(self, dtype: torch.dtype) -> tuple[Tensor, Views]:
        generator = torch.Generator().manual_seed(sum(self.name.encode()))
        images = self.change(torch.rand(self.shape, generator=generator).to(dtype))
        count, channels, height, width = images.shape
        return images, make_views(
            self.kinds, self.views_each * count, height, width, self.size, self.backbone or channels
        )


def _every_other(images: Tensor) -> Tensor:
    wide = torch.full((*images.shape[:3], 2 * images.shape[3]), float("nan"), dtype=images.dtype)
    wide[..., 1::2] = images
    return wide[..., 1::2]


VIEW_CASES = (
    ViewCase("tall", (2, 3, 45, 7), 17, views_each=2),
    ViewCase("broad", (3, 1, 5, 70), 34, ("overhanging", "crop"), backbone=3),
    ViewCase("one-row", (1, 3, 1, 19), 8, ("overhanging",)),
    ViewCase("five-channels", (2, 5, 11, 13), 9),
    ViewCase("sixteen-grey", (2, 1, 11, 13), 5, backbone=16),
    ViewCase("channels-last", (2, 3, 15, 12), 10, change=lambda x: x.to(memory_format=torch.channels_last)),
    ViewCase("transposed", (2, 3, 15, 12), 10, change=lambda x: x.transpose(2, 3)),
    ViewCase("every-other-pixel", (2, 3, 15, 12), 10, change=_every_other),
    ViewCase("some-images", (7, 3, 9, 9), 10, change=lambda x: x[1::3]),
    ViewCase("same-image", (1, 3, 15, 12), 10, change=lambda x: x.expand(3, -1, -1, -1)),
    ViewCase("one-value", (2, 3, 1, 12), 10, ("overhanging",), change=lambda x: x.expand(-1, -1, 8, -1)),
)
