"""Rows of steps: the verdict on every contender's gradient, its prediction, and its measurement on a CPU or a GPU."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sfm_fast.backbones.backbone import Backbone
from sfm_fast.distill.predict import Prediction
from sfm_fast.measure.memory import living_bytes

from ..harness import Contender, Plan, attempt, measure, release
from ..machine import card_memory
from ..presets import StepShape
from ..rows import STANDING, Row
from .contenders import Made, Setting, Way, lgm, reference

STEPS = 5  # in mode "steps"
TOLERANCE = {"cpu": 1e-3, "cuda": 2e-2}  # of the gradient, relative; a GPU's convolutions round to TF32
SHRUNKEN = 8  # classes of a large shape on which results are compared
Predictions = dict[str, Prediction | None]  # by contender


def shrunken(shape: StepShape) -> StepShape:
    """``shape``, or a few classes of a large one."""
    return replace(shape, classes=SHRUNKEN, lgm_views=2) if shape.large else shape


def verdicts(
    ways: Sequence[Way], shape: StepShape, backbone: Backbone, tolerance: float | None = None
) -> dict[str, str]:
    """Name -> "" if the gradient of the first step is right, else the status with the reason; on the `shrunken` shape, in float32.

    The expected gradient is autograd's for the definition in plain torch for SFM (without noise for a way whose noise isn't the
    package's), and double backward's for LGM. tolerance: instead of `TOLERANCE` of the device. In bfloat16, features differ too little between images with random weights.
    """
    small, device = shrunken(shape), backbone.device
    allowed = TOLERANCE[device.type] if tolerance is None else tolerance
    # As loaded, because LGM stock runs in this way and folded weights of bfloat16 are others.
    plain = backbone.unprepared()
    exact = replace(plain, model=copy.deepcopy(plain.model).float(), precision="fp32", run=None)
    expected: dict[tuple[str, bool], Tensor] = {}

    def first_gradient(way: Way, noise: bool) -> Tensor:
        made = way.make(Setting(small, exact, noise=noise), way)
        made.step()
        return made.gradient().float().cpu()

    checked = {}
    for way in ways:
        judge = lgm(small, "frozen") if way.is_lgm else Way("SFM reference", reference, small.images, way.config)
        checked[way.name] = ""
        if way.name == judge.name:
            continue
        key = (way.method, way.replays_noise)
        if key not in expected:
            expected[key] = first_gradient(judge, way.replays_noise)
        part = replace(way, micro_batch=max(1, way.micro_batch * small.images // shape.images))
        gradient, _, verdict = attempt(functools.partial(first_gradient, part, part.replays_noise), device)
        if not verdict:
            off = float((gradient - expected[key]).norm() / expected[key].norm())
            if not off <= allowed:
                verdict = f"wrong result: gradient off by {off:.0e}"
        checked[way.name] = verdict
    return checked


def case_of(suite: str, name: str, setting: Setting) -> Row:
    """The common fields of all rows of the case ``name``."""
    shape, backbone = setting.shape, setting.backbone
    return Row(
        suite, name, backbone=backbone.name, precision=backbone.precision, classes=shape.classes, ipc=shape.ipc,
        dim=backbone.num_features, image_size=backbone.image_size,
    )  # fmt: skip


def row_of(case: Row, way: Way, setting: Setting, prediction: Prediction | None = None, steps: int = 1) -> Row:
    """The row of one contender in ``case``, with the values that are known without a measurement."""
    row = replace(
        case, contender=way.name, mode="step" if steps == 1 else "steps", ours=way.ours, micro_batch=way.micro_batch,
        compiled=setting.backbone.run is not None, images=setting.shape.images, steps=steps,
        views=setting.config(way.config).views_per_step,
    )  # fmt: skip
    if prediction is not None:
        row.predicted_bytes, row.by_category = prediction.peak_bytes, prediction.by_category
        row.flops = prediction.flops * steps
    return row


def predicted_row(case: Row, way: Way, setting: Setting, prediction: Prediction) -> Row:
    """A row without times: ``peak_bytes`` beyond weights, pyramid and Adam, ``absolute_bytes`` with them."""
    total, standing = prediction.peak_bytes, sum(prediction.by_category[name] for name in STANDING)
    return replace(
        row_of(case, way, setting, prediction), status="predicted", predicted_bytes=None, peak_bytes=total - standing,
        absolute_bytes=total, host_bytes=prediction.host_bytes,
    )  # fmt: skip


@dataclass
class _Alive:
    """A contender that is ready to run, or the status with the reason why it isn't; seconds of its first call."""

    way: Way
    made: Made | None
    verdict: str
    first: float


