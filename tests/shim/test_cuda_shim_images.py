"""The CUDA kernels of images, executed on the CPU by the emulator in `shim/`, against torch in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from shim_calls import DTYPES, ROUNDING, Call
from torch import Tensor

from sfm_fast import philox
from sfm_fast.reference.render import color_matrix

KEY = dict(seed=-(2**62) + 12345, step=2**32 - 3, stream=2)


# ---- rendering


def make_levels(count: int, channels: int, sides: Sequence[int], seed: int = 0) -> Tensor:
    """(count, P) float32: the levels of each image one behind the other."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels * sum(side * side for side in sides), generator=generator)


def split(flat: Tensor, channels: int, sides: Sequence[int]) -> list[Tensor]:
    parts = flat.split([channels * side * side for side in sides], dim=1)
    return [part.unflatten(1, (channels, side, side)) for part, side in zip(parts, sides, strict=True)]


def defined_render(levels: Sequence[Tensor], size: int) -> Tensor:
    total = sum(F.interpolate(level, (size, size), mode="bilinear", align_corners=False) for level in levels)
    assert isinstance(total, Tensor)
    if total.shape[1] == 3:
        total = torch.einsum("oc,nchw->nohw", color_matrix(total.dtype), total)
    return torch.sigmoid(2 * total)


def run_render(
    shim: ctypes.CDLL, levels: Sequence[Tensor], size: int, rows: Tensor | None = None,
    dtype: torch.dtype = torch.float32, off: int = 0, call: Call | None = None, quads: bool = True,
) -> Tensor:  # fmt: skip
    """``off`` misaligns the output; levels are read where they lie if ``call`` has placed them."""
    if call is None:
        call = Call(shim)
        levels = [call.place(level, off) for level in levels]
    count, channels = (len(levels[0]) if rows is None else len(rows)), levels[0].shape[1]
    rows = None if rows is None else call.place(rows)
    out = call.poisoned((count, channels, size, size), dtype, off)
    arguments = (len(levels), *numbers_of(levels), rows, count, channels, size, DTYPES[dtype], quads, out)
    call.run("render", *arguments, writes=(out,))
    return out.clone()


def numbers_of(levels: Sequence[Tensor]) -> list[Tensor]:
    """Sides, addresses and strides."""
    each = ((level.shape[-1], level.data_ptr(), level.stride(0)) for level in levels)
    return [torch.tensor(values) for values in zip(*each, strict=True)]


def run_render_backward(shim: ctypes.CDLL, grad: Tensor, images: Tensor, sides: Sequence[int], off: int = 0) -> Tensor:
    call, (count, channels, size, _) = Call(shim), images.shape
    grad, images, side = call.place(grad, off), call.place(images, off), torch.tensor(sides)
    out = call.poisoned((count, channels * sum(side * side for side in sides)), shift=off)
    call.run(
        "render_backward", grad, images, DTYPES[images.dtype], len(sides), side, count, channels, size, out,
        writes=(out,),
    )  # fmt: skip
    return out.clone()


def defined_render_backward(grad: Tensor, images: Tensor, sides: Sequence[int]) -> Tensor:
    """The adjoint at the images given, rounded as they are."""
    y, (count, channels, size, _) = images.double(), images.shape
    g = grad.double() * 2 * y * (1 - y)
    if channels == 3:
        g = torch.einsum("oc,nohw->nchw", color_matrix(torch.float64), g)
    levels = [torch.zeros(count, channels, side, side, dtype=torch.float64, requires_grad=True) for side in sides]
    total = sum(F.interpolate(level, (size, size), mode="bilinear", align_corners=False) for level in levels)
    assert isinstance(total, Tensor)
    return torch.cat([part.flatten(1) for part in torch.autograd.grad(total, levels, g)], dim=1)


def assert_rounded(result: Tensor, expected: Tensor, slack: float = 1e-6) -> None:
    """Equal but for the rounding of the result's dtype and float32 arithmetic."""
    assert result.shape == expected.shape
    bound = ROUNDING[result.dtype] * expected.abs() + slack
    assert ((result.double() - expected).abs() <= bound).all(), (result.double() - expected).abs().max()


