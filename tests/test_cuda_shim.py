"""The CUDA kernels, executed on the CPU by the emulator in `shim/`, against the definitions in float64."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import definitions
import pytest
import torch
from torch import Tensor

from sfm_fast.reference import flow_alignment as reference

SHIM = Path(__file__).parent / "shim"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
KINDS = {
    "global": (0, "global", "cosine"),
    "class": (1, "class", "cosine"),
    "mse": (2, "global", "mse"),
    "pair_mse": (3, "pair", "mse"),
}
MARGIN = 64  # elements before and after every buffer


def build(target: Path, *flags: str) -> ctypes.CDLL:
    command = ["g++", "-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    subprocess.run([*command, *flags, f"-I{SHIM}", str(SHIM / "shim_ops.cpp"), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.last_message.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return build(tmp_path_factory.mktemp("shim") / "shim.so")


@pytest.fixture(params=["ascending", "descending"])
def both_orders(request: pytest.FixtureRequest, shim: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    """The order in which threads and blocks run: a missing barrier shows in one of the two."""
    shim.set_reversed(int(request.param == "descending"))
    yield shim
    shim.set_reversed(0)


class Call:
    """Arguments of one call: inputs copied between margins of NaN, outputs poisoned, both checked afterwards."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.held: list[tuple[Tensor, Tensor]] = []

    def place(self, tensor: Tensor, shift: int = 0) -> Tensor:
        """A copy of equal strides inside a larger buffer, ``shift`` elements off its 64-byte alignment."""
        size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
        fill: Any = float("nan") if tensor.is_floating_point() else -1
        buffer = torch.full((size + 2 * MARGIN + shift + 64,), fill, dtype=tensor.dtype)
        skip = -(buffer.data_ptr() // tensor.element_size()) % 64 + MARGIN + shift
        view = buffer.as_strided(tensor.shape, tensor.stride(), skip)
        unique = slice(0, 1 if tensor.dim() and tensor.stride(0) == 0 else None)  # one row of memory, if expanded
        view[unique].copy_(tensor[unique])
        self.held.append((buffer, buffer.clone()))
        return view

    def poisoned(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, shift: int = 0) -> Tensor:
        return self.place(torch.full(shape, float("nan"), dtype=dtype), shift)

    def run(self, name: str, *arguments: Any, writes: tuple[Tensor, ...]) -> None:
        """Calls, raises on an error code, and checks that nothing but ``writes`` has changed."""

        def convert(value: Any) -> Any:
            if value is None or isinstance(value, Tensor):
                return ctypes.c_void_p(None if value is None else value.data_ptr())
            return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(int(value))

        code = self.library[name](*[convert(value) for value in arguments])
        assert code == 0, (code, self.library.last_message())
        for view in writes:
            for buffer, before in self.held:
                if buffer.untyped_storage().data_ptr() == view.untyped_storage().data_ptr():
                    before.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(view)
        for buffer, before in self.held:
            assert torch.equal(buffer.view(torch.uint8), before.view(torch.uint8)), "wrote outside its outputs"


@dataclass
class Problem:
    """Features with labels or without, and the centres as an operation takes them."""

    features: Tensor
    centers: Tensor
    labels: Tensor | None
    order: Tensor | None
    offsets: Tensor | None
    shift: Tensor
    shifted: Tensor


def make(
    classes: int,
    dims: int,
    dtype: torch.dtype = torch.float32,
    labelled: bool = False,
    mean: float = 0.0,
    seed: int = 0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, dims, generator=generator)
    counts = (
        torch.randint(1, 6, (classes,), generator=generator) if labelled else torch.ones(classes, dtype=torch.int64)
    )
    labels = torch.arange(classes).repeat_interleave(counts)
    labels = labels[torch.randperm(len(labels), generator=generator)] if labelled else labels
    features = (centers[labels] + torch.randn(len(labels), dims, generator=generator) + mean).to(dtype)
    centers = centers + mean
    shift = centers.double().mean(0).float()
    order = torch.argsort(labels, stable=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(labels, minlength=classes).cumsum(0)])
    if not labelled:
        return Problem(features, centers, None, None, None, shift, centers - shift)
    return Problem(features, centers, labels, order, offsets, shift, centers - shift)


