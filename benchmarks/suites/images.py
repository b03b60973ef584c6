"""Time and memory of the image path (render, augment, both) beside the same operation by operation in torch.

    sfm-fast bench --suite images
    pytest benchmarks/suites/images.py --benchmark-enable       # small shapes

Every contender's picture and gradients are first checked against float64, without noise where its noise isn't ours; a wrong one
gets no time. ``extra_bytes`` is the peak beyond inputs and the results themselves (views and levels' gradients), which all must make.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sfm_fast.ops import backends
from sfm_fast.ops.augment import augment
from sfm_fast.ops.render import render
from sfm_fast.ops.render_augment import render_augment
from sfm_fast.views import Views

from ..baselines import images as baseline
from ..harness import Contender, Row, attempt, benchmark_rows, measure, share_of
from ..machine import ceilings
from ..shapes import IMAGE_SHAPES, ImageShape

ImagePath = Callable[[list[Tensor], Views], Tensor]
SUITE = "images"
MODES = ("forward", "both")
SECONDS = 1.5  # that each contender of a shape may take for each mode


def paths(shape: ImageShape, device: torch.device) -> dict[str, ImagePath]:
    """Name -> views of (levels, views). Ours first, on every backend that is here."""
    dtype, canvas, probe = getattr(torch, shape.dtype), shape.canvas, torch.empty(1, device=device)
    automatic = backends.explain_images(probe).backend
    found: dict[str, ImagePath] = {}
    for backend in dict.fromkeys([automatic, "cuda", "triton"]):
        try:
            backends.explain_images(probe, backend=backend)
        except ValueError:
            continue
        found[f"sfm_fast {backend}"] = functools.partial(_fused, canvas, dtype, backend)
        found[f"sfm_fast {backend}, render then augment"] = functools.partial(_in_turn, canvas, dtype, backend)
    found["sfm_fast torch"] = functools.partial(_fused, canvas, dtype, "torch")
    found["operation by operation"] = lambda levels, views: baseline.render_augment(levels, canvas, views).to(dtype)
    if shape.compiled:
        compiled = torch.compile(baseline.render_augment)
        found["torch.compile of it"] = lambda levels, views: compiled(levels, canvas, views).to(dtype)
    return found


def _fused(canvas: int, dtype: torch.dtype, backend: str, levels: list[Tensor], views: Views) -> Tensor:
    return render_augment(levels, canvas, views, dtype=dtype, backend=backend)


def _in_turn(canvas: int, dtype: torch.dtype, backend: str, levels: list[Tensor], views: Views) -> Tensor:
    return augment(render(levels, canvas, backend=backend), views, dtype=dtype, backend=backend)


def verdicts(shape: ImageShape, every: dict[str, ImagePath], levels: list[Tensor], views: Views) -> dict[str, str]:
    """Name -> "" or why it is wrong, on the first images."""
    few = min(3, shape.images)
    part = [level[:few].detach() for level in levels]
    silent = replace(views.select(slice(few)), noise_items=torch.full_like(views.noise_items[:few], -1))
    grad = torch.randn(few, shape.channels, shape.size, shape.size, device=part[0].device)
    exact = [level.double() for level in part]
    expected, gradients = _gradients(
        lambda leaves, chosen: render_augment(leaves, shape.canvas, chosen, backend="torch"),
        exact,
        silent,
        grad.double(),
    )
    bound = 2e-2 if shape.dtype == "bfloat16" else 2e-3
    found = {}
    for name, path in every.items():
        value, _, verdict = attempt(lambda path=path: _gradients(path, part, silent, grad), grad.device)
        if not verdict:
            shown, mine = value
            off = max(
                ((ours - theirs).norm() / theirs.norm()).item()
                for ours, theirs in zip((shown.double(), *mine), (expected, *gradients), strict=True)
            )
            verdict = "" if off <= bound else f"wrong result: off by {off:.0e}"
        found[name] = verdict
    return found


def _gradients(path: ImagePath, levels: list[Tensor], views: Views, grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [level.detach().requires_grad_() for level in levels]
    shown = path(leaves, views)
    return shown.detach(), torch.autograd.grad(shown, leaves, grad.to(shown.dtype))


def shape_rows(shape: ImageShape, device: torch.device, seconds: float = SECONDS) -> list[Row]:
    """One row for each contender and mode ("forward", "both")."""
    measured = ceilings(device)
    levels, views = shape.inputs(device)
    every = paths(shape, device)
    checked = verdicts(shape, every, levels, views)
    leaves = [level.requires_grad_() for level in levels]
    dtype = getattr(torch, shape.dtype)
    grad = torch.randn(shape.images, shape.channels, shape.size, shape.size, device=device).to(dtype)
    level_bytes, view_bytes = sum(level.nbytes for level in levels), grad.nbytes
    case = {"case": shape.name, **{key: value for key, value in asdict(shape).items() if key != "compiled"}}
    rows = []
    for mode in MODES:
        chosen = []
        for name, path in every.items():
            verdict = checked[name]
            call = _both(path, leaves, views, grad) if mode == "both" else _forward(path, leaves, views)
            ours = name.startswith("sfm_fast") and "torch" not in name
            chosen.append(Contender(name, call, verdict, compiles="compile" in name, graph=ours))
        # Read the levels, write the views; read their gradient and the levels again, write the levels' gradients.
        least = level_bytes + view_bytes + (0 if mode == "forward" else 2 * level_bytes + view_bytes)
        results = view_bytes + (0 if mode == "forward" else level_bytes)
        found = measure(chosen, suite=SUITE, case=case, mode=mode, device=device, seconds=seconds, cold=True)
        for row in found:
            row |= share_of(row, measured, least_bytes=least)
            if "peak_bytes" in row:
                row["extra_bytes"] = max(0, row["peak_bytes"] - results)
            rows.append(row)
    torch.compiler.reset()
    gc.collect()
    return rows


def _forward(path: ImagePath, leaves: list[Tensor], views: Views) -> Callable[[], Any]:
    @torch.no_grad()
    def call() -> Tensor:
        return path(leaves, views)

    return call


def _both(path: ImagePath, leaves: list[Tensor], views: Views, grad: Tensor) -> Callable[[], Any]:
    def call() -> Any:
        shown = path(leaves, views)
        return shown, *torch.autograd.grad(shown, leaves, grad)

    return call


def rows(preset: str, device: torch.device, only: str = "") -> Iterator[list[Row]]:
    """The rows of each shape of ``preset`` whose name contains ``only``, as they come."""
    for shape in IMAGE_SHAPES.get(preset, ()):
        if only in shape.name:
            yield shape_rows(shape, device, 0.1 if preset == "small" else SECONDS)


@pytest.mark.parametrize("shape", IMAGE_SHAPES["small"], ids=lambda shape: shape.name)
def test_render_augment(benchmark: Any, shape: ImageShape) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    levels, views = shape.inputs(device)
    leaves = [level.requires_grad_() for level in levels]
    grad = torch.randn(shape.images, shape.channels, shape.size, shape.size, device=device)
    ours, *others = (_both(path, leaves, views, grad) for path in paths(shape, device).values())
    names = list(paths(shape, device))[1:]
    benchmark_rows(benchmark, shape_rows(shape, device), ours, dict(zip(names, others, strict=True)))