def assert_gradient(result: Tensor, expected: Tensor, channels: int, sides: Sequence[int]) -> None:
    """To a few units of the largest value of each level: coarse texels are long sums."""
    for one, two in zip(split(result, channels, sides), split(expected, channels, sides), strict=True):
        assert_rounded(one, two, 2e-6 * float(two.abs().max()) + 1e-7)


PYRAMIDS = [
    (5, 3, (5,)),
    (5, 1, (1, 2, 3, 4, 5)),
    (7, 3, (1, 6, 7, 7)),
    (8, 3, (1, 1, 2)),
    (28, 1, (1, 2, 4, 8, 16, 28)),
    (28, 3, (3, 7, 14)),
    (32, 3, (1, 2, 4, 8, 16, 32)),
    (33, 3, (1, 2, 4, 8, 16, 28, 32, 33, 13)),
    (72, 1, (1, 5, 18, 36, 71)),
    (64, 3, (1, 2, 4, 8, 16, 32, 64)),
    (48, 1, (1, 2, 3, 6)),
]


@pytest.mark.parametrize(("size", "channels", "sides"), PYRAMIDS)
def test_render(shim: ctypes.CDLL, size: int, channels: int, sides: tuple[int, ...]) -> None:
    flat = make_levels(3, channels, sides)
    expected = defined_render(split(flat.double(), channels, sides), size)
    for dtype in DTYPES:
        for off in (0, 1):
            contiguous = [level.contiguous() for level in split(flat, channels, sides)]
            for quads in (True, False):
                assert_rounded(run_render(shim, contiguous, size, dtype=dtype, off=off, quads=quads), expected)
    call, rows = Call(shim), torch.tensor([2, 0, 2, 1])  # levels inside one buffer, images by number
    views = split(call.place(flat), channels, sides)
    assert_rounded(run_render(shim, views, size, rows, call=call), expected[rows])


@pytest.mark.parametrize(("size", "channels", "sides"), PYRAMIDS)
def test_render_backward(shim: ctypes.CDLL, size: int, channels: int, sides: tuple[int, ...]) -> None:
    grad = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))
    images = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(2))
    for dtype, off in ((torch.float32, 0), (torch.float32, 1), (torch.bfloat16, 1), (torch.float16, 0)):
        one, two = grad.to(dtype), images.to(dtype)
        result = run_render_backward(shim, one, two, sides, off)
        assert_gradient(result, defined_render_backward(one, two, sides), channels, sides)


@pytest.mark.parametrize(
    ("size", "channels", "sides"),
    [
        (96, 3, (1, 2, 4, 8, 48, 96)),
        (256, 3, (1, 2, 4, 8, 16, 32, 64, 128, 256)),
        (520, 3, (1, 3, 260, 519)),
        (700, 1, (2,)),
    ],
)
def test_large_canvas(both_orders: ctypes.CDLL, size: int, channels: int, sides: tuple[int, ...]) -> None:
    """Many strips, several groups of levels, several columns a thread; the same bits in both orders."""
    levels = split(make_levels(1, channels, sides), channels, sides)
    images = run_render(both_orders, levels, size)
    assert_rounded(images, defined_render([level.double() for level in levels], size))
    grad = torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    result = run_render_backward(both_orders, grad, images, sides)
    assert_gradient(result, defined_render_backward(grad, images, sides), channels, sides)
    both_orders.set_reversed(0)
    assert torch.equal(run_render(both_orders, levels, size), images)
    assert torch.equal(run_render_backward(both_orders, grad, images, sides), result)


def test_render_extremes(shim: ctypes.CDLL) -> None:
    """Large sums saturate without NaN; a NaN reaches its own image and no other."""
    levels = split(make_levels(3, 1, (4, 8)), 1, (4, 8))
    levels = [levels[0].contiguous(), levels[1].contiguous()]
    levels[0][0], levels[0][1] = 1e30, -1e30
    levels[1][2, 0, 3, 3] = float("nan")
    images = run_render(shim, levels, 8)
    assert (images[0] == 1).all()
    assert (images[1] == 0).all()
    assert images[2].isnan().sum() == 1
    assert run_render(shim, levels, 8, torch.empty(0, dtype=torch.int64)).numel() == 0