def flow(
    shim: ctypes.CDLL,
    problem: Problem,
    kind: int,
    upstream: float | None = None,
    eps: float = 1e-8,
    alpha: float = 0.3,
    off: int = 0,
    fused: bool = True,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient through both operations; ``off`` misaligns every buffer of floats.

    The upstream gradient is classes * dims unless given: gradients of order 1, well above any absolute tolerance.
    """
    call = Call(shim)
    classes, dims = problem.centers.shape
    upstream = float(classes * dims) if upstream is None else upstream
    centers = problem.shifted if kind == 4 else problem.shifted - problem.shifted.double().mean(0).float()
    features, centers, shift = (
        call.place(problem.features, off),
        call.place(centers, off),
        call.place(problem.shift, off),
    )
    order = None if problem.order is None else call.place(problem.order)
    offsets = None if problem.offsets is None else call.place(problem.offsets)
    count = classes if kind == 1 else 1
    loss, rows, columns = call.poisoned((1,)), call.poisoned((2, count)), call.poisoned((2, dims), shift=off)
    common = (features, DTYPES[features.dtype], features.stride(0), order, offsets, centers, shift)
    call.run(
        "flow_alignment", *common, classes, dims, kind, eps, alpha, loss, rows, columns, fused,
        writes=(loss, rows, columns),
    )  # fmt: skip
    grad_output, gradient = (
        call.place(torch.tensor([upstream])),
        call.poisoned(tuple(features.shape), features.dtype, off),
    )
    backward = (grad_output, *common, rows, count, columns, classes, dims, gradient)
    call.run("flow_alignment_backward", *backward, writes=(gradient,))
    return loss[0].clone(), gradient.clone()


def defined(problem: Problem, kind: str, eps: float = 1e-8, alpha: float = 0.3) -> tuple[Tensor, Tensor]:
    features = problem.features.double().requires_grad_()
    if kind == "decoupled":
        loss = definitions.decoupled(features, problem.centers, problem.labels, alpha)
    else:
        loss = definitions.flow_alignment(features, problem.centers, problem.labels, *KINDS[kind][1:], eps)
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


NUMBERS = {name: number for name, (number, *_) in KINDS.items()} | {"decoupled": 4}


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(("classes", "dims"), [(2, 1), (2, 3), (9, 37), (21, 40), (19, 264)])
def test_flow_alignment(shim: ctypes.CDLL, kind: str, labelled: bool, classes: int, dims: int) -> None:
    for dtype in DTYPES:
        problem = make(classes, dims, dtype, labelled)
        expected = defined(problem, kind)
        for fused in (True, False):
            assert_flow(flow(shim, problem, NUMBERS[kind], fused=fused), expected, dtype)


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("fused", [True, False])
def test_many_classes(both_orders: ctypes.CDLL, kind: str, fused: bool) -> None:
    """Several chunks and tiles; the same bits again, and in the other order of threads."""
    problem = make(60, 136, labelled=True)
    first = flow(both_orders, problem, NUMBERS[kind], fused=fused)
    assert_flow(first, defined(problem, kind), torch.float32)
    both_orders.set_reversed(0)
    for one, two in zip(first, flow(both_orders, problem, NUMBERS[kind], fused=fused), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("kind", "classes", "dims"), [("class", 8211, 3), ("global", 90, 32769), ("mse", 90, 32769), ("decoupled", 8211, 2)]
)
def test_long_chunks(both_orders: ctypes.CDLL, kind: str, classes: int, dims: int) -> None:
    """Shapes at which a block takes many classes in turn; the definitions would take hours, so the float64 reference."""
    problem = make(classes, dims)
    features = problem.features.double().requires_grad_()
    centers, means = problem.centers.double() - problem.shift.double(), features - problem.shift.double()
    centred = reference.centre_rows(centers)
    if kind == "decoupled":
        loss = reference.decoupled_mse(centers, means, 0.3)
    elif kind == "mse":
        loss = reference.flow_mse(centred, means)
    else:
        loss = {"class": reference.class_cosine, "global": reference.global_cosine}[kind](centred, means, 1e-8)
    (gradient,) = torch.autograd.grad(loss, features)
    result = flow(both_orders, problem, NUMBERS[kind])
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
    assert_flow(
        flow(shim, problem, NUMBERS[kind], off=int(layout == "misaligned")), defined(problem, kind), torch.float32
    )


@pytest.mark.parametrize("kind", NUMBERS)
def test_common_mean(shim: ctypes.CDLL, kind: str) -> None:
    """A mean 1000 times the spread: the inputs are exact in float32, the shift comes off before anything is summed."""
    problem = make(13, 48, labelled=True, mean=1000.0)
    assert_flow(flow(shim, problem, NUMBERS[kind]), defined(problem, kind), torch.float32, slack=20)


def assert_close_rows(shim: ctypes.CDLL, problem: Problem, kind: str, gradient_bound: float = 1e-4) -> None:
    (loss, gradient), (expected, expected_gradient) = flow(shim, problem, NUMBERS[kind]), defined(problem, kind)
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
    loss, gradient = flow(shim, problem, NUMBERS[kind])
    assert loss == 1
    assert (gradient == 0).all()


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(shim: ctypes.CDLL, kind: str, value: float) -> None:
    problem = make(10, 20, labelled=True)
    problem.features[3, 7] = value
    loss, _ = flow(shim, problem, NUMBERS[kind])
    assert loss.isnan() or (kind not in ("global", "class") and loss.isinf())


@pytest.mark.parametrize("kind", ["global", "class"])
def test_short_flows(shim: ctypes.CDLL, kind: str) -> None:
    problem = make(6, 16)
    problem.features = torch.ones(6, 16)
    loss, gradient = flow(shim, problem, NUMBERS[kind], eps=0.1)
    assert loss == 1
    assert (gradient == 0).all()


def test_upstream_gradient(shim: ctypes.CDLL) -> None:
    problem = make(8, 12, labelled=True)
    for kind in NUMBERS:
        _, one = flow(shim, problem, NUMBERS[kind], upstream=1.0)
        _, scaled = flow(shim, problem, NUMBERS[kind], upstream=-2.0)
        assert torch.equal(scaled, -2 * one)


@pytest.mark.parametrize("kind", NUMBERS)
def test_empty_class(shim: ctypes.CDLL, kind: str) -> None:
    problem = make(5, 8, labelled=True)
    assert problem.offsets is not None
    problem.offsets[3] = problem.offsets[2]  # class 2 loses its items to class 3
    assert flow(shim, problem, NUMBERS[kind])[0].isnan()


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("items", ["of class 1", "none"])
def test_empty_first_class(shim: ctypes.CDLL, kind: str, items: str) -> None:
    """Class 0 has no row to take off the others; without any item there is no address to read ``order`` from."""
    problem = make(5, 8, labelled=True)
    assert problem.offsets is not None
    problem.offsets[1] = 0
    if items == "none":
        problem.features, problem.order, problem.offsets = torch.empty(0, 8), None, torch.zeros(6, dtype=torch.int64)
    assert flow(shim, problem, NUMBERS[kind])[0].isnan()


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


def centred(classes: int, dims: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(classes, dims, generator=generator)
    b = a + torch.randn(classes, dims, generator=generator)
    return a - a.mean(0), b - b.mean(0)


def pairs(
    shim: ctypes.CDLL, a: Tensor, b: Tensor, groups: Tensor | None = None, start: int = 0, stop: int | None = None,
    eps: float = 1e-8, gradient: bool = True, high: bool = False, block: int = 0, tile: int = 0, off: int = 0,
    gram: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call, (classes, dims) = Call(shim), a.shape
    stop = classes if stop is None else stop
    a, b, groups = call.place(a, off), call.place(b, off), None if groups is None else call.place(groups)
    total, out = call.poisoned((1,), torch.float64), call.poisoned((stop - start if gradient else 0, dims), shift=off)
    arguments = (a, b, groups, classes, dims, start, stop, eps, gradient, high, block, tile, gram, total, out)
    call.run("pair_alignment", *arguments, writes=(total, out))
    return total[0].clone(), out.clone()


def defined_pairs(
    a: Tensor, b: Tensor, groups: Tensor | None = None, start: int = 0, stop: int | None = None, eps: float = 1e-8
) -> tuple[Tensor, Tensor]:
    a, b = a.double(), b.double().requires_grad_()
    f, g = a[None] - a[:, None], b[None] - b[:, None]
    square_f, square_g = f.square().sum(-1), g.square().sum(-1)
    dropped = (square_f.sqrt() < eps) | (square_g.detach().sqrt() < eps) | torch.eye(len(a), dtype=torch.bool)
    if groups is not None:
        dropped |= groups[:, None] == groups[None]
    lengths = (torch.where(dropped, 1.0, square_f) * torch.where(dropped, 1.0, square_g)).sqrt()
    cosine = torch.where(dropped, 0.0, (f * g).sum(-1) / lengths)
    (gradient,) = torch.autograd.grad(cosine.sum(), b)
    return cosine[start:stop].detach().sum(), gradient[start:stop]


def assert_pairs(
    result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], classes: int, high: bool = False, slack: float = 1.0
) -> None:
    pair_count = classes * (classes - 1)
    assert (result[0] - expected[0]).abs() <= slack * (
        3e-4 if high else 3e-7
    ) * pair_count  # half a unit of TF32 is 4.9e-4
    scale = expected[1].abs().max() + 1e-12
    assert (result[1].double() - expected[1]).abs().max() <= slack * (4e-3 if high else 4e-6) * scale + (
        1e-3 if high else 2e-6
    )


GRAMS = pytest.mark.parametrize("gram", [True, False], ids=["gram", "four products"])


@GRAMS
@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize(("classes", "dims"), [(2, 1), (3, 2), (5, 7), (17, 16), (66, 9), (70, 68), (129, 20)])
def test_pairs(shim: ctypes.CDLL, classes: int, dims: int, high: bool, gram: bool) -> None:
    a, b = centred(classes, dims)
    slack = 50.0 if dims < 4 else 1.0  # one dimension or two: lengths near zero
    assert_pairs(pairs(shim, a, b, high=high, gram=gram), defined_pairs(a, b), classes, high, slack)


@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("ratio", [2.0**-20, 1e-3, 700.0, 1e9])
def test_lengths_of_other_scales(shim: ctypes.CDLL, ratio: float, high: bool) -> None:
    """Features far shorter or longer than the centres, all of them or one: a numerator from squares would cancel."""
    a, b = centred(70, 36)
    (total, gradient), (expected, expected_gradient) = pairs(shim, a, ratio * b, high=high), defined_pairs(a, ratio * b)
    assert_pairs((total, ratio * gradient), (expected, ratio * expected_gradient), 70, high)
    b[11] *= ratio
    (total, gradient), (expected, expected_gradient) = pairs(shim, a, b, high=high), defined_pairs(a, b)
    rows = torch.arange(70) != 11  # one short row has a gradient far larger than the others
    assert_pairs((total, gradient[rows]), (expected, expected_gradient[rows]), 70, high)
    assert_pairs((total, gradient[11:12]), (expected, expected_gradient[11:12]), 70, high)


def clustered(classes: int, dims: int, clusters: int, spread: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(clusters, dims, generator=generator)[torch.arange(classes) % clusters]
    a = a + spread * torch.randn(classes, dims, generator=generator)
    b = a + spread * torch.randn(classes, dims, generator=generator)
    return a - a.mean(0), b - b.mean(0)


@pytest.mark.parametrize("spread", [0.1, 0.14, 0.3])
def test_clusters_on_truncating_tensor_cores(shim: ctypes.CDLL, spread: float) -> None:
    """Pairs far closer to each other than to the rest, in sums of 1024 products, which tensor cores truncate as they go."""
    a, b = clustered(64, 1024, 4, spread)
    expected, expected_gradient = defined_pairs(a, b)

    def error(gram: bool) -> float:
        total, gradient = pairs(shim, a, b, gram=gram)
        assert (total - expected).abs() <= 64 * 63 * (1e-6 if gram else 1e-3)
        return float((gradient - expected_gradient).norm() / expected_gradient.norm())

    assert error(gram=True) <= 1e-5
    truncated = error(gram=False)
    shim.set_rounding_products(1)
    try:
        rounded = error(gram=False)
    finally:
        shim.set_rounding_products(0)
    assert truncated > 5 * rounded, "the emulated tensor cores don't truncate"


@GRAMS
@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("tile", [1, 2])
@pytest.mark.parametrize(("classes", "block"), [(150, 0), (150, 64), (150, 100), (131, 128)])
def test_pair_blocks(both_orders: ctypes.CDLL, classes: int, block: int, tile: int, high: bool, gram: bool) -> None:
    """Several blocks of the pair matrix, their mirror images, small and large tiles; the same bits again."""
    a, b = centred(classes, 18)
    result = pairs(both_orders, a, b, high=high, block=block, tile=tile, gram=gram)
    assert_pairs(result, defined_pairs(a, b), classes, high)
    both_orders.set_reversed(0)
    for one, two in zip(result, pairs(both_orders, a, b, high=high, block=block, tile=tile, gram=gram), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize(("start", "stop"), [(0, 40), (33, 97), (96, 97), (50, 50)])
def test_pair_rectangle(shim: ctypes.CDLL, start: int, stop: int, high: bool) -> None:
    a, b = centred(97, 20)
    groups = torch.arange(97) // 5
    expected = defined_pairs(a, b, groups, start, stop)
    if start == stop:
        assert pairs(shim, a, b, groups, start, stop)[0] == 0
        return
    for block in (0, 32):
        assert_pairs(pairs(shim, a, b, groups, start, stop, high=high, block=block), expected, 97, high)


def test_pair_groups_and_no_gradient(shim: ctypes.CDLL) -> None:
    a, b = centred(75, 12)
    groups = torch.randint(0, 6, (75,), generator=torch.Generator().manual_seed(1))
    expected = defined_pairs(a, b, groups)
    total, gradient = pairs(shim, a, b, groups)
    assert_pairs((total, gradient), expected, 75)
    alone, empty = pairs(shim, a, b, groups, gradient=False)
    assert alone == total
    assert empty.shape == (0, 12)
    misaligned = pairs(shim, a, b, groups, off=1)
    assert torch.equal(misaligned[1], gradient)


@pytest.mark.parametrize("high", [False, True])
def test_close_pairs(shim: ctypes.CDLL, high: bool) -> None:
    """Identical rows have length exactly 0 and are dropped; nearly identical rows keep their direction."""
    a, b = centred(40, 32)
    a[5], a[20] = a[3], a[4] + 1e-3 * torch.randn(32, generator=torch.Generator().manual_seed(2))
    b[9], b[30] = b[8], b[7] + 1e-3 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    # The gradient of a pair that is 1e-3 long is a difference of large terms: compared to its own size.
    assert_pairs(pairs(shim, a, b, high=high), defined_pairs(a, b), 40, high, slack=4)
    same = torch.ones(40, 32)
    total, gradient = pairs(shim, same, b, high=high)
    assert total == 0
    assert (gradient == 0).all()


def test_imagenet_21k_pairs_take_200_megabytes(shim: ctypes.CDLL) -> None:
    """Means, their gradient, and the workspace with its matrices for a block of pairs."""
    classes, dims = 21_841, 1024
    shim.pair_workspace.restype = ctypes.c_int64
    space = shim.pair_workspace(ctypes.c_int64(classes), ctypes.c_int64(dims))
    assert 4 * 4 * 1024**2 < space < 18e6
    assert 2 * 4 * classes * dims + space <= 200e6


@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_pairs_not_finite(shim: ctypes.CDLL, value: float, high: bool) -> None:
    for which in (0, 1):
        inputs = centred(20, 12)
        inputs[which][13, 5] = value
        assert pairs(shim, *inputs, high=high)[0].isnan()


def test_missing_barriers_are_noticed(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    broken = build(tmp_path / "broken.so", "-DSFM_SHIM_NO_BARRIERS")
    problem, (a, b) = make(40, 40), centred(70, 40)
    assert not torch.isfinite(flow(broken, problem, 0)[0])
    assert not torch.isfinite(pairs(broken, a, b)[0])
