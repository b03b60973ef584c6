"""How time and memory of one step grow with classes, images a class, views and feature width: SFM beside LGM frozen.

    sfm-fast bench --preset laptop --suite scaling
    sfm-fast bench --preset imagenet-100 --suite scaling --predict

Each case varies one number and keeps the preset's others; images and weights are random. A contender too slow for the time that is left gets a
predicted row: peak memory and operations, no time.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from sfm_fast.backbones.backbone import Backbone
from sfm_fast.backbones.load import shape_of_backbone
from sfm_fast.distill.predict import Prediction
from sfm_fast.errors import InputError, require_package

from ..harness import Row
from ..steps.contenders import (
    PRESETS,
    Preset,
    Setting,
    Way,
    check_device,
    distilled,
    lgm,
    with_random_weights,
)
from ..steps.rows import StepRun, case_of, predicted_row, verdicts

SUITE = "scaling"
SECONDS = 0.5  # that the slowest contender of a case may take, but for the least number of rounds
ROUNDS = 3
CALLS = ROUNDS + 3  # with the first, the harness's own and the one whose memory is counted
BUDGET = 60.0  # seconds for the whole suite on a CPU
LARGEST = 20.0  # seconds that one contender of one case may take


VIT = "vit_of_width_"
SMALL = replace(PRESETS["small"], backbone=f"{VIT}64")
LAPTOP = replace(PRESETS["laptop"], backbone=f"{VIT}192", data="")  # a backbone like the shipped one
LARGE = PRESETS["imagenet-100"]


@dataclass(frozen=True)
class Axes:
    """What is varied from ``preset``. dims: feature widths, of `vit_of_width`; backbones: timm models, whose widths count."""

    preset: Preset
    classes: tuple[int, ...]
    ipc: tuple[int, ...]
    views: tuple[int, ...]
    dims: tuple[int, ...] = ()
    backbones: tuple[str, ...] = ()

    def points(self) -> list[tuple[str, int, Preset]]:
        """(what is varied, its value, the preset with it), the small ones of every axis first; a width is 0 where only the backbone knows it."""
        preset = self.preset
        axes = [
            [("classes", value, replace(preset, classes=value)) for value in self.classes],
            [("ipc", value, replace(preset, ipc=value)) for value in self.ipc],
            [("views", value, replace(preset, views=value, lgm_views=value)) for value in self.views],
            [("dim", value, replace(preset, backbone=f"{VIT}{value}")) for value in self.dims]
            + [("dim", 0, replace(preset, backbone=name)) for name in self.backbones],
        ]
        return [point for places in itertools.zip_longest(*axes) for point in places if point is not None]


AXES = {
    "small": Axes(SMALL, (2, 4), (1, 2), (1,), (64,)),
    "laptop": Axes(LAPTOP, (10, 20, 50, 100), (1, 2, 5, 10), (1, 3, 4, 10), (96, 192, 384, 768)),
    "imagenet-100": Axes(
        LARGE,
        (10, 100, 1000, 10000),
        (1, 2, 5, 10),
        (1, 3, 4, 10),
        backbones=tuple(f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large")),
    ),
}


def vit_of_width(dim: int) -> Backbone:
    """A ViT like the shipped one, on 28 px in five blocks, but of another width, without weights."""
    require_package("timm", "building a backbone", "distill")
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        model = VisionTransformer(
            img_size=28, patch_size=7, in_chans=1, num_classes=0, embed_dim=dim, depth=5, num_heads=max(1, dim // 64),
            class_token=False, global_pool="avg",
        )  # fmt: skip
    constants = (torch.tensor([0.286]), torch.tensor([0.353]))  # those of the shipped one
    model = model.eval().requires_grad_(False)
    return Backbone(f"ViT of width {dim}", model, *constants, 28, 28, 1, dim, "random weights")


@functools.lru_cache(maxsize=16)
def shape_of(name: str, image_size: int | None, precision: str) -> Backbone:
    """The backbone without weights; ``VIT`` and a number is `vit_of_width`."""
    if name.startswith(VIT):
        return vit_of_width(int(name.removeprefix(VIT)))
    return shape_of_backbone(name, image_size=image_size, precision=precision)


def ways_at(preset: Preset) -> list[Way]:
    """SFM in one shot and in micro-batches of the preset's middle size, and LGM frozen."""
    sizes = preset.micro_batches
    size = min(sizes[(len(sizes) - 1) // 2], preset.images)
    return [
        Way("SFM one-shot", distilled, preset.images),
        Way(f"SFM micro-batch {size}", distilled, size),
        lgm(preset, "frozen"),
    ]


def rows(
    preset: str,
    device: torch.device,
    only: str = "",
    *,
    predict: bool = False,
    seconds: float = SECONDS,
    budget: float = BUDGET,
) -> Iterator[list[Row]]:
    """The rows of each case whose name ("classes 20") contains ``only``: facts ``varied`` and ``value``, one row a contender.

    predict: nothing is run; peak memory and operations are counted. budget: seconds for all cases; what would exceed it is predicted.
    Raises ``InputError`` for a preset without this suite, and for a large one on a CPU.
    """
    if preset not in AXES:
        raise InputError(f"preset must be one of {tuple(AXES)} for the suite {SUITE!r}, got {preset!r}")
    axes = AXES[preset]
    if not predict:
        check_device(axes.preset, device)
    clock = _Clock(budget if device.type == "cpu" else 10 * budget)
    done: dict[Preset, list[Row]] = {}  # the preset itself is on every axis
    for varied, value, point in axes.points():
        backbone = shape_of(point.backbone, point.image_size, point.precision)
        value = value or backbone.num_features
        name = f"{varied} {value}"
        if only not in name:
            continue
        if point not in done:
            done[point] = _case(point, backbone, device, predict, seconds, clock)
        yield [{**row, "case": name, "varied": varied, "value": value} for row in done[point]]


class _Clock:
    """Says whether a contender fits into the time that is left, from how fast it has been so far."""

    def __init__(self, budget: float) -> None:
        self.end = time.monotonic() + budget
        self.rates: dict[bool, float] = {}  # operations a second

    def fits(self, way: Way, flops: int) -> bool:
        rate = self.rates.get(way.is_lgm)
        seconds = CALLS * flops / rate if rate else 0.0
        return seconds < LARGEST and time.monotonic() + seconds < self.end

    def learn(self, ways: Sequence[Way], rows: Sequence[Row]) -> None:
        for way, row in zip(ways, rows, strict=True):
            if row["status"] == "ok":
                self.rates[way.is_lgm] = max(row["flops"] / row["median"], self.rates.get(way.is_lgm, 0.0))


def _case(
    preset: Preset, shape: Backbone, device: torch.device, predict: bool, seconds: float, clock: _Clock
) -> list[Row]:
    guessed, ways = Setting(preset, shape), ways_at(preset)
    predictions = {way.name: _prediction(way, guessed) for way in ways}
    chosen = [] if predict else [way for way in ways if clock.fits(way, predictions[way.name].flops)]
    case = {"suite": SUITE, **case_of(guessed, "")}
    measured: dict[str, Row] = {}
    if chosen:
        backbone = with_random_weights(shape, device)
        checked = verdicts(chosen, preset, backbone)
        run = StepRun(Setting(preset, backbone), case, device, seconds, checked, dict(predictions), ROUNDS)
        (found,) = run.measured(chosen, ("step",))
        measured = {row["contender"]: row for row in found}
        clock.learn(chosen, found)
    return [measured.get(way.name) or predicted_row(case, way, guessed, predictions[way.name]) for way in ways]


def _prediction(way: Way, setting: Setting) -> Prediction:
    found = way.predict(setting)
    assert found is not None  # these ways all are the package's own step
    return found
