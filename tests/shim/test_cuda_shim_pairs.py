"""The CUDA kernels of pair alignment, executed on the CPU by the emulator in `shim/`, against the definition in float64."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch
from shim_calls import Call, build
from torch import Tensor


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
    a, b = centred(70, 40)
    assert not torch.isfinite(pairs(broken, a, b)[0])