# ---- noise


def test_normals(shim: ctypes.CDLL) -> None:
    """2e-6 from float64 for every word, also where the logarithm is near 0 and the angle near quarters of a turn."""
    edges = [0, 1, 2, 1000, *(2**n + near for n in (23, 24, 28, 29, 30, 31) for near in (-2, -1, 0, 1))]
    edges += [2**32 - 1 - word for word in edges]
    pairs = torch.cartesian_prod(torch.tensor(edges), torch.tensor(edges))
    others = torch.randint(0, 2**32, (200_000, 2), generator=torch.Generator().manual_seed(0))
    near = torch.cat([torch.arange(2000), 2**32 - 1 - torch.arange(2000), 2**31 - 1000 + torch.arange(2000)])
    pairs = torch.cat([pairs, others, torch.stack([near, near.flip(0)], 1)])
    result = torch.empty(len(pairs) // 2 * 2, 2)
    words = pairs[: len(result)].contiguous()
    shim.box_muller(ctypes.c_int64(len(words) // 2), *(ctypes.c_void_p(x.data_ptr()) for x in (words, result)))
    u = (words.double() + 0.5) * 2.0**-32
    radius, angle = (-2 * u[:, 0].log()).sqrt(), 2 * torch.pi * u[:, 1]
    # log(u) near 1 loses digits in float64 too, but not below 1e-10 of the radius.
    expected = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    assert (result.double() - expected).abs().max() <= 2e-6


def test_philox(shim: ctypes.CDLL) -> None:
    words = torch.randint(0, 2**32, (50, 4), generator=torch.Generator().manual_seed(1))
    for seed in (0, -1, 2**40 + 7, -(2**63)):
        result = words.clone()
        shim.philox_words(ctypes.c_int64(50), ctypes.c_void_p(result.data_ptr()), ctypes.c_int64(seed))
        expected = philox.philox4x32((words[:, 0], words[:, 1], words[:, 2], words[:, 3]), seed)
        assert torch.equal(result, torch.stack(expected, 1))


# ---- views


@dataclass
class Views:
    """One call: images, the views' boxes and which of them have noise."""

    images: Tensor
    boxes: Tensor
    size: int
    channels: int
    items: Tensor = field(init=False)
    mean: Tensor = field(init=False)
    std: Tensor = field(init=False)

    def __post_init__(self) -> None:
        numbers = torch.arange(len(self.boxes)) * 977 + 2**32 - 2000
        self.items = torch.where(torch.arange(len(self.boxes)) % 3 == 1, -1, numbers % 2**32)
        self.mean = torch.tensor([0.485, 0.456, 0.406, 0.5])[: self.channels]
        self.std = torch.tensor([0.229, 0.224, 0.225, 0.3])[: self.channels]

    def shape(self) -> Tensor:
        count, channels, height, width = self.images.shape
        return torch.tensor([len(self.boxes), count, channels, self.channels, height, width, self.size])


def make_boxes(views: int, size: int, height: int, width: int) -> Tensor:
    """Crops of many kinds: mirrored, overhanging, strongly enlarged and reduced, one line, far outside."""
    kinds = [
        (0.3, 0.9, 1.2, 0.7),
        (width - 1.0, -1.0, 0.0, 1.0),  # mirrored, integer coordinates
        (-3.4, (width + 6) / size, -2.6, (height + 5) / size),
        (2.2, 0.05, 3.1, 0.06),
        (width + 2.5, -4.0, -1.5, 4.0),
        (1.5, 0.0, 2.0, 0.5),
        (1.0, 0.3, 1.25, 0.0),
        (-50.0, 0.1, 60.0, 1.0),
        (0.0, -0.0, 0.0, 1e-30),
        (1e30, -1e38, -1e9, 1e7),
    ]
    return torch.tensor([kinds[k % len(kinds)] for k in range(views)])


def defined_augment(views: Views, images: Tensor, noise: bool = True) -> Tensor:
    """In the images' dtype, differentiable; coordinates rounded to float32 as the operations round them."""
    steps, boxes = torch.arange(views.size).double(), views.boxes.double()
    x = (boxes[:, :1] + steps * boxes[:, 1:2]).float().double().clamp(-1e6, 1e6)
    y = (boxes[:, 2:3] + steps * boxes[:, 3:]).float().double().clamp(-1e6, 1e6)
    height, width = images.shape[2:]
    across, down = (2 * x + 1) / width - 1, (2 * y + 1) / height - 1
    count, size = len(boxes), views.size
    grid = torch.stack([across[:, None].expand(count, size, size), down[:, :, None].expand(count, size, size)], -1)
    source = images.repeat(count // len(images), 1, 1, 1)
    out = F.grid_sample(source, grid.to(images.dtype), mode="bilinear", padding_mode="zeros", align_corners=False)
    for view in (views.items >= 0).nonzero().flatten().tolist() if noise else []:
        normal = philox.normal(views.items[view : view + 1], out[0].numel(), **KEY)
        out = out.index_add(0, torch.tensor([view]), 0.5 + 0.2 * normal.view(1, *out.shape[1:]).to(out))
    column = (1, -1, 1, 1)
    return (out - noise * views.mean.to(out).view(column)) / views.std.to(out).view(column)


def run_augment(shim: ctypes.CDLL, views: Views, dtype: torch.dtype = torch.float32, off: int = 0) -> Tensor:
    call = Call(shim)
    images, boxes, mean, std = (call.place(x, off) for x in (views.images, views.boxes, views.mean, views.std))
    out = call.poisoned((len(boxes), views.channels, views.size, views.size), dtype, off)
    arguments = (images, DTYPES[images.dtype], views.shape(), boxes, call.place(views.items), 0.5, 0.2)
    call.run("augment", *arguments, *KEY.values(), mean, std, DTYPES[dtype], out, writes=(out,))
    return out.clone()


def run_augment_backward(
    shim: ctypes.CDLL, views: Views, grad: Tensor, dtype: torch.dtype = torch.float32, off: int = 0
) -> Tensor:
    call = Call(shim)
    grad, boxes, std = (call.place(x, off) for x in (grad, views.boxes, views.std))
    out = call.poisoned(tuple(views.images.shape), dtype, off)
    arguments = (grad, DTYPES[grad.dtype], views.shape(), boxes, std, DTYPES[dtype], out)
    call.run("augment_backward", *arguments, writes=(out,))
    return out.clone()


# Images, views an image, image channels, view channels, height, width, size.
VIEWS = [
    (5, 2, 3, 3, 5, 5, 3),
    (5, 2, 1, 3, 28, 28, 7),
    (10, 1, 1, 1, 28, 28, 28),
    (4, 3, 3, 3, 33, 20, 12),
    (3, 1, 2, 2, 9, 40, 8),
    (2, 1, 4, 4, 16, 16, 5),
]


def make_views(case: Sequence[int], dtype: torch.dtype = torch.float32) -> Views:
    count, per_image, channels, view_channels, height, width, size = case
    images = torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(4)).to(dtype)
    return Views(images, make_boxes(count * per_image, size, height, width), size, view_channels)


@pytest.mark.parametrize("case", VIEWS)
def test_augment(shim: ctypes.CDLL, case: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        views = make_views(case, dtype)
        expected = defined_augment(views, views.images.double())
        for out_dtype in DTYPES:
            for off in (0, 1) if dtype == torch.float32 else (1,):
                # Weights of coordinates near 40: half a unit of those, 2e-6, over the deviation.
                assert_rounded(run_augment(shim, views, out_dtype, off), expected, 1.5e-5)


@pytest.mark.parametrize("case", VIEWS)
def test_augment_backward(shim: ctypes.CDLL, case: tuple[int, ...]) -> None:
    views = make_views(case)
    shape = (len(views.boxes), views.channels, views.size, views.size)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    for dtype in DTYPES:
        given = grad.to(dtype)
        images = views.images.double().requires_grad_()
        (expected,) = torch.autograd.grad(defined_augment(views, images, noise=False), images, given.double())
        for out_dtype in DTYPES:
            result = run_augment_backward(shim, views, given, out_dtype, int(dtype == out_dtype))
            assert_rounded(result, expected, 2e-6 * float(expected.abs().max()))


def test_adjoint(shim: ctypes.CDLL) -> None:
    """<A x, g> = <x, A' g> for coordinates a rounding away from whole numbers: both take the same taps."""
    size, generator = 24, torch.Generator().manual_seed(6)
    boxes = torch.randn(40, 4, generator=generator)
    boxes[:, 1::2] = boxes[:, 1::2].sign() / torch.randint(1, 7, (40, 2), generator=generator)
    boxes[:, ::2] = torch.where(boxes[:, 1::2] > 0, 0.0, 15.0) + 2.0**-22 * boxes[:, ::2].round()
    views = Views(torch.rand(40, 1, 16, 16, generator=generator), boxes, size, 1)
    views.items.fill_(-1)
    views.mean, views.std = torch.zeros(1), torch.ones(1)
    grad = torch.randn(40, 1, size, size, generator=generator)
    one = (run_augment(shim, views).double() * grad).sum((1, 2, 3))
    two = (run_augment_backward(shim, views, grad).double() * views.images).sum((1, 2, 3))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize(("count", "per_image", "channels", "canvas"), [(5, 1, 3, 33), (7, 2, 3, 24), (41, 3, 1, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("numbered", [False, True])
def test_images_in_blocks(
    shim: ctypes.CDLL, count: int, per_image: int, channels: int, canvas: int, dtype: torch.dtype, numbered: bool,
    blocks: bool,
) -> None:  # fmt: skip
    """The canvas of some images at a time: the same bits as rendering all of them, then augmenting those; and back."""
    sides = (1, 2, 5, canvas)
    flat = make_levels(count, channels, sides)
    rows = torch.randint(0, count, (count,), generator=torch.Generator().manual_seed(7)) if numbered else None
    pictures = run_render(shim, split(flat, channels, sides), canvas, rows, quads=blocks)
    views = Views(pictures, make_boxes(count * per_image, 9, canvas, canvas), 9, 3)
    expected = run_augment(shim, views, dtype)

    call = Call(shim)
    levels, boxes, mean, std = (
        split(call.place(flat), channels, sides),
        *map(call.place, (views.boxes, views.mean, views.std)),
    )
    placed = None if rows is None else call.place(rows)
    out = call.poisoned(tuple(expected.shape), dtype)
    where = (len(sides), *numbers_of(levels), placed, canvas, views.shape(), boxes)
    arguments = (*where, call.place(views.items), 0.5, 0.2, *KEY.values(), mean, std, DTYPES[dtype], blocks, out)
    call.run("render_augment", *arguments, writes=(out,))
    assert torch.equal(out, expected)

    grad = call.place(torch.randn(expected.shape, generator=torch.Generator().manual_seed(8)).to(dtype))
    gradient = call.poisoned((count, flat.shape[1]))
    call.run("render_augment_backward", grad, DTYPES[dtype], *where, std, blocks, gradient, writes=(gradient,))
    canvas_gradient = run_augment_backward(shim, views, grad.clone())
    assert torch.equal(gradient, run_render_backward(shim, canvas_gradient, pictures, sides))


def test_views_in_both_orders(both_orders: ctypes.CDLL) -> None:
    views = make_views((4, 3, 3, 3, 33, 20, 12))
    out = run_augment(both_orders, views)
    grad = run_augment_backward(both_orders, views, out)
    both_orders.set_reversed(0)
    assert torch.equal(run_augment(both_orders, views), out)
    assert torch.equal(run_augment_backward(both_orders, views, out), grad)


def test_no_noise_and_no_views(shim: ctypes.CDLL) -> None:
    views = make_views((3, 1, 3, 3, 8, 8, 5))
    noisy = run_augment(shim, views)
    views.items.fill_(-1)
    quiet = run_augment(shim, views)
    assert torch.equal(noisy[1], quiet[1])
    assert not torch.equal(noisy[0], quiet[0])
    none, unseen = (Views(torch.ones(count, 1, 8, 8), torch.empty(0, 4), 4, 1) for count in (0, 2))
    assert run_augment(shim, none).numel() == 0
    assert run_augment_backward(shim, none, torch.empty(0, 1, 4, 4)).numel() == 0
    assert (run_augment_backward(shim, unseen, torch.empty(0, 1, 4, 4)) == 0).all()
