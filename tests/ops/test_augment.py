"""Views: definition, accuracy of the kernels, geometry, noise, drawing, replay, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases.images import AXES, IMAGE_CASES, VIEW_CASES, make_views
from image_definitions import DTYPES, KERNELS, assert_as_accurate_as_torch, incoming, kernel_calls, results, shown

from sfm_fast import InputError, philox
from sfm_fast.ops.augment import augment
from sfm_fast.reference import augment as reference
from sfm_fast.reference.augment import normalize
from sfm_fast.views import NOISE_MEAN, NOISE_STD, Augmentation, Views, draw_views

BACKENDS = ("torch", *KERNELS)
MEAN, STD = torch.tensor([0.3]), torch.tensor([0.4])
WHOLE = Augmentation(min_area=1.0, max_area=1.0, flip=False, noise=False)


def drawn(items, image_size=(16, 16), size=12, mean=MEAN, std=STD, **options):
    return draw_views(items, image_size, size, mean, std, **({"seed": 1, "step": 2} | options))


def quiet(boxes, size, channels=1):
    """Views without noise that show the source's own values."""
    boxes = torch.tensor(boxes, dtype=torch.float32)
    items = torch.full((len(boxes),), -1)
    return Views(boxes, items, size, torch.zeros(channels), torch.ones(channels))


@pytest.mark.parametrize("case", VIEW_CASES, ids=lambda case: case.name)
def test_reference_is_the_definition(case):
    images, views = case.make(torch.float64)
    ours = results(lambda leaves: reference.augment(leaves[0], views), [images])
    theirs = results(lambda leaves: shown(leaves[0], views), [images])
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=5e-7)  # its noise is float32


@pytest.mark.parametrize("kind", AXES)
def test_reference_is_the_definition_of_every_box(kind):
    images = torch.rand(2, 3, 14, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    views = make_views((kind, f"crop/{kind}"), 4, 14, 11, 9, 3)
    ours = results(lambda leaves: reference.augment(leaves[0], views), [images])
    theirs = results(lambda leaves: shown(leaves[0], views), [images])
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=5e-7)  # its noise is float32


@pytest.mark.parametrize(("backend", "dtype", "case"), list(kernel_calls(VIEW_CASES)))
def test_kernels_are_as_accurate_as_torch(case, dtype, backend):
    images, views = case.make(dtype)
    assert_as_accurate_as_torch(
        lambda leaves, which, out: augment(leaves[0], views, dtype=out, backend=which), [images], dtype, backend
    )


@pytest.mark.parametrize(("backend", "dtype", "case"), list(kernel_calls(IMAGE_CASES)))
def test_kernels_are_as_accurate_as_torch_on_every_box(case, dtype, backend):
    inputs = case.make()
    assert_as_accurate_as_torch(
        lambda leaves, which, out: augment(leaves[0], inputs.views, dtype=out, backend=which),
        [inputs.images.to(dtype)],
        dtype,
        backend,
    )


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 31, 33, 48, 63, 65, 100])
@pytest.mark.parametrize("source", [1, 16, 33, 80])
def test_blocks_of_any_size(size, source):
    generator = torch.Generator().manual_seed(size)
    images = torch.rand(2, 3, source, source + 3, generator=generator)
    views = make_views(("crop", "mirrored/overhanging"), 4, source, source + 3, size, 3)
    assert_as_accurate_as_torch(
        lambda leaves, which, out: augment(leaves[0], views, dtype=out, backend=which),
        [images],
        torch.float32,
        "cpu",
        slack=5e-6,
    )


