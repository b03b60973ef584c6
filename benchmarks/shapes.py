"""Sizes of the losses and of the image path, with inputs of that size; `presets` has the sizes that are run."""

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
    compiled: bool = False  # torch.compile takes half a minute per shape, so it is off by default
    keops: bool = False
    naive: bool = True  # also all flows as a C x C x D tensor, unless that takes minutes or is pointless

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
