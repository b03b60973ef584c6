"""Time, peak memory and predicted memory of whole distillation steps: SFM in one shot, in micro-batches, plain, and LGM's three forms.

    python benchmarks/bench_step.py --preset laptop --out benchmarks/results/cpu/step.json
    python benchmarks/bench_step.py --preset imagenet-100 --device cuda --out step.json      # random weights and images suffice

All levels of the pyramid are live. Contenders take turns; ``delta_bytes`` is the peak beyond what stands before the step (weights,
pyramid, Adam), ``peak_bytes`` everything. What runs out of memory has a row that says so. Preset laptop: a minute on 2 cores.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from baselines.step import PlainStep
from harness import environment, is_out_of_memory, matmul_rate

from sfm_fast.data.backbones import SHIPPED, Backbone, load_backbone, shape_of_backbone
from sfm_fast.data.datasets import open_dataset
from sfm_fast.data.sources import from_iterable
from sfm_fast.distill.config import DistillConfig, Execution
from sfm_fast.distill.methods import LGM_VARIANTS
from sfm_fast.distill.predict import predict_step
from sfm_fast.distill.prepare import make_distiller
from sfm_fast.files import check_output_file, write_json
from sfm_fast.report.tables import step_table
from sfm_fast.statistics import ClassStatistics
from sfm_fast.testing.perf import interleaved, peak_memory


@dataclass(frozen=True)
class Preset:
    backbone: str
    image_size: int | None
    classes: int
    channels: int
    lgm_views: int
    micro_batches: tuple[int, ...]


PRESETS = {
    "laptop": Preset(SHIPPED, None, 10, 1, 10, (5, 2)),
    "imagenet-100": Preset("vit_base_patch14_dinov2", 224, 100, 3, 10, (64, 32, 8)),
    "imagenet-1k": Preset("vit_base_patch14_dinov2", 224, 1000, 3, 3, (128, 64, 16)),
}


def open_backbone(preset: Preset, device: torch.device, precision: str, compile: bool) -> Backbone:
    """The shipped one, or a timm model with random weights: memory and time don't depend on them."""
    if preset.backbone == SHIPPED:
        return load_backbone(device=device, precision=precision, compile=compile)
    shape = shape_of_backbone(preset.backbone, image_size=preset.image_size, precision=precision)
    torch.manual_seed(0)
    model = shape.model.to_empty(device=device)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            value.normal_(std=0.02)
    model.requires_grad_(False)
    run = torch.compile(model) if compile else None
    return replace(shape, model=model, mean=shape.mean.to(device), std=shape.std.to(device), run=run)


def steps(preset: Preset, backbone: Backbone, only: str) -> dict[str, tuple[Callable[[], Any], Any]]:
    """Name -> (a step, its prediction or None), made when called: their states need not fit beside each other."""
    statistics = ClassStatistics(preset.classes, backbone.num_features)
    features = torch.randn(2 * preset.classes, backbone.num_features)
    statistics.update(features, torch.arange(len(features)) % preset.classes)
    statistics.provenance = {"channels": preset.channels}
    count, config = preset.classes, DistillConfig()
    if preset.backbone == SHIPPED:
        source = open_dataset("embedded", "train")
    else:
        side = backbone.resize
        picture = torch.rand(preset.channels, side, side)
        names = [str(c) for c in range(count)]
        source = from_iterable(
            [(picture, i % count) for i in range(count * preset.lgm_views)], class_names=names, channels=preset.channels
        )

    def made(options: dict[str, Any], execution: Execution) -> tuple[Callable[[], Any], Any]:
        configured = replace(config, **options)
        distiller = make_distiller(configured, backbone, source, statistics, execution=execution)
        distiller.grow_fully()
        stock = options.get("lgm_variant") == "stock"

        def step() -> None:
            backbone.model.requires_grad_(stock)
            distiller.step()

        found = predict_step(
            configured,
            backbone,
            count,
            preset.channels,
            int(execution.micro_batch),
            host_state=execution.state == "host",
        )
        return step, found

    def plain() -> tuple[Callable[[], Any], Any]:
        objective = make_distiller(config, backbone, None, statistics, execution=Execution(count)).objective
        labels = torch.arange(count, device=backbone.device)
        step = PlainStep(objective, backbone, labels, preset.channels, backbone.image_size)
        return lambda: step(0), None

    found: dict[str, Any] = {"SFM one-shot": lambda: made({}, Execution(count))}
    for size in preset.micro_batches:
        found[f"SFM micro-batch {size}"] = lambda size=size: made({}, Execution(size))
    size = preset.micro_batches[0]
    found[f"SFM micro-batch {size}, state on host"] = lambda: made({}, Execution(size, state="host"))
    found["SFM plain torch"] = plain
    for variant in LGM_VARIANTS:
        options = {"method": "lgm", "lgm_variant": variant, "views": preset.lgm_views}
        found[f"LGM {variant}"] = lambda options=options: made(options, Execution(count))
    chosen = {name: make for name, make in found.items() if only in name}
    if not chosen:
        raise SystemExit(f"--only {only!r}: wanted a part of one of {list(found)}")
    return chosen


