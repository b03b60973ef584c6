"""What holds for render, augment and render_augment alike: bits, inputs, gradients of every form, compile, any shape."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases.images import IMAGE_CASES, ImageInputs
from hypothesis import given, settings
from hypothesis import strategies as st
from image_definitions import DTYPES, KERNELS, KINDS, assert_as_accurate_as_torch, call, incoming, leaves_of, results
from torch import Tensor

import sfm_fast
from sfm_fast.ops.augment import augment
from sfm_fast.ops.render import render
from sfm_fast.ops.render_augment import render_augment
from sfm_fast.views import Views

CASES = {case.name: case for case in IMAGE_CASES}
# The interpreter's share of a test that runs on several cases.
SOME = [("cpu", name) for name in ("colour", "odd", "wide", "grey-to-colour", "rows")] + [("triton", "smallest")]


def outputs(kind, inputs, backend="cpu", dtype=None, grad=None):
    return results(lambda leaves: call(kind, inputs, leaves, backend, dtype), leaves_of(kind, inputs), grad)


def assert_same_bits(ours, theirs):
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one, two)


def subset(inputs: ImageInputs, chosen: Tensor) -> tuple[ImageInputs, Tensor]:
    """Some of the images by level slices, and the numbers of their views."""
    count = len(inputs.levels[0] if inputs.rows is None else inputs.rows)
    views = torch.arange(len(inputs.views.boxes)).view(-1, count)[:, chosen].flatten()
    part = replace(
        inputs, levels=[level[chosen] for level in inputs.levels], rows=None, views=inputs.views.select(views)
    )
    return part, views


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "name"), SOME)
def test_same_bits_on_every_run(kind, backend, name):
    inputs = CASES[name].make()
    assert_same_bits(outputs(kind, inputs, backend), outputs(kind, CASES[name].make(), backend))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_with_any_number_of_threads(kind, dtype):
    inputs = CASES["colour"].make()
    first, before = outputs(kind, inputs, dtype=dtype), torch.get_num_threads()
    try:
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert_same_bits(outputs(kind, inputs, dtype=dtype), first)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("backend", "name"), [("cpu", "colour"), ("cpu", "odd"), ("cpu", "outside"), ("triton", "smallest")]
)
def test_same_bits_in_any_batch_split(kind, backend, name):
    """An image is the same, and so is its gradient, whichever others come with it."""
    inputs = CASES[name].make()
    whole = outputs(kind, inputs, backend)
    grad, count = incoming(whole[0]), len(inputs.levels[0])
    for chosen in (torch.tensor([count - 1]), torch.arange(count - 1), torch.arange(count).flip(0)):
        part, views = subset(inputs, chosen)
        shown = chosen if kind == "render" else views
        leaves = [leaf[chosen] for leaf in leaves_of(kind, inputs)]
        ours = results(lambda parts, part=part: call(kind, part, parts, backend), leaves, grad[shown])
        assert_same_bits(ours, [whole[0][shown], *(gradient[chosen] for gradient in whole[1:])])


@pytest.mark.parametrize("kind", ["render", "render_augment"])
@pytest.mark.parametrize("backend", KERNELS)
def test_rows_are_the_images_they_name(kind, backend):
    inputs = CASES["rows-of-flat-buffer"].make()
    by_row = outputs(kind, inputs, backend)
    picked = outputs(kind, replace(inputs, levels=[level[inputs.rows] for level in inputs.levels], rows=None), backend)
    assert torch.equal(by_row[0], picked[0])
    for level, gradient, expected in zip(inputs.levels, by_row[1:], picked[1:], strict=True):
        assert torch.equal(gradient, torch.zeros_like(level).index_add(0, inputs.rows, expected))


@pytest.mark.parametrize("kind", ["augment", "render_augment"])
@pytest.mark.parametrize(("backend", "name"), [("cpu", "colour"), ("cpu", "odd"), ("triton", "smallest")])
def test_views_of_an_image_one_by_one(kind, backend, name):
    inputs = CASES[name].make()
    count = len(inputs.levels[0])
    whole = outputs(kind, inputs, backend)
    grad, shown, total = incoming(whole[0]), [], None
    for views in torch.arange(len(inputs.views.boxes)).split(count):
        result, *gradients = outputs(kind, replace(inputs, views=inputs.views.select(views)), backend, grad=grad[views])
        shown.append(result)
        total = gradients if total is None else [one + two for one, two in zip(total, gradients, strict=True)]
    assert torch.equal(torch.cat(shown), whole[0])
    for one, two in zip(total, whole[1:], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "name"), SOME)
def test_no_uninitialised_memory_is_read_or_left(kind, backend, name):
    inputs = CASES[name].make()
    expected = outputs(kind, inputs, backend)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # fills every torch.empty with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        assert_same_bits(outputs(kind, inputs, backend), expected)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("backend", "name"), [("cpu", "flat-buffer"), ("cpu", "rows"), ("cpu", "strided"), ("triton", "smallest")]
)
def test_nothing_given_is_written(kind, backend, name):
    inputs = CASES[name].make()
    leaves = [leaf.detach().requires_grad_() for leaf in leaves_of(kind, inputs)]
    views = inputs.views
    result = call(kind, inputs, leaves, backend)
    grad = incoming(result)
    tensors = [*leaves, views.boxes, views.noise_items, views.mean, views.std, grad, result]
    tensors += [] if inputs.rows is None else [inputs.rows]
    copies, versions = [tensor.detach().clone() for tensor in tensors], [tensor._version for tensor in tensors]
    for _ in range(2):
        torch.autograd.grad(result, leaves, grad, retain_graph=True)
    call(kind, inputs, leaves, backend)
    for tensor, copy, version in zip(tensors, copies, versions, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor._version == version


SAVED = [("render", "result"), ("render", "rows"), ("augment", "boxes"), ("augment", "std")]
SAVED += [("render_augment", name) for name in ("levels", "rows", "boxes", "std")]


@pytest.mark.parametrize(("kind", "saved"), SAVED)
def test_changing_what_the_backward_needs_is_an_error(kind, saved):
    inputs = CASES["rows"].make()
    views = inputs.views
    leaves = [leaf.clone().requires_grad_() for leaf in leaves_of(kind, inputs)]
    given = [leaf * 1 for leaf in leaves]
    result = call(kind, inputs, given, "cpu")
    changed = {"result": result, "levels": given[0], "rows": inputs.rows, "boxes": views.boxes, "std": views.std}[saved]
    with torch.no_grad():
        changed.copy_(changed.flip(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize("kind", ["augment", "render_augment"])
@pytest.mark.parametrize("backend", KERNELS)
def test_views_of_any_stride(kind, backend):
    inputs = CASES["smallest"].make()
    views = inputs.views
    odd = replace(
        views,
        boxes=views.boxes.T.contiguous().T,
        noise_items=torch.stack([views.noise_items, views.noise_items + 1], dim=1)[:, 0],
        mean=views.mean.repeat_interleave(2)[::2],
        std=torch.stack([views.std, torch.zeros(3)], dim=1)[:, 0],
    )
    assert not any(getattr(odd, name).is_contiguous() for name in ("boxes", "noise_items", "mean", "std"))
    assert_same_bits(outputs(kind, replace(inputs, views=odd), backend), outputs(kind, inputs, backend))
    same = replace(views, mean=torch.tensor(0.5).expand(3), std=torch.tensor(0.25).expand(3))
    plain = replace(views, mean=torch.full((3,), 0.5), std=torch.full((3,), 0.25))
    assert_same_bits(
        outputs(kind, replace(inputs, views=same), backend), outputs(kind, replace(inputs, views=plain), backend)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_of_any_stride_come_in(kind, dtype, backend):
    if backend == "triton" and dtype != torch.bfloat16:
        pytest.skip("interpreted Triton is slow")
    inputs = CASES["smallest"].make()
    plain = outputs(kind, inputs, backend, dtype)
    grad = incoming(plain[0])
    wide = torch.full((*grad.shape[:3], 2 * grad.shape[3]), float("nan"), dtype=dtype)
    wide[..., ::2] = grad
    forms = [
        grad.to(memory_format=torch.channels_last),
        grad.transpose(2, 3).contiguous().transpose(2, 3),
        wide[..., ::2],
    ]
    for form in forms:
        assert not form.is_contiguous()
        assert_same_bits(outputs(kind, inputs, backend, dtype, form), plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", KERNELS)
def test_scalars_expanded_to_the_result_come_in(kind, backend):
    inputs = CASES["smallest"].make()
    leaves = [leaf.detach().requires_grad_() for leaf in leaves_of(kind, inputs)]
    (2.5 * call(kind, inputs, leaves, backend).sum()).backward()
    result = call(kind, inputs, leaves, backend)
    expected = torch.autograd.grad(result, leaves, torch.full_like(result, 2.5))
    assert_same_bits([leaf.grad for leaf in leaves], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", KERNELS)
def test_backward_repeats_scales_and_accumulates(kind, backend):
    inputs = CASES["smallest"].make()
    leaves = [leaf.detach().requires_grad_() for leaf in leaves_of(kind, inputs)]
    result = call(kind, inputs, leaves, backend)
    grad = incoming(result)
    first = [gradient.clone() for gradient in torch.autograd.grad(result, leaves, grad, retain_graph=True)]
    assert_same_bits(torch.autograd.grad(result, leaves, grad, retain_graph=True), first)
    assert_same_bits(torch.autograd.grad(result, leaves, -4 * grad, retain_graph=True), [-4 * g for g in first])
    assert not any(g.any() for g in torch.autograd.grad(result, leaves, 0 * grad, retain_graph=True))
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    result.backward(grad)
    assert_same_bits([leaf.grad for leaf in leaves], [1 + gradient for gradient in first])


@pytest.mark.parametrize("kind", ["render", "render_augment"])
def test_some_levels_alone_need_a_gradient(kind):
    inputs = CASES["smallest"].make()
    result, *expected = outputs(kind, inputs)
    leaves = [level.clone().requires_grad_(k == 1) for k, level in enumerate(inputs.levels)]
    call(kind, inputs, leaves, "cpu").backward(incoming(result))
    assert torch.equal(leaves[1].grad, expected[1])
    assert leaves[0].grad is None
    assert not call(kind, inputs, [level.detach() for level in leaves], "cpu").requires_grad
    with torch.no_grad():
        assert not call(kind, inputs, leaves, "cpu").requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tiny", "odd", "rows", "grey-to-colour"])
def test_double_backward_equals_plain_torch(kind, name):
    inputs = CASES[name].make()

    def second(backend, leaves):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        result = call(kind, inputs, leaves, backend)
        gradients = torch.autograd.grad(
            (result * incoming(result)).sum() + result.pow(3).sum(), leaves, create_graph=True
        )
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), leaves)

    exact = second("torch", [leaf.double() for leaf in leaves_of(kind, inputs)])
    for one, two in zip(second("cpu", leaves_of(kind, inputs)), exact, strict=True):
        assert (one.double() - two).norm() <= 1e-4 * two.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_reference(kind):
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, 1, side, side, generator=generator, dtype=torch.float64) for side in (1, 2, 3)]
    views = replace(CASES["grey-to-colour"].make().views, size=3)
    inputs = ImageInputs(levels, torch.tensor([1, 0]), 3, views)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves_of(kind, inputs)]
    assert torch.autograd.gradcheck(lambda *parts: call(kind, inputs, parts, "auto"), leaves)
    assert torch.autograd.gradgradcheck(lambda *parts: call(kind, inputs, parts, "auto"), leaves)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_autocast_keeps_float32(kind, backend):
    inputs = CASES["colour"].make()
    leaves = leaves_of(kind, inputs)
    plain = results(lambda parts: call(kind, inputs, parts, backend), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(results(lambda parts: call(kind, inputs, parts, backend), leaves), plain)


def test_compile_without_graph_breaks():
    inputs = CASES["rows"].make()
    rows, canvas, views = inputs.rows, inputs.canvas, inputs.views

    def every_one(levels):
        images = render(levels, canvas, rows=rows, backend="cpu")
        low = render(levels, canvas, dtype=torch.bfloat16, backend="cpu").float()
        seen = augment(images, views, backend="cpu")
        return images, low, seen, render_augment(levels, canvas, views, rows=rows, dtype=torch.float16, backend="cpu")

    def gradients(function):
        leaves = [level.detach().requires_grad_() for level in inputs.levels]
        shown = function(leaves)
        loss = sum((image.float() * incoming(image).float()).sum() for image in shown)
        return [*shown, *torch.autograd.grad(loss, leaves)]

    for one, two in zip(gradients(torch.compile(every_one, fullgraph=True)), gradients(every_one), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_fake_tensors_know_shapes_and_dtypes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        levels = [torch.empty(12_000, 3, side, side, requires_grad=True) for side in (1, 16, 256)]
        boxes, items = torch.empty(20_000, 4), torch.empty(20_000, dtype=torch.int64)
        views = Views(boxes, items, 224, torch.empty(3), torch.empty(3))
        rows = torch.empty(10_000, dtype=torch.int64)
        for backend in ("auto", "torch", "cpu"):
            images = render(levels, 256, rows=rows, dtype=torch.bfloat16, backend=backend)
            assert (images.dtype, images.shape) == (torch.bfloat16, (10_000, 3, 256, 256))
            if backend != "torch":  # plain torch asks which views have noise
                seen = augment(images, views, dtype=torch.float16, backend=backend)
                assert (seen.dtype, seen.shape) == (torch.float16, (20_000, 3, 224, 224))
                seen.sum().backward()
                views_of_levels = render_augment(levels, 256, views, rows=rows, backend=backend)
                assert (views_of_levels.dtype, views_of_levels.shape) == (torch.float32, (20_000, 3, 224, 224))
                views_of_levels.sum().backward()
                assert [level.grad.shape for level in levels] == [level.shape for level in levels]


def test_float64_takes_plain_torch():
    level = torch.zeros(2, 3, 4, 4)
    assert sfm_fast.ops.backends.explain_images(level).backend == "cpu"
    choice = sfm_fast.ops.backends.explain_images(level.double())
    assert choice.backend == "torch"
    assert "float64" in choice.reasons["cpu"]
    assert "runs on NVIDIA GPUs, not on cpu" in choice.reasons["cuda"] or "library" in choice.reasons["cuda"]
    assert sfm_fast.ops.backends.explain_images(level.to("meta")).backend == "torch"


AXIS = st.tuples(st.floats(-1.5, 1.5), st.one_of(st.floats(-5, 5), st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e-3, 2.0])))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    canvas=st.integers(1, 40),
    fractions=st.lists(st.floats(0, 1), min_size=1, max_size=6),
    images=st.integers(1, 4),
    channels=st.sampled_from([1, 3]),
    to_colour=st.booleans(),
    size=st.integers(1, 40),
    axes=st.lists(st.tuples(AXIS, AXIS), min_size=1, max_size=3),
    noise=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**64 - 1),
)
def test_any_shape_and_box(kind, canvas, fractions, images, channels, to_colour, size, axes, noise, dtype, seed):
    generator = torch.Generator().manual_seed(canvas * 100 + size)
    sides = [max(1, round(fraction * canvas)) for fraction in fractions]
    levels = [torch.randn(images, channels, side, side, generator=generator) for side in sides]
    boxes = [[x * canvas, dx, y * canvas, dy] for (x, dx), (y, dy) in axes for _ in range(images)]
    items = torch.arange(len(boxes)) if noise else torch.full((len(boxes),), -1)
    backbone = 3 if to_colour else channels
    mean, std = torch.linspace(0.3, 0.6, backbone), torch.linspace(0.2, 0.4, backbone)
    inputs = ImageInputs(levels, None, canvas, Views(torch.tensor(boxes), items, size, mean, std, seed=seed))
    assert_as_accurate_as_torch(
        lambda leaves, backend, out: call(kind, inputs, leaves, backend, out),
        leaves_of(kind, inputs),
        dtype,
        "cpu",
        image_is_saved=kind == "render",
        slack=2e-5,  # a coordinate of 40 pixels has 4e-6 of rounding, divided by the standard deviation
    )
