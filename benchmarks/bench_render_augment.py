"""Time and memory of the image path (render, augment, both) beside the same operation by operation in torch.

    python benchmarks/bench_render_augment.py --out benchmarks/results/cpu/render_augment.json
    pytest benchmarks/bench_render_augment.py --benchmark-enable                                 # small shapes

Every contender's picture and gradients are first checked against float64, without noise where its noise isn't ours; a wrong one gets
no time. Contenders run in turn; times are medians; ``extra_bytes`` is the peak beyond inputs and the results themselves (views and
levels' gradients), ``peak_bytes`` includes these. A few minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from baselines import images as baseline
from harness import copy_bandwidth, environment, graph_microseconds, is_out_of_memory, memory_limit
from torch import Tensor

from sfm_fast.distill.images import level_sizes
from sfm_fast.files import check_output_file, write_json, write_text
from sfm_fast.ops import backends
from sfm_fast.ops.augment import augment
from sfm_fast.ops.render import render
from sfm_fast.ops.render_augment import render_augment
from sfm_fast.reference.augment import Views, draw_views
from sfm_fast.report.tables import image_table
from sfm_fast.testing.perf import interleaved, peak_memory

ImagePath = Callable[[list[Tensor], Views], Tensor]
SECONDS = 6.0  # that each contender of a case and mode may take


@dataclass(frozen=True)
class Case:
    """``images`` of ``channels``, canvas -> view pixels; dtype of the views, "float32" or "bfloat16"."""

    images: int
    canvas: int
    size: int
    channels: int = 3
    dtype: str = "float32"
    compiled: bool = False

    def inputs(self, device: torch.device) -> tuple[list[Tensor], Views]:
        generator = torch.Generator().manual_seed(self.images)
        sides = level_sizes(self.canvas, "pyramid")
        levels = [
            torch.randn(self.images, self.channels, side, side, generator=generator).div(len(sides)).to(device)
            for side in sides
        ]
        mean, std = torch.full((self.channels,), 0.45), torch.full((self.channels,), 0.225)
        views = draw_views(torch.arange(self.images), (self.canvas, self.canvas), self.size, mean, std, seed=1, step=7)
        tensors = {name: getattr(views, name).to(device) for name in ("boxes", "noise_items", "mean", "std")}
        return levels, replace(views, **tensors)


FULL = [
    Case(10, 28, 28, 1),
    Case(10, 256, 224),
    Case(100, 256, 224, compiled=True),
    Case(100, 256, 224, dtype="bfloat16"),
]
GPU = [
    Case(100, 256, 224, compiled=True),
    Case(100, 256, 224, dtype="bfloat16"),
    Case(1000, 256, 224, dtype="bfloat16"),
]
SMALL = [Case(10, 28, 28, 1), Case(2, 64, 56)]


def contenders(case: Case, device: torch.device) -> dict[str, ImagePath]:
    """Name -> views of (levels, views). Ours first, on every backend that is here."""
    dtype, probe = getattr(torch, case.dtype), torch.empty(1, device=device)
    automatic = backends.explain_images(probe).backend
    found: dict[str, ImagePath] = {}
    for backend in dict.fromkeys([automatic, "cuda", "triton"]):
        try:
            backends.explain_images(probe, backend=backend)
        except ValueError:
            continue
        found[f"sfm_fast {backend}"] = lambda levels, views, backend=backend: render_augment(
            levels, case.canvas, views, dtype=dtype, backend=backend
        )
        found[f"sfm_fast {backend}, render then augment"] = lambda levels, views, backend=backend: augment(
            render(levels, case.canvas, backend=backend), views, dtype=dtype, backend=backend
        )
    found["sfm_fast torch"] = lambda levels, views: render_augment(
        levels, case.canvas, views, dtype=dtype, backend="torch"
    )
    found["operation by operation"] = lambda levels, views: baseline.render_augment(levels, case.canvas, views).to(
        dtype
    )
    if case.compiled:
        compiled = torch.compile(baseline.render_augment)
        found["torch.compile of it"] = lambda levels, views: compiled(levels, case.canvas, views).to(dtype)
    return found


def _gradients(path: ImagePath, levels: list[Tensor], views: Views, grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [level.detach().requires_grad_() for level in levels]
    shown = path(leaves, views)
    return shown.detach(), torch.autograd.grad(shown, leaves, grad.to(shown.dtype))


def checked(case: Case, paths: dict[str, ImagePath], levels: list[Tensor], views: Views) -> dict[str, str]:
    """Name -> "" for the contenders whose picture and gradients are right, else why not; on the first images."""
    few = min(3, case.images)
    part = [level[:few] for level in levels]
    silent = replace(views.select(slice(few)), noise_items=torch.full_like(views.noise_items[:few], -1))
    grad = torch.randn(few, case.channels, case.size, case.size, device=part[0].device)
    exact = [level.double() for level in part]
    expected, gradients = _gradients(
        lambda leaves, chosen: render_augment(leaves, case.canvas, chosen, backend="torch"),
        exact,
        silent,
        grad.double(),
    )
    bound = 2e-2 if case.dtype == "bfloat16" else 2e-3
    verdicts = {}
    for name, path in paths.items():
        if name.startswith("torch.compile"):
            verdicts[name] = ""  # the code that was checked; another batch size would compile again
            continue
        shown, found = _gradients(path, part, silent, grad)
        off = max(
            ((mine - theirs).norm() / theirs.norm()).item()
            for mine, theirs in zip((shown.double(), *found), (expected, *gradients), strict=True)
        )
        verdicts[name] = "" if off <= bound else f"wrong result (off by {off:.0e})"
    return verdicts


def measure(case: Case, device: torch.device, bandwidth: float) -> list[dict[str, Any]]:
    """One row a contender and mode ("forward", "both")."""
    levels, views = case.inputs(device)
    paths = contenders(case, device)
    verdicts = checked(case, paths, levels, views)
    leaves = [level.requires_grad_() for level in levels]
    grad = torch.randn(case.images, case.channels, case.size, case.size, device=device).to(getattr(torch, case.dtype))
    level_bytes, view_bytes = sum(level.nbytes for level in levels), grad.nbytes
    rows = []
    for mode in ("forward", "both"):
        calls: dict[str, Callable[[], Any]] = {}
        for name, path in paths.items():
            if verdicts[name]:
                continue
            if mode == "forward":
                calls[name] = lambda path=path: _without_graph(path, leaves, views)
            else:
                calls[name] = lambda path=path: _both(path, leaves, views, grad)
            try:
                with memory_limit(device):
                    calls[name]()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                del calls[name]
                verdicts[name] = "out of memory"
        one = interleaved(calls, rounds=1, warmup=0, device=device)
        slowest = max(timing.median for timing in one.values())
        timings = interleaved(calls, rounds=int(min(200, max(5, SECONDS / slowest))), warmup=0, device=device)
        # Read the levels, write the views; read their gradient and the levels again, write the levels' gradients.
        least = level_bytes + view_bytes + (0 if mode == "forward" else 2 * level_bytes + view_bytes)
        results = view_bytes + (0 if mode == "forward" else level_bytes)
        for name in paths:
            row: dict[str, Any] = {**asdict(case), "contender": name, "mode": mode}
            if name in timings:
                row |= timings[name].__dict__
                row["copy_fraction"] = least / row["median"] / bandwidth
                row["peak_bytes"] = peak_memory(calls[name], device)
                row["extra_bytes"] = max(0, row["peak_bytes"] - results)
                if device.type == "cuda" and name.startswith("sfm_fast") and "torch" not in name:
                    row["graph_microseconds"] = graph_microseconds(calls[name])
            else:
                row["status"] = verdicts[name]
            rows.append(row)
    return rows


@torch.no_grad()
def _without_graph(path: ImagePath, leaves: list[Tensor], views: Views) -> Tensor:
    return path(leaves, views)


def _both(path: ImagePath, leaves: list[Tensor], views: Views, grad: Tensor) -> tuple[Any, ...]:
    shown = path(leaves, views)
    return shown, *torch.autograd.grad(shown, leaves, grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="render_augment.json", help="JSON file (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="two small shapes, in seconds")
    parser.add_argument("--gpu-shapes", action="store_true", help="three shapes for a GPU")
    arguments = parser.parse_args()
    check_output_file(arguments.out, "--out")
    device = torch.device(arguments.device)
    result: dict[str, Any] = {"environment": environment(), "rows": []}
    for case in SMALL if arguments.small else GPU if arguments.gpu_shapes else FULL:
        bandwidth = copy_bandwidth(device)
        rows = [{**row, "copy_bandwidth": bandwidth} for row in measure(case, device, bandwidth)]
        result["rows"] += rows
        print(image_table(rows), flush=True)
        write_json(arguments.out, result)
        write_text(Path(arguments.out).with_suffix(".md"), image_table(result["rows"]) + "\n")
        torch.compiler.reset()
        gc.collect()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_render_augment(benchmark: Any, case: Case) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = measure(case, device, 1.0)
    benchmark.extra_info["rows"] = rows
    assert not [row for row in rows if "wrong result" in row.get("status", "")]
    levels, views = case.inputs(device)
    benchmark(lambda: _without_graph(lambda *both: render_augment(both[0], case.canvas, both[1]), levels, views))


if __name__ == "__main__":
    main()
