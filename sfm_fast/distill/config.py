"""The options of a distillation run: `DistillConfig` determines its result, `Execution` its memory, `Every` how often it writes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InputError
from ..options import check_options, option
from ..settings import AREA, MOST_PIXELS, PROXIMITY, SHRINKAGE, Augmentation
from .methods import CENTERS, DECLARED, LEVELS, AnchoredOptions, DecoupledOptions, FlowOptions, MatchingOptions

CENTER_OPTIONS = {  # and the centres that have them
    "shrinkage": ("discriminant", "regression"),
    "center_scale": ("discriminant",),
    "proximity": ("regression",),
}
PARAMETRIZATIONS = ("pyramid", "pixel")
STARTS = ("auto", "real", "noise")
STATES = ("device", "host")

# The papers' settings, where this package's differ.
PAPER: dict[str, Any] = {
    "method": "sfm",
    "level": "class",
    "centers": "means",
    "steps": 5000,
    "init": "noise",
    "noise": True,
    "min_area": AREA[0],
    "average_last": 0.0,
}
# This package's, which docs/accuracy.md compares with them. Views get no noise because evaluation has none.
OWN: dict[str, Any] = {"init": "auto", "noise": False, "min_area": 0.3, "average_last": 0.25}


@dataclass(frozen=True)
class Execution:
    """How a run uses memory; it changes the result only by rounding.

    micro_batch: images whose activations are in memory at a time, or "auto": the most that fit ``memory_budget`` (bytes; None: nine
    tenths of the free memory on a GPU, half of the available memory on a CPU). state: where the pyramid and Adam's moments are stored;
    "host" copies them to the device and back block by block.
    """

    micro_batch: int | str = "auto"
    memory_budget: int | None = None
    state: str = "device"

    def __post_init__(self) -> None:
        whole = isinstance(self.micro_batch, int) and not isinstance(self.micro_batch, bool)
        if self.micro_batch != "auto" and not (whole and int(self.micro_batch) >= 1):
            raise InputError(f"micro_batch must be 'auto' or at least 1, got {self.micro_batch!r}")
        if self.memory_budget is not None and self.memory_budget < 1:
            raise InputError(f"memory_budget must be positive, got {self.memory_budget}")
        if self.state not in STATES:
            raise InputError(f"state must be one of {STATES}, got {self.state!r}")


@dataclass(frozen=True, kw_only=True)
class Every:
    """How often a run writes, in steps."""

    checkpoint_every: int = option(500, "steps between checkpoints", metavar="STEPS", least=1)
    grid_every: int = option(500, "steps between image grids", metavar="STEPS", least=1)
    log_every: int = option(10, "steps between log lines", metavar="STEPS", least=1)

    def __post_init__(self) -> None:
        check_options(self)


class Schedule(NamedTuple):
    """Adam's step size, and the steps between pyramid levels."""

    lr: float
    grow_every: int


if TYPE_CHECKING:

    class _MethodOptions(FlowOptions, DecoupledOptions, AnchoredOptions, MatchingOptions):
        """The options of all methods, as type checkers see them."""
else:
    # Made from the registered methods, so that a new method needs no change here.
    _MethodOptions = type("_MethodOptions", tuple(dict.fromkeys(kind.options for kind in DECLARED.values())), {})


