"""The pyramid and its rendering: definition, accuracy of the kernels, hard values, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases.images import IMAGE_CASES
from image_definitions import KERNELS, assert_as_accurate_as_torch, kernel_calls, results

from sfm_fast import InputError
from sfm_fast.distill.images import SyntheticImages, level_sizes
from sfm_fast.ops.render import render
from sfm_fast.reference import render as reference
from sfm_fast.reference.render import color_matrix

BACKENDS = ("torch", *KERNELS)


def test_render_is_the_formula():
    levels = [torch.randn(2, 3, side, side, dtype=torch.float64) for side in (1, 2, 5)]
    total = sum(F.interpolate(level, (5, 5), mode="bilinear", align_corners=False) for level in levels)
    correlation = torch.tensor([[0.26, 0.09, 0.02], [0.27, 0.0, -0.05], [0.27, -0.09, 0.03]], dtype=torch.float64)
    matrix = correlation / max(correlation[:, k].square().sum().sqrt() for k in range(3))
    expected = torch.sigmoid(2 * torch.stack([sum(matrix[o, c] * total[:, c] for c in range(3)) for o in range(3)], 1))
    torch.testing.assert_close(reference.render(levels, 5), expected)
    torch.testing.assert_close(color_matrix(torch.float64), matrix)


def test_grey_has_no_colour_matrix():
    level = torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(reference.render([level], 4), torch.sigmoid(2 * level))


@pytest.mark.parametrize(("backend", "dtype", "case"), list(kernel_calls(IMAGE_CASES)))
def test_kernels_are_as_accurate_as_torch(case, dtype, backend):
    inputs = case.make()
    assert_as_accurate_as_torch(
        lambda leaves, which, out: render(leaves, inputs.canvas, rows=inputs.rows, dtype=out, backend=which),
        inputs.levels,
        dtype,
        backend,
        image_is_saved=True,
    )


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 65, 100])
def test_blocks_of_any_size(size):
    """Whole vectors, one pixel more and one less, with levels on both sides of every width."""
    generator = torch.Generator().manual_seed(size)
    sides = sorted({1, size // 2, size - 1, size} - {0})
    levels = [torch.randn(2, 3, side, side, generator=generator) for side in sides]
    assert_as_accurate_as_torch(
        lambda leaves, which, out: render(leaves, size, dtype=out, backend=which), levels, torch.float32, "cpu"
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_values_saturate(backend):
    values = torch.tensor([-float("inf"), -3e38, -1e4, -60.0, 60.0, 1e4, 3e38, float("inf")]).view(8, 1, 1, 1)
    image, gradient = results(lambda levels: render(levels, 1, backend=backend), [values])
    assert ((image[:4] >= 0) & (image[:4] < 1e-37)).all()
    assert image.flatten()[4:].tolist() == [1, 1, 1, 1]
    assert not gradient.abs().gt(1e-35).any()
    assert not gradient.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_nan_stays_where_it_is(backend, channels):
    coarse, fine = torch.zeros(2, channels, 1, 1), torch.zeros(2, channels, 6, 6)
    fine[0, 0, 2, 3] = float("nan")
    image = render([coarse, fine], 6, backend=backend)
    assert image[0, 0, 2, 3].isnan()
    assert image.isnan().sum() == channels
    coarse[1, 0] = float("nan")
    assert render([coarse, fine], 6, backend=backend)[1, 0].isnan().all()


def test_the_dtype_of_the_images():
    level = torch.randn(1, 3, 4, 4)
    assert render([level], 4).dtype == torch.float32
    assert render([level.double()], 4).dtype == torch.float64
    assert torch.equal(render([level], 4, dtype=torch.bfloat16), render([level], 4).bfloat16())
    assert torch.equal(render([level], 4, dtype=torch.float16), render([level], 4).half())
    assert render([level], 4, dtype=torch.float64).dtype == torch.float64


def test_images_not_in_rows_have_no_gradient():
    level = torch.randn(5, 3, 4, 4)
    gradient = results(lambda levels: render(levels, 6, rows=torch.tensor([3, 1, 3])), [level])[1]
    assert [bool(part.any()) for part in gradient] == [False, True, False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [None, torch.zeros(0, dtype=torch.int64)], ids=["no image", "no row"])
def test_nothing_gives_nothing(backend, rows):
    level = torch.zeros(0 if rows is None else 2, 3, 4, 4)
    image, gradient = results(lambda levels: render(levels, 6, rows=rows, backend=backend), [level])
    assert image.shape == (0, 3, 6, 6)
    assert gradient.shape == level.shape
    assert not gradient.any()


LEVEL = torch.zeros(2, 3, 4, 4)
ROWS = torch.tensor([0, 1])
BAD_CALLS = {
    "a tensor": (dict(levels=LEVEL), "levels must be a list of 1 to 16 tensors, got a? ?torch"),
    "no level": (dict(levels=[]), "levels must be a list of 1 to 16 tensors, got 0"),
    "too many levels": (dict(levels=[LEVEL] * 17), "got 17"),
    "integer level": (dict(levels=[LEVEL.long()]), r"levels\[0\] must be a float32 or float64 tensor, got torch.int64"),
    "low level": (dict(levels=[LEVEL, LEVEL.bfloat16()]), r"levels\[1\] must be a float32"),
    "list for a level": (dict(levels=[[0.0]]), r"levels\[0\] must be a float32 or float64 tensor, got a builtins.list"),
    "three dimensions": (dict(levels=[LEVEL[0]]), r"levels\[0\] must be \(images, 1 or 3 channels, side, side\)"),
    "not square": (dict(levels=[LEVEL[:, :, :2]]), r"got \(2, 3, 2, 4\)"),
    "two channels": (dict(levels=[LEVEL[:, :2]]), r"got \(2, 2, 4, 4\)"),
    "larger than the canvas": (dict(levels=[LEVEL, torch.zeros(2, 3, 7, 7)]), r"levels\[1\] must have a side of 1 to 6"),
    "empty level": (dict(levels=[torch.zeros(2, 3, 0, 0)]), r"levels\[0\] must have a side of 1 to 6 pixels, got 0"),
    "fewer images": (dict(levels=[LEVEL, LEVEL[:1]]), r"levels\[1\] must be like levels\[0\], \(2, 3\)"),
    "grey and colour": (dict(levels=[LEVEL, LEVEL[:, :1]]), r"levels\[1\] must be like levels\[0\]"),
    "two dtypes": (dict(levels=[LEVEL, LEVEL.double()]), r"levels\[1\] must be like levels\[0\].*got \(2, 3\) torch.float64"),
    "two devices": (dict(levels=[LEVEL, LEVEL.to("meta")]), r"levels\[1\] must be like levels\[0\].*on meta"),
    "size 0": (dict(size=0), "size must be 1 to 16384 pixels, got 0"),
    "huge size": (dict(size=2**14 + 1), "size must be 1 to 16384 pixels, got 16385"),
    "float size": (dict(size=6.0), r"size must be a number of pixels \(int\), got a builtins.float"),
    "bool size": (dict(size=True), "size must be a number of pixels"),
    "row range": (dict(rows=ROWS + 1), r"rows must be in 0\.\.1, got 1\.\.2"),
    "negative row": (dict(rows=ROWS - 1), r"rows must be in 0\.\.1, got -1\.\.0"),
    "row dtype": (dict(rows=ROWS.int()), "rows must be a 1-D int64 tensor, got torch.int32"),
    "row shape": (dict(rows=ROWS[None]), "rows must be a 1-D int64 tensor"),
    "list for rows": (dict(rows=[0, 1]), "rows must be a 1-D int64 tensor, got a builtins.list"),
    "row device": (dict(rows=ROWS.to("meta")), "rows are on meta, the images on cpu"),
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
        render(**({"levels": [LEVEL], "size": 6} | changes))


def test_level_sizes_double_and_end_at_the_size():
    assert level_sizes(28, "pyramid") == [1, 2, 4, 8, 16, 28]
    assert level_sizes(256, "pyramid") == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert level_sizes(1, "pyramid") == [1]
    assert level_sizes(28, "pixel") == [28]
    with pytest.raises(InputError, match="parametrization"):
        level_sizes(28, "wavelet")


def test_growth_rescales_and_keeps_the_variance():
    images = SyntheticImages(500, 1, 4, seed=1)
    first = images.levels[0].detach().clone()
    assert abs(first.std() - 1) < 0.1
    images.grow()
    assert torch.equal(images.levels[0], first * 0.5)
    assert abs(images.levels[1].std() - 0.5) < 0.03
    images.grow()
    assert images.fully_grown
    torch.testing.assert_close(images.levels[0], first / 3)
    assert all(abs(level.std() - 1 / 3) < 0.05 for level in images.levels)
    images.grow()
    assert len(images.levels) == 3


def test_start_depends_on_the_seed_and_the_image_alone():
    few, many = SyntheticImages(3, 3, 8, seed=4), SyntheticImages(10, 3, 8, seed=4)
    assert torch.equal(few.levels[0], many.levels[0][:3])
    assert not torch.equal(few.levels[0], SyntheticImages(3, 3, 8, seed=5).levels[0])
