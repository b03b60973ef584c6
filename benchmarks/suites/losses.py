"""Time and memory of the flow-alignment losses against eager torch, torch.compile, Gram matrices, C x C x D and KeOps.

    sfm-fast bench --suite losses

Every contender is first checked against the float64 reference (or, if that would take too long, against ours); a wrong one
gets no time.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import sfm_fast
from sfm_fast.ops import backends

from ..baselines import flow_alignment as baseline
from ..cells import Cell
from ..harness import SLOW, Contender, Plan, add_share, attempt, measure
from ..machine import ceilings
from ..presets import LOSS_SHAPES
from ..registry import Cells, Options, suite
from ..rows import Row
from ..shapes import LossShape

Loss = Callable[[Tensor, Tensor | None], Tensor]
SUITE = "losses"
MODES = ("forward", "backward", "both")
SECONDS = 0.3  # for each contender and mode of a shape


@dataclass(frozen=True)
class Entry:
    """One loss of (features, labels). backend: of ours; "" for a baseline. exact: ours at precision "highest"."""

    loss: Loss
    backend: str = ""
    exact: bool = True
    compiled: bool = False

    @property
    def own_kernels(self) -> bool:
        return self.backend not in ("", "torch")


def losses(shape: LossShape, centers: Tensor) -> dict[str, Entry]:
    """Every loss by name. Ours first, on every available backend."""
    probe = torch.empty(1, 1, device=centers.device)
    make = functools.partial(sfm_fast.FlowAlignmentLoss, centers, alignment=shape.alignment)
    automatic = backends.explain(probe, alignment=shape.alignment).backend
    every: dict[str, Entry] = {}
    for backend in dict.fromkeys([automatic, "cuda", "triton", "torch"]):
        try:
            backends.explain(probe, alignment=shape.alignment, backend=backend)
        except sfm_fast.InputError:
            continue
        if backend == "torch" and shape.alignment == "pair" and shape.classes > 2000:
            continue  # minutes per call, since it uses float64 products
        every[f"sfm_fast {backend}"] = Entry(make(backend=backend), backend)
        if shape.alignment == "pair" and centers.is_cuda and backend != "torch":
            high = make(backend=backend, precision="high")
            every[f"sfm_fast {backend}, high"] = Entry(high, backend, exact=False)
    return every | _baselines(shape, centers)


def _baselines(shape: LossShape, centers: Tensor) -> dict[str, Entry]:
    name = "Gram matrices" if shape.alignment == "pair" else "eager"

    def entry(compiled: bool) -> Entry:
        def wrap(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return torch.compile(function) if compiled else function

        if shape.alignment == "pair":
            # The centres' part once, as in ours, but in the first call, since it may run out of memory.
            constants, gram = functools.cache(lambda: baseline.gram_constants(centers)), wrap(baseline.gram_pair)
            return Entry(lambda features, labels: gram(features, constants(), labels), compiled=compiled)
        eager = wrap(baseline.EAGER[shape.alignment])
        return Entry(lambda features, labels: eager(features, centers, labels), compiled=compiled)

    every = {name: entry(compiled=False)}
    if shape.compiled:
        every[f"torch.compile of {name}"] = entry(compiled=True)
    if shape.alignment == "pair" and shape.naive:
        every["C x C x D"] = Entry(lambda features, labels: baseline.naive_pair(features, centers, labels))
    if shape.keops:
        keops = lambda features, labels: baseline.keops_pair(features, centers, labels)  # noqa: E731
        every["KeOps"] = Entry(keops, compiled=True)
    return every


def contenders(
    shape: LossShape, every: Mapping[str, Entry], features: Tensor, centers: Tensor, labels: Tensor | None
) -> list[Contender]:
    """Every loss with its verdict; ``call`` is its forward + backward."""
    reference: tuple[Tensor, Tensor] | None = None
    if (shape.alignment != "pair" or shape.classes <= 2000) and features.numel() <= 1 << 25:
        exact = sfm_fast.FlowAlignmentLoss(centers, alignment=shape.alignment, backend="torch")
        reference = _value(exact, features.double(), labels)
    case = Row(
        SUITE, shape.name, mode="both", alignment=shape.alignment, classes=shape.classes, dim=shape.dim,
        dtype="float32", ipc=shape.ipc,
    )  # fmt: skip
    one = torch.ones((), device=features.device)  # reused: autograd would fill a new one in every call
    checked = []
    for name, entry in every.items():
        value, seconds, verdict = attempt(functools.partial(_value, entry.loss, features, labels), features.device)
        if not verdict:
            # Too large for float64: then the others must agree with the first contender, ours.
            reference = reference or value
            # With a large common mean, eager float32 itself is wrong in the third digit on the largest shapes.
            bound = 1e-3 if entry.backend and entry.exact else 3e-2
            off = ((value[1] - reference[1]).norm() / reference[1].norm()).item()
            if not (off <= bound and abs(value[0] - reference[0]) <= bound / 10 * abs(reference[0])):
                verdict = f"wrong result: gradient off by {off:.0e}"
        call = lambda loss=entry.loss: torch.autograd.grad(loss(features, labels), features, one)  # noqa: E731
        row = replace(case, contender=name, ours=bool(entry.backend), compiled=entry.compiled)
        checked.append(Contender(row, call, verdict, seconds or None, graph=entry.own_kernels))
        del value
    return checked


def _value(loss: Loss, features: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    leaf = features.detach().requires_grad_()
    result = loss(leaf, labels)
    (gradient,) = torch.autograd.grad(result, leaf)
    return result.detach(), gradient


def shape_rows(shape: LossShape, device: torch.device, seconds: float = SECONDS) -> list[Row]:
    """One row for each contender and mode ("forward", "backward", "both")."""
    # The machine's ceilings are measured for every shape, since a busy machine is sometimes slower.
    rates = ceilings(device)
    features, centers, labels = shape.inputs(device)
    features.requires_grad_()
    every = losses(shape, centers)
    both = contenders(shape, every, features, centers, labels)
    rows = []
    for mode in MODES:
        chosen = [
            _in_mode(contender, every[contender.name].loss, mode, features, labels)
            for contender in both
            if mode == "both" or contender.verdict or not _slow(contender)
        ]
        backward = mode == "backward"
        for row in measure(chosen, device, Plan(seconds, memory=not backward, cold=not backward)):
            if mode != "both":
                row.first_seconds = None  # the first call of the process was the check, forward + backward
            least_bytes, flops = _work(shape, mode)
            rate = _rate(every[row.contender], rates)
            add_share(row, rates, least_bytes=least_bytes, flops=flops, rate=rate)
            rows.append(row)
    torch.compiler.reset()
    gc.collect()
    return rows


def _slow(contender: Contender) -> bool:
    return not contender.row.compiled and (contender.first_seconds or 0) > SLOW


def _in_mode(contender: Contender, loss: Loss, mode: str, features: Tensor, labels: Tensor | None) -> Contender:
    if mode == "both":
        return contender
    row, verdict = replace(contender.row, mode=mode), contender.verdict
    if mode == "forward":  # without a gradient, as in an evaluation: otherwise pairs compute it in the forward
        return Contender(row, lambda: _without_graph(loss, features, labels), verdict)
    # A new graph every time, built outside the measured time, since compiled backwards free theirs.
    return Contender(
        row, lambda result: torch.autograd.grad(result, features), verdict, prepare=lambda: loss(features, labels)
    )


@torch.no_grad()
def _without_graph(loss: Loss, features: Tensor, labels: Tensor | None) -> Tensor:
    return loss(features, labels)


def _work(shape: LossShape, mode: str) -> tuple[int, int]:
    """The minimum (bytes, operations) of the work: traffic of the memory-bound kinds, float32 matrix products of pairs."""
    if shape.alignment == "pair":
        # Ours computes the gradient in the forward, so a backward alone has no ceiling to be compared with.
        return 0, {"forward": 3, "backward": 0, "both": 7}[mode] * shape.classes**2 * shape.dim
    items, centers = shape.classes * shape.ipc * shape.dim * 4, shape.classes * shape.dim * 4
    forward, backward = items + centers, 2 * items + centers
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode], 0


def _rate(entry: Entry, rates: Mapping[str, float]) -> str:
    """The ceiling of a contender's products: ours use TF32 on NVIDIA's tensor cores, three per product at precision "highest"."""
    return "tf32_rate" if entry.own_kernels and "tf32_rate" in rates and torch.version.hip is None else "matmul_rate"


@suite(
    SUITE,
    "Losses",
    "eager torch as the formula reads, torch.compile of it, Gram matrices, C x C x D, KeOps",
    presets=LOSS_SHAPES,
)
def cells(preset: str, device: torch.device, options: Options) -> Cells:
    seconds = 0.1 if preset == "small" else SECONDS
    for shape in LOSS_SHAPES[preset]:
        yield Cell(shape.name, functools.partial(shape_rows, shape, device, seconds))
