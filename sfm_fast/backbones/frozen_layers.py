"""Layers of a frozen model that keep for the backward pass only what the gradient to their input needs.

torch's convolution keeps its input, which only the gradient of its weights needs, and its batch norm in eval mode too, although it is
an affine map with constants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_convolution = torch.ops.aten.convolution.default
_convolution_backward = torch.ops.aten.convolution_backward.default


class _Convolution(torch.autograd.Function):
    """A convolution with a constant weight: keeps the weight alone."""

    # In this old form, a call takes half the time of one with setup_context, which a net of many small layers notices.
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: tuple[Any, ...]) -> Tensor:
        ctx.how, ctx.shape, ctx.strides = how, x.shape, x.stride()
        ctx.save_for_backward(weight)
        result: Tensor = _convolution(x, weight, bias, *how)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        # Only the input's shape and strides are read. Expanding one number would have other strides, which makes a copy.
        shaped = gradient.new_empty_strided(ctx.shape, ctx.strides)
        result, _, _ = _convolution_backward(gradient, shaped, weight, None, *ctx.how, (True, False, False))
        return result, None, None, None


class FrozenConv2d(nn.Conv2d):
    """A `torch.nn.Conv2d` with zero padding whose weight is constant; with a weight that requires a gradient it is an ordinary one."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.requires_grad or not (input.requires_grad and torch.is_grad_enabled()):
            return super().forward(input)
        assert not isinstance(self.padding, str)
        how = (self.stride, self.padding, self.dilation, False, (0, 0), self.groups)
        result: Tensor = _Convolution.apply(input, self.weight, self.bias, how)
        return result


class FrozenConv2dSame(FrozenConv2d):
    """timm's ``Conv2dSame`` with a constant weight: pads as TensorFlow does for the input's size (its ``padding`` is 0)."""

    def forward(self, input: Tensor) -> Tensor:
        from timm.layers import pad_same

        return super().forward(pad_same(input, list(self.kernel_size), list(self.stride), list(self.dilation)))


class Affine(nn.Module):
    """scale * x + shift for each channel, dimension 1 of x: a batch norm in eval mode."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1,) + (1,) * (x.ndim - 2)
        return torch.addcmul(self.shift.view(shape), x, self.scale.view(shape))
