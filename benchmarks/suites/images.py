"""Time and memory of the image path (render, augment, both) against the same in torch, operation by operation.

    sfm-fast bench --suite images

Every contender's picture and gradients are first checked against float64, without noise if its noise isn't ours; a wrong one
gets no time. ``extra_bytes`` is the peak beyond inputs and results (views and levels' gradients), which every contender needs.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sfm_fast.ops import backends
from sfm_fast.ops.augment import augment
from sfm_fast.ops.render import render
from sfm_fast.ops.render_augment import render_augment
from sfm_fast.views import Views

from ..baselines import images as baseline
from ..cells import Cell
from ..harness import Contender, Plan, add_share, attempt, measure
from ..machine import ceilings
from ..presets import IMAGE_SHAPES
from ..registry import Cells, Options, suite
from ..rows import Row
from ..shapes import ImageShape

ImagePath = Callable[[list[Tensor], Views], Tensor]
SUITE = "images"
MODES = ("forward", "both")
SECONDS = 1.5  # for each contender and mode of a shape


@dataclass(frozen=True)
class Entry:
    """One image path: views of (levels, views). backend: of ours; "" for a baseline."""

    path: ImagePath
    backend: str = ""
    compiled: bool = False


def paths(shape: ImageShape, device: torch.device) -> dict[str, Entry]:
    """Every path by name. Ours first, on every available backend."""
    dtype, canvas, probe = getattr(torch, shape.dtype), shape.canvas, torch.empty(1, device=device)
    automatic = backends.explain_images(probe).backend
    every: dict[str, Entry] = {}
    for backend in dict.fromkeys([automatic, "cuda", "triton"]):
        try:
            backends.explain_images(probe, backend=backend)
        except ValueError:
            continue
        every[f"sfm_fast {backend}"] = Entry(functools.partial(_fused, canvas, dtype, backend), backend)
        in_turn = functools.partial(_in_turn, canvas, dtype, backend)
        every[f"sfm_fast {backend}, render then augment"] = Entry(in_turn, backend)
    every["sfm_fast torch"] = Entry(functools.partial(_fused, canvas, dtype, "torch"), "torch")
    every["operation by operation"] = Entry(
        lambda levels, views: baseline.render_augment(levels, canvas, views).to(dtype)
    )
    if shape.compiled:
        compiled = torch.compile(baseline.render_augment)
        every["torch.compile of it"] = Entry(
            lambda levels, views: compiled(levels, canvas, views).to(dtype), compiled=True
        )
    return every


def _fused(canvas: int, dtype: torch.dtype, backend: str, levels: list[Tensor], views: Views) -> Tensor:
    return render_augment(levels, canvas, views, dtype=dtype, backend=backend)


def _in_turn(canvas: int, dtype: torch.dtype, backend: str, levels: list[Tensor], views: Views) -> Tensor:
    return augment(render(levels, canvas, backend=backend), views, dtype=dtype, backend=backend)


def verdicts(shape: ImageShape, every: Mapping[str, Entry], levels: list[Tensor], views: Views) -> dict[str, str]:
    """Name -> "" or the reason why it is wrong, checked on the first images."""
    few = min(3, shape.images)
    part = [level[:few].detach() for level in levels]
    silent = replace(views.select(slice(few)), noise_items=torch.full_like(views.noise_items[:few], -1))
    grad = torch.randn(few, shape.channels, shape.size, shape.size, device=part[0].device)
    expected, gradients = _gradients(
        lambda leaves, chosen: render_augment(leaves, shape.canvas, chosen, backend="torch"),
        [level.double() for level in part],
        silent,
        grad.double(),
    )
    bound = 2e-2 if shape.dtype == "bfloat16" else 2e-3
    checked = {}
    for name, entry in every.items():
        value, _, verdict = attempt(functools.partial(_gradients, entry.path, part, silent, grad), grad.device)
        if not verdict:
            shown, mine = value
            off = max(
                ((ours - theirs).norm() / theirs.norm()).item()
                for ours, theirs in zip((shown.double(), *mine), (expected, *gradients), strict=True)
            )
            verdict = "" if off <= bound else f"wrong result: off by {off:.0e}"
        checked[name] = verdict
    return checked


def _gradients(path: ImagePath, levels: list[Tensor], views: Views, grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [level.detach().requires_grad_() for level in levels]
    shown = path(leaves, views)
    return shown.detach(), torch.autograd.grad(shown, leaves, grad.to(shown.dtype))


def shape_rows(shape: ImageShape, device: torch.device, seconds: float = SECONDS) -> list[Row]:
    """One row for each contender and mode ("forward", "both")."""
    rates = ceilings(device)
    levels, views = shape.inputs(device)
    every = paths(shape, device)
    checked = verdicts(shape, every, levels, views)
    leaves = [level.requires_grad_() for level in levels]
    grad = output_gradient(shape, device)
    level_bytes, view_bytes = sum(level.nbytes for level in levels), grad.nbytes
    case = Row(
        SUITE, shape.name, images=shape.images, canvas=shape.canvas, size=shape.size, channels=shape.channels,
        dtype=shape.dtype,
    )  # fmt: skip
    rows = []
    for mode in MODES:
        chosen = []
        for name, entry in every.items():
            row = replace(case, contender=name, mode=mode, ours=bool(entry.backend), compiled=entry.compiled)
            call = both(entry.path, leaves, views, grad) if mode == "both" else _forward(entry.path, leaves, views)
            chosen.append(Contender(row, call, checked[name], graph=entry.backend not in ("", "torch")))
        # Read the levels, write the views; read their gradient and the levels again, write the levels' gradients.
        least = level_bytes + view_bytes + (0 if mode == "forward" else 2 * level_bytes + view_bytes)
        results = view_bytes + (0 if mode == "forward" else level_bytes)
        for row in measure(chosen, device, Plan(seconds, cold=True)):
            add_share(row, rates, least_bytes=least)
            if row.peak_bytes is not None:
                row.extra_bytes = max(0, row.peak_bytes - results)
            rows.append(row)
    torch.compiler.reset()
    gc.collect()
    return rows


def output_gradient(shape: ImageShape, device: torch.device) -> Tensor:
    """A gradient of the views, in their dtype."""
    size = (shape.images, shape.channels, shape.size, shape.size)
    return torch.randn(size, device=device).to(getattr(torch, shape.dtype))


def _forward(path: ImagePath, leaves: list[Tensor], views: Views) -> Callable[[], Any]:
    @torch.no_grad()
    def call() -> Tensor:
        return path(leaves, views)

    return call


def both(path: ImagePath, leaves: list[Tensor], views: Views, grad: Tensor) -> Callable[[], Any]:
    """Forward + backward."""

    def call() -> Any:
        shown = path(leaves, views)
        return shown, *torch.autograd.grad(shown, leaves, grad)

    return call


@suite(
    SUITE,
    "Rendering and augmenting",
    "the same operation by operation, torch.compile of it, render then augment",
    presets=IMAGE_SHAPES,
)
def cells(preset: str, device: torch.device, options: Options) -> Cells:
    seconds = 0.1 if preset == "small" else SECONDS
    for shape in IMAGE_SHAPES[preset]:
        yield Cell(shape.name, functools.partial(shape_rows, shape, device, seconds))
