"""The pyramid and its rendering."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sfm_fast import InputError
from sfm_fast.distill.images import SyntheticImages, level_sizes
from sfm_fast.reference.render import color_matrix, render


def test_render_is_the_formula():
    levels = [torch.randn(2, 3, side, side, dtype=torch.float64) for side in (1, 2, 5)]
    total = sum(F.interpolate(level, (5, 5), mode="bilinear", align_corners=False) for level in levels)
    correlation = torch.tensor([[0.26, 0.09, 0.02], [0.27, 0.0, -0.05], [0.27, -0.09, 0.03]], dtype=torch.float64)
    matrix = correlation / max(correlation[:, k].square().sum().sqrt() for k in range(3))
    expected = torch.sigmoid(2 * torch.stack([sum(matrix[o, c] * total[:, c] for c in range(3)) for o in range(3)], 1))
    torch.testing.assert_close(render(levels, 5), expected)
    torch.testing.assert_close(color_matrix(torch.float64), matrix)


def test_grey_has_no_colour_matrix():
    level = torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(render([level], 4), torch.sigmoid(2 * level))


def test_gradcheck():
    levels = [torch.randn(1, 3, side, side, dtype=torch.float64).requires_grad_() for side in (1, 2, 3)]
    assert torch.autograd.gradcheck(lambda *parts: render(parts, 3), levels)


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
