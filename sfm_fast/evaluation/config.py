"""Options of the evaluation, without torch, for command lines: modes, references, and how probes and projectors are fitted."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..errors import InputError
from ..options import check_options, option
from ..settings import AREA

MODES = ("probe", "inherit", "kd")
REFERENCES = ("full", "random-real", "nearest-real", "neighbour-real", "class-means")
USUAL = REFERENCES[:3]
SOLVERS = ("ridge", "adam")
TEMPERATURE, ALPHA = 4.0, 0.5  # of knowledge distillation
WEIGHT_DECAYS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # of the classifier on all real images


@dataclass(frozen=True)
class ProbeConfig:
    """seeds: fits per row, each with its own views and initial weights. views: views per image, from which epochs draw.

    min_area: smallest area of a crop as a fraction of the image. projector: solver of mode inherit. blends: whether half of its views
    show blends of two images; False: only views of single images, as in the paper. temperature, alpha: of mode kd.
    """

    seeds: int = option(3, "number of fits per row of the table, each with another seed", least=1)
    epochs: int = option(1000, "maximum number of epochs of a fit with Adam, which takes at most 20 000 steps", least=1)
    views: int = option(200, "augmented views per image, whose features are computed once", least=1)
    min_area: float = option(AREA[0], "smallest area of a random crop, as a fraction of the image", within="(0, 1]")
    projector: str = option("ridge", "solver that fits the projector of mode inherit", choices=SOLVERS)
    blends: bool = option(False, "let half of the views for the projector show blends of two images")
    temperature: float = option(TEMPERATURE, "softmax temperature of teacher and student in mode kd")
    alpha: float = option(ALPHA, "weight of the teacher's term in the loss of mode kd")

    def __post_init__(self) -> None:
        check_options(self)
        check_distillation(self.temperature, self.alpha)

    def settings(self, mode: str) -> dict[str, object]:
        """The settings that ``mode`` uses."""
        unused = {
            "probe": ("projector", "blends", "temperature", "alpha"),
            "inherit": ("temperature", "alpha") + (("epochs",) if self.projector == "ridge" else ()),
            "kd": ("projector", "blends"),
        }[mode]
        return {name: value for name, value in asdict(self).items() if name not in unused}


@dataclass(frozen=True, kw_only=True)
class ProjectorFit:
    """How a projector is fitted on synthetic images: on ``views`` flips and crops per image, the same for both backbones."""

    solver: str = option("ridge", "solver that fits the projector", choices=SOLVERS)
    views: int = option(200, "augmented views per image that the projector is fitted on", least=1)
    min_area: float = option(
        AREA[0], "smallest area of a crop in these views, as a fraction of the image", within="(0, 1]"
    )
    blends: bool = option(False, "let half of these views show blends of two images")
    seed: int = option(0, "seed of these views", least=0, most=2**63 - 1)

    def __post_init__(self) -> None:
        check_options(self)


def check_distillation(temperature: float, alpha: float) -> None:
    """Raise ``InputError`` unless temperature is a positive number and alpha in 0..1."""
    if not 0 < temperature < float("inf"):
        raise InputError(f"temperature must be positive, got {temperature}")
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must be in [0, 1], got {alpha}")
