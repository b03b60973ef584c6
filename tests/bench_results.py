"""Benchmark results made up for tests of what is written of them: every suite, and what is only predicted."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from sfm_fast.benchmarks.rows import Claim, Result, Row
from sfm_fast.measure.timing import Ratio, Timing

HARDWARE = "Testing CPU <i>9000</i>"
ENVIRONMENT = {
    "cpu": HARDWARE, "cores": 4, "threads": 3, "memory_bytes": 8_000_000_000, "gpu": None, "python": "3.11.7",
    "torch": "2.99.0", "triton": None, "sfm_fast": "1.2.3", "commit": "abc1234", "dirty": False,
}  # fmt: skip
PARTS = {"parameters": 9_000_000, "pyramid": 500_000, "adam": 500_000, "activations": 6_000_000, "workspace": 1_000_000}


def row(suite: str, case: str, contender: str, mode: str, median: float | None, ratio: Any = None, **facts: Any) -> Row:
    """A row; ``median``: seconds, or None with ``status`` among the facts; ``ratio``: (median, low, high)."""
    found = Row(suite, case, contender, mode, ours=contender.startswith(("sfm_fast", "SFM")))
    if median is not None:
        found.take(Timing(median, 0.9 * median, 1.2 * median, 11))
    if ratio is not None:
        found.ratio = Ratio(*ratio)
    return replace(found, **facts)


def loss_rows() -> list[Row]:
    rows = []
    for alignment in ("global", "pair"):
        for classes, dim in ((10, 384), (100, 384), (1000, 384), (1000, 768), (10, 768)):
            case = {"alignment": alignment, "classes": classes, "dim": dim, "ipc": 1, "dtype": "float32"}
            name = f"{alignment} {classes}x{dim}"
            base = classes * dim * 1e-9
            rows += [
                row(
                    "losses",
                    name,
                    "sfm_fast cpu",
                    "both",
                    base,
                    (1, 1, 1),
                    peak_bytes=classes * dim * 4,
                    copy_fraction=0.88,
                    **case,
                ),
                row("losses", name, "sfm_fast torch", "both", 0.5 * base, (0.5, 0.4, 0.6), peak_bytes=8, **case),
                row(
                    "losses", name, "eager", "both", 3.1 * base, (3.1, 2.9, 3.3), peak_bytes=classes * dim * 16, **case
                ),
            ]
            lost = alignment == "pair" and classes == 1000
            status = {"status": "out of memory"} if lost else {"peak_bytes": classes**2 * dim * 4}
            rows.append(
                row(
                    "losses",
                    name,
                    "C x C x D",
                    "both",
                    None if lost else 9 * base,
                    None if lost else (9, 8, 10),
                    **status,
                    **case,
                )
            )
    wrong = {"status": "wrong result: gradient off by 3e-1", "alignment": "global", "classes": 10, "dim": 384, "ipc": 1}
    return [*rows, row("losses", "global 10x384", "KeOps | <b>", "both", None, **wrong)]


def step_rows() -> list[Row]:
    case = {"backbone": "vit", "classes": 10, "ipc": 1, "dtype": "float32", "images": 10}
    guess = {"predicted_bytes": 17_000_000, "by_category": PARTS}
    return [
        row("step", "laptop", "SFM one-shot", "step", 0.02, (1, 1, 1), peak_bytes=7_300_000, first_seconds=0.9, views=1, micro_batch=10, **guess, **case),
        row("step", "laptop", "SFM micro-batch 5", "step", 0.03, (1.5, 1.4, 1.6), peak_bytes=3_700_000, views=1, micro_batch=5, **case),
        row("step", "laptop", "LGM frozen", "step", 0.18, (9.0, 8.7, 9.4), peak_bytes=73_000_000, first_seconds=0.4, views=10, **case),
        row("step", "laptop", "LGM stock", "step", None, status="out of memory", views=10, **case),
    ]  # fmt: skip


def scaling_rows() -> list[Row]:
    """Each axis with all of its values, that of the setting itself among them."""
    rows = []
    for axis, values in (("classes", (10, 20, 40)), ("ipc", (1, 2, 5)), ("dim", (192, 384)), ("views", (10, 1, 5))):
        for value in values:
            case = {"classes": 10, "ipc": 1, "dim": 192, "precision": "fp32", "varied": axis, "value": value}
            ours = case | {"views": 1} | {axis: value}
            theirs = case | {"views": 10} | {axis: value}
            name, size = f"{axis} {value}", value * 1000
            if axis != "views":
                rows.append(
                    row("scaling", name, "SFM one-shot", "step", 0.001 * value, (1, 1, 1), peak_bytes=size, **ours)
                )
            rows.append(
                row("scaling", name, "LGM frozen", "step", 0.01 * value, (10, 9, 11), peak_bytes=9 * size, **theirs)
            )
    lost = {"status": "out of memory", "varied": "classes", "classes": 80, "ipc": 1}
    return [*rows, row("scaling", "classes 80", "LGM frozen", "step", None, **lost)]


def laptop() -> Result:
    image = {"images": 10, "canvas": 256, "size": 224, "channels": 3, "dtype": "bfloat16"}
    other = [
        row("images", "ten", "sfm_fast cpu", "forward", 0.0035, (1, 1, 1), peak_bytes=16_500_000, **image),
        row("images", "ten", "operation by operation", "forward", 0.002, (0.57, 0.5, 0.62), peak_bytes=141_000_000, **image),
        row("images", "ten", "sfm_fast cpu", "both", 0.0118, (1, 1, 1), peak_bytes=16_500_000, extra_bytes=0, first_seconds=0.5, **image),
        row("images", "ten", "operation by operation", "both", 0.14, (11.8, 11.6, 12.0), peak_bytes=141_600_000, extra_bytes=125_100_000, first_seconds=0.2, **image),
        row("loading", "ImageNet JPEGs", "LGM, DataLoader", "load", 0.25, (1, 1, 1), images=100, first_seconds=9, peak_bytes=9),
        row("loading", "ImageNet JPEGs", "LGM, works ahead", "load", 0.1, (0.4, 0.3, 0.5), images=100, first_seconds=1, peak_bytes=1),
        row("startup", "import", "sfm_fast", "once", 1.5),
        row("startup", "import sfm_fast.extra", "sfm_fast", "once", None, status="unsupported: not built"),
    ]  # fmt: skip
    rows = [*loss_rows(), *step_rows(), *scaling_rows(), *other]
    return Result("laptop", dict(ENVIRONMENT), rows)


def imagenet() -> Result:
    case = {"classes": 100, "ipc": 1, "dtype": "bf16", "by_category": PARTS}
    rows = [
        row("step", "imagenet-100", "SFM one-shot", "step", None, status="predicted", peak_bytes=5_460_000_000, absolute_bytes=5_630_000_000, **case),
        row("step", "imagenet-100", "LGM frozen", "step", None, status="predicted", peak_bytes=51_720_000_000, absolute_bytes=51_890_000_000, **case),
    ]  # fmt: skip
    gpu = ENVIRONMENT | {"gpu": "Testing GPU 200"}
    return Result("imagenet-100", gpu, rows)


CLAIMS = [
    Claim("memory", "ImageNet-100", "SFM one-shot", 54.61, "predicted", "x less memory", 10, 50),
    Claim("accuracy", "laptop", "sfm", -3.214, "measured", "points above LGM", -0.5, standard_error=0.41),
]


def cells(table: str) -> list[list[str]]:
    """The body of every Markdown table in the text, cell by cell."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def line_of(table: str, *wanted: str) -> list[str]:
    """The one row whose first cells are those wanted."""
    found = [line for line in cells(table) if tuple(line[: len(wanted)]) == wanted]
    assert len(found) == 1, (wanted, found)
    return found[0]
