"""Everything that decides what a distillation run computes, checked once."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import InputError
from ..ops.backends import ALIGNMENTS, METRICS
from ..views import Augmentation
from .images import PARAMETRIZATIONS
from .objectives import LEVELS, LGM_VARIANTS, METHODS

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


@dataclass(frozen=True)
class DistillConfig:
    """Options of one run; the defaults are the papers'. A run is a function of these, the centres and the backbone.

    level: what the images of a class match: "class", their mean the class's; "cluster", each of them one of the class's ``ipc`` k-means
    centres (a flow loss then leaves flows within a class out, which takes alignment "pair").
    ipc: images per class. views: augmented views of an image a step (None: 1 for SFM, 10 for LGM).
    size: side of the synthetic images (None: from the backbone). grow_every: steps between pyramid levels.
    average_last: the result is the mean of the pyramids after the run's last steps, this share of all; 0: the last one, as in the papers.
    min_area: smallest random crop as a part of the image. noise: whether views get Gaussian noise.
    """

    method: str = "sfm"
    level: str = "class"
    ipc: int = 1
    steps: int = 5000
    lr: float = 2e-3
    views: int | None = None
    parametrization: str = "pyramid"
    size: int | None = None
    grow_every: int = 200
    average_last: float = 0.0
    alignment: str = "global"
    metric: str = "cosine"
    alpha: float = 1.0
    min_area: float = 0.08
    noise: bool = True
    lgm_variant: str = "closed-form"
    seed: int = 0

    # What may differ between a run and its continuation.
    RESUMABLE = ("steps",)

    def __post_init__(self) -> None:
        for name, choices in (
            ("method", METHODS),
            ("level", LEVELS),
            ("parametrization", PARAMETRIZATIONS),
            ("alignment", ALIGNMENTS),
            ("metric", METRICS),
            ("lgm_variant", LGM_VARIANTS),
        ):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name, least in (("ipc", 1), ("steps", 1), ("views", 1), ("size", 1), ("grow_every", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")
        for name, most in (
            ("ipc", 10**6),
            ("steps", 2**32 - 1),
            ("views", 10**4),
            ("size", 2**14),
            ("seed", 2**64 - 1),
        ):
            value = getattr(self, name)
            if value is not None and value > most:
                raise InputError(f"{name} must be at most {most}, got {value}")
        if self.level == "cluster" and self.method == "lgm":
            raise InputError("level 'cluster' is for sfm and sfm-decoupled: lgm has no centres")
        if self.level == "cluster" and self.method == "sfm-decoupled" and self.alpha != 1:
            raise InputError(
                f"level 'cluster' takes alpha 1: other centres of one class are no other classes, got {self.alpha}"
            )
        if self.level == "cluster" and self.method == "sfm" and self.alignment != "pair":
            raise InputError(f"level 'cluster' of method 'sfm' takes alignment 'pair', got {self.alignment!r}")
        if not 0 < self.lr <= 1000:
            raise InputError(f"lr must be positive and at most 1000, got {self.lr}")
        if not 0 < self.min_area <= 1:
            raise InputError(f"min_area must be in (0, 1], got {self.min_area}")
        if not 0 <= self.average_last <= 1:
            raise InputError(f"average_last must be in [0, 1], got {self.average_last}")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha must be in [0, 1], got {self.alpha}")

    @classmethod
    def recommended(cls, **options: Any) -> DistillConfig:
        """What did best here at the papers' cost (docs/accuracy.md): `RECOMMENDED`, cluster level from ipc 2 on; ``options`` come last."""
        chosen = RECOMMENDED | options
        clusters = chosen.get("ipc", 1) > 1 and chosen["method"] == "sfm-decoupled"
        return cls(**({"level": "cluster" if clusters else "class"} | chosen))

    @property
    def views_per_step(self) -> int:
        return self.views if self.views is not None else (10 if self.method == "lgm" else 1)

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
