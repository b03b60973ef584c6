"""What the distillation methods declare: names, options and requirements, without torch, for configurations and command lines.

`objectives` has their losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import InputError
from ..options import option
from ..settings import FLOWS, METRICS

LEVELS = ("class", "cluster")
CENTERS = ("means", "discriminant", "regression")
LGM_VARIANTS = ("closed-form", "frozen", "stock")


class Method:
    """A method's class attributes; everything about it but its loss, from its options on the command line to its views, follows from them."""

    name: ClassVar[str]  # of the method
    about: ClassVar[str]  # one line for the command line's help
    options: ClassVar[type]  # dataclass of the method's own options, which `DistillConfig` inherits
    usual_views: ClassVar[int] = 1  # views per image and step, unless the configuration sets them
    levels: ClassVar[tuple[str, ...]] = LEVELS  # the levels that the method supports
    needs_images: ClassVar[bool] = False  # whether it needs real images at every step, instead of centres

    @classmethod
    def check(cls, config: Any) -> None:
        """Raise ``InputError`` if options of a `DistillConfig` can't be combined."""
        if config.level not in cls.levels:
            names = [name for name, kind in DECLARED.items() if config.level in kind.levels]
            others = ", ".join(names[:-1]) + f" and {names[-1]}"
            raise InputError(f"level {config.level!r} is for {others}, not for {cls.name}")

    @classmethod
    def separates(cls, config: Any) -> bool:
        """Whether its loss is a mean over classes (at cluster level: over images) with the options of a `DistillConfig`."""
        return False

    @classmethod
    def scale_free(cls, config: Any) -> bool:
        """Whether its loss stays the same if all features are multiplied by a number, so that losses of several backbones can be added."""
        return True


DECLARED: dict[str, type[Method]] = {}


def declare(kind: type[Method]) -> type[Method]:
    """Decorator: register a method under its ``name``; a subclass with the same name replaces it."""
    DECLARED[kind.name] = kind
    return kind


@dataclass(frozen=True, kw_only=True)
class FlowOptions:
    """Options of `Flow`."""

    alignment: str = option(
        "global", "for sfm: align all flows at once, flow by flow, or every pair of classes", choices=FLOWS
    )
    metric: str = option("cosine", "for sfm: how flows are compared", choices=METRICS)


@declare
class Flow(Method):
    """SFM: statistical flow matching."""

    name, about, options = "sfm", "aligns flows between class means, the paper's loss", FlowOptions

    @classmethod
    def scale_free(cls, config: Any) -> bool:
        return bool(config.metric == "cosine")

    @classmethod
    def check(cls, config: Any) -> None:
        if config.level == "cluster" and config.alignment != "pair":
            raise InputError(
                f"alignment must be 'pair' for method 'sfm' with level 'cluster', got {config.alignment!r}"
            )


@dataclass(frozen=True, kw_only=True)
class DecoupledOptions:
    """Options of `DecoupledFlow`."""

    alpha: float = option(
        1.0,
        "for sfm-decoupled: weight of the term of the class's own centre; 1 leaves out the term of the other classes",
        within="[0, 1]",
    )


@declare
class DecoupledFlow(Method):
    """SFM's decoupled variant."""

    name, about, options = "sfm-decoupled", "pulls class means to their centres", DecoupledOptions

    @classmethod
    def separates(cls, config: Any) -> bool:
        return bool(config.alpha == 1)

    @classmethod
    def scale_free(cls, config: Any) -> bool:
        return False

    @classmethod
    def check(cls, config: Any) -> None:
        if config.level == "cluster" and not cls.separates(config):
            raise InputError(
                f"alpha must be 1 with level 'cluster', where the other centres include those of the same class, got {config.alpha}"
            )


@dataclass(frozen=True, kw_only=True)
class AnchoredOptions:
    """Options of `AnchoredFlow`."""

    length_weight: float = option(
        2.0,
        "for sfm-anchored: weight of the term that pulls the lengths of the flows to those of the centres; 0 leaves them free",
        within="[0, 1e6]",
    )
    length_delta: float | None = option(
        0.1,
        "for sfm-anchored: logarithm of the ratio of lengths from which on the term grows in proportion to it, so that lengths out of reach pull no harder",
        usual="none, its square grows everywhere",
        within="(0, 1e6]",
    )


@declare
class AnchoredFlow(Method):
    """SFM with flows that start at a fixed point."""

    name, about, options = "sfm-anchored", "aligns flows from the real mean to class means", AnchoredOptions

    @classmethod
    def separates(cls, config: Any) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class MatchingOptions:
    """Options of `Matching`."""

    lgm_variant: str = option("closed-form", "for lgm: how its gradients are computed", choices=LGM_VARIANTS)


@declare
class Matching(Method):
    """LGM: linear gradient matching."""

    name, about, options = "lgm", "linear gradient matching on real images", MatchingOptions
    usual_views, needs_images, levels = 10, True, ("class",)
