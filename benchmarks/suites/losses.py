"""Time and memory of the flow-alignment losses beside torch eager, torch.compile, Gram matrices, C x C x D and KeOps.

    sfm-fast bench --suite losses
    pytest benchmarks/suites/losses.py --benchmark-enable       # small shapes

Every contender is first checked against the float64 reference (or, where that would take too long, against ours); a wrong one
gets no time.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sfm_fast
from sfm_fast.ops import backends

from ..baselines import flow_alignment as baseline
from ..harness import SLOW, Contender, Row, attempt, benchmark_rows, measure, share_of
from ..machine import ceilings
from ..shapes import LOSS_SHAPES, LossShape

Loss = Callable[[Tensor, Tensor | None], Tensor]
SUITE = "losses"
MODES = ("forward", "backward", "both")
SECONDS = 0.3  # that each contender of a shape may take for each mode


def losses(shape: LossShape, centers: Tensor) -> dict[str, Loss]:
    """Name -> loss of (features, labels). Ours first, on every backend that is here."""
    probe = torch.empty(1, 1, device=centers.device)
    automatic = backends.explain(probe, alignment=shape.alignment).backend
    found: dict[str, Loss] = {}
    for backend in dict.fromkeys([automatic, "cuda", "triton", "torch"]):
        try:
            backends.explain(probe, alignment=shape.alignment, backend=backend)
        except sfm_fast.InputError:
            continue
        if backend == "torch" and shape.alignment == "pair" and shape.classes > 2000:
            continue  # minutes a call: float64 products on purpose
        found[f"sfm_fast {backend}"] = sfm_fast.FlowAlignmentLoss(centers, alignment=shape.alignment, backend=backend)
        if shape.alignment == "pair" and centers.is_cuda and backend != "torch":
            found[f"sfm_fast {backend}, high"] = sfm_fast.FlowAlignmentLoss(
                centers, alignment="pair", backend=backend, precision="high"
            )
    if shape.alignment == "pair":
        # The centres' part once, as ours does it; inside the first call, which may run out of memory.
        constants = functools.cache(lambda: baseline.gram_constants(centers))
        name, function = "Gram matrices", baseline.gram_pair
    else:
        constants = lambda: centers  # noqa: E731
        name, function = "eager", baseline.paper_global if shape.alignment == "global" else baseline.paper_class
    found[name] = lambda features, labels: function(features, constants(), labels)
    if shape.compiled:
        compiled = torch.compile(function)
        found[f"torch.compile of {name}"] = lambda features, labels: compiled(features, constants(), labels)
    if shape.alignment == "pair" and shape.naive:
        found["C x C x D"] = lambda features, labels: baseline.naive_pair(features, centers, labels)
    if shape.keops:
        found["KeOps"] = lambda features, labels: baseline.keops_pair(features, centers, labels)
    return found


def contenders(
    shape: LossShape, every: dict[str, Loss], features: Tensor, centers: Tensor, labels: Tensor | None
) -> list[Contender]:
    """Every loss with its verdict; ``call`` is its forward + backward."""
    reference: tuple[Tensor, Tensor] | None = None
    if (shape.alignment != "pair" or shape.classes <= 2000) and features.numel() <= 1 << 25:
        exact = sfm_fast.FlowAlignmentLoss(centers, alignment=shape.alignment, backend="torch")
        reference = _value(exact, features.double(), labels)
    found = []
    one = torch.ones((), device=features.device)  # kept: autograd would fill a new one in every call
    for name, loss in every.items():
        value, seconds, verdict = attempt(lambda loss=loss: _value(loss, features, labels), features.device)
        if not verdict:
            # Too large for float64: then the first contender, ours, is what the others must agree with.
            reference = reference or value
            # Eager float32 next to a large common mean is itself off in the third digit on the largest shapes.
            bound = 1e-3 if name.startswith("sfm_fast") and "high" not in name else 3e-2
            off = ((value[1] - reference[1]).norm() / reference[1].norm()).item()
            if not (off <= bound and abs(value[0] - reference[0]) <= bound / 10 * abs(reference[0])):
                verdict = f"wrong result: gradient off by {off:.0e}"
        ours = name.startswith("sfm_fast") and "torch" not in name
        call = lambda loss=loss: torch.autograd.grad(loss(features, labels), features, one)  # noqa: E731
        found.append(
            Contender(name, call, verdict, seconds or None, compiles="compile" in name or name == "KeOps", graph=ours)
        )
        del value
    return found


def _value(loss: Loss, features: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    leaf = features.detach().requires_grad_()
    result = loss(leaf, labels)
    (gradient,) = torch.autograd.grad(result, leaf)
    return result.detach(), gradient


def shape_rows(shape: LossShape, device: torch.device, seconds: float = SECONDS) -> list[Row]:
    """One row for each contender and mode ("forward", "backward", "both")."""
    # The machine's ceilings beside every shape, not once: a shared machine has slow moments.
    measured = ceilings(device)
    features, centers, labels = shape.inputs(device)
    features.requires_grad_()
    every = losses(shape, centers)
    both = contenders(shape, every, features, centers, labels)
    case = {
        "case": shape.name,
        "alignment": shape.alignment,
        "classes": shape.classes,
        "dim": shape.dim,
        "dtype": "float32",
    }
    rows = []
    for mode in MODES:
        chosen = [
            _in_mode(contender, every[contender.name], mode, features, labels)
            for contender in both
            if mode == "both" or contender.verdict or not _slow(contender)
        ]
        found = measure(
            chosen,
            suite=SUITE,
            case={**case, "ipc": shape.ipc},
            mode=mode,
            device=device,
            seconds=seconds,
            memory=mode != "backward",
            cold=mode != "backward",
        )
        for row in found:
            if mode != "both":
                row.pop("first_seconds", None)  # of the process it is the check's, which was forward + backward
            rate = _rate(row["contender"], measured)
            rows.append(row | share_of(row, measured, **_work(shape, mode), rate=rate))
    torch.compiler.reset()
    gc.collect()
    return rows


def _slow(contender: Contender) -> bool:
    return not contender.compiles and (contender.first_seconds or 0) > SLOW


def _in_mode(contender: Contender, loss: Loss, mode: str, features: Tensor, labels: Tensor | None) -> Contender:
    name, verdict = contender.name, contender.verdict
    if mode == "both":
        return contender
    if mode == "forward":  # alone, as in an evaluation: with a gradient to come, pairs compute it in the forward
        return Contender(name, lambda: _without_graph(loss, features, labels), verdict, compiles=contender.compiles)
    # Of a fresh graph every time, built outside the clock: compiled backwards take theirs apart.
    return Contender(
        name,
        lambda result: torch.autograd.grad(result, features),
        verdict,
        compiles=contender.compiles,
        prepare=lambda: loss(features, labels),
    )


@torch.no_grad()
def _without_graph(loss: Loss, features: Tensor, labels: Tensor | None) -> Tensor:
    return loss(features, labels)


def _work(shape: LossShape, mode: str) -> dict[str, float]:
    """What the work can't do without: memory traffic for the memory-bound kinds, float32 matrix products for pairs."""
    if shape.alignment == "pair":
        # Ours computes the gradient in the forward, so a backward alone has no ceiling to be compared with.
        products = {"forward": 3, "backward": 0, "both": 7}[mode]
        return {"flops": products * shape.classes**2 * shape.dim}
    items, centers = shape.classes * shape.ipc * shape.dim * 4, shape.classes * shape.dim * 4
    forward, backward = items + centers, 2 * items + centers
    return {"least_bytes": {"forward": forward, "backward": backward, "both": forward + backward}[mode]}


def _rate(contender: str, measured: dict[str, float]) -> str:
    """The ceiling of a contender's products: ours take TF32 on NVIDIA's tensor cores, at precision "highest" three for each."""
    ours = contender.startswith("sfm_fast") and "torch" not in contender
    return "tf32_rate" if ours and "tf32_rate" in measured and torch.version.hip is None else "matmul_rate"


def rows(preset: str, device: torch.device, only: str = "") -> Iterator[list[Row]]:
    """The rows of each shape of ``preset`` whose name contains ``only``, as they come."""
    for shape in LOSS_SHAPES.get(preset, ()):
        if only in shape.name:
            yield shape_rows(shape, device, 0.1 if preset == "small" else SECONDS)


@pytest.mark.parametrize("shape", LOSS_SHAPES["small"], ids=lambda shape: shape.name)
def test_flow_alignment(benchmark: Any, shape: LossShape) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    features, centers, labels = shape.inputs(device)
    found = contenders(shape, losses(shape, centers), features.requires_grad_(), centers, labels)
    ours, *others = (contender for contender in found if not contender.verdict)
    benchmark_rows(benchmark, shape_rows(shape, device), ours.call, {other.name: other.call for other in others})
