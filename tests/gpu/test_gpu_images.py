"""The kernels of images on a real GPU: accuracy, CUDA graphs, streams, determinism, memory, more than 2^31 pixels. See test_gpu.py."""

from __future__ import annotations

from dataclasses import replace

import image_definitions
import pytest
import torch
from cases.images import IMAGE_CASES, VIEW_CASES, make_views
from gpu_device import BACKENDS, DEVICE, DTYPES, moved, needs_device, needs_gpu
from image_definitions import assert_as_accurate_as_torch, call, incoming, leaves_of, results

import sfm_fast
from sfm_fast import philox
from sfm_fast.measure.memory import peak_memory
from sfm_fast.measure.timing import captured
from sfm_fast.ops.augment import augment
from sfm_fast.ops.render import render
from sfm_fast.ops.render_augment import render_augment
from sfm_fast.views import Views

pytestmark = needs_device
KERNELS = pytest.mark.parametrize("backend", BACKENDS)
OPERATIONS = pytest.mark.parametrize("kind", image_definitions.KINDS)


def views_on_gpu(views):
    names = ("boxes", "noise_items", "mean", "std")
    return replace(views, **{name: getattr(views, name).to(DEVICE) for name in names})


def images_on_gpu(name):
    inputs = next(case for case in IMAGE_CASES if case.name == name).make()
    rows = None if inputs.rows is None else inputs.rows.to(DEVICE)
    levels = [moved(level) for level in inputs.levels]
    return replace(inputs, levels=levels, rows=rows, views=views_on_gpu(inputs.views))


