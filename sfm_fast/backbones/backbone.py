"""A frozen backbone: the model, its input transform and its identity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from ..data.transforms import ImageTransform, match_channels
from ..errors import InputError
from ..reference.augment import normalize
from .prepare import Preparation

# The facts that, besides the model's name, must agree for features to be the same, with their names in messages.
IDENTITY = {
    "fingerprint": "weights",
    "input_size": "input size",
    "resize": "resize",
    "num_features": "features",
    "mean": "mean",
    "std": "std",
}


class Record(TypedDict):
    """A backbone as recorded in files: its identity, and what changes its features' last digits: precision and preparation."""

    name: str
    fingerprint: str
    num_features: int
    input_size: int
    resize: int
    mean: list[float]
    std: list[float]
    precision: str
    prepared: int


@dataclass
class Backbone:
    """A frozen model from normalised images (N, in_channels, input_size, input_size) to features (N, num_features).

    ``resize`` is the side that real images are resized to before the central crop; ``fingerprint`` is a hash of the weights as
    loaded. ``precision`` "bf16": weights and activations are bfloat16; ``why_precision``: why it was chosen if "auto" was asked for,
    else "". ``run``: the compiled model, or None to call ``model``.
    ``prepared``: version of the changes by `sfm_fast.prepare_frozen`, which ``preparation`` lists, or 0 for a model as loaded;
    ``original`` then returns the backbone as loaded.
    """

    name: str
    model: nn.Module
    mean: Tensor
    std: Tensor
    input_size: int
    resize: int
    in_channels: int
    num_features: int
    fingerprint: str
    precision: str = "fp32"
    why_precision: str = field(default="", repr=False, compare=False)
    run: Callable[[Tensor], Tensor] | None = None
    prepared: int = 0
    preparation: Preparation | None = field(default=None, repr=False, compare=False)
    original: Callable[[], Backbone] | None = field(default=None, repr=False, compare=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the views that the model takes."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def image_size(self) -> int:
        """Side of synthetic images: 8/7 of the input size as in the papers (256 for 224), or the input size itself below 64."""
        return round(self.input_size * 8 / 7) if self.input_size >= 64 else self.input_size

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for backbones that give the same features; equal weights alone may be in another network or get other inputs."""
        recorded: Mapping[str, Any] = self.describe()
        return self.name, *(recorded[key] for key in IDENTITY)

    def __call__(self, views: Tensor) -> Tensor:
        """Features (N, num_features) float32 of normalised views; differentiable in ``views``."""
        features: Tensor = (self.model if self.run is None else self.run)(views.to(self.dtype))
        return features.float()

    def unprepared(self) -> Backbone:
        """This backbone with its model as loaded, which may load it again. Raises ``InputError`` if that can't be done."""
        if not self.prepared:
            return self
        if self.original is None:
            raise InputError(f"backbone {self.name!r} is needed as loaded: load it with prepare=False")
        return self.original()

    def transform(self, channels: int) -> ImageTransform:
        """The transform from real images to this backbone's centre view."""
        return ImageTransform(self.resize, self.input_size, channels)

    @torch.no_grad()
    def features(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Features of images (N, channels, input_size, input_size) in 0..1, batch by batch, without a graph."""
        parts = [self(self.prepare(batch)) for batch in images.split(batch_size)]
        return torch.cat(parts)

    def prepare(self, images: Tensor) -> Tensor:
        """Images in 0..1, moved to the device, with the model's channels, normalised."""
        images = images.to(self.device)
        return normalize(match_channels(images, self.in_channels), self.mean, self.std)

    def describe(self) -> Record:
        """The record of this backbone for files made with it."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "num_features": self.num_features,
            "input_size": self.input_size,
            "resize": self.resize,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "precision": self.precision,
            "prepared": self.prepared,
        }
