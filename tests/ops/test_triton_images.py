"""The Triton kernels of the image operations in the interpreter, against float64 torch written from the definition."""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton runs on the GPU here, see test_gpu.py", allow_module_level=True)

import triton
import triton.language as tl

from sfm_fast import philox
from sfm_fast.kernels.augment import augment, augment_backward
from sfm_fast.kernels.philox import normal_pair
from sfm_fast.kernels.render import render, render_backward
from sfm_fast.kernels.render_augment import render_augment, render_augment_backward
from sfm_fast.reference.render import render as reference_render

# The interpreter truncates to bfloat16 where a GPU rounds: a whole unit in the last place.
UNIT = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
NOISE = (0.5, 0.2, -5, 3, 2)  # mean, std, seed, step, stream


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(numbers) % 2**31)


def _levels(count: int, channels: int, sides: tuple[int, ...], flat: bool = True) -> list[Tensor]:
    """Views of one buffer (N, P), as training has them, or tensors of their own."""
    generator = _generator(count, channels, *sides)
    sizes = [channels * side * side for side in sides]
    buffer = torch.randn(count, sum(sizes), generator=generator)
    views = [
        part.unflatten(1, (channels, side, side)) for part, side in zip(buffer.split(sizes, 1), sides, strict=True)
    ]
    return views if flat else [view.clone() for view in views]


