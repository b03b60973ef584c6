"""A frozen backbone: the model, what its images must look like, and what tells it from others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from ..data.transforms import ImageTransform, match_channels
from ..reference.augment import normalize

# What must agree, beside the model's name, for features to be the same; and what messages call it.
IDENTITY = {
    "fingerprint": "weights",
    "input_size": "input size",
    "resize": "resize",
    "num_features": "features",
    "mean": "mean",
    "std": "std",
}


class Record(TypedDict):
    """A backbone as files record it: what tells it from others, and how it ran."""

    name: str
    fingerprint: str
    num_features: int
    input_size: int
    resize: int
    mean: list[float]
    std: list[float]
    precision: str


@dataclass
class Backbone:
    """A frozen model from normalised images (N, in_channels, input_size, input_size) to features (N, num_features).

    ``resize`` is the side real images are resized to before the central crop; ``fingerprint`` is a hash of the weights as they
    were loaded. ``precision`` "bf16": weights and activations are bfloat16. ``run`` is what computes: the model, or its compiled form.
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
    run: Callable[[Tensor], Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the views that the model takes."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def image_size(self) -> int:
        """Side of synthetic images: 8/7 of the input (256 for 224), as the papers have it; small inputs keep theirs."""
        return round(self.input_size * 8 / 7) if self.input_size >= 64 else self.input_size

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for backbones that give the same features: equal weights alone may sit in another network, or see other inputs."""
        recorded: Mapping[str, Any] = self.describe()
        return self.name, *(recorded[key] for key in IDENTITY)

    def __call__(self, views: Tensor) -> Tensor:
        """Features (N, num_features) float32 of normalised views; differentiable in ``views``."""
        features: Tensor = (self.model if self.run is None else self.run)(views.to(self.dtype))
        return features.float()

    def transform(self, channels: int) -> ImageTransform:
        """How real images come to this backbone's centre view."""
        return ImageTransform(self.resize, self.input_size, channels)

    @torch.no_grad()
    def features(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Features of images (N, channels, input_size, input_size) in 0..1, batch by batch, without a graph."""
        parts = [self(self.prepare(batch)) for batch in images.split(batch_size)]
        return torch.cat(parts)

    def prepare(self, images: Tensor) -> Tensor:
        """Move to the device, match channels, normalise."""
        images = images.to(self.device)
        return normalize(match_channels(images, self.in_channels), self.mean, self.std)

    def describe(self) -> Record:
        """Provenance: what a file made with this backbone must name."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "num_features": self.num_features,
            "input_size": self.input_size,
            "resize": self.resize,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "precision": self.precision,
        }
