"""Times of every kernel on a GPU, with it alone: the most telling first, a line and a JSON row as soon as each is taken.

    python -m sfm_fast.benchmarks.gpu.times --out bench.json [--device cuda] [--seconds 86]

Forward + backward in one CUDA graph, device time; beside it the floor, which is the least bytes over the card's copy bandwidth or the
fewest known operations over its rate of products, whichever takes longer, and the share of the time that the floor is. Each result is
compared with that of the case's first contender before it is timed. All cases have their CUDA contenders timed first, then Triton's, which
compile for seconds. On a CPU (--device cpu) shapes are small and Triton is
interpreted: that only shows that the script runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sfm_fast
from sfm_fast.distill.images import level_sizes
from sfm_fast.measure.memory import peak_memory
from sfm_fast.measure.timing import samples, summary
from sfm_fast.ops.augment import augment
from sfm_fast.ops.library import operation
from sfm_fast.ops.render import render
from sfm_fast.ops.render_augment import render_augment
from sfm_fast.views import draw_views

from ..harness import attempt, graph_microseconds
from ..machine import ceilings, environment
from ..shapes import ImageShape, LossShape
from .record import Record, Taken, why

FORMAT = "sfm_fast GPU times 1"
TF32_PRODUCTS = 3  # per float32 product
Result = tuple[Tensor, ...]


@dataclass(frozen=True)
class Contender:
    """A backend, and (CUDA) whether its kernels are the "new" ones or the "old" ones that are to be replaced."""

    backend: str
    kernels: str = ""

    @property
    def name(self) -> str:
        return f"{self.backend} {self.kernels}".strip()


@dataclass(frozen=True)
class Case:
    """One operation to time. call: (backend) -> a function that returns its results; its inputs are prepared.

    least_bytes: the minimum read and written. operations: the minimum of products, with ``rate`` as their ceiling.
    close: the allowed relative difference from the first contender's results.
    """

    name: str
    call: Callable[[str], Callable[[], Result]]
    least_bytes: float
    operations: float = 0.0
    rate: str = "tf32_rate"
    close: float = 1e-3
    memory: bool = False
    images: bool = False


@dataclass
class Time(Taken):
    """One row of the result: seconds are of forward + backward unless the case says otherwise."""

    case: str
    contender: str
    status: str = "ok"
    seconds: float | None = None
    warm_seconds: float | None = None
    floor_seconds: float | None = None
    share: float | None = None
    peak_bytes: int | None = None
    first_seconds: float | None = None
    difference: float | None = None
    facts: dict[str, object] = field(default_factory=dict)

    def line(self) -> str:
        if self.seconds is None:
            return f"{self.case}, {self.contender}: {self.status}"
        line = f"{self.case}, {self.contender}: {self.seconds * 1e3:.4g} ms"
        if self.warm_seconds is not None:
            line += f" ({self.warm_seconds * 1e3:.4g} warm)"
        if self.floor_seconds is not None and self.share is not None:
            line += f", floor {self.floor_seconds * 1e3:.4g}, {100 * self.share:.0f} %"
        if self.peak_bytes is not None:
            line += f", {self.peak_bytes / 1e6:.0f} MB beyond its inputs"
        return line + ("" if self.status == "ok" else f", {self.status}")


def loss_inputs(shape: LossShape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features and centres (C, D) as in `LossShape.inputs`, made on the device: for 200 000 classes a CPU takes seconds."""
    generator = torch.Generator(device).manual_seed(shape.classes + shape.dim)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    offset = 5 * normal(shape.dim)
    return offset + normal(shape.classes, shape.dim), offset + normal(shape.classes, shape.dim)


def loss_case(
    shape: LossShape, device: torch.device, dtype: torch.dtype = torch.float32, precision: str = "highest"
) -> Case:
    """Forward + backward of a flow alignment loss."""
    features, centers = loss_inputs(shape, device)
    features = features.to(dtype).requires_grad_()
    one = torch.ones((), device=device)

    def call(backend: str) -> Callable[[], Result]:
        module = sfm_fast.FlowAlignmentLoss(centers, alignment=shape.alignment, backend=backend, precision=precision)

        def run() -> Result:
            loss = module(features)
            return loss.detach(), torch.autograd.grad(loss, features, one)[0]

        return run

    cells, wide = shape.classes * shape.dim, features.element_size()
    passes = 3 if shape.alignment == "class" else 2  # reads of features and centres; one write of the gradient
    name = f"{shape.name} {str(dtype).removeprefix('torch.')}"
    if shape.alignment != "pair":
        close = 1e-3 if dtype == torch.float32 else 1e-2
        return Case(name, call, cells * (passes * 4 + (passes + 1) * wide), close=close)
    # Three Gram matrices of half the pairs, two products of all pairs with the classes.
    products = 7 * shape.classes * cells * (TF32_PRODUCTS if precision == "highest" else 1)
    close = 1e-3 if precision == "highest" else 3e-2
    return Case(f"{name} {precision}", call, cells * 20, products, close=close, memory=True)


