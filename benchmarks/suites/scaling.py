"""How time and memory of one step grow with classes, images per class, views and feature width: SFM against LGM frozen.

    sfm-fast bench --preset laptop --suite scaling
    sfm-fast bench --preset imagenet-100 --suite scaling --predict

Each case varies one number of the shape; images and weights are random. A contender that is too slow for the remaining time
gets a predicted row: peak memory and operations, no time.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from sfm_fast.backbones.backbone import Backbone
from sfm_fast.backbones.load import shape_of_backbone
from sfm_fast.distill.predict import Prediction
from sfm_fast.errors import InputError, require_package

from ..cells import Cell
from ..harness import Plan
from ..presets import SCALING, VIT, StepShape
from ..registry import Cells, Options, suite
from ..rows import Row
from ..steps.contenders import Setting, Way, check_device, lgm, micro_batch, one_shot, with_random_weights
from ..steps.rows import StepRun, case_of, predicted_row, verdicts

SUITE = "scaling"
PLAN = Plan(seconds=0.5)  # for the slowest contender of a case, unless the least number of rounds takes longer
BUDGET = 60.0  # seconds for the whole suite on a CPU
LARGEST = 20.0  # seconds that one contender of one case may take


def vit_of_width(dim: int) -> Backbone:
    """A ViT like the shipped one, for 28 px with five blocks, but with another width and without weights."""
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
    """The backbone without weights; `presets.VIT` and a number is `vit_of_width`."""
    if name.startswith(VIT):
        return vit_of_width(int(name.removeprefix(VIT)))
    return shape_of_backbone(name, image_size=image_size, precision=precision)


def ways_at(shape: StepShape) -> list[Way]:
    """SFM in one shot and in micro-batches of the shape's middle size, and LGM frozen."""
    sizes = shape.micro_batches
    size = min(sizes[(len(sizes) - 1) // 2], shape.images)
    return [one_shot(shape), micro_batch(size), lgm(shape, "frozen")]


def cases(
    preset: str, device: torch.device, *, predict: bool = False, plan: Plan = PLAN, budget: float = BUDGET
) -> Iterator[Cell[str, list[Row]]]:
    """A cell for each case ("classes 20"), with one row per contender.

    predict: nothing is run. budget: seconds for all cases; rows that would exceed it are predicted. Raises ``InputError`` for a preset
    without this suite, and for a large one on a CPU.
    """
    if preset not in SCALING:
        raise InputError(f"preset must be one of {tuple(SCALING)} for the suite {SUITE!r}, got {preset!r}")
    axes = SCALING[preset]
    if not predict:
        check_device(axes.shape, device)
    clock = _Clock(plan.least + 3, budget if device.type == "cpu" else 10 * budget)
    known: dict[StepShape, list[Row]] = {}  # the unchanged shape is on every axis

    def work(name: str, varied: str, value: int, shape: StepShape, backbone: Backbone) -> list[Row]:
        if shape not in known:
            known[shape] = _case(shape, backbone, device, plan, None if predict else clock)
        return [replace(row, case=name, varied=varied, value=value) for row in known[shape]]

    for varied, value, shape in axes.points():
        backbone = shape_of(shape.backbone, shape.image_size, shape.precision)
        value = value or backbone.num_features
        name = f"{varied} {value}"
        yield Cell(name, functools.partial(work, name, varied, value, shape, backbone))


@suite(SUITE, "Scaling of whole steps", "LGM frozen", presets=SCALING, predicts=True)
def cells(preset: str, device: torch.device, options: Options) -> Cells:
    return cases(preset, device, predict=options.predict)


class _Clock:
    """Decides if a contender's ``calls`` fit into the remaining time, from its speed so far."""

    def __init__(self, calls: int, budget: float) -> None:
        self.calls, self.end = calls, time.monotonic() + budget
        self.rates: dict[bool, float] = {}  # operations per second

    def fits(self, way: Way, flops: int) -> bool:
        rate = self.rates.get(way.is_lgm)
        seconds = self.calls * flops / rate if rate else 0.0
        return seconds < LARGEST and time.monotonic() + seconds < self.end

    def learn(self, ways: Sequence[Way], rows: Sequence[Row]) -> None:
        for way, row in zip(ways, rows, strict=True):
            if row.measured and row.flops:
                self.rates[way.is_lgm] = max(row.flops / row.seconds, self.rates.get(way.is_lgm, 0.0))


def _case(shape: StepShape, empty: Backbone, device: torch.device, plan: Plan, clock: _Clock | None) -> list[Row]:
    """``clock`` None: everything is predicted."""
    guessed, ways = Setting(shape, empty), ways_at(shape)
    predictions = {way.name: _prediction(way, guessed) for way in ways}
    chosen = [way for way in ways if clock is not None and clock.fits(way, predictions[way.name].flops)]
    case = case_of(SUITE, "the shape itself", guessed)
    measured: dict[str, Row] = {}
    if clock is not None and chosen:
        backbone = with_random_weights(empty, device)
        checked = verdicts(chosen, shape, backbone)
        run = StepRun(Setting(shape, backbone), case, device, plan, checked, dict(predictions))
        (rows,) = run.measured(chosen, ("step",))
        measured = {row.contender: row for row in rows}
        clock.learn(chosen, rows)
    return [measured.get(way.name) or predicted_row(case, way, guessed, predictions[way.name]) for way in ways]


def _prediction(way: Way, setting: Setting) -> Prediction:
    prediction = way.predict(setting)
    assert prediction is not None  # all these ways are the package's own step
    return prediction