def _close(got: Tensor, reference: Tensor, plain: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Not further from float64 than plain torch, but for a few units in the last place of the largest number."""
    assert got.dtype == dtype
    assert got.shape == reference.shape
    error, allowed = (got.double() - reference).abs().max(), (plain.double() - reference).abs().max()
    assert error <= allowed + 2 * UNIT[dtype] * reference.abs().max().clamp(min=1)


def _render_gradient(levels: list[Tensor], size: int, grad: Tensor, dtype: torch.dtype) -> Tensor:
    leaves = [level.to(dtype, copy=True).requires_grad_() for level in levels]
    gradients = torch.autograd.grad(reference_render(leaves, size), leaves, grad.to(dtype))
    return torch.cat([gradient.flatten(1) for gradient in gradients], 1)


SIZES = [
    (5, (1, 2, 5), 3, 3),
    (28, (1, 2, 4, 8, 16, 28), 3, 1),
    (28, (3, 7, 12), 1, 2),
    (16, (16, 4, 16, 4), 3, 2),
    (9, (9,), 1, 2),
    (33, (32, 1), 1, 1),
    (1, (1, 1), 3, 2),
    (72, (3, 36, 72), 1, 1),
]


@pytest.mark.parametrize(("size", "sides", "channels", "count"), SIZES)
def test_render(size, sides, channels, count):
    levels = _levels(count, channels, sides)
    images = render(levels, None, size, torch.float32)
    reference = reference_render([level.double() for level in levels], size)
    _close(images, reference, reference_render(levels, size))

    grad = torch.randn(images.shape, generator=_generator(size))
    gradient = render_backward(grad, images, list(sides))
    exact, plain = (_render_gradient(levels, size, grad, dtype) for dtype in (torch.float64, torch.float32))
    _close(gradient, exact, plain)
    assert torch.equal(gradient, render_backward(grad, images, list(sides)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_render_dtypes(dtype):
    sides, size = (1, 3, 8), 8
    levels = _levels(2, 3, sides, flat=False)
    images = render(levels, None, size, dtype)
    _close(images, reference_render([level.double() for level in levels], size), images, dtype)
    grad = torch.randn(2, 3, 2 * size, size, generator=_generator(1)).to(dtype)[:, :, ::2]
    gradient = render_backward(grad, images.float(), list(sides))
    assert torch.equal(gradient, render_backward(grad.float(), images, list(sides)))


def test_render_rows_strides_and_offsets():
    levels = _levels(5, 3, (2, 4, 6))
    rows = torch.tensor([4, 0, 4, 1])
    whole = render(levels, None, 6, torch.float32)
    assert torch.equal(render(levels, rows, 6, torch.float32), whole[rows])
    assert torch.equal(render([level[1:3] for level in levels], None, 6, torch.float32), whole[1:3])
    turned = [level.transpose(2, 3).contiguous().transpose(2, 3) for level in levels]
    assert torch.equal(render(turned, None, 6, torch.float32), whole)
    assert render(levels, rows[:0], 6, torch.float32).shape == (0, 3, 6, 6)
    assert render_backward(whole[:0], whole[:0], [2, 4]).shape == (0, 60)


def test_render_of_huge_and_undefined_levels():
    level = torch.tensor([-math.inf, -1e30, -60.0, 60.0, 1e30, math.inf, math.nan, 0.0, 0.0]).view(1, 1, 3, 3)
    values = render([level], None, 3, torch.float32).flatten()
    expected = torch.sigmoid(2 * level.double()).flatten()
    torch.testing.assert_close(values.double(), expected, atol=1e-30, rtol=1e-6, equal_nan=True)


def test_a_workspace_for_a_part_of_the_images(monkeypatch):
    levels = _levels(5, 1, (2, 3, 7))
    images = render(levels, None, 8, torch.float32)
    grad = torch.randn(images.shape, generator=_generator(3))
    whole = render_backward(grad, images, [2, 3, 7])
    monkeypatch.setattr("sfm_fast.kernels.render_gradient.WORKSPACE", 2 * 4 * 8 * (12 + 8))
    assert torch.equal(render_backward(grad, images, [2, 3, 7]), whole)
    monkeypatch.setattr("sfm_fast.kernels.segments.IS_HIP", True)
    assert torch.equal(render_backward(grad, images, [2, 3, 7]), whole)


@triton.jit
def _pairs_kernel(first: tl.tensor, second: tl.tensor, x: tl.tensor, y: tl.tensor, BLOCK: tl.constexpr) -> None:
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = normal_pair(tl.load(first + index).to(tl.uint32), tl.load(second + index).to(tl.uint32))
    tl.store(x + index, a)
    tl.store(y + index, b)


def test_normal_numbers_are_accurate_for_every_word():
    edges = [0, 1, 2, 2**29 - 1, 2**29, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 3 * 2**30, 2**32 - 2, 2**32 - 1]
    turns = torch.tensor([*edges, 2**32 - 2**29 - 1, 2**32 - 2**29, int(2**31.5), int(2**31.5) + 1])
    near = torch.arange(512)
    words = torch.cat([turns, near, 2**32 - 1 - near, 2**31 - 256 + near, int(2**31.5) - 256 + near])
    pairs = torch.cartesian_prod(words, turns)
    random = torch.randint(0, 2**32, (2**17 - 2 * len(pairs), 2), generator=_generator(7))
    pairs = torch.cat([pairs, pairs.flip(1), random])
    x, y = torch.empty(len(pairs)), torch.empty(len(pairs))
    _pairs_kernel[(1,)](pairs[:, 0].contiguous(), pairs[:, 1].contiguous(), x, y, BLOCK=len(pairs))
    u, left = (pairs.double() + 0.5) * 2.0**-32, (2**32 - 1 - pairs[:, 0]).double() + 0.5
    radius = torch.sqrt(-2 * torch.where(u[:, 0] > 0.5, torch.log1p(-left * 2.0**-32), torch.log(u[:, 0])))
    assert (x - radius * torch.cos(2 * math.pi * u[:, 1])).abs().max() < 2e-6
    assert (y - radius * torch.sin(2 * math.pi * u[:, 1])).abs().max() < 2e-6


def _reference_views(
    images: Tensor, boxes: Tensor, items: Tensor, size: int, mean: Tensor, std: Tensor, noise: tuple = NOISE
) -> Tensor:
    (_, channels, height, width), count = images.shape, len(boxes)
    box, index = boxes.to(images.dtype), torch.arange(size, dtype=images.dtype)
    x = (2 * (box[:, :1] + index * box[:, 1:2]) + 1) / width - 1
    y = (2 * (box[:, 2:3] + index * box[:, 3:]) + 1) / height - 1
    grid = torch.stack((x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)), -1)
    repeated = images.repeat(count // len(images), 1, 1, 1)
    views = F.grid_sample(repeated, grid, padding_mode="zeros", align_corners=False)
    noise_mean, noise_std, seed, step, stream = noise
    number = channels * size * size
    normal = philox.normal(items.clamp(min=0), number, seed=seed, stream=stream, step=step).view(views.shape)
    views = views + (items >= 0).view(-1, 1, 1, 1) * (noise_mean + noise_std * normal.to(views))
    mean, std = (value.to(views).view(1, -1, 1, 1) for value in (mean, std))
    return (views.expand(-1, mean.shape[1], -1, -1) - mean) / std


def _image_gradient(images: Tensor, boxes: Tensor, size: int, std: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    leaf = images.to(dtype, copy=True).requires_grad_()
    items = torch.full((len(boxes),), -1)
    views = _reference_views(leaf, boxes, items, size, torch.zeros_like(std), std)
    return torch.autograd.grad(views, leaf, grad.to(dtype))[0]


def _boxes(count: int, height: int, width: int, size: int) -> Tensor:
    """Crops that overhang, every second one mirrored."""
    generator = _generator(count, height, size)
    scale = 0.3 + torch.rand(count, 2, generator=generator)
    start = (1 - scale) * torch.rand(count, 2, generator=generator) * 1.2 - 0.1
    x, dx = start[:, 0] * width - 0.5, scale[:, 0] * width / size
    mirrored = torch.arange(count) % 2 == 0
    x, dx = torch.where(mirrored, width - 1 - x, x), torch.where(mirrored, -dx, dx)
    return torch.stack((x, dx, start[:, 1] * height - 0.5, scale[:, 1] * height / size), 1)


# images, views of each, channels, outputs, height, width, size, box (x0, dx, y0, dy)
VIEWS = {
    "crops": (2, 2, 3, 3, 28, 28, 28, None),
    "grey": (2, 1, 1, 3, 28, 20, 12, None),
    "odd": (1, 3, 3, 3, 9, 13, 7, None),
    "one channel": (2, 3, 1, 1, 12, 12, 5, None),
    "two tiles": (1, 1, 1, 1, 34, 40, 44, None),
    "five channels": (1, 1, 5, 5, 6, 6, 9, None),
    "zoom": (1, 1, 3, 3, 6, 6, 12, (2.3, 0.05, 4.2, -0.05)),
    "reduction": (1, 1, 1, 3, 40, 40, 10, (0.25, 4.0, 38.9, -4.0)),
    "integers": (1, 1, 1, 1, 8, 8, 8, (-1.0, 1.0, 8.0, -1.0)),
    "constant": (1, 1, 1, 1, 8, 8, 6, (3.5, 0.0, -2.0, 1.5)),
    "nearly constant": (1, 1, 1, 1, 8, 8, 6, (3.5, 1e-3, 2.0, 1e-8)),
    "outside": (1, 1, 1, 1, 8, 8, 6, (100.0, 1.0, 0.0, 1.0)),
}


@pytest.mark.parametrize("case", VIEWS)
def test_augment(case):
    count, each, channels, outputs, height, width, size, box = VIEWS[case]
    views, generator = count * each, _generator(height, width)
    images = torch.rand(count, channels, height, width, generator=generator)
    boxes = _boxes(views, height, width, size) if box is None else torch.tensor([box])
    items = torch.arange(views) * 7 - (1 if views > 1 else 0)
    mean, std = torch.rand(2, outputs, generator=generator) + 0.2
    got = augment(images, boxes, items, size, mean, std, *NOISE, torch.float32)
    plain = _reference_views(images, boxes, items, size, mean, std)
    _close(got, _reference_views(images.double(), boxes, items, size, mean, std), plain)
    assert torch.equal(got, augment(images, boxes, items, size, mean, std, *NOISE, torch.float32))

    grad = torch.randn(got.shape, generator=generator)
    gradient = augment_backward(grad, boxes, std, count, channels, height, width, torch.float32)
    exact, plain = (_image_gradient(images, boxes, size, std, grad, dtype) for dtype in (torch.float64, torch.float32))
    _close(gradient, exact, plain)
    assert torch.equal(gradient, augment_backward(grad, boxes, std, count, channels, height, width, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_augment_dtypes_strides_and_offsets(dtype):
    images = torch.rand(3, 6, 8, 3, generator=_generator(4)).to(dtype).permute(0, 3, 1, 2)[1:]
    boxes, items, mean, std = _boxes(2, 6, 8, 8), torch.tensor([-1, 2**32 - 1]), torch.rand(3), torch.rand(3) + 0.5
    got = augment(images, boxes, items, 8, mean, std, *NOISE, dtype)
    reference = _reference_views(images.double(), boxes, items, 8, mean, std)
    _close(got, reference, reference, dtype)
    grad = torch.randn(2, 3, 8, 8, generator=_generator(5)).to(dtype).transpose(2, 3)
    gradient = augment_backward(grad, boxes, std, 2, 3, 6, 8, dtype)
    exact = _image_gradient(images, boxes, 8, std, grad, torch.float64)
    _close(gradient, exact, exact, dtype)


def test_the_backward_is_the_adjoint_of_the_forward():
    images, zeros, ones = torch.rand(2, 3, 11, 9, generator=_generator(6)), torch.zeros(3), torch.ones(3)
    boxes = _boxes(4, 11, 9, 10)
    views = augment(images, boxes, torch.full((4,), -1), 10, zeros, ones, *NOISE, torch.float32)
    grad = torch.randn(views.shape, generator=_generator(8))
    gradient = augment_backward(grad, boxes, ones, 2, 3, 11, 9, torch.float32)
    torch.testing.assert_close((views.double() * grad).sum(), (images.double() * gradient).sum(), rtol=1e-6, atol=1e-5)


def test_huge_coordinates_read_zeros():
    images, ones = torch.rand(1, 1, 4, 4), torch.ones(1)
    item = torch.tensor([-1])
    for box in ((3e38, 3e38, 0.0, 1.0), (-3e38, 0.0, 0.0, 1.0), (0.0, 1.0, 1e20, -3e38)):
        boxes = torch.tensor([box])
        views = augment(images, boxes, item, 4, 0 * ones, ones, *NOISE, torch.float32)
        assert torch.equal(views, torch.zeros(1, 1, 4, 4))
        gradient = augment_backward(torch.ones(1, 1, 4, 4), boxes, ones, 1, 1, 4, 4, torch.float32)
        assert torch.equal(gradient, torch.zeros(1, 1, 4, 4))


def test_noise_does_not_depend_on_the_batch():
    images, mean, std = torch.rand(3, 3, 8, 8, generator=_generator(9)), torch.rand(3), torch.rand(3) + 0.5
    boxes, items = _boxes(6, 8, 8, 7), torch.tensor([5, -1, 9, 4, 1, 0])
    whole = augment(images, boxes, items, 7, mean, std, *NOISE, torch.float32)
    alone = augment(images[1:2], boxes[4:5], items[4:5], 7, mean, std, *NOISE, torch.float32)
    assert torch.equal(alone, whole[4:5])
    assert augment(images[:0], boxes[:0], items[:0], 7, mean, std, *NOISE, torch.float32).shape == (0, 3, 7, 7)
    empty = augment_backward(whole[:0], boxes[:0], std, 2, 3, 8, 8, torch.float32)
    assert torch.equal(empty, torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(("channels", "outputs"), [(1, 3), (3, 3)])
def test_render_augment(channels, outputs):
    levels, rows = _levels(4, channels, (1, 3, 8)), torch.tensor([3, 1, 3])
    boxes, items = _boxes(6, 8, 8, 9), torch.arange(6) - 1
    mean, std = torch.rand(2, outputs, generator=_generator(2)) + 0.3
    got = render_augment(levels, rows, 8, boxes, items, 9, mean, std, *NOISE, torch.float32)

    def gradient(dtype: torch.dtype, grad: Tensor | None) -> Tensor:
        leaves = [level[rows].to(dtype).requires_grad_() for level in levels]
        views = _reference_views(reference_render(leaves, 8), boxes, items, 9, mean, std)
        if grad is None:
            return views.detach()
        return torch.cat([part.flatten(1) for part in torch.autograd.grad(views, leaves, grad.to(dtype))], 1)

    _close(got, gradient(torch.float64, None), gradient(torch.float32, None))
    grad = torch.randn(got.shape, generator=_generator(11))
    back = render_augment_backward(grad, levels, rows, 8, boxes, std)
    _close(back, gradient(torch.float64, grad), gradient(torch.float32, grad))


def test_arguments_are_checked():
    level, images, boxes, one = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), torch.rand(2, 4), torch.ones(3)
    items = torch.zeros(2, dtype=torch.int64)
    for levels, size, dtype, match in (
        ([], 4, torch.float32, "levels must be 1 to 16"),
        ([level], 3, torch.float32, r"levels\[0\] must have a side"),
        ([level, level[:1]], 4, torch.float32, r"levels\[1\] must have shape"),
        ([level.double()], 4, torch.float32, r"levels\[0\] must be float32"),
        ([level[:, :2]], 4, torch.float32, "1 or 3 channels"),
        ([level], 4, torch.float64, "dtype must be"),
    ):
        with pytest.raises(ValueError, match=match):
            render(levels, None, size, dtype)
    with pytest.raises(ValueError, match="grad must have shape"):
        render_backward(images[:1], images, [4])
    with pytest.raises(ValueError, match="sides must be"):
        render_backward(images, images, [5])
    with pytest.raises(ValueError, match="boxes must have a multiple of 2"):
        augment(images, boxes[:1], items[:1], 4, one, one, *NOISE, torch.float32)
    with pytest.raises(ValueError, match="1 channel or those of mean"):
        augment(images, boxes, items, 4, one[:2], one[:2], *NOISE, torch.float32)
    with pytest.raises(ValueError, match="noise_items must have shape"):
        augment(images, boxes, items[:1], 4, one, one, *NOISE, torch.float32)
    with pytest.raises(ValueError, match="step must be"):
        augment(images, boxes, items, 4, one, one, 0.5, 0.2, 0, 2**32, 2, torch.float32)