@dataclass(frozen=True, kw_only=True)
class DistillConfig(_MethodOptions):
    """Options of one run. They, the backbones and the centres (or real images) determine its result; `paper` has the papers' settings.

    level: "class" matches the mean of a class's images with the class mean; "cluster" matches each image with one of the class's ``ipc``
    k-means centres (a flow loss then leaves out the flows within a class and needs alignment "pair").
    centers, shrinkage, center_scale, proximity: the class means, at cluster level the k-means centres; regression centres, which are near them
    (`ClassStatistics.regression_centers`); or discriminant centres (`ClassStatistics.discriminant_centers`), which at cluster level move each
    k-means centre by as much as its class's mean.
    ipc: images per class. views: augmented views per image and step (None: 1 for SFM, 10 for LGM).
    init: what the images start from; "auto" becomes "real" or "noise" when a run is made (`make_distiller`).
    size: side of the synthetic images (None: from the backbones). lr, grow_every: the step size, and the steps between pyramid levels (None:
    see `schedule`).
    average_last: the result is about the mean of the pyramids over this last fraction of the steps (`IterateAverage`); 0: the last pyramid, as in the papers.
    min_area: smallest area of a random crop, as a fraction of the image. noise: whether views get Gaussian noise.
    The options of single methods (alignment, metric; alpha; length_weight, length_delta; lgm_variant) are declared by the methods.

    Options that are None are then set to what is usual for the others: for LGM the papers' settings, else this package's.
    """

    method: str = option(
        "sfm-anchored", "; ".join(f"{name}: {kind.about}" for name, kind in DECLARED.items()), choices=tuple(DECLARED)
    )
    level: str | None = option(
        None,
        "for sfm and its variants: match the mean of a class's images with the class mean, or each image with one of the class's k-means centres, of which there are --ipc",
        choices=LEVELS,
        usual="cluster for more than one image per class if the method's loss allows it, else class",
    )
    centers: str | None = option(
        None,
        "for sfm and its variants: what the synthetic features are compared with, means: the class means or k-means centres; regression: targets near them on which "
        "ridge regression learns to predict the real data's classes; discriminant: targets whose nearest-target rule is the linear discriminant of the real data. "
        "Both train a better linear probe than means",
        choices=CENTERS,
        usual="regression, means for lgm",
    )
    shrinkage: float | None = option(
        None,
        "lambda, of discriminant centres the multiple of the mean variance that is added to the within-class covariance, of regression centres the ridge penalty in "
        "units of the targets' mean squared distance from their mean",
        usual=f"chosen from the statistics, and {SHRINKAGE:g}",
        within="[0, 1e6]",
    )
    center_scale: float | None = option(
        None,
        "of discriminant centres: kappa, their distance from the common mean in units of the class means' distance",
        usual="chosen from the statistics",
        within="(0, 1e6]",
    )
    proximity: float | None = option(
        None,
        "of regression centres: the weight of staying near the means",
        usual=f"{PROXIMITY:g}",
        within="(0, 1e6]",
    )
    ipc: int = option(1, "synthetic images per class", least=1, most=10**6)
    steps: int = option(1000, "number of optimisation steps", least=1, most=2**32 - 1)
    lr: float | None = option(
        None,
        "Adam's learning rate",
        usual="5 / steps, but between 0.0025 and 0.01, from real images; 10 / steps, but between 0.002, the papers' for 5000 steps, and 0.02, from noise",
        most=1000,
    )
    views: int | None = option(
        None,
        "augmented views per image and step",
        metavar="A",
        usual=", ".join(f"{kind.usual_views} for {name}" for name, kind in DECLARED.items()),
        least=1,
        most=10**4,
    )
    parametrization: str = option(
        "pyramid", "parameters of the images: a pyramid of levels or plain pixels", choices=PARAMETRIZATIONS
    )
    init: str | None = option(
        None,
        "what the images start from: real images, of which those are taken whose features are nearest to what they will be compared with, or noise; auto: real "
        "ones if the data set is given",
        choices=STARTS,
        usual="auto, noise for lgm",
    )
    size: int | None = option(
        None,
        "side of the synthetic images in pixels",
        metavar="PX",
        usual="8/7 of the backbone's input size, or that size itself if it is small",
        least=1,
        most=MOST_PIXELS,
    )
    grow_every: int | None = option(
        None,
        "steps between pyramid levels",
        metavar="STEPS",
        usual="such that all levels are there after 0.36 of the steps: 200 for 5000 steps and 256 px, as in the papers",
        least=1,
    )
    average_last: float | None = option(
        None,
        "average the images over about this last fraction of the steps so far, with weights that fade; 0: no average",
        metavar="SHARE",
        usual=f"{OWN['average_last']}, 0 for lgm",
        within="[0, 1]",
    )
    min_area: float | None = option(
        None,
        "smallest area of a random crop, as a fraction of the image",
        metavar="SHARE",
        usual=f"{OWN['min_area']}, {PAPER['min_area']} for lgm",
        within="(0, 1]",
    )
    noise: bool | None = option(None, "whether views get Gaussian noise", flag=True, usual="no, yes for lgm")
    seed: int = option(0, "seed of the run's random numbers", least=0, most=2**64 - 1)

    # Options that may change when a run is resumed.
    RESUMABLE = ("steps",)

    def __post_init__(self) -> None:
        check_options(self)
        for name, value in self._usual().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # the dataclass is frozen
        DECLARED[self.method].check(self)
        for name, kinds in CENTER_OPTIONS.items():
            if getattr(self, name) is not None and self.centers not in kinds:
                raise InputError(
                    f"centers must be {' or '.join(map(repr, kinds))} if {name} is given, got {self.centers!r}"
                )
        if self.centers != "means" and DECLARED[self.method].needs_images:
            raise InputError(
                f"centers must be 'means' for method {self.method!r}, which uses no centres, got {self.centers!r}"
            )

    def _usual(self) -> dict[str, Any]:
        """What the options become that aren't given."""
        kind = DECLARED[self.method]
        if kind.needs_images:
            return {name: PAPER[name] for name in ("level", "centers", *OWN)}
        level = self.level or ("cluster" if self.ipc > 1 and kind.separates(self) else "class")
        return OWN | {"level": level, "centers": "regression" if self.center_scale is None else "discriminant"}

    @classmethod
    def paper(cls, **options: Any) -> DistillConfig:
        """The papers' settings, of which ``options`` take precedence: plain SFM if they name no method."""
        return cls(**(PAPER | options))

    @property
    def views_per_step(self) -> int:
        return DECLARED[self.method].usual_views if self.views is None else self.views

    def schedule(self, levels: int) -> Schedule:
        """The step size and growth of a run whose pyramids have ``levels`` levels: those given, or those of `lr`'s help, and in proportion to the papers' 5000 steps."""
        if self.lr is not None:
            lr = self.lr
        elif self.init == "real":
            lr = min(max(5 / self.steps, 2.5e-3), 0.01)
        else:
            lr = min(max(10 / self.steps, 2e-3), 0.02)
        every = max(1, round(0.36 * self.steps / levels)) if self.grow_every is None else self.grow_every
        return Schedule(lr, every)

    @property
    def images_per_term(self) -> int:
        """Number of images in each term of a separable loss: those of a class, or a single one at cluster level."""
        return 1 if self.level == "cluster" else self.ipc

    @property
    def augmentation(self) -> Augmentation:
        assert self.min_area is not None
        assert self.noise is not None
        return Augmentation(min_area=self.min_area, noise=self.noise)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DistillConfig:
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def difference(self, other: DistillConfig) -> str:
        """The options, with values, that prevent resuming a run of configuration ``other`` with this one; "" if there are none."""
        pairs = (
            (name, value, getattr(self, name)) for name, value in asdict(other).items() if name not in self.RESUMABLE
        )
        return ", ".join(f"{name} was {old!r}, now {new!r}" for name, old, new in pairs if old != new)
