"""The backbones that a run's images are made for: one, or several whose losses are summed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..backbones.backbone import Backbone
from ..checks import kind_of
from ..errors import InputError
from .config import DistillConfig
from .objectives import Objective


@dataclass(frozen=True, eq=False)
class Member:
    """One of the backbones of a run, and its share of the loss: ``weight`` times ``objective`` of its features."""

    backbone: Backbone
    objective: Objective
    weight: float = 1.0


def backbones_of(backbone: Backbone | Sequence[Backbone]) -> tuple[Backbone, ...]:
    """One or several backbones as a tuple. Raises ``InputError`` if there is none, one twice, or if they are on different devices."""
    several = (backbone,) if isinstance(backbone, Backbone) else tuple(backbone)
    if not several:
        raise InputError("backbone must be one backbone, or a list of at least one, got none")
    for one in several:
        if not isinstance(one, Backbone):
            raise InputError(f"backbone must be a Backbone of `load_backbone`, or a list of them, got {kind_of(one)}")
    for place, one in enumerate(several):
        if one.device != several[0].device:
            raise InputError(
                f"backbones must be on one device, got {several[0].name!r} on {several[0].device} and {one.name!r} on {one.device}"
            )
        if any(one.identity == other.identity for other in several[:place]):
            raise InputError(f"backbones must differ, got {one.name!r} with the same weights twice")
    return several


def image_size(config: DistillConfig, backbones: Sequence[Backbone]) -> int:
    """Side of the synthetic images in pixels: ``config.size``, or the largest that one of the backbones has by itself."""
    return config.size or max(one.image_size for one in backbones)
