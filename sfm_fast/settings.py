"""Names, limits and defaults of options, in a module without torch, so that a command line can show and check them at once."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InputError

FLOWS = ("global", "class", "pair")  # between classes
ALIGNMENTS = (*FLOWS, "anchored")
METRICS = ("cosine", "mse")
AREA = (0.08, 1.0)  # of a random crop, as fractions of the image
SHRINKAGE, PROXIMITY = 0.3, 1.0  # of regression centres
MOST_PIXELS = 2**14  # side of an image, a canvas or a view


@dataclass(frozen=True)
class Augmentation:
    """Settings of random views. ``noise=False`` gives the flips and crops of evaluation; areas are fractions of the image."""

    min_area: float = AREA[0]
    max_area: float = AREA[1]
    flip: bool = True
    noise: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.min_area <= self.max_area <= 1:
            raise InputError(f"areas must be 0 < min_area <= max_area <= 1, got {self.min_area} and {self.max_area}")
