"""Which suites a preset runs, and the result file they fill: one JSON a preset, written after every case."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sfm_fast.errors import InputError

from .harness import Row
from .machine import environment
from .report.rows import FORMAT
from .suites import images as bench_render_augment
from .suites import loading as bench_loading
from .suites import losses as bench_flow_alignment
from .suites import scaling as bench_scaling
from .suites import startup as bench_startup
from .suites import step as bench_step

Result = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """A set of suites for one kind of machine."""

    suites: tuple[str, ...]
    about: str
    gpu: bool = False


PRESETS = {
    "laptop": Preset(
        ("losses", "images", "step", "loading", "scaling", "startup"),
        "embedded data and the shipped backbone, about ten minutes on 2 cores",
    ),
    "imagenet-100": Preset(
        ("losses", "images", "step", "loading", "scaling"), "ViT-B/14 and 100 classes, for a GPU or --predict", gpu=True
    ),
    "imagenet-1k": Preset(
        ("losses", "images", "step", "loading"), "ViT-B/14 and 1000 classes, for a GPU or --predict", gpu=True
    ),
    "full": Preset(("losses",), "the losses at every number of classes and features: half an hour on 2 cores"),
    "small": Preset(("losses", "images", "step", "startup"), "small shapes: does everything run"),
}
SUITES: dict[str, Callable[..., Iterator[list[Row]]]] = {
    "losses": bench_flow_alignment.rows,
    "images": bench_render_augment.rows,
    "step": bench_step.rows,
    "loading": bench_loading.rows,
    "scaling": bench_scaling.rows,
    "startup": bench_startup.rows,
}
PREDICTED = ("step", "scaling")  # what can be said without running it


def run(
    preset: str,
    device: torch.device,
    *,
    suites: Sequence[str] = (),
    only: str = "",
    predict: bool = False,
    compile: bool = False,
    before: Result | None = None,
) -> Iterator[tuple[list[Row], Result]]:
    """Yield each case's rows and the whole result so far.

    suites: some of the preset's (default: all). only: cases whose name contains this. predict: nothing is run, peak memory and
    operations of steps are counted. compile: torch.compile of the backbone in steps. before: a result whose other rows stay.
    """
    chosen = _choose(preset, suites, predict)
    if PRESETS[preset].gpu and device.type == "cpu" and not predict:
        raise InputError(
            f"preset {preset}: wants a GPU, as a step would take minutes on a CPU; give --predict, or --device cuda"
        )
    kept = before["rows"] if before else []
    for name in ("cpu", "gpu", "torch", "threads"):
        mine, old = environment(device)[name], before["environment"].get(name) if before else None
        if before and mine != old:
            raise InputError(
                f"the result's other rows were measured with {name} {old}, this run has {mine}: give another --out"
            )
    result: Result = {"format": FORMAT, "preset": preset, "environment": environment(device), "rows": kept}
    for suite in chosen:
        options: dict[str, Any] = {"only": only}
        if suite in PREDICTED:
            options["predict"] = predict
        if suite == "step":
            options["compile"] = compile
        for rows in SUITES[suite](preset, device, **options):
            fresh = [{**row, "commit": result["environment"]["commit"]} for row in rows]
            result["rows"] = merged(result["rows"], fresh)
            yield fresh, result


def _choose(preset: str, suites: Sequence[str], predict: bool) -> list[str]:
    if preset not in PRESETS:
        raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    offered = [name for name in PRESETS[preset].suites if not predict or name in PREDICTED]
    unknown = [name for name in suites if name not in offered]
    if unknown or not offered:
        wanted = f"preset {preset}{' with --predict' if predict else ''} has {', '.join(offered) or 'none'}"
        raise InputError(f"suite: {wanted}; got {', '.join(unknown) or 'none'}")
    return list(suites) or offered


def _key(row: Row) -> tuple[str, str, str]:
    """The rows that were measured against each other have the same."""
    return row["suite"], row["case"], row["mode"]


def merged(rows: Sequence[Row], fresh: Sequence[Row]) -> list[Row]:
    """``rows`` with those of a case that was measured again replaced, in their old place; new cases of a suite at its end."""
    again = {_key(row) for row in fresh}
    place = next((i for i, row in enumerate(rows) if _key(row) in again), None)
    if place is None:
        same = [i for i, row in enumerate(rows) if row["suite"] == fresh[0]["suite"]] if fresh else []
        place = same[-1] + 1 if same else len(rows)
    left = [row for row in rows[:place] if _key(row) not in again]
    right = [row for row in rows[place:] if _key(row) not in again]
    return [*left, *fresh, *right]
