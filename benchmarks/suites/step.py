"""Time, peak memory and operations of whole distillation steps: SFM's ways of running one beside LGM's three forms.

    sfm-fast bench --preset laptop --suite step
    sfm-fast bench --preset imagenet-100 --suite step --predict      # no GPU, no weights
    pytest benchmarks/suites/step.py --benchmark-enable

All levels of the pyramid are live. Mode "step" is one step; "steps" is `STEPS` in a row. Each does all that a run does: views, Adam, LGM's
batch of real images. Before any time is taken, the first step's gradient of each contender is held against autograd of the definition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..harness import Row, benchmark_rows, share_of
from ..machine import matmul_rate
from ..steps.contenders import (
    PRESETS,
    Preset,
    Setting,
    Way,
    check_device,
    find_preset,
    open_backbone,
    ways_of,
)
from ..steps.rows import StepRun, case_of, predicted_row, verdicts

SUITE = "step"
MODES = ("step", "steps")
SECONDS = 3.0  # that the slowest contender may take for each mode


def rows(
    preset: str | Preset,
    device: torch.device,
    only: str = "",
    *,
    modes: Sequence[str] = MODES,
    seconds: float = SECONDS,
    min_rounds: int = 5,
    compile: bool = False,
    predict: bool = False,
    ways: Sequence[Way] | None = None,
) -> Iterator[list[Row]]:
    """The rows of each of ``modes``, where the case's name contains ``only``: one for each contender.

    predict: memory and operations from fake tensors instead, status "predicted"; no device is used. ways: contenders instead of
    the preset's own. Raises ``InputError`` for an unknown preset, or a large one on a CPU.
    """
    preset = find_preset(preset)
    if not predict:
        check_device(preset, device)
    name = f"{preset.name}: {preset.classes} classes, ipc {preset.ipc}" + (", torch.compile" if compile else "")
    every = ways_of(preset) if ways is None else list(ways)
    chosen = every if only in name else []
    if not chosen:
        return
    backbone = open_backbone(preset, device, compile=compile, weights=not predict)
    setting = Setting(preset, backbone)
    case = {"suite": SUITE, **case_of(setting, name)}
    predictions = {way.name: way.predict(setting) for way in chosen}
    if predict:
        found = [(way, predictions[way.name]) for way in chosen]
        yield [predicted_row(case, way, setting, guess) for way, guess in found if guess is not None]
        return
    checked = verdicts(chosen, preset, backbone)
    run = StepRun(setting, case, device, seconds, checked, predictions, min_rounds)
    rate = matmul_rate(device) if device.type == "cpu" else matmul_rate(device, 8192, backbone.dtype)
    for found_rows in run.measured(chosen, modes):
        for row in found_rows:
            if row.get("flops"):
                row |= share_of(row, {"matmul_rate": rate}, flops=row["flops"])
        yield found_rows


def test_step(benchmark: Any) -> None:
    preset, device = PRESETS["laptop"], torch.device("cpu")
    (found,) = rows(preset, device, modes=("step",), seconds=1.0)
    setting = Setting(preset, open_backbone(preset, device))
    steps = {way.name: way.make(setting, way).step for way in ways_of(preset)}
    ours = steps.pop("SFM one-shot")
    benchmark_rows(benchmark, found, ours, steps)