@pytest.mark.parametrize("case", IMAGE_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@OPERATIONS
@KERNELS
def test_images_as_accurate_as_torch(backend, kind, dtype, case):
    inputs = images_on_gpu(case.name)
    leaves = [inputs.images.to(dtype)] if kind == "augment" else inputs.levels
    assert_as_accurate_as_torch(
        lambda parts, which, out: call(kind, inputs, parts, which, out),
        leaves,
        dtype,
        backend,
        slack=3e-6,
        image_is_saved=kind == "render",
    )


@pytest.mark.parametrize("case", VIEW_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@KERNELS
def test_views_as_accurate_as_torch(backend, dtype, case):
    images, views = case.make(dtype)
    views = views_on_gpu(views)
    assert_as_accurate_as_torch(
        lambda parts, which, out: augment(parts[0], views, dtype=out, backend=which),
        [moved(images)],
        dtype,
        backend,
        slack=3e-6,
    )


@pytest.mark.parametrize("canvas", [64, 224, 256])
@OPERATIONS
@KERNELS
def test_images_at_size(backend, kind, canvas):
    generator = torch.Generator().manual_seed(canvas)
    sides = [side for side in (1, 2, 4, 8, 16, 32, 64, 128, 256, canvas) if side <= canvas]
    levels = [torch.randn(6, 3, side, side, generator=generator).to(DEVICE) / len(sides) ** 0.5 for side in sides]
    views = views_on_gpu(make_views(("crop", "mirrored", "overhanging"), 12, canvas, canvas, 224, 3))
    inputs = image_definitions.ImageInputs(levels, None, canvas, views)
    assert_as_accurate_as_torch(
        lambda parts, which, out: call(kind, inputs, parts, which, out),
        leaves_of(kind, inputs),
        torch.float32,
        backend,
        slack=2e-5,
        image_is_saved=kind == "render",
    )


@needs_gpu
@OPERATIONS
@KERNELS
def test_images_in_a_cuda_graph(backend, kind):
    inputs = images_on_gpu("colour")
    static = [leaf.detach().clone().requires_grad_() for leaf in leaves_of(kind, inputs)]
    grad = incoming(call(kind, inputs, static, backend))

    def step():
        result = call(kind, inputs, static, backend)
        return [result.detach(), *torch.autograd.grad(result, static, grad)]

    graph, replayed = captured(step)
    fresh = [torch.rand_like(leaf) for leaf in static]
    with torch.no_grad():
        for leaf, values in zip(static, fresh, strict=True):
            leaf.copy_(values)
        inputs.views.boxes.mul_(0.9)
        inputs.views.noise_items.add_(1)
    graph.replay()
    for one, two in zip(replayed, results(lambda parts: call(kind, inputs, parts, backend), fresh, grad), strict=True):
        assert torch.equal(one, two)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["colour", "wide", "rows"])
@OPERATIONS
@KERNELS
def test_same_bits_of_images_on_every_run_and_stream(backend, kind, name, dtype):
    inputs = images_on_gpu(name)
    leaves = leaves_of(kind, inputs)
    first = results(lambda parts: call(kind, inputs, parts, backend, dtype), leaves)
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            again = results(lambda parts: call(kind, inputs, parts, backend, dtype), leaves)
        torch.cuda.synchronize()
        for one, two in zip(first, again, strict=True):
            assert torch.equal(one, two)


@OPERATIONS
@KERNELS
def test_same_bits_of_an_image_by_itself(backend, kind):
    inputs = images_on_gpu("colour")
    leaves, count = leaves_of(kind, inputs), len(inputs.levels[0])
    whole = results(lambda parts: call(kind, inputs, parts, backend), leaves)
    grad = incoming(whole[0])
    for image in range(count):
        chosen = torch.arange(image, len(inputs.views.boxes), count, device=DEVICE)
        part = replace(inputs, views=inputs.views.select(chosen))
        shown = slice(image, image + 1) if kind == "render" else chosen
        one = results(
            lambda parts, part=part: call(kind, part, parts, backend),
            [leaf[image : image + 1] for leaf in leaves],
            grad[shown],
        )
        assert torch.equal(one[0], whole[0][shown])
        for ours, theirs in zip(one[1:], whole[1:], strict=True):
            assert torch.equal(ours, theirs[image : image + 1])


@needs_gpu
@OPERATIONS
@KERNELS
def test_images_like_those_of_the_cpu(backend, kind):
    on_cpu = next(case for case in IMAGE_CASES if case.name == "colour").make()
    inputs, leaves = images_on_gpu("colour"), leaves_of(kind, on_cpu)
    theirs = results(lambda parts: call(kind, on_cpu, parts, "cpu"), leaves)
    ours = results(lambda parts: call(kind, inputs, parts, backend), [leaf.to(DEVICE) for leaf in leaves])
    for one, two in zip(ours, theirs, strict=True):
        assert (one.cpu() - two).abs().max() <= 1e-5 * two.abs().max()


@KERNELS
def test_noise_is_the_reference(backend):
    items, size = torch.tensor([0, 2**32 - 1, 77]), 1000
    constants = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    views = Views(
        torch.zeros(3, 4, device=DEVICE), items.to(DEVICE), size, *constants, seed=2**64 - 9, step=2**32 - 1, noise_mean=0.0,
        noise_std=1.0,
    )  # fmt: skip
    made = augment(torch.zeros(3, 3, 1, 1, device=DEVICE), views, backend=backend).flatten(1).cpu()
    expected = philox.normal(items, 3 * size * size, seed=views.seed, stream=views.stream, step=views.step)
    assert (made - expected).abs().max() <= 2e-6


@KERNELS
@pytest.mark.usefixtures("maximum_of_a_gpu")
def test_hard_values_of_images(backend):
    values = torch.tensor([-float("inf"), -3e38, -60.0, 60.0, 3e38, float("inf"), float("nan")], device=DEVICE)
    image, gradient = results(lambda levels: render(levels, 1, backend=backend), [values.view(7, 1, 1, 1)])
    assert ((image[:3] >= 0) & (image[:3] < 1e-37)).all()
    assert (image[3:6] == 1).all()
    assert image[6].isnan()
    assert (gradient[:6].abs() < 1e-35).all()
    boxes = [
        [float("nan"), 1, 0, 1],
        [float("inf"), 1, 0, 1],
        [0, -float("inf"), 0, 1],
        [3e38, 3e38, 0, 1],
        [0, 1, -1e10, 1],
    ]
    boxes, items = torch.tensor([*boxes, [0, 1, 0, 1]], device=DEVICE), torch.full((6,), -1, device=DEVICE)
    views = Views(boxes, items, 4, torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE))
    images = torch.rand(1, 1, 4, 4, device=DEVICE)
    shown, gradient = results(lambda parts: augment(parts[0], views, backend=backend), [images])
    assert not shown[:-1].any()
    assert torch.equal(shown[-1:], images)
    assert torch.equal(gradient, incoming(shown)[-1:])


