"""The HTML page of `sfm-fast demo`: images, loss, accuracy, time and memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..data.sources import ImageSource
from ..data.transforms import ImageTransform
from ..distill.progress import LogRow
from ..evaluation.rows import Row
from ..report import html, plots
from ..report.tables import text_table
from ..synthetic import SyntheticSet, to_bytes
from ..units import megabytes
from .cost import Cost

COST_HEADER = ("method", "views", "ms a step", "time x SFM", "peak memory", "memory x SFM")


def pixel_class_means(source: ImageSource, transform: ImageTransform, batch_size: int = 512) -> Tensor:
    """Mean image of each class: (C, channels, crop, crop), in one pass."""
    total = torch.zeros(len(source.class_names), transform.channels, transform.crop, transform.crop)
    counts = torch.zeros(len(source.class_names))
    for images, labels in source.batches(batch_size, transform):
        total.index_add_(0, labels, images)
        counts += torch.bincount(labels, minlength=len(counts))
    return total / counts.clamp(min=1).view(-1, 1, 1, 1)


def cost_rows(costs: list[Cost]) -> list[tuple[str, ...]]:
    """Rows under `COST_HEADER`; the first one is the base of the ratios."""
    base = costs[0]
    return [
        (
            row["name"],
            str(row["views"]),
            f"{row['step_seconds'] * 1e3:.1f}",
            "1.0" if row is base else _time_ratio(row, base),
            megabytes(row["peak_bytes"]),
            f"{row['peak_bytes'] / base['peak_bytes']:.1f}",
        )
        for row in costs
    ]


def _time_ratio(row: Cost, base: Cost) -> str:
    """The ratio of times with its interval, if there is one: earlier results and those of few rounds have none."""
    if "time_ratio" not in row:
        return f"{row['step_seconds'] / base['step_seconds']:.1f}"
    low, high = row["time_ratio_low"], row["time_ratio_high"]
    return f"{row['time_ratio']:.1f}" + ("" if low is None or high is None else f" ({low:.1f}–{high:.1f})")


def cost_note(costs: list[Cost]) -> str:
    """What the ratios of `cost_rows` rest on."""
    rounds, sure = costs[0]["rounds"], any(row.get("time_ratio_low") is not None for row in costs)
    interval = "sign-test interval of that median, 95 %" if sure else "too few for an interval"
    return f"Ratio of times: median of {rounds} rounds, in each of which every method makes one step ({interval}). Memory is counted in bytes, the same in every run."


def cost_table(costs: list[Cost]) -> str:
    """Time and memory as a text table."""
    return text_table(COST_HEADER, cost_rows(costs))


def write_page(
    path: Path,
    *,
    synthetic: SyntheticSet,
    nearest: Tensor,
    means: Tensor,
    log: Iterable[LogRow],
    accuracy: list[Row],
    costs: list[Cost],
    facts: dict[str, str],
) -> None:
    """Write the page to ``path``, atomically. nearest, means: (C, channels, S, S) in 0..1, ordered by class."""
    from ..files import write_text

    entries = list(log)
    config = synthetic.metadata["config"]
    first_of_class = synthetic.images[: len(synthetic.class_names)]
    pictures = html.picture_rows(
        synthetic.class_names,
        [
            ("synthetic", to_bytes(first_of_class)),
            ("real image nearest the class centre", to_bytes(nearest)),
            ("mean of the real pixels", to_bytes(means)),
        ],
    )
    curve = plots.line_plot(
        [row["step"] for row in entries], [row["loss"] for row in entries], xlabel="step", ylabel="loss"
    )
    accuracy_rows = [
        (
            row.get("method") or row["images"],
            str(row["ipc"]),
            f"{100 * row['top1_mean']:.1f} ± {100 * row['top1_std']:.1f}",
            f"{100 * row['top5_mean']:.1f} ± {100 * row['top5_std']:.1f}",
        )
        for row in accuracy
    ]
    ours = next((place for place, row in enumerate(accuracy) if row.get("method") == config["method"]), None)
    sections = [
        (
            "Synthetic images",
            html.note("One synthetic image per class, with real images of the same class below it.") + pictures,
        ),
        (
            "Loss",
            html.figure(
                curve,
                f"Loss of every {entries[0]['step'] if entries else 1}th step. It jumps at each new pyramid level, and random views make it noisy.",
            ),
        ),
        (
            "Accuracy",
            html.note(
                "A linear classifier on the frozen backbone's features, trained on the listed images and tested on other, real images. Mean ± standard deviation over seeds."
            )
            + html.table(("trained on", "images per class", "top-1 %", "top-5 %"), accuracy_rows, ours),
        ),
        (
            "Cost",
            html.note(
                "One step of each method with the same backbone and data, timed in turn in one run: median time, and peak memory beyond what is allocated "
                "before the step. LGM in three variants: as in its public code (stock), with a frozen backbone, and without double backward (closed form). "
                + cost_note(costs)
            )
            + html.table(COST_HEADER, cost_rows(costs), 0),
        ),
        (
            "Settings",
            html.table(("name", "value"), [*facts.items(), *((key, str(value)) for key, value in config.items())]),
        ),
    ]
    lead = f"{len(synthetic.class_names)} classes, {config['ipc']} synthetic image(s) each, distilled in {config['steps']} steps by statistical flow matching ({config['method']})."
    write_text(path, html.page("sfm_fast: a distilled data set", lead, sections))