@pytest.mark.parametrize("inside", DTYPES, ids=str)
@pytest.mark.parametrize("outside", DTYPES, ids=str)
def test_dtypes_mix(inside, outside):
    """Images in one dtype, views in another; images and their gradients round once."""
    images = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(0)).to(inside)
    views = make_views(("crop", "mirrored"), 2, 6, 5, 7, 3)
    result, gradient = results(lambda leaves: augment(leaves[0], views, dtype=outside, backend="cpu"), [images])
    wide, wide_gradient = results(
        lambda leaves: augment(leaves[0], views, backend="cpu"), [images.float()], incoming(result)
    )
    assert torch.equal(result, wide.to(outside))
    assert torch.equal(gradient, wide_gradient.to(inside))


@pytest.mark.usefixtures("maximum_of_a_gpu")
@pytest.mark.parametrize("backend", KERNELS)
def test_boxes_that_are_not_numbers_show_nothing(backend):
    nan, inf = float("nan"), float("inf")
    bad = [[nan, 1, 0, 1], [0, inf, 0, 1], [-inf, 1, 0, 1], [inf, 1, 0, 1], [0, -inf, 0, 1], [0, nan, 0, 1]]
    bad += [[y, dy, x, dx] for x, dx, y, dy in bad]
    far = [3e38, 3e38, 0, 1], [0, 1, -3e38, -3e38], [1e10, -1, 0, 1], [-1e10, 1, 0, 1], [2**31, 0, 0, 1]
    boxes = [*bad, *far, [0, 1, 0, 1]]
    images = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    result, gradient = results(lambda leaves: augment(leaves[0], quiet(boxes, 4), backend=backend), [images])
    assert not result[:-1].any()
    assert torch.equal(result[-1:], images)
    assert torch.equal(gradient, incoming(result)[-1:])