def image_cases(shape: ImageShape, device: torch.device) -> Iterator[Case]:
    """The image path as in a step, and kernel by kernel."""
    _, views = replace(shape, images=1).inputs(device)
    views = draw_views(
        torch.arange(shape.images, device=device), shape.canvas, shape.size, views.mean, views.std, seed=1, step=7
    )
    dtype, sides = getattr(torch, shape.dtype), level_sizes(shape.canvas, "pyramid")
    levels = [torch.randn(shape.images, shape.channels, side, side, device=device) / len(sides) for side in sides]
    leaves = [level.requires_grad_() for level in levels]
    side = shape.canvas
    texels = sum(level.numel() for level in levels) * 4
    canvas = shape.images * shape.channels * side * side * 4
    shown = shape.images * shape.channels * shape.size**2 * torch.empty((), dtype=dtype).element_size()
    grad = torch.randn(shape.images, shape.channels, shape.size, shape.size, device=device).to(dtype)

    def both(backend: str) -> Callable[[], Result]:
        def run() -> Result:
            views_of = render_augment(leaves, side, views, dtype=dtype, backend=backend)
            return views_of.detach(), *torch.autograd.grad(views_of, leaves, grad)

        return run

    yield Case(f"render_augment {shape.name}", both, 3 * texels + 2 * shown, close=2e-2, images=True)
    del both
    flat = [leaf.detach() for leaf in leaves]
    pictures = render(flat, side, backend="torch" if device.type == "cpu" else "auto")
    canvas_grad, sides = torch.randn_like(pictures), [level.shape[-1] for level in flat]

    def forward_of_render(backend: str) -> Callable[[], Result]:
        return lambda: (render(flat, side, backend=backend),)

    def backward_of_render(backend: str) -> Callable[[], Result]:
        # Not by autograd, which would run it on the forward's stream: a CUDA graph can't capture that.
        backward = operation(backend, "render_backward")
        return lambda: (backward(canvas_grad, pictures, sides),)

    def forward_of_augment(backend: str) -> Callable[[], Result]:
        return lambda: (augment(pictures, views, dtype=dtype, backend=backend),)

    def backward_of_augment(backend: str) -> Callable[[], Result]:
        backward, form = operation(backend, "augment_backward"), (shape.images, shape.channels, side, side)
        return lambda: (backward(grad, views.boxes, views.std, *form, torch.float32),)

    yield Case(f"render {shape.name}, forward", forward_of_render, texels + canvas, images=True)
    yield Case(f"render {shape.name}, backward", backward_of_render, texels + 2 * canvas, images=True)
    yield Case(f"augment {shape.name}, forward", forward_of_augment, canvas + shown, close=2e-2, images=True)
    yield Case(f"augment {shape.name}, backward", backward_of_augment, canvas + shown, close=2e-2, images=True)


def cases(device: torch.device) -> Iterator[Callable[[], Iterator[Case]]]:
    """Functions that make a case, or several with shared inputs, each called at its turn; the most important first."""
    small = device.type == "cpu"

    def losses(alignment: str, classes: int, dim: int, **options: Any) -> Callable[[], Iterator[Case]]:
        if small:
            classes, dim = 20, 16
        return lambda: iter([loss_case(LossShape(alignment, classes, dim), device, **options)])

    def images(count: int, dtype: str) -> Callable[[], Iterator[Case]]:
        shape = ImageShape(1, 16, 12, dtype=dtype) if small else ImageShape(count, 256, 224, dtype=dtype)
        return lambda: image_cases(shape, device)

    yield losses("pair", 21_841, 1024, precision="highest")
    yield losses("pair", 21_841, 1024, precision="high")
    yield images(1000, "bfloat16")
    yield losses("global", 1000, 768)
    yield losses("global", 21_841, 1024)
    yield losses("class", 21_841, 1024)
    yield losses("anchored", 21_841, 1024)
    yield losses("pair", 1000, 768, precision="highest")
    yield losses("global", 200_000, 1024)
    yield losses("global", 21_841, 1024, dtype=torch.bfloat16)
    yield images(100, "float32")


def contenders(case: Case, device: torch.device, last: bool) -> list[Contender]:
    """The contenders of the first round, or of the ``last`` one: Triton's, which compile for seconds."""
    if last:  # an interpreted image takes seconds
        return [] if case.images and device.type == "cpu" else [Contender("triton")]
    if device.type == "cpu":
        return [Contender("cpu", "new"), Contender("cpu", "old")]
    return [Contender("cuda", "new"), Contender("cuda", "old")] if torch.version.hip is None else []