def measure(preset: Preset, backbone: Backbone, rounds: int, only: str, together: bool) -> list[dict[str, Any]]:
    """One row a contender. ``together``: all alive at once and interleaved; else one after the other (on a GPU, to save memory)."""
    device, rate = backbone.device, None
    if device.type == "cuda":
        rate = _bf16_rate(device)
    makers, rows, alive = steps(preset, backbone, only), [], {}
    for name, make in makers.items():
        try:
            if device.type == "cuda":
                torch.cuda.empty_cache()
            step, prediction = make()
            step()
            delta = peak_memory(step, device)
            total = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        except (RuntimeError, MemoryError, ValueError) as error:
            if not is_out_of_memory(error) and "out of memory" not in str(error):
                raise
            rows.append({"name": name, "status": "out of memory"})
            step = prediction = None
            gc.collect()
            continue
        row: dict[str, Any] = {"name": name, "images": preset.classes, "delta_bytes": delta, "peak_bytes": total}
        if prediction is not None:
            row |= {"predicted_bytes": prediction.peak_bytes, "by_category": prediction.by_category}
            row["flops_per_step"] = prediction.flops
        rows.append(row)
        if together:
            alive[name] = step
        else:
            row |= interleaved({name: step}, rounds=rounds, device=device)[name].__dict__
            if rate and prediction is not None:
                row["flops_utilisation"] = prediction.flops / row["median"] / rate
        step = prediction = None
        gc.collect()
    if alive:
        timings = interleaved(alive, rounds=rounds, device=device)
        for row in rows:
            row |= timings[row["name"]].__dict__ if row["name"] in timings else {}
    backbone.model.requires_grad_(False)
    return rows


def _bf16_rate(device: torch.device, size: int = 8192) -> float:
    """Floating-point operations a second of a large bfloat16 matrix product."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    seconds = interleaved({"mm": lambda: torch.mm(a, a)}, rounds=11, warmup=3, device=device)["mm"].median
    return 2 * size**3 / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="laptop", help="default: %(default)s")
    parser.add_argument("--out", default="step.json", help="JSON file (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="steps timed of each (default: %(default)s)")
    parser.add_argument("--only", default="", help="contenders whose name contains this")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the backbone")
    arguments = parser.parse_args()
    check_output_file(arguments.out, "--out")
    device, preset = torch.device(arguments.device), PRESETS[arguments.preset]
    precision = "bf16" if device.type == "cuda" else "fp32"
    backbone = open_backbone(preset, device, precision, arguments.compile)
    rows = measure(preset, backbone, arguments.rounds, arguments.only, together=device.type == "cpu")
    result: dict[str, Any] = {
        "environment": environment(),
        "preset": arguments.preset,
        "backbone": backbone.name,
        "precision": precision,
        "compile": arguments.compile,
        "matmul_rate": matmul_rate(device),
        "rows": rows,
    }
    write_json(arguments.out, result)
    print(step_table(rows))


if __name__ == "__main__":
    main()
