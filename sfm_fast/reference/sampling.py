"""Bilinear sampling of images that can be differentiated any number of times with respect to the images.

Sampling is linear in the images: its derivative is its adjoint, whose derivative is sampling again. Both use torch's kernels;
needed because `torch.nn.functional.grid_sample` has no second derivative in torch 2.11.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BILINEAR, ZEROS = 0, 0  # torch's numbers for grid_sample's mode and padding_mode


def sample(images: Tensor, grid: Tensor) -> Tensor:
    """grid_sample(images, grid), bilinear with zeros outside, align_corners=False; ``grid`` is a constant."""
    shown: Tensor = _Sample.apply(images, grid)
    return shown


class _Sample(torch.autograd.Function):
    """images (V, channels, H, W), grid (V, height, width, 2) -> (V, channels, height, width)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(images: Tensor, grid: Tensor) -> Tensor:
        return torch.grid_sampler(images, grid, BILINEAR, ZEROS, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        images, grid = ctx.saved_tensors
        return _Adjoint.apply(grad, images.detach(), grid), None


class _Adjoint(torch.autograd.Function):
    """The gradient of the samples -> that of the images; only the shape of ``images`` matters, but torch's kernel takes the tensor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, images: Tensor, grid: Tensor) -> Tensor:
        wanted = [True, False]
        result: Tensor = torch.ops.aten.grid_sampler_2d_backward(grad, images, grid, BILINEAR, ZEROS, False, wanted)[0]
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (grid,) = ctx.saved_tensors
        return _Sample.apply(grad, grid), None, None