@dataclass
class StepRun:
    """Measures contenders on ``setting``. case: of `case_of`. checked: of `verdicts`. predictions: for the rows of measurements."""

    setting: Setting
    case: Row
    device: torch.device
    plan: Plan
    checked: dict[str, str]
    predictions: Predictions

    def measured(self, ways: Sequence[Way], modes: Sequence[str]) -> Iterator[list[Row]]:
        """The rows of each mode ("step", "steps"), one for each of ``ways``."""
        return self._together(ways, modes) if self.device.type == "cpu" else self._one_by_one(ways, modes)

    def _alive(self, way: Way) -> _Alive:
        made, verdict, first = None, self.checked[way.name] or self._too_large(way), 0.0
        if not verdict:
            made, _, verdict = attempt(lambda: way.make(self.setting, way), self.device)
        if made is not None:
            _, first, verdict = attempt(made.step, self.device)
        return _Alive(way, None if verdict else made, verdict, first)

    def _too_large(self, way: Way) -> str:
        """The status of a step whose predicted peak is more than a GPU's memory, else "": trying it would take long and fail.

        Memory in use counts as available: the weights are part of the peak, and the first contender is removed if necessary.
        """
        prediction, room = self.predictions[way.name], card_memory(self.device)
        if prediction is None or room is None or prediction.peak_bytes <= room:
            return ""
        return f"out of memory: predicted {prediction.peak_bytes / 1e9:.1f} GB, the card has {room / 1e9:.1f} GB"

    def _rows(self, every: Sequence[_Alive], mode: str) -> list[Row]:
        steps, contenders = STEPS if mode == "steps" else 1, []
        for one in every:
            row = row_of(self.case, one.way, self.setting, self.predictions[one.way.name], steps)
            call = _several(one.made.step if one.made is not None else _nothing, steps)
            contenders.append(Contender(row, call, one.verdict, one.first))
        rows = measure(contenders, self.device, self.plan)
        if mode == "steps" or self.setting.backbone.run is None:
            for row in rows:
                row.first_seconds = None  # the verdict's step was earlier; only the compilation remains
        return rows

    def _together(self, ways: Sequence[Way], modes: Sequence[str]) -> Iterator[list[Row]]:
        """All contenders in memory at once and measured in turn."""
        every = [self._alive(way) for way in ways]
        for mode in modes:
            yield self._rows(every, mode)

    def _one_by_one(self, ways: Sequence[Way], modes: Sequence[str]) -> Iterator[list[Row]]:
        """To save a GPU's memory: each contender in turn with only the first one, which between steps has a pyramid and two moments."""
        base, base_bytes = self._first(ways[0])
        rows = {mode: self._rows([base], mode) for mode in modes}
        for way in ways[1:]:
            group = self._beside(base, way, modes)
            if any(row.status == "out of memory" for row in group.values()):  # again with all memory, but no ratio
                base.made, base.verdict, base_bytes = None, "out of memory", 0
                group = self._beside(base, way, modes)
                base, base_bytes = self._first(ways[0])
            for mode, row in group.items():
                if row.absolute_bytes is not None:
                    row.absolute_bytes -= base_bytes
                rows[mode].append(row)
        yield from rows.values()

    def _first(self, way: Way) -> tuple[_Alive, int]:
        """The contender, and the bytes it takes between steps."""
        release(self.device)
        before = living_bytes(self.device)
        alive = self._alive(way)
        release(self.device)
        return alive, living_bytes(self.device) - before

    def _beside(self, base: _Alive, way: Way, modes: Sequence[str]) -> dict[str, Row]:
        release(self.device)
        one = self._alive(way)
        return {mode: self._rows([base, one], mode)[1] for mode in modes}


def _nothing() -> None:
    """The call of a contender that never runs."""


def _several(step: Callable[[], Any], steps: int) -> Callable[[], None]:
    def call() -> None:
        for _ in range(steps):
            step()

    return call
