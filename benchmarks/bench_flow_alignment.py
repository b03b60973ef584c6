"""Time and memory of the flow-alignment losses beside torch eager, torch.compile, Gram matrices, C x C x D and KeOps.

    python benchmarks/bench_flow_alignment.py --out benchmarks/results/cpu/flow_alignment.json
    pytest benchmarks/bench_flow_alignment.py --benchmark-enable                                  # small shapes

Every contender is first checked against the float64 reference (or, where that would take too long, against the others);
a wrong one gets no time. Contenders run in turn, round by round; times are medians, memory is the peak beyond what was
allocated before. What ran out of memory has a row that says so. About half an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from baselines import flow_alignment as baseline
from harness import copy_bandwidth, environment, graph_microseconds, is_out_of_memory, matmul_rate, memory_limit
from torch import Tensor

import sfm_fast
from sfm_fast.files import check_output_file, write_json, write_text
from sfm_fast.ops import backends
from sfm_fast.report.tables import loss_table
from sfm_fast.testing.perf import interleaved, peak_memory, summary

Loss = Callable[[Tensor, Tensor | None], Tensor]
SECONDS = 0.6  # that each contender of a case may take for each of forward, backward and both, beyond one round
SLOW = 15.0  # seconds a call


@dataclass(frozen=True)
class Case:
    """One shape: C classes, D features, ``ipc`` labelled features a class (1: the class means themselves)."""

    alignment: str
    classes: int
    dim: int
    ipc: int = 1
    compiled: bool = False  # torch.compile takes half a minute a shape: only where asked
    keops: bool = False

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(self.classes + self.dim)
        offset = 5 * torch.randn(self.dim, generator=generator)  # features share a mean larger than their spread
        centers = offset + torch.randn(self.classes, self.dim, generator=generator)
        features = offset + torch.randn(self.classes * self.ipc, self.dim, generator=generator)
        labels = None
        if self.ipc > 1:
            labels = torch.arange(self.classes).repeat(self.ipc)[torch.randperm(len(features), generator=generator)]
            labels = labels.to(device)
        return features.to(device), centers.to(device), labels


CLASSES, DIMS = (10, 100, 1000, 10_000, 21_841), (384, 768, 1024)
COMPILED = ((10, 384), (1000, 768), (21_841, 1024))
FULL = [
    *(
        Case(alignment, classes, dim, ipc, compiled=(classes, dim) in COMPILED and ipc == 1)
        for alignment in ("global", "class")
        for classes in CLASSES
        for dim in DIMS
        for ipc in (1, 10)
    ),
    *(
        Case(
            "pair",
            classes,
            dim,
            compiled=(classes, dim) in COMPILED[:2],
            keops=(classes, dim) in ((10, 384), (1000, 768)),
        )
        for classes in CLASSES
        for dim in DIMS
    ),
]
# What a few minutes of a GPU are best spent on.
GPU = [
    Case("global", 1000, 768, compiled=True),
    Case("global", 21_841, 1024),
    Case("global", 200_000, 1024),
    Case("class", 21_841, 1024),
    Case("pair", 1000, 768),
    Case("pair", 21_841, 1024),
]
SMALL = [Case("global", 10, 384), Case("class", 100, 384, 10), Case("pair", 100, 384), Case("global", 1000, 768)]


def contenders(case: Case, centers: Tensor) -> dict[str, Loss]:
    """Name -> loss of (features, labels). Ours first, on every backend that is here."""
    probe = torch.empty(1, 1, device=centers.device)
    automatic = backends.explain(probe, alignment=case.alignment).backend
    found: dict[str, Loss] = {}
    for backend in dict.fromkeys([automatic, "cuda", "triton", "torch"]):
        try:
            backends.explain(probe, alignment=case.alignment, backend=backend)
        except sfm_fast.InputError:
            continue
        if backend == "torch" and case.alignment == "pair" and case.classes > 2000:
            continue  # minutes a call: float64 products on purpose
        module = sfm_fast.FlowAlignmentLoss(centers, alignment=case.alignment, backend=backend)
        found[f"sfm_fast {backend}"] = module
        if case.alignment == "pair" and centers.is_cuda and backend != "torch":
            found[f"sfm_fast {backend}, high"] = sfm_fast.FlowAlignmentLoss(
                centers, alignment="pair", backend=backend, precision="high"
            )
    eager: dict[str, Callable[..., Tensor]] = {
        "global": baseline.paper_global,
        "class": baseline.paper_class,
        "pair": baseline.gram_pair,
    }
    name = "Gram matrices" if case.alignment == "pair" else "eager"
    function = eager[case.alignment]
    found[name] = lambda features, labels: function(features, centers, labels)
    if case.compiled:
        compiled = torch.compile(function)
        found[f"torch.compile of {name}"] = lambda features, labels: compiled(features, centers, labels)
    if case.alignment == "pair":
        found["C x C x D"] = lambda features, labels: baseline.naive_pair(features, centers, labels)
    if case.keops:
        found["KeOps"] = lambda features, labels: baseline.keops_pair(features, centers, labels)
    return found


def checked(
    case: Case, losses: dict[str, Loss], features: Tensor, centers: Tensor, labels: Tensor | None
) -> dict[str, Any]:
    """The contenders that give the right loss and gradient, and for every other one why not."""
    small = case.alignment != "pair" or case.classes <= 2000
    reference: tuple[Tensor, Tensor] | None = None
    if small and features.numel() <= 1 << 25:
        exact = sfm_fast.FlowAlignmentLoss(centers, alignment=case.alignment, backend="torch")
        reference = _value(exact, features.double(), labels)
    verdicts: dict[str, Any] = {}
    for name, loss in losses.items():
        try:
            with memory_limit(features.device):
                started = time.perf_counter()
                value = _value(loss, features, labels)
                seconds = time.perf_counter() - started
        except (RuntimeError, MemoryError, ImportError) as error:
            verdicts[name] = (
                "out of memory" if is_out_of_memory(error) else f"failed: {str(error).splitlines()[0][:120]}"
            )
            gc.collect()
            continue
        # Too large for float64: then the first contender, ours, is what the others must agree with.
        reference = reference or value
        # Eager float32 next to a large common mean is itself off in the third digit on the largest shapes.
        bound = 1e-3 if name.startswith("sfm_fast") and "high" not in name else 3e-2
        off = ((value[1] - reference[1]).norm() / reference[1].norm()).item()
        wrong = not (off <= bound and abs(value[0] - reference[0]) <= bound / 10 * abs(reference[0]))
        verdicts[name] = f"wrong result (gradient off by {off:.0e})" if wrong else seconds
    return verdicts


def _value(loss: Loss, features: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    leaf = features.detach().requires_grad_()
    result = loss(leaf, labels)
    (gradient,) = torch.autograd.grad(result, leaf)
    return result.detach(), gradient


def measure(case: Case, device: torch.device, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """One row for each contender and mode ("forward", "backward", "both")."""
    features, centers, labels = case.inputs(device)
    losses = contenders(case, centers)
    verdicts = checked(case, losses, features, centers, labels)
    gc.collect()
    timed = {name: loss for name, loss in losses.items() if isinstance(verdicts[name], float)}
    # So slow that the call of the check must do, for forward + backward.
    slow = {name: summary([verdicts[name]]).__dict__ for name in timed if verdicts[name] > SLOW}
    leaf = features.requires_grad_()
    rows = []
    for mode in ("forward", "backward", "both"):
        if mode == "backward":
            # One graph at a time: the graphs of all contenders together need not fit.
            seconds = {
                name: _backward(loss, leaf, labels, verdicts[name]) for name, loss in timed.items() if name not in slow
            }
        else:
            calls = {name: _call(loss, leaf, labels, mode) for name, loss in timed.items() if name not in slow}
            each = max([verdicts[name] for name in calls], default=1.0)
            rounds, prime = int(min(300, max(3, SECONDS / each))), int(each < 0.2)
            timings = interleaved(calls, rounds=rounds, prime=prime, device=device)
            seconds = {name: timing.__dict__ for name, timing in timings.items()} | (slow if mode == "both" else {})
        for name in losses:
            row: dict[str, Any] = {**case.__dict__, "contender": name, "mode": mode}
            if name in slow and mode != "both":
                continue
            if name in timed:
                row |= seconds[name]
                row |= _roofline(case, mode, row["median"], ceilings)
                if mode == "both":
                    row["peak_bytes"] = peak_memory(_call(timed[name], leaf, labels, mode), device)
                    if device.type == "cuda" and name.startswith("sfm_fast") and "torch" not in name:
                        row["graph_microseconds"] = graph_microseconds(_call(timed[name], leaf, labels, mode))
            else:
                row["status"] = verdicts[name]
            rows.append(row)
    return rows


def _call(loss: Loss, leaf: Tensor, labels: Tensor | None, mode: str) -> Callable[[], Any]:
    if mode == "forward":  # alone, as in an evaluation: with a gradient to come, pairs compute it in the forward
        return lambda: _without_graph(loss, leaf, labels)
    return lambda: torch.autograd.grad(loss(leaf, labels), leaf)


@torch.no_grad()
def _without_graph(loss: Loss, leaf: Tensor, labels: Tensor | None) -> Tensor:
    return loss(leaf, labels)


def _backward(loss: Loss, leaf: Tensor, labels: Tensor | None, seconds: float) -> dict[str, Any]:
    """Of a fresh graph every time, built outside the clock: compiled backwards take theirs apart."""
    rounds = int(min(300, max(3, SECONDS / seconds)))
    times = []
    for _ in range(rounds):
        result = loss(leaf, labels)
        once = {"backward": lambda result=result: torch.autograd.grad(result, leaf)}
        times.append(interleaved(once, rounds=1, warmup=0, device=leaf.device)["backward"].median)
    return summary(times).__dict__


def _roofline(case: Case, mode: str, seconds: float, ceilings: dict[str, float]) -> dict[str, float]:
    """Share of the measured ceiling: copy bandwidth for the memory-bound kinds, float32 matrix products for pairs."""
    if case.alignment == "pair":
        products = {"forward": 3, "backward": 4, "both": 7}[mode]
        if mode == "backward":
            return {}  # ours computes the gradient in the forward
        return {"matmul_fraction": products * case.classes**2 * case.dim / seconds / ceilings["matmul_rate"]}
    items, centers = case.classes * case.ipc * case.dim * 4, case.classes * case.dim * 4
    forward, backward = items + centers, 2 * items + centers
    least = {"forward": forward, "backward": backward, "both": forward + backward}[mode]
    return {"copy_fraction": least / seconds / ceilings["copy_bandwidth"]}


def run(cases: list[Case], device: torch.device) -> Iterator[list[dict[str, Any]]]:
    for case in cases:
        # The machine's ceilings beside every case, not once: a shared machine has slow moments.
        ceilings = {"copy_bandwidth": copy_bandwidth(device), "matmul_rate": matmul_rate(device)}
        yield [{**row, **ceilings} for row in measure(case, device, ceilings)]
        torch.compiler.reset()
        gc.collect()


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["alignment"], row["classes"], row["dim"], row["ipc"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="flow_alignment.json", help="JSON file (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="four small shapes, in seconds")
    parser.add_argument("--gpu-shapes", action="store_true", help="six shapes for a GPU, in minutes")
    parser.add_argument(
        "--only", default="", help="only cases whose 'alignment CxD' contains this; the file's other rows stay"
    )
    arguments = parser.parse_args()
    check_output_file(arguments.out, "--out")
    device = torch.device(arguments.device)
    chosen = SMALL if arguments.small else GPU if arguments.gpu_shapes else FULL
    cases = [case for case in chosen if arguments.only in f"{case.alignment} {case.classes}x{case.dim}"]
    result: dict[str, Any] = {"environment": environment(), "rows": []}
    if arguments.only and Path(arguments.out).exists():
        again = {_key(case.__dict__) for case in cases}
        before = json.loads(Path(arguments.out).read_text())["rows"]
        result["rows"] = [row for row in before if _key(row) not in again]
    order = {_key(case.__dict__): place for place, case in enumerate(chosen)}
    for rows in run(cases, device):
        result["rows"] = sorted([*result["rows"], *rows], key=lambda row: order[_key(row)])
        print(loss_table(rows), flush=True)
        write_json(arguments.out, result)
        write_text(
            Path(arguments.out).with_suffix(".md"), "Forward + backward.\n\n" + loss_table(result["rows"]) + "\n"
        )


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.alignment}-{case.classes}x{case.dim}")
def test_flow_alignment(benchmark: Any, case: Case) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = measure(case, device, {"copy_bandwidth": 1.0, "matmul_rate": 1.0})
    benchmark.extra_info["rows"] = rows
    assert not [row for row in rows if "wrong result" in row.get("status", "")]
    features, centers, labels = case.inputs(device)
    module = sfm_fast.FlowAlignmentLoss(centers, alignment=case.alignment)
    benchmark(_call(module, features.requires_grad_(), labels, "both"))


if __name__ == "__main__":
    main()
