"""Views straight from levels against the two steps one by one, and the gradient that a step takes without a graph."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from cases.images import IMAGE_CASES, ImageCase, make_boxes, make_views
from image_definitions import KERNELS, assert_as_accurate_as_torch, incoming, kernel_calls, results

from sfm_fast import InputError, draw_views
from sfm_fast.measure.memory import peak_memory
from sfm_fast.ops import library
from sfm_fast.ops import render_augment as fakes
from sfm_fast.ops.augment import augment
from sfm_fast.ops.render import render
from sfm_fast.ops.render_augment import render_augment, render_augment_backward

BACKENDS = ("torch", *KERNELS)
SMALL = next(case for case in IMAGE_CASES if case.name == "smallest")


@pytest.mark.parametrize(("backend", "dtype", "case"), list(kernel_calls(IMAGE_CASES)))
def test_kernels_are_as_accurate_as_torch(case, dtype, backend):
    inputs = case.make()
    assert_as_accurate_as_torch(
        lambda leaves, which, out: render_augment(
            leaves, inputs.canvas, inputs.views, rows=inputs.rows, dtype=out, backend=which
        ),
        inputs.levels,
        dtype,
        backend,
    )


@pytest.mark.parametrize("canvas", [1, 15, 16, 17, 33, 64, 90])
@pytest.mark.parametrize("size", [1, 16, 31, 65])
def test_blocks_of_any_size(canvas, size):
    generator = torch.Generator().manual_seed(size)
    sides = sorted({1, canvas // 2, canvas - 1, canvas} - {0})
    levels = [torch.randn(2, 3, side, side, generator=generator) for side in sides]
    views = make_views(("crop", "mirrored/overhanging"), 4, canvas, canvas, size, 3)
    assert_as_accurate_as_torch(
        lambda leaves, which, out: render_augment(leaves, canvas, views, dtype=out, backend=which),
        levels,
        torch.float32,
        "cpu",
        slack=5e-6,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_one_step_after_the_other(backend):
    inputs = SMALL.make()

    def stepwise(levels):
        return augment(render(levels, inputs.canvas, backend=backend), inputs.views, backend=backend)

    ours = results(lambda levels: render_augment(levels, inputs.canvas, inputs.views, backend=backend), inputs.levels)
    for one, two in zip(ours, results(stepwise, inputs.levels), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_without_a_graph(backend, dtype):
    inputs = SMALL.make()
    shown, *expected = results(
        lambda levels: render_augment(levels, inputs.canvas, inputs.views, dtype=dtype, backend=backend), inputs.levels
    )
    flat = render_augment_backward(incoming(shown), inputs.levels, inputs.canvas, inputs.views, backend=backend)
    assert flat.dtype == torch.float32
    assert torch.equal(flat, torch.cat([part.flatten(1) for part in expected], dim=1))


@pytest.mark.parametrize("backend", KERNELS)
def test_levels_outside_the_view_have_no_gradient(backend):
    levels = [torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 1, 16, 16)]
    views = make_views(("whole",), 1, 16, 16, 4, 1)
    views = replace(views, boxes=torch.tensor([[9.0, 1, 10.5, 1]]))
    _, coarse, fine = results(lambda leaves: render_augment(leaves, 16, views, backend=backend), levels)
    assert fine[0, 0, 10:15, 9:13].all()
    assert fine.count_nonzero() == 20
    assert not coarse[..., :2, :].any()
    assert not coarse[..., :, :1].any()
    assert coarse[..., 2:, 2:].all()


@pytest.mark.usefixtures("maximum_of_a_gpu")
@pytest.mark.parametrize("backend", KERNELS)
def test_nan_and_far_boxes(backend):
    inputs = SMALL.make()
    boxes = torch.tensor([[float("nan"), 1, 0, 1], [3e38, 3e38, 0, 1]])
    views = replace(inputs.views, boxes=boxes, noise_items=torch.tensor([-1, -1]))
    shown, *gradients = results(
        lambda levels: render_augment(levels, inputs.canvas, views, backend=backend), inputs.levels
    )
    assert (shown + (views.mean / views.std).view(1, 3, 1, 1)).abs().max() < 1e-6
    assert not any(gradient.any() for gradient in gradients)


def test_no_image_is_kept():
    """Plain torch keeps some ten canvases an image for the backward; here there is not even one."""
    case = ImageCase("large", 256, (1, 4, 16, 64), 3, 32, images=4)
    inputs = case.make()
    canvases = 4 * 3 * 256 * 256 * 4
    leaves = [level.requires_grad_() for level in inputs.levels]

    def step():
        render_augment(leaves, inputs.canvas, inputs.views, backend="cpu").sum().backward()

    step()
    assert peak_memory(step) < canvases / 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [None, torch.zeros(0, dtype=torch.int64)], ids=["no image", "no row"])
def test_nothing_gives_nothing(backend, rows):
    level = torch.zeros(0 if rows is None else 2, 3, 4, 4)
    views = make_views(("crop",), 0, 6, 6, 5, 3)
    shown, gradient = results(lambda levels: render_augment(levels, 6, views, rows=rows, backend=backend), [level])
    assert shown.shape == (0, 3, 5, 5)
    assert gradient.shape == level.shape
    assert not gradient.any()


LEVEL, VIEWS = torch.zeros(2, 3, 4, 4), make_views(("crop",), 4, 6, 6, 5, 3)
BAD_CALLS = {
    "no level": (dict(levels=[]), "levels must be a list of 1 to 16 tensors, got 0"),
    "larger than the canvas": (dict(canvas=3), r"levels\[0\] must have a side of 1 to 3 pixels, got 4"),
    "canvas": (dict(canvas=0), "canvas must be 1 to 16384 pixels, got 0"),
    "float canvas": (dict(canvas=6.5), r"canvas must be a number of pixels \(int\)"),
    "rows": (dict(rows=torch.tensor([0, 2])), r"rows must be in 0\.\.1, got 0\.\.2"),
    "rows and views": (dict(rows=torch.tensor([0, 1, 0])), "views must be the same number for each image, got 4 views of 3"),
    "not views": (dict(views=None), "views must be sfm_fast.Views, got a builtins.NoneType"),
    "view boxes": (dict(views=replace(VIEWS, boxes=VIEWS.boxes[:, :2])), r"views.boxes must be \(views, 4\)"),
    "channels": (dict(levels=[torch.zeros(2, 3, 4, 4)], views=replace(VIEWS, mean=VIEWS.mean[:2], std=VIEWS.std[:2])),
                 "images must have 1 or 2 channels to fit views.mean, got 3"),
    "dtype": (dict(dtype=torch.int32), "dtype must be float32, bfloat16, float16 or float64, got torch.int32"),
    "backend": (dict(backend="tpu"), "backend must be one of"),
    "absent backend": (dict(backend="cuda"), "backend='cuda' can't run this call: .+; backend='auto' would use 'cpu'"),
    "kernel for float64": (dict(levels=[LEVEL.double()], backend="cpu"), "supports float32, bfloat16 and float16, not"),
    "float64 from a kernel": (dict(dtype=torch.float64, backend="cpu"), "float64"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_names_the_argument(name):
    changes, message = BAD_CALLS[name]
    with pytest.raises(InputError, match=message):
        render_augment(**({"levels": [LEVEL], "canvas": 6, "views": VIEWS} | changes))


def test_boxes_come_in_turns():
    boxes = make_boxes(("whole", "constant/whole"), 3, 8, 4, 2)
    assert boxes.tolist() == [[0.5, 2, 1.5, 4], [boxes[1, 0].item(), 0, 1.5, 4], [0.5, 2, 1.5, 4]]


def test_double_backward_with_some_levels_constant():
    levels = [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8, requires_grad=True)]
    views = draw_views(torch.arange(2), 8, 6, torch.zeros(3), torch.ones(3), seed=0, step=0)

    def second(backend):
        shown = render_augment(levels, 8, views, backend=backend)
        (gradient,) = torch.autograd.grad(shown.square().sum(), levels[1], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), levels[1])[0]

    expected = second("torch")
    assert (second("cpu") - expected).norm() <= 1e-5 * expected.norm()


def test_scratch_of_a_gpu_is_counted_as_the_kernels_take_it():
    """Blocks of images in CUDA, all of them in Triton; the number is written down in C++ and in Python."""
    source = (Path(__file__).parents[2] / "csrc" / "kinds.h").read_text()
    shift = re.search(r"#define SFM_CANVAS_BYTES \((\d+) << (\d+)\)", source)
    assert shift is not None
    assert int(shift[1]) << int(shift[2]) == fakes.CANVAS_BYTES
    assert [fakes._images_at_once(n, 3, 256, 1) for n in (5, 32, 1000)] == [5, 32, 32]
    assert fakes._images_at_once(1000, 3, 256, 2) == 16
    assert fakes._images_at_once(1000, 3, 1024, 2) == 1
    boxes, items, mean, std = (torch.empty(*shape, device="meta") for shape in ((1000, 4), (1000,), (3,), (3,)))
    arguments = [torch.empty(1000, 3, 256, 256, device="meta")], None, 256, boxes, items, 32, mean, std
    for name, in_blocks in (("render_augment", True), ("triton_render_augment", False)):
        if ("triton" if name.startswith("triton") else "cpu") in library.problems:
            continue
        with mock.patch.object(fakes, "_images_at_once", wraps=fakes._images_at_once) as counted:
            shown = getattr(torch.ops.sfm_fast, name)(*arguments, 0.5, 0.2, 0, 0, 0, torch.float32)
            assert shown.shape == (1000, 3, 32, 32)
            assert counted.called == in_blocks