@pytest.mark.parametrize("backend", KERNELS)
def test_boxes_on_whole_pixels_copy(backend):
    images = torch.rand(2, 3, 6, 9, generator=torch.Generator().manual_seed(0))
    boxes = [[2, 1, 1, 1], [8, -1, 5, -1], [0, 2, 0, 1], [4, 0, 3, 0]]
    result = augment(images, quiet(boxes, 5, 3), backend=backend)
    assert torch.equal(result[0], images[0, :, 1:6, 2:7])
    assert torch.equal(result[1], images[1].flip(1, 2)[:, :5, :5])
    assert torch.equal(result[2], images[0, :, :5, ::2])
    assert torch.equal(result[3], images[1, :, 3, 4].view(3, 1, 1).expand(3, 5, 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_shows_where_it_is_and_nowhere_else(backend):
    images = torch.zeros(2, 1, 8, 8)
    images[0, 0, 2, 3] = float("nan")
    result = augment(images, quiet([[0.25, 0.5, 0.25, 0.5], [0, 1, 0, 1]], 16), backend=backend)
    first, last = result[0, 0].isnan().nonzero().aminmax(dim=0)
    assert first.tolist() == [2, 4]  # row 1.25, column 2.25
    assert last.tolist() == [5, 7]
    assert not result[1].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("images", [0, 1])
def test_nothing_gives_nothing(images, backend):
    views = quiet(torch.zeros(0, 4).tolist(), 5, 3)
    views = replace(views, boxes=torch.zeros(0, 4))
    result, gradient = results(lambda leaves: augment(leaves[0], views, backend=backend), [torch.rand(images, 3, 4, 6)])
    assert result.shape == (0, 3, 5, 5)
    assert gradient.shape == (images, 3, 4, 6)
    assert not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_seeds_of_64_bits(backend):
    """The operations' integers have a sign; the seed has none."""
    images, views = torch.zeros(1, 1, 2, 2), replace(quiet([[0, 1, 0, 1]], 2), noise_items=torch.tensor([2**32 - 1]))
    shown = [
        augment(images, replace(views, seed=seed), backend=backend) for seed in (1, 2**63 + 1, 2**64 - 1, 2**32 + 1)
    ]
    for seed, result in zip((1, 2**63 + 1, 2**64 - 1, 2**32 + 1), shown, strict=True):
        normal = philox.normal(views.noise_items, 4, seed=seed, stream=views.stream, step=0)
        torch.testing.assert_close(result.flatten(), NOISE_MEAN + NOISE_STD * normal[0], rtol=0, atol=1e-6)


def test_replay_and_batch_split():
    images, items = torch.rand(9, 1, 16, 16), torch.arange(9)
    whole = augment(images, drawn(items))
    assert torch.equal(whole, augment(images, drawn(items)))
    for rows in (slice(0, 2), slice(2, 7), torch.tensor([8, 3])):
        assert torch.equal(whole[rows], augment(images[rows], drawn(items[rows])))
        assert torch.equal(whole[rows], augment(images[rows], drawn(items).select(rows)))
    assert not torch.equal(whole, augment(images, drawn(items, step=3)))
    assert not torch.equal(whole, augment(images, drawn(items, seed=2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_unit_crop_of_aspect_one_is_the_image(monkeypatch, backend):
    monkeypatch.setattr("sfm_fast.views.LOG_ASPECT", (0.0, 0.0))
    images = torch.rand(3, 1, 12, 12)
    views = drawn(torch.arange(3), (12, 12), augmentation=WHOLE)
    torch.testing.assert_close(augment(images, views, backend=backend), normalize(images, MEAN, STD), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flip_mirrors(monkeypatch, backend):
    monkeypatch.setattr("sfm_fast.views.LOG_ASPECT", (0.0, 0.0))
    monkeypatch.setattr("sfm_fast.views.FLIP_PROBABILITY", 1.1)
    images = torch.rand(3, 1, 12, 12)
    views = drawn(torch.arange(3), (12, 12), augmentation=Augmentation(1.0, 1.0, True, False))
    torch.testing.assert_close(
        augment(images, views, backend=backend), normalize(images.flip(3), MEAN, STD), rtol=0, atol=1e-5
    )


def test_drawn_crops_have_the_stated_distribution():
    height, width, size = 40, 60, 24
    views = drawn(torch.arange(20000), (height, width), size)
    x0, dx, y0, dy = views.boxes.double().unbind(1)
    across, down = dx.abs() * size / width, dy * size / height
    area, aspect = across * down, across / down
    assert area.min() > 0.079
    assert area.max() < 1.001
    assert abs(area.mean() - 0.54) < 0.01
    assert aspect.min() > 0.749
    assert aspect.max() < 1.334
    assert abs(torch.log(aspect).mean()) < 0.01
    assert (dy > 0).all()
    assert abs((dx < 0).double().mean() - 0.5) < 0.02
    assert abs((views.noise_items >= 0).double().mean() - 0.5) < 0.02
    assert ((views.noise_items == torch.arange(20000)) | (views.noise_items == -1)).all()
    # A crop no longer than the image lies inside: its outermost pixels, half a step from its edges, do too.
    for origin, step, side in ((x0, dx, width), (y0, dy, height)):
        ends = torch.stack([origin - step / 2, origin + step * (size - 0.5)])
        low, high = ends.amin(0), ends.amax(0)
        inside = high - low <= side
        assert inside.double().mean() > 0.8
        assert (low[inside] >= -0.5 - 1e-4).all()
        assert (high[inside] <= side - 0.5 + 1e-4).all()
    assert (drawn(torch.arange(99), augmentation=WHOLE).noise_items == -1).all()


def test_a_view_belongs_to_its_item_and_stream():
    items = torch.tensor([7, 3, 7])
    views = drawn(items)
    assert torch.equal(views.boxes[0], views.boxes[2])
    assert not torch.equal(views.boxes[0], views.boxes[1])
    other = drawn(items, streams=(philox.Stream.REAL_AUGMENT_PARAMETERS, philox.Stream.AUGMENT_NOISE))
    assert not (views.boxes == other.boxes).any()
    noise = (philox.Stream.AUGMENT_PARAMETERS, philox.Stream.REAL_AUGMENT_NOISE)
    assert drawn(items, streams=noise).stream == philox.Stream.REAL_AUGMENT_NOISE


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_noise_has_the_stated_mean_and_spread(backend):
    images, views = torch.zeros(600, 1, 12, 12), drawn(torch.arange(600))
    noisy = views.noise_items >= 0
    pixels = augment(images, views, backend=backend) * STD + MEAN
    assert pixels[~noisy].abs().max() < 1e-6
    assert abs(pixels[noisy].mean() - NOISE_MEAN) < 0.005
    assert abs(pixels[noisy].std() - NOISE_STD) < 0.005


@pytest.mark.parametrize("channels", [1, 3])
def test_gradcheck(channels):
    images = torch.rand(2, channels, 6, 6, dtype=torch.float64).requires_grad_()
    views = make_views(("crop", "mirrored/overhanging"), 4, 6, 6, 5, 3)
    assert torch.autograd.gradcheck(lambda x: augment(x, views), images)
    assert torch.autograd.gradgradcheck(lambda x: augment(x, views).square(), images)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grey_images_fill_the_backbone_channels(backend):
    views = drawn(torch.arange(2), (8, 8), 8, torch.zeros(3), torch.ones(3))
    out = augment(torch.rand(2, 1, 8, 8), views, backend=backend)
    assert out.shape == (2, 3, 8, 8)
    assert torch.equal(out[:, 0], out[:, 2])


IMAGES, VIEWS = torch.zeros(2, 3, 4, 5), make_views(("crop",), 4, 4, 5, 6, 3)
BAD_CALLS = {
    "list for images": (dict(images=[0.0]), "images must be a float32.*got a builtins.list"),
    "integer images": (dict(images=IMAGES.long()), "images must be a float32, float64, bfloat16 or float16 tensor"),
    "three dimensions": (dict(images=IMAGES[0]), r"images must be \(images, channels, height, width\).*got \(3, 4, 5\)"),
    "no pixel": (dict(images=IMAGES[:, :, :0]), r"images must be .*got \(2, 3, 0, 5\)"),
    "huge images": (dict(images=torch.zeros(1, 1, 1, 2**14 + 1)), "images must be .* at most 16384 pixels"),
    "wrong channels": (dict(images=IMAGES[:, :2]), "images must have 1 or 3 channels to fit views.mean, got 2"),
    "not views": (dict(views=VIEWS.boxes), "views must be sfm_fast.Views, got torch.float32"),
    "dtype": (dict(dtype=torch.int8), "dtype must be float32, bfloat16, float16 or float64, got torch.int8"),
    "backend": (dict(backend="gpu"), "backend must be one of"),
    "absent backend": (dict(backend="cuda"), "backend='cuda' can't run this call: .+; backend='auto' would use 'cpu'"),
    "kernel for float64": (dict(images=IMAGES.double(), backend="cpu"), "supports float32, bfloat16 and float16, not"),
    "float64 from a kernel": (dict(dtype=torch.float64, backend="cpu"), "float64"),
    "view device": (dict(images=IMAGES.to("meta")), "views.boxes is on cpu, the images on meta"),
}  # fmt: skip
BAD_VIEWS = {
    "size": (dict(size=0), "views.size must be 1 to 16384 pixels, got 0"),
    "float size": (dict(size=6.0), r"views.size must be a number of pixels \(int\), got a builtins.float"),
    "boxes dtype": (dict(boxes=VIEWS.boxes.double()), "views.boxes must be a torch.float32 tensor, got torch.float64"),
    "boxes list": (dict(boxes=[[0, 1, 0, 1]]), "views.boxes must be a torch.float32 tensor, got a builtins.list"),
    "boxes shape": (dict(boxes=VIEWS.boxes[:, :3]), r"views.boxes must be \(views, 4\), got \(4, 3\)"),
    "boxes flat": (dict(boxes=VIEWS.boxes[0]), r"views.boxes must be \(views, 4\), got \(4,\)"),
    "items dtype": (dict(noise_items=VIEWS.noise_items.int()), "views.noise_items must be a torch.int64 tensor"),
    "items shape": (dict(noise_items=VIEWS.noise_items[:3]), r"views.noise_items must be \(4,\) to fit boxes"),
    "items device": (dict(noise_items=VIEWS.noise_items.to("meta")), "views.noise_items is on meta, the images on cpu"),
    "odd number": (
        dict(boxes=VIEWS.boxes[:3], noise_items=VIEWS.noise_items[:3]),
        "views must be the same number for each image, got 3 views of 2 images",
    ),
    "mean dtype": (dict(mean=VIEWS.mean.double()), "views.mean must be a torch.float32 tensor"),
    "mean tuple": (dict(mean=(0.5, 0.5, 0.5)), "views.mean must be a torch.float32 tensor, got a builtins.tuple"),
    "std dtype": (dict(std=VIEWS.std.bfloat16()), "views.std must be a torch.float32 tensor, got torch.bfloat16"),
    "std shape": (dict(std=VIEWS.std[:2]), r"views.mean and views.std must be \(channels,\), got \(3,\) and \(2,\)"),
    "mean matrix": (dict(mean=VIEWS.mean[None], std=VIEWS.std[None]), r"views.mean and views.std must be \(channels,\)"),
    "many channels": (dict(mean=torch.zeros(17), std=torch.ones(17)), r"must be \(channels,\), got \(17,\)"),
    "no channel": (dict(mean=torch.zeros(0), std=torch.ones(0)), r"must be \(channels,\), got \(0,\)"),
    "negative seed": (dict(seed=-1), r"views.seed must be in \[0, 2\*\*64\).*got -1"),
    "large seed": (dict(seed=2**64), r"views.seed must be in \[0, 2\*\*64\)"),
    "negative step": (dict(step=-1), r"views.step and views.stream in \[0, 2\*\*32\), got"),
    "large step": (dict(step=2**32), r"views.step and views.stream in \[0, 2\*\*32\), got"),
    "large stream": (dict(stream=2**32), r"views.step and views.stream in \[0, 2\*\*32\), got"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_names_the_argument(name):
    changes, message = BAD_CALLS[name]
    with pytest.raises(InputError, match=message):
        augment(**({"images": IMAGES, "views": VIEWS} | changes))


@pytest.mark.parametrize("name", BAD_VIEWS)
def test_bad_views_name_the_field(name):
    changes, message = BAD_VIEWS[name]
    with pytest.raises(InputError, match=message):
        augment(IMAGES, replace(VIEWS, **changes))


def test_views_of_no_image():
    with pytest.raises(InputError, match="got 4 views of 0 images"):
        augment(IMAGES[:0], VIEWS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("side", "size"), [(64, 56), (256, 224)])
def test_16_bit_images_are_sampled_where_float32_ones_are(side, size, backend, dtype):
    if backend == "triton" and side > 64:
        pytest.skip("minutes in the interpreter")
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).to(dtype)
    mean, std = torch.full((3,), 0.45), torch.full((3,), 0.22)
    views = drawn(torch.arange(2), (side, side), size, mean, std)
    right = reference.augment(images.double(), views)
    found = augment(images, views, backend=backend).double()
    # A rounding of the result, nothing of the positions: those may move a pixel by 5.
    assert (found - right).abs().max() <= right.abs().max() * torch.finfo(dtype).eps
    wide = augment(images, views, dtype=torch.float32, backend=backend).double()
    torch.testing.assert_close(wide, right, rtol=0, atol=1e-4)
    leaf = images.clone().requires_grad_()
    augment(leaf, views, backend=backend).sum().backward()
    exact = images.double().requires_grad_()
    reference.augment(exact, views).sum().backward()
    assert (leaf.grad.double() - exact.grad).abs().max() <= 2 * exact.grad.abs().max() * torch.finfo(dtype).eps
