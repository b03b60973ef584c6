"""The CUDA kernels, executed on the CPU by the emulator in `shim/`, against the definitions in float64."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import definitions
import pytest
import torch
from shim_calls import DTYPES, ROUNDING, Call, Problem, build, make
from torch import Tensor

from sfm_fast.losses.evaluate import Constants, prepare
from sfm_fast.reference import flow_alignment as reference

# Names of tests/definitions.py: alignment and metric.
KINDS = {
    "global": ("global", "cosine"),
    "class": ("class", "cosine"),
    "mse": ("global", "mse"),
    "pair_mse": ("pair", "mse"),
    "anchored": ("anchored", "cosine"),
    "anchored-lengths": ("anchored-lengths", "cosine"),
}
ALPHA = 0.3
WEIGHTS = {"decoupled": (ALPHA, 0.0), "anchored-lengths": tuple(definitions.LENGTHS.values())}


def flow(
    shim: ctypes.CDLL,
    problem: Problem,
    kind: str,
    upstream: float | None = None,
    eps: float = 1e-8,
    off: int = 0,
    fused: bool = True,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient through both operations; ``off`` misaligns every buffer of floats.

    The upstream gradient is classes * dims unless given: gradients of order 1, well above any absolute tolerance.
    """
    call = Call(shim)
    classes, dims = problem.centers.shape
    upstream = float(classes * dims) if upstream is None else upstream
    number, anchor, constants = NUMBERS[kind], None, prepared(problem, kind)
    features, centers, shift = (
        call.place(problem.features, off),
        call.place(constants.rows, off),
        call.place(constants.shift, off),
    )
    if constants.anchor is not None:
        anchor = call.place(constants.anchor.float(), off)
    order = None if problem.order is None else call.place(problem.order)
    offsets = None if problem.offsets is None else call.place(problem.offsets)
    count = classes if number in reference.PER_CLASS else 1
    loss, rows, columns = call.poisoned((1,)), call.poisoned((2, count)), call.poisoned((2, dims), shift=off)
    common = (features, DTYPES[features.dtype], features.stride(0), order, offsets, centers, shift)
    call.run(
        "flow_alignment", *common, anchor, classes, dims, number, eps, *WEIGHTS.get(kind, (0.0, 0.0)), loss, rows, columns, fused,
        writes=(loss, rows, columns),
    )  # fmt: skip
    grad_output, gradient = (
        call.place(torch.tensor([upstream])),
        call.poisoned(tuple(features.shape), features.dtype, off),
    )
    backward = (grad_output, *common, rows, count, columns, classes, dims, gradient)
    call.run("flow_alignment_backward", *backward, writes=(gradient,))
    return loss[0].clone(), gradient.clone()


def prepared(problem: Problem, kind: str) -> Constants:
    """What the package hands to the operation."""
    alignment = "decoupled" if kind == "decoupled" else KINDS[kind][0]
    if alignment == "anchored-lengths":
        return prepare(problem.centers, "anchored", definitions.anchor_of(problem.centers))
    return prepare(problem.centers, alignment)


def defined(problem: Problem, kind: str, eps: float = 1e-8) -> tuple[Tensor, Tensor]:
    features = problem.features.double().requires_grad_()
    if kind == "decoupled":
        loss = definitions.decoupled(features, problem.centers, problem.labels, ALPHA)
    else:
        loss = definitions.flow_alignment(features, problem.centers, problem.labels, *KINDS[kind], eps)
    (gradient,) = torch.autograd.grad(loss, features)
    return loss.detach(), gradient * problem.centers.numel()


def assert_flow(
    result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype, slack: float = 1.0
) -> None:
    (loss, gradient), (expected_loss, expected_gradient) = result, expected
    assert (loss.double() - expected_loss).abs() <= slack * 2e-6 * (1 + expected_loss.abs())
    largest = expected_gradient.abs().max()
    bound = (
        ROUNDING[dtype] * expected_gradient.abs() + slack * 5e-6 * largest + 5e-7
    )  # also half a step of subnormal float16
    assert ((gradient.double() - expected_gradient).abs() <= bound).all()


