"""Time, peak memory and operations of whole distillation steps: SFM's ways of running one against LGM's three forms.

    sfm-fast bench --preset laptop --suite step
    sfm-fast bench --preset imagenet-100 --suite step --predict      # no GPU, no weights

All levels of the pyramid are live. Mode "step" is one step; "steps" is `STEPS` in a row. Each has all parts of a run: views, Adam,
LGM's batch of real images. First, the gradient of each contender's first step is checked against autograd of the definition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..cells import Cell
from ..harness import Plan, add_share
from ..machine import matmul_rate
from ..presets import STEPS, StepShape
from ..registry import Cells, Options, suite
from ..rows import Row
from ..steps.contenders import Setting, Way, check_device, find_shape, open_backbone, ways_of
from ..steps.rows import StepRun, case_of, predicted_row, verdicts

SUITE = "step"
MODES = ("step", "steps")
PLAN = Plan(seconds=3.0)


def rows(
    preset: str | StepShape,
    device: torch.device,
    *,
    modes: Sequence[str] = MODES,
    plan: Plan = PLAN,
    options: Options = Options(),
    ways: Sequence[Way] | None = None,
) -> list[Row]:
    """One row for each of ``modes`` and contender; with ``options.predict`` only memory and operations, without a device.

    ways: contenders instead of the shape's own. Raises ``InputError`` for an unknown preset, or a large one on a CPU.
    """
    shape = find_shape(preset)
    if not options.predict:
        check_device(shape, device)
    chosen = ways_of(shape) if ways is None else list(ways)
    backbone = open_backbone(shape, device, compile=options.compile, weights=not options.predict)
    setting = Setting(shape, backbone)
    case = case_of(SUITE, case_name(shape, options), setting)
    predictions = {way.name: way.predict(setting) for way in chosen}
    if options.predict:
        known = [(way, predictions[way.name]) for way in chosen]
        return [predicted_row(case, way, setting, guess) for way, guess in known if guess is not None]
    run = StepRun(setting, case, device, plan, verdicts(chosen, shape, backbone), predictions)
    rate = matmul_rate(device) if device.type == "cpu" else matmul_rate(device, 8192, backbone.dtype)
    measured = [row for mode in run.measured(chosen, modes) for row in mode]
    for row in measured:
        if row.flops:
            add_share(row, {"matmul_rate": rate}, flops=row.flops)
    return measured


def case_name(shape: StepShape, options: Options) -> str:
    return f"{shape.name}: {shape.classes} classes, ipc {shape.ipc}" + (", torch.compile" if options.compile else "")


@suite(SUITE, "Whole steps", "a plain torch step; LGM closed-form, frozen and stock", presets=STEPS, predicts=True)
def cells(preset: str, device: torch.device, options: Options) -> Cells:
    yield Cell(case_name(STEPS[preset], options), lambda: rows(preset, device, options=options))