@OPERATIONS
@KERNELS
def test_nothing_gives_nothing(backend, kind):
    inputs = images_on_gpu("tiny")
    views = inputs.views.select(slice(0, 0))
    inputs = replace(inputs, levels=[level[:0] for level in inputs.levels], views=views)
    shown, *gradients = results(lambda parts: call(kind, inputs, parts, backend), leaves_of(kind, inputs))
    assert len(shown) == 0
    assert all(len(gradient) == 0 for gradient in gradients)


@needs_gpu
@pytest.mark.gpu_alone
@OPERATIONS
@KERNELS
def test_more_than_two_to_the_31_pixels(backend, kind):
    count, canvas = 12_000, 256  # 2.36e9 pixels, 4.7 GB in bfloat16
    torch.cuda.empty_cache()  # what this process has kept doesn't count as free
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("needs 60 GB")
    levels = [torch.randn(count, 3, side, side, device=DEVICE) for side in (1, 4)]
    views = views_on_gpu(make_views(("crop", "mirrored"), count, canvas, canvas, canvas, 3))
    inputs = image_definitions.ImageInputs(levels, None, canvas, views)
    leaves = [render(levels, canvas, dtype=torch.bfloat16, backend=backend)] if kind == "augment" else levels
    leaves = [leaf.requires_grad_() for leaf in leaves]
    result = call(kind, inputs, leaves, backend, torch.bfloat16)
    assert result.numel() > 2**31
    grad = result.detach()
    gradients = torch.autograd.grad(result, leaves, grad)
    for image in (0, 10_923, count - 1):  # the second is where 2^31 pixels are passed
        rows = slice(image, image + 1)
        part = replace(inputs, views=views.select(rows))
        alone = results(
            lambda parts, part=part: call(kind, part, parts, backend, torch.bfloat16),
            [leaf[rows] for leaf in leaves],
            grad[rows],
        )
        for one, two in zip(alone, [result, *gradients], strict=True):
            assert torch.equal(one, two[rows])


@needs_gpu
@KERNELS
def test_no_image_is_kept_between_forward_and_backward(backend):
    inputs = images_on_gpu("colour")
    levels = [torch.randn(64, 3, side, side, device=DEVICE, requires_grad=True) for side in (1, 16, 256)]
    views = views_on_gpu(make_views(("crop",), 64, 256, 256, 32, 3))
    inputs = replace(inputs, levels=levels, canvas=256, views=views)
    call("render_augment", inputs, levels, backend)
    before = torch.cuda.memory_allocated()
    result = call("render_augment", inputs, levels, backend)
    kept = torch.cuda.memory_allocated() - before
    assert kept <= result.numel() * 4 + 2**16
    canvas = 64 * 3 * 256 * 256 * 4
    assert (
        peak_memory(lambda: call("render_augment", inputs, levels, backend), "cuda")
        <= canvas + result.numel() * 4 + 2**20
    )
    # The canvas, its gradient, and the levels' gradients twice: flat and as autograd takes them.
    floats = sum(level.numel() for level in levels) * 4
    assert peak_memory(lambda: result.sum().backward(), "cuda") <= 2 * canvas + 2 * floats + result.numel() * 8 + 2**20


@needs_gpu
def test_compiled_images():
    inputs = images_on_gpu("rows")

    @torch.compile(fullgraph=True)
    def compiled(levels):
        images = render(levels, inputs.canvas, rows=inputs.rows)
        return augment(images, inputs.views) + render_augment(levels, inputs.canvas, inputs.views, rows=inputs.rows)

    def plain(levels):
        return 2 * call("render_augment", inputs, levels, "torch")

    for one, two in zip(results(compiled, inputs.levels), results(plain, inputs.levels), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=2e-5)


@needs_gpu
def test_image_tensors_on_different_devices_are_named():
    inputs = images_on_gpu("rows")
    with pytest.raises(sfm_fast.InputError, match="rows are on cpu, the images on cuda"):
        render(inputs.levels, inputs.canvas, rows=inputs.rows.cpu())
    with pytest.raises(sfm_fast.InputError, match=r"levels\[1\] must be like levels\[0\].*on cpu"):
        render([inputs.levels[0], inputs.levels[1].cpu()], inputs.canvas)
    views = replace(inputs.views, std=inputs.views.std.cpu())
    with pytest.raises(sfm_fast.InputError, match=r"views\.std is on cpu, the images on cuda"):
        augment(inputs.images, views)
    with pytest.raises(sfm_fast.InputError, match="runs on CPU tensors, not on cuda"):
        render(inputs.levels, inputs.canvas, backend="cpu")