NUMBERS = {kind: reference.KINDS[name.removesuffix("-lengths"), metric] for kind, (name, metric) in KINDS.items()}
NUMBERS["decoupled"] = reference.DECOUPLED


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(("classes", "dims"), [(2, 1), (2, 3), (9, 37), (21, 40), (19, 264)])
def test_flow_alignment(shim: ctypes.CDLL, kind: str, labelled: bool, classes: int, dims: int) -> None:
    for dtype in DTYPES:
        problem = make(classes, dims, dtype, labelled)
        expected = defined(problem, kind)
        for fused in (True, False):
            assert_flow(flow(shim, problem, kind, fused=fused), expected, dtype)


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("fused", [True, False])
def test_many_classes(both_orders: ctypes.CDLL, kind: str, fused: bool) -> None:
    """Several chunks and tiles; the same bits again, and in the other order of threads."""
    problem = make(60, 136, labelled=True)
    first = flow(both_orders, problem, kind, fused=fused)
    assert_flow(first, defined(problem, kind), torch.float32)
    both_orders.set_reversed(0)
    for one, two in zip(first, flow(both_orders, problem, kind, fused=fused), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("kind", "classes", "dims"),
    [
        ("class", 8211, 3),
        ("anchored-lengths", 8211, 3),
        ("global", 90, 32769),
        ("mse", 90, 32769),
        ("decoupled", 8211, 2),
    ],
)
def test_long_chunks(both_orders: ctypes.CDLL, kind: str, classes: int, dims: int) -> None:
    """Shapes at which a block takes many classes in turn; the definitions would take hours, so the float64 reference."""
    problem = make(classes, dims)
    features = problem.features.double().requires_grad_()
    centers, means = problem.centers.double() - problem.shift.double(), features - problem.shift.double()
    centred = reference.centre_rows(centers)
    if kind == "decoupled":
        loss = reference.decoupled_mse(centers, means, ALPHA)
    elif kind == "anchored-lengths":
        anchor = definitions.anchor_of(problem.centers.double()) - problem.shift.double()
        loss = reference.anchored_cosine(centers - anchor, means - anchor, 1e-8, *definitions.LENGTHS.values())
    elif kind == "mse":
        loss = reference.flow_mse(centred, means)
    else:
        loss = {"class": reference.class_cosine, "global": reference.global_cosine}[kind](centred, means, 1e-8)
    (gradient,) = torch.autograd.grad(loss, features)
    result = flow(both_orders, problem, kind)
    assert_flow(result, (loss.detach(), gradient * classes * dims), torch.float32)


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("layout", ["row_stride", "odd_row_stride", "misaligned", "expanded"])
def test_layouts(shim: ctypes.CDLL, kind: str, layout: str) -> None:
    problem = make(11, 24)
    if layout == "expanded":
        problem.features = problem.features[:1].expand(11, 24)
        if kind in ("global", "class"):
            return  # equal rows: short flows, below
    elif layout != "misaligned":
        wide = torch.full((11, 32 if layout == "row_stride" else 29), float("nan"))
        wide[:, :24] = problem.features
        problem.features = wide[:, :24]
    assert_flow(flow(shim, problem, kind, off=int(layout == "misaligned")), defined(problem, kind), torch.float32)


@pytest.mark.parametrize("kind", NUMBERS)
def test_common_mean(shim: ctypes.CDLL, kind: str) -> None:
    """A mean 1000 times the spread: the inputs are exact in float32, the shift comes off before anything is summed."""
    problem = make(13, 48, labelled=True, mean=1000.0)
    assert_flow(flow(shim, problem, kind), defined(problem, kind), torch.float32, slack=20)


