"""Everything that decides what a distillation run computes, checked once."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from ..checks import MOST_PIXELS
from ..errors import InputError
from ..options import check_options, option
from ..views import AREA, Augmentation
from .images import PARAMETRIZATIONS
from .objectives import LEVELS, METHODS, DecoupledOptions, FlowOptions, MatchingOptions

STATES = ("device", "host")

# Better than the papers' settings at the same cost: means pulled to centres, larger crops, no noise that evaluation doesn't have,
# and the mean of the last iterates.
RECOMMENDED: dict[str, Any] = {"method": "sfm-decoupled", "noise": False, "min_area": 0.3, "average_last": 0.25}


@dataclass(frozen=True)
class Execution:
    """How a run uses the machine; what it computes is the same up to rounding.

    micro_batch: images whose activations exist at once, or "auto": the most that fit ``memory_budget`` (bytes; None: nine tenths of
    what is free on a GPU, half of what is available on a CPU). state: where the pyramid and Adam's moments lie; "host" copies blocks to and fro.
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


if TYPE_CHECKING:

    class _MethodOptions(FlowOptions, DecoupledOptions, MatchingOptions):
        """The options of all methods, as type checkers see them."""
else:
    # Of whatever methods there are: a new one needs no line here.
    _MethodOptions = type("_MethodOptions", tuple(dict.fromkeys(kind.options for kind in METHODS.values())), {})


@dataclass(frozen=True, kw_only=True)
class DistillConfig(_MethodOptions):
    """Options of one run; the defaults are the papers'. A run is a function of these, the centres and the backbone.

    level: what the images of a class match: "class", their mean the class's; "cluster", each of them one of the class's ``ipc`` k-means
    centres (a flow loss then leaves flows within a class out, which takes alignment "pair").
    ipc: images per class. views: augmented views of an image a step (None: 1 for SFM, 10 for LGM).
    size: side of the synthetic images (None: from the backbone). grow_every: steps between pyramid levels.
    average_last: the result is the mean of the pyramids after the run's last steps, this share of all; 0: the last one, as in the papers.
    min_area: smallest random crop as a part of the image. noise: whether views get Gaussian noise.
    The options of single methods (alignment, metric; alpha; lgm_variant) are those that the methods declare.
    """

    method: str = option(
        "sfm", "; ".join(f"{name}: {kind.about}" for name, kind in METHODS.items()), choices=tuple(METHODS)
    )
    level: str = option(
        "class",
        "of sfm and sfm-decoupled: match class means, or each image of a class with one of its k-means centres, as many as --ipc",
        choices=LEVELS,
    )
    ipc: int = option(1, "synthetic images per class", least=1, most=10**6)
    steps: int = option(5000, "optimisation steps", least=1, most=2**32 - 1)
    lr: float = option(2e-3, "Adam's step size", most=1000)
    views: int | None = option(
        None,
        "augmented views of every image a step",
        metavar="A",
        usual=", ".join(f"{kind.usual_views} for {name}" for name, kind in METHODS.items()),
        least=1,
        most=10**4,
    )
    parametrization: str = option("pyramid", "of the images", choices=PARAMETRIZATIONS)
    size: int | None = option(
        None,
        "side of the images",
        metavar="PX",
        usual="8/7 of the backbone's input, small inputs as they are",
        least=1,
        most=MOST_PIXELS,
    )
    grow_every: int = option(200, "steps between pyramid levels", metavar="STEPS", least=1)
    average_last: float = option(
        0.0,
        "take the mean of the images over this share of the steps, the last ones, such as 0.25",
        metavar="SHARE",
        usual="0, the last images alone",
        within="[0, 1]",
    )
    min_area: float = option(AREA[0], "smallest random crop, as a part of the image", metavar="SHARE", within="(0, 1]")
    noise: bool = option(True, "whether views get Gaussian noise")
    seed: int = option(0, "of the random numbers of a run", least=0, most=2**64 - 1)

    # What may differ between a run and its continuation.
    RESUMABLE = ("steps",)

    def __post_init__(self) -> None:
        check_options(self)
        METHODS[self.method].check(self)

    @classmethod
    def recommended(cls, **options: Any) -> DistillConfig:
        """What did best here at the papers' cost (docs/accuracy.md): `RECOMMENDED`, cluster level from ipc 2 on; ``options`` come last."""
        chosen = RECOMMENDED | options
        clusters = chosen.get("ipc", 1) > 1 and chosen["method"] == "sfm-decoupled"
        return cls(**({"level": "cluster" if clusters else "class"} | chosen))

    @property
    def views_per_step(self) -> int:
        return METHODS[self.method].usual_views if self.views is None else self.views

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(min_area=self.min_area, noise=self.noise)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DistillConfig:
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def difference(self, other: DistillConfig) -> str:
        """Names and values that forbid continuing ``other``'s run with this configuration; empty where none do."""
        pairs = (
            (name, value, getattr(self, name)) for name, value in asdict(other).items() if name not in self.RESUMABLE
        )
        return ", ".join(f"{name} was {old!r}, now {new!r}" for name, old, new in pairs if old != new)
