"""Sampling in plain torch: grid_sample's own values, gradients and memory, and derivatives of any order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sfm_fast.measure.memory import peak_memory
from sfm_fast.reference.sampling import sample


def inputs(dtype=torch.float32, shape=(3, 2, 5, 7), size=4):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    grid = 2.6 * torch.rand(shape[0], size, size + 1, 2, generator=generator, dtype=torch.float64) - 1.3  # outside too
    return images.requires_grad_(), grid.to(dtype)


def plain(images, grid):
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def gathered(images, grid):
    """The definition: weights of every pixel, with which autograd can go on for ever."""
    height, width = images.shape[2:]
    x, y = ((grid[..., axis] + 1) * side / 2 - 0.5 for axis, side in ((0, width), (1, height)))
    rows, columns = (
        (1 - (at[..., None] - torch.arange(side)).abs()).clamp_min(0) for at, side in ((y, height), (x, width))
    )
    return torch.einsum("vcyx,vijy,vijx->vcij", images, rows, columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_and_gradients_are_grid_samples(dtype):
    images, grid = inputs(dtype)
    ours, theirs = sample(images, grid), plain(images, grid)
    assert torch.equal(ours, theirs)
    weight = torch.randn_like(ours)
    assert torch.equal(*(torch.autograd.grad(out, images, weight)[0] for out in (ours, theirs)))
    torch.testing.assert_close(
        sample(images, grid).double(), gathered(images.double(), grid.double()), atol=1e-5, rtol=0
    )


def third(function, images, grid):
    """Gradients of the first three orders, each of something that isn't linear in the last."""
    found, value = [], function(images, grid).pow(3)
    for _ in range(3):
        (gradient,) = torch.autograd.grad(value.sum(), images, create_graph=True)
        found.append(gradient)
        value = gradient.pow(2)
    return found


def test_derivatives_of_higher_order():
    images, grid = inputs(torch.float64)
    for one, two in zip(third(sample, images, grid), third(gathered, images, grid), strict=True):
        assert two.abs().max() > 0
        torch.testing.assert_close(one, two)
    assert torch.autograd.gradcheck(lambda x: sample(x, grid), images)
    assert torch.autograd.gradgradcheck(lambda x: sample(x, grid).square(), images)


def test_it_takes_no_more_memory_than_grid_sample():
    images, grid = inputs(shape=(4, 3, 64, 64), size=48)

    def bytes_of(function):
        return peak_memory(lambda: torch.autograd.grad(function(images, grid).sum(), images))

    assert bytes_of(sample) <= bytes_of(plain)


def test_function_transforms():
    images, grid = inputs(torch.float64)
    one = torch.func.grad(lambda x: sample(x, grid).pow(3).sum())(images.detach())
    torch.testing.assert_close(one, third(sample, images, grid)[0])
    many = torch.func.vmap(sample)(torch.stack([images, 2 * images]), torch.stack([grid, grid]))
    torch.testing.assert_close(many[1], 2 * sample(images, grid))


def test_compiled_whole():
    images, grid = inputs()
    compiled = torch.compile(lambda x, at: sample(x, at).sin(), fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(images, grid), plain(images, grid).sin()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), images)[0] for out in (ours, theirs)))
