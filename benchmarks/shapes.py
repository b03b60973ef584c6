"""The registry of sizes that benchmarks run at, preset by preset; tests check every backend at those that are small enough."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfm_fast.distill.images import level_sizes
from sfm_fast.views import Views, draw_views


@dataclass(frozen=True)
class LossShape:
    """C classes, D features, ``ipc`` labelled features a class (1: the class means themselves)."""

    alignment: str
    classes: int
    dim: int
    ipc: int = 1
    compiled: bool = False  # torch.compile takes half a minute a shape: only where asked
    keops: bool = False
    naive: bool = True  # all flows as a C x C x D tensor beside it, where that is neither minutes long nor pointless

    @property
    def name(self) -> str:
        return f"{self.alignment} {self.classes}x{self.dim}" + (f" ipc {self.ipc}" if self.ipc > 1 else "")

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features (C * ipc, D) and centers (C, D) that share a mean larger than their spread, and labels in random order."""
        generator = torch.Generator().manual_seed(self.classes + self.dim)
        offset = 5 * torch.randn(self.dim, generator=generator)
        centers = offset + torch.randn(self.classes, self.dim, generator=generator)
        features = offset + torch.randn(self.classes * self.ipc, self.dim, generator=generator)
        labels = None
        if self.ipc > 1:
            labels = torch.arange(self.classes).repeat(self.ipc)[torch.randperm(len(features), generator=generator)]
            labels = labels.to(device)
        return features.to(device), centers.to(device), labels


@dataclass(frozen=True)
class ImageShape:
    """``images`` pyramids of ``channels`` x ``canvas``², one view of ``size``² each; dtype of the views "float32" or "bfloat16"."""

    images: int
    canvas: int
    size: int
    channels: int = 3
    dtype: str = "float32"
    compiled: bool = False

    @property
    def name(self) -> str:
        return f"{self.images}x{self.channels}x{self.canvas} to {self.size} {self.dtype}"

    def inputs(self, device: torch.device) -> tuple[list[Tensor], Views]:
        """Levels of the pyramid and views as a run draws them."""
        generator = torch.Generator().manual_seed(self.images)
        sides = level_sizes(self.canvas, "pyramid")
        levels = [
            torch.randn(self.images, self.channels, side, side, generator=generator).div(len(sides)).to(device)
            for side in sides
        ]
        mean, std = torch.full((self.channels,), 0.45), torch.full((self.channels,), 0.225)
        views = draw_views(torch.arange(self.images), (self.canvas, self.canvas), self.size, mean, std, seed=1, step=7)
        tensors = {name: getattr(views, name).to(device) for name in ("boxes", "noise_items", "mean", "std")}
        return levels, replace(views, **tensors)


def _losses(alignment: str, classes: tuple[int, ...], dims: tuple[int, ...], ipc: int = 1) -> tuple[LossShape, ...]:
    """Along the classes at 768 features and along the features at 1000 classes, each shape once."""
    sizes = [(count, 768) for count in classes] + [(1000, dim) for dim in dims]
    return tuple(LossShape(alignment, count, dim, ipc, naive=count != 1000) for count, dim in dict.fromkeys(sizes))


LOSS_SHAPES: dict[str, tuple[LossShape, ...]] = {
    "small": (
        LossShape("global", 10, 384),
        LossShape("class", 100, 384, 10),
        LossShape("pair", 100, 384),
        LossShape("global", 1000, 768),
    ),
    "laptop": (
        *_losses("global", (10, 100, 1000, 10_000), (384, 1024)),
        LossShape("global", 1000, 768, 10),
        LossShape("global", 21_841, 1024),
        *_losses("class", (10, 100, 1000, 10_000), (384, 1024)),
        LossShape("class", 1000, 768, 10),
        *_losses("pair", (10, 100, 1000, 4000), (384, 1024)),
    ),
    # What a few minutes of a GPU are best spent on.
    "imagenet-100": tuple(LossShape(alignment, 100, 768) for alignment in ("global", "class", "pair")),
    "imagenet-1k": (
        LossShape("global", 1000, 768, compiled=True),
        LossShape("global", 21_841, 1024),
        LossShape("global", 200_000, 1024),
        LossShape("class", 21_841, 1024),
        LossShape("pair", 1000, 768, compiled=True),
        LossShape("pair", 21_841, 1024),
    ),
    "full": (
        *(
            LossShape(alignment, classes, dim, ipc)
            for alignment in ("global", "class")
            for classes in (10, 100, 1000, 10_000, 21_841)
            for dim in (384, 768, 1024)
            for ipc in (1, 10)
        ),
        *(
            LossShape("pair", classes, dim, keops=(classes, dim) in ((10, 384), (1000, 768)))
            for classes in (10, 100, 1000, 10_000, 21_841)
            for dim in (384, 768, 1024)
        ),
    ),
}
# torch.compile beside ours where users are, on one shape of each kind: every further one costs its half a minute.
for _preset, _compiled in {
    "laptop": ("global 1000x768", "pair 1000x768"),
    "full": ("global 10x384", "global 1000x768", "global 21841x1024", "class 1000x768", "pair 10x384", "pair 1000x768"),
}.items():
    LOSS_SHAPES[_preset] = tuple(
        replace(shape, compiled=True) if shape.name in _compiled else shape for shape in LOSS_SHAPES[_preset]
    )

IMAGE_SHAPES: dict[str, tuple[ImageShape, ...]] = {
    "small": (ImageShape(10, 28, 28, 1), ImageShape(2, 64, 56)),
    "laptop": (
        ImageShape(10, 28, 28, 1),
        ImageShape(10, 256, 224, compiled=True),
        ImageShape(100, 256, 224),
        ImageShape(100, 256, 224, dtype="bfloat16"),
    ),
    "imagenet-100": (ImageShape(100, 256, 224, compiled=True), ImageShape(100, 256, 224, dtype="bfloat16")),
    "imagenet-1k": (ImageShape(1000, 256, 224, dtype="bfloat16"),),
}