def assert_close_rows(shim: ctypes.CDLL, problem: Problem, kind: str, gradient_bound: float = 1e-4) -> None:
    (loss, gradient), (expected, expected_gradient) = flow(shim, problem, kind), defined(problem, kind)
    assert (loss.double() - expected).abs() <= 1e-5 * expected.abs().clamp(max=1)
    assert (gradient.double() - expected_gradient).norm() <= gradient_bound * expected_gradient.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_far_from_the_shift(shim: ctypes.CDLL, kind: str, labelled: bool, offset: float) -> None:
    """Classes far from the shift compared with their spread: sums of squares about the shift would cancel."""
    problem = make(40, 32, labelled=labelled)
    problem.features = problem.features + offset
    # q_c differs from class to class, so r can't make up for the rounding of m, half a unit of 1e-3 at 1e4.
    assert_close_rows(shim, problem, kind, 3e-4 if kind == "class" and labelled and offset > 1e3 else 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_close_together(shim: ctypes.CDLL, kind: str) -> None:
    problem = make(40, 32)
    problem.features = 1e-4 * problem.features + 1
    assert_close_rows(shim, problem, kind)


@pytest.mark.parametrize("kind", ["mse", "pair_mse"])
def test_small_distance(shim: ctypes.CDLL, kind: str) -> None:
    """Features that are the centres but for a constant and a little noise: t - a is nearly the same row everywhere."""
    problem = make(40, 32)
    noise = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    problem.features = problem.centers + 7 + 1e-3 * noise
    assert_close_rows(shim, problem, kind, 1e-3)


@pytest.mark.parametrize("kind", ["global", "class"])
@pytest.mark.parametrize("labelled", [False, True])
def test_identical_rows(shim: ctypes.CDLL, kind: str, labelled: bool) -> None:
    """Exactly no flow, whatever the row and at any eps."""
    problem = make(40, 32, labelled=labelled)
    problem.features = (problem.features[:1] + 3).repeat(len(problem.features), 1)
    loss, gradient = flow(shim, problem, kind)
    assert loss == 1
    assert (gradient == 0).all()


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(shim: ctypes.CDLL, kind: str, value: float) -> None:
    problem = make(10, 20, labelled=True)
    problem.features[3, 7] = value
    loss, _ = flow(shim, problem, kind)
    assert loss.isnan() or (kind in ("mse", "pair_mse", "decoupled") and loss.isinf())


@pytest.mark.parametrize("kind", ["global", "class"])
def test_short_flows(shim: ctypes.CDLL, kind: str) -> None:
    problem = make(6, 16)
    problem.features = torch.ones(6, 16)
    loss, gradient = flow(shim, problem, kind, eps=0.1)
    assert loss == 1
    assert (gradient == 0).all()


def test_upstream_gradient(shim: ctypes.CDLL) -> None:
    problem = make(8, 12, labelled=True)
    for kind in NUMBERS:
        _, one = flow(shim, problem, kind, upstream=1.0)
        _, scaled = flow(shim, problem, kind, upstream=-2.0)
        assert torch.equal(scaled, -2 * one)


@pytest.mark.parametrize("kind", NUMBERS)
def test_empty_class(shim: ctypes.CDLL, kind: str) -> None:
    problem = make(5, 8, labelled=True)
    assert problem.offsets is not None
    problem.offsets[3] = problem.offsets[2]  # class 2 loses its items to class 3
    assert flow(shim, problem, kind)[0].isnan()


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("items", ["of class 1", "none"])
def test_empty_first_class(shim: ctypes.CDLL, kind: str, items: str) -> None:
    """Class 0 has no row to take off the others; without any item there is no address to read ``order`` from."""
    problem = make(5, 8, labelled=True)
    assert problem.offsets is not None
    problem.offsets[1] = 0
    if items == "none":
        problem.features, problem.order, problem.offsets = torch.empty(0, 8), None, torch.zeros(6, dtype=torch.int64)
    assert flow(shim, problem, kind)[0].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("classes", "dims"), [(1, 1), (7, 33), (40, 72)])
@pytest.mark.parametrize("labelled", [False, True])
def test_class_means(shim: ctypes.CDLL, dtype: torch.dtype, classes: int, dims: int, labelled: bool) -> None:
    problem, call = make(classes, dims, dtype, labelled, mean=8.0), Call(shim)
    features, shift, means = call.place(problem.features), call.place(problem.shift), call.poisoned((classes, dims))
    order = None if problem.order is None else call.place(problem.order)
    offsets = None if problem.offsets is None else call.place(problem.offsets)
    call.run(
        "class_means",
        features,
        DTYPES[dtype],
        features.stride(0),
        order,
        offsets,
        shift,
        classes,
        dims,
        means,
        writes=(means,),
    )
    expected = definitions.class_means(problem.features.double(), problem.labels, classes) - problem.shift.double()
    torch.testing.assert_close(means.double(), expected, rtol=1e-6, atol=2e-6)
    grad, out = call.place(torch.randn(classes, dims)), call.poisoned(tuple(features.shape), dtype)
    call.run("class_means_backward", grad, order, offsets, classes, dims, DTYPES[dtype], out, writes=(out,))
    labels = torch.arange(classes) if problem.labels is None else problem.labels
    expected = (grad.double() / torch.bincount(labels).double()[:, None])[labels]
    torch.testing.assert_close(out.double(), expected, rtol=ROUNDING[dtype] + 2.0**-23, atol=1e-7)


def test_missing_barriers_are_noticed_here_too(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    broken = build(tmp_path / "broken.so", "-DSFM_SHIM_NO_BARRIERS")
    assert not torch.isfinite(flow(broken, make(40, 40), "global")[0])
