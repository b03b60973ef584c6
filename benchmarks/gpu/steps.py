"""Whole distillation steps on a GPU, each alone on it: time, images a second, share of the card's products, peak memory.

    python -m sfm_fast.benchmarks.gpu.steps --preset imagenet-100 --out steps.json [--device cuda] [--seconds 86]

SFM in one shot and in micro-batches of 32 and 8, LGM frozen, and LGM stock where its predicted peak fits into the card; SFM in one shot
once more at the end, for what the machine does meanwhile. A JSON row, and a line, as soon as each is measured; several presets may
go into one file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import sfm_fast
from sfm_fast.files import write_json
from sfm_fast.measure.memory import peak_memory
from sfm_fast.measure.timing import samples, summary

from ..harness import attempt, release
from ..machine import card_memory, environment, matmul_rate
from ..presets import StepShape
from ..steps.contenders import (
    ANCHORED,
    Setting,
    Way,
    check_device,
    find_shape,
    lgm,
    micro_batch,
    one_shot,
    open_backbone,
)
from .record import Record, Taken, read_rows, why

FORMAT = "sfm_fast GPU steps 1"
MICRO_BATCHES = (32, 8)
LONGEST = 4.0  # maximum seconds of timing one contender
AGAIN = "SFM one-shot, again"


@dataclass
class StepTime(Taken):
    """One row: a step of ``contender`` at ``preset``. peak_bytes: beyond weights, pyramid and Adam's state."""

    preset: str
    contender: str
    status: str = "ok"
    images: int = 0
    micro_batch: int = 0
    seconds: float | None = None
    p20: float | None = None
    p80: float | None = None
    rounds: int = 0
    images_per_second: float | None = None
    flops: int | None = None
    mfu: float | None = None
    peak_bytes: int | None = None
    predicted_bytes: int | None = None
    first_seconds: float | None = None

    def line(self) -> str:
        if self.seconds is None:
            return f"{self.preset}, {self.contender}: {self.status}"
        line = f"{self.preset}, {self.contender}: {self.seconds * 1e3:.4g} ms, {self.images_per_second:.4g} images/s"
        if self.mfu is not None:
            line += f", {100 * self.mfu:.0f} % of the products' rate"
        if self.peak_bytes is not None and self.predicted_bytes is not None:
            line += f", peak {self.peak_bytes / 1e9:.3g} GB (with all that stands, predicted {self.predicted_bytes / 1e9:.3g})"
        return line + ("" if self.status == "ok" else f", {self.status}")


def ways(shape: StepShape) -> list[Way]:
    sizes = [size for size in MICRO_BATCHES if size < shape.images] or [max(1, shape.images // 2)]
    own = [one_shot(shape), *(micro_batch(size) for size in sizes), micro_batch(sizes[-1], method=ANCHORED)]
    return [*own, lgm(shape, "frozen"), lgm(shape, "stock"), one_shot(shape, AGAIN)]


Predicted = dict[str, dict[str, list[int]]]  # preset -> way -> peak bytes, operations


def predict(names: Sequence[str]) -> Predicted:
    """The predictions for every way of these presets, on fake tensors: they take seconds each, which a run on a GPU saves."""
    predicted: Predicted = {}
    for name in names:
        shape = find_shape(name)
        setting = Setting(shape, open_backbone(shape, torch.device("cpu"), weights=False))
        predicted[name] = {}
        for way in ways(shape):
            prediction = way.predict(setting)
            assert prediction is not None
            predicted[name][way.name] = [prediction.peak_bytes, prediction.flops]
    return predicted


def measured(way: Way, setting: Setting, rate: float, predicted: Predicted) -> StepTime:
    """A step of ``way``: predicted first, and run if the prediction fits the memory."""
    device, name = setting.backbone.device, setting.shape.name
    row = StepTime(name, way.name, images=setting.shape.images, micro_batch=way.micro_batch)
    if way.name in predicted.get(name, {}):
        row.predicted_bytes, row.flops = predicted[name][way.name]
    elif (prediction := way.predict(setting)) is not None:
        row.predicted_bytes, row.flops = prediction.peak_bytes, prediction.flops
    room = card_memory(device)
    if room is not None and row.predicted_bytes is not None and row.predicted_bytes > room:
        row.status = f"left out: predicted {row.predicted_bytes / 1e9:.0f} GB, the card has {room / 1e9:.0f} GB"
        return row
    made, _, status = attempt(lambda: way.make(setting, way), device)
    if made is not None:
        _, row.first_seconds, status = attempt(made.step, device)
    if made is None or status:
        row.status = status
        return row

    def run() -> None:
        once = summary(samples({"step": made.step}, rounds=1, device=device, events=True)["step"]).median
        longest = LONGEST if device.type == "cuda" else LONGEST / 8
        rounds = int(min(20, max(3 if device.type == "cuda" else 1, longest / max(once, 1e-9))))
        timing = summary(samples({"step": made.step}, rounds=rounds, warmup=0, device=device, events=True)["step"])
        row.seconds, row.p20, row.p80, row.rounds = timing.median, timing.p20, timing.p80, timing.rounds
        row.images_per_second = row.images / timing.median
        if row.flops:
            row.mfu = row.flops / timing.median / rate
        row.peak_bytes = peak_memory(made.step, device)

    _, _, status = attempt(run, device)
    row.status = status or row.status
    return row


def run(name: str, device: torch.device, out: Path, seconds: float, predicted: Predicted) -> bool:
    """Measure all ways of preset ``name`` until ``seconds`` are over; whether each was measured, or left out for its memory."""
    shape = find_shape(name)
    check_device(shape, device)
    setting = Setting(shape, open_backbone(shape, device))
    backbone = setting.backbone
    rate = matmul_rate(device) if device.type == "cpu" else matmul_rate(device, 8192, backbone.dtype)
    head = {"format": FORMAT, "environment": environment(device), "products_rate": rate}
    record = Record(out, head, seconds, [row for row in read_rows(out) if row["preset"] != name])
    print("== losses by", sfm_fast.explain(torch.empty(1, 1, device=device)).backend, flush=True)
    right = True
    for way in ways(shape):
        if record.over(f"{way.name} is"):
            continue
        try:
            row = measured(way, setting, rate, predicted)
        except Exception as error:  # any error concerns only this contender
            row = StepTime(name, way.name, why(error))
        right = right and (row.status == "ok" or row.status.startswith("left out"))
        record.add(row)
        release(device)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", required=True, help="one; several with --predict")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=86.0)
    parser.add_argument(
        "--predict", action="store_true", help="write predictions of all ways to --out, and run nothing"
    )
    parser.add_argument("--predicted", type=Path, help="such a file")
    options = parser.parse_args()
    if options.predict:
        write_json(options.out, predict(options.preset))
        return
    known = options.predicted is not None and options.predicted.exists()
    predicted: Predicted = json.loads(options.predicted.read_text()) if known else {}
    (name,) = options.preset
    if not run(name, torch.device(options.device), options.out, options.seconds, predicted):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