def timed(
    case: Case, contender: Contender, expected: Result | None, device: torch.device, measured: dict[str, float]
) -> tuple[Time, Result | None]:
    """The row of one contender, and its results."""
    row = Time(case.name, contender.name)
    os.environ["SFM_FAST_KERNELS"] = contender.kernels or "new"  # read at every call; a graph keeps the choice
    made, _, status = attempt(lambda: case.call(contender.backend), device)
    results: Result | None = None
    if made is not None:
        results, row.first_seconds, status = attempt(made, device)
    if status or made is None or results is None:
        row.status = status or "failed"
        return row, None
    results = tuple(result.float() for result in results)
    if not all(bool(result.isfinite().all()) for result in results):
        row.status = "wrong: not all of its results are finite"
        return row, None
    if expected is not None:
        pairs = zip(results, expected, strict=True)
        row.difference = max(float((a - b).norm() / b.norm().clamp(min=1e-20)) for a, b in pairs)
        if not row.difference <= case.close:
            row.status = f"differs from the first contender by {row.difference:.0e}"
            return row, results

    def run() -> None:
        if device.type == "cpu":
            row.seconds = summary(samples({"call": made}, rounds=2, device=device)["call"]).median
            return
        row.seconds = graph_microseconds(made) * 1e-6
        if row.seconds < 1e-3:
            row.warm_seconds = graph_microseconds(made, 50) * 1e-6
        if case.memory:
            row.peak_bytes = peak_memory(made, device)

    _, _, status = attempt(run, device)
    if status:
        row.status = status
    if row.seconds and device.type == "cuda":
        row.floor_seconds = max(case.least_bytes / measured["copy_bandwidth"], case.operations / measured[case.rate])
        row.share = row.floor_seconds / row.seconds
    return row, results


class Run:
    """Measures rows and writes each to ``out`` at once, until ``seconds`` are over. resume: the rows of ``out`` are kept."""

    def __init__(self, device: torch.device, out: Path, seconds: float, resume: bool = False) -> None:
        self.device = device
        if resume:
            head = json.loads(out.read_text())
            self.ceilings = head["ceilings"]
            self.record = Record(out, head, seconds, head.pop("rows"))
            return
        self.ceilings = ceilings(device)
        head = {"format": FORMAT, "environment": environment(device), "ceilings": self.ceilings}
        self.record = Record(out, head, seconds)
        print("==", ", ".join(f"{name} {value:.3g}" for name, value in self.ceilings.items()), flush=True)

    def has(self, case: str, contender: str) -> bool:
        return any(row["case"] == case and row["contender"] == contender for row in self.record.rows)

    def __call__(self) -> bool:
        """Whether every row is right."""
        for last in (False, True):
            for number, make in enumerate(cases(self.device)):
                if self.record.over("the cases that were to come are"):
                    break
                group = f"group {number}"
                try:
                    for case in make():
                        self.time(case, last)
                        del case
                except Exception as error:  # in the inputs: recorded in a row, and the other groups still run
                    if not self.has(group, ""):
                        self.record.add(Time(group, "", why(error)))
                    self.go_on_if_lost()
                self.go_on_if_lost()
        os.environ.pop("SFM_FAST_KERNELS", None)
        return all(row["status"] == "ok" for row in self.record.rows)

    def time(self, case: Case, last: bool) -> None:
        expected: Result | None = None
        for contender in contenders(case, self.device, last):
            if self.record.left < 0 or self.has(case.name, contender.name):
                continue
            if last and expected is None:  # results of the first round's first contender, which are gone
                expected = results_of(case, contenders(case, self.device, False)[:1], self.device)
            try:
                row, results = timed(case, contender, expected, self.device, self.ceilings)
            except Exception as error:  # any error concerns only this contender
                row, results = Time(case.name, contender.name, why(error)), None
            expected = expected if expected is not None else results
            self.record.add(row)
            if row.status != "ok":
                self.go_on_if_lost()

    def go_on_if_lost(self) -> None:
        """Continue in a new process after an illegal access or a failed capture, since every later call of this one fails."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            print("== this process can't use the GPU any more: a new one goes on", flush=True)
            words = ["--device", self.device.type, "--out", str(self.record.out), "--resume"]
            words += ["--seconds", f"{max(0.0, self.record.left):.1f}"]
            os.execv(sys.executable, [sys.executable, "-P", "-m", "sfm_fast.benchmarks.gpu.times", *words])


def results_of(case: Case, first: list[Contender], device: torch.device) -> Result | None:
    """The results of the first contender, if there is one and it succeeds."""
    if not first:
        return None
    os.environ["SFM_FAST_KERNELS"] = first[0].kernels or "new"
    results, _, _ = attempt(lambda: case.call(first[0].backend)(), device)
    return None if results is None else tuple(result.float() for result in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=86.0)
    parser.add_argument("--resume", action="store_true", help="go on with what --out has")
    options = parser.parse_args()
    if not Run(torch.device(options.device), options.out, options.seconds, options.resume)():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
