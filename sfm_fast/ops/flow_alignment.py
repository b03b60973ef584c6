"""The losses `global`, `class`, mean squared error, decoupled and anchored on a compiled backend, with their gradients.

With t_c the class means minus ``shift`` and a_c = centers[c], dL/dt_c = p_c a_c + q_c (t_c - m) + r: the forward returns
the loss with ``rows`` = (p, q) and ``columns`` = (m, r), the backward reads the features once more and writes the gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..reference import flow_alignment as reference
from .library import operation, register
from .segments import Segments


def flow_alignment(
    features: Tensor,
    segments: Segments | None,
    centers: Tensor,
    shift: Tensor,
    kind: int,
    *,
    anchor: Tensor | None = None,
    eps: float = 1e-8,
    weight: float = 0.0,
    delta: float = math.inf,
    backend: str,
) -> Tensor:
    """Loss, a float32 scalar, differentiable in ``features`` (twice: the second derivative runs in plain torch).

    features (N, D) float32, bfloat16 or float16; centers (C, D), shift (D,) and anchor (D,) float32, kind, weight and delta as in
    `sfm_fast.reference.flow_alignment`. Every run gives the same bits: no atomics, and the shape fixes the order of sums.
    """
    order, offsets = (None, None) if segments is None else (segments.order, segments.offsets)
    arguments = features, order, offsets, centers, shift, anchor, kind, eps, weight, delta
    if torch.compiler.is_compiling():
        loss: Tensor = operation(backend, "flow_alignment")(*arguments)[0]
    else:
        loss = _FlowAlignment.apply(backend, *arguments)
    return loss


def _backward(
    backend: str, saved: tuple[Any, ...], constants: tuple[int, float, float, float], grad_output: Tensor
) -> Tensor:
    kind, eps, weight, delta = constants
    features, order, offsets, centers, shift, anchor, rows, columns = saved
    if not torch.is_grad_enabled():
        arguments = features, order, offsets, centers, shift, rows, columns
        gradient: Tensor = operation(backend, "flow_alignment_backward")(grad_output, *arguments)
        return gradient
    # With create_graph=True the gradient must be differentiable itself, so the reference computes it.
    loss = reference.flow_alignment(features, order, offsets, centers, shift, anchor, kind, eps, weight, delta)
    (gradient,) = torch.autograd.grad(loss, features, grad_output, create_graph=True)
    return gradient


class _FlowAlignment(torch.autograd.Function):
    """For eager calls: takes a third of the time per call of an autograd formula registered with the dispatcher."""

    @staticmethod
    def forward(ctx: Any, backend: str, *arguments: Any) -> Tensor:
        features, order, offsets, centers, shift, anchor, *ctx.constants = arguments
        with torch._C._AutoDispatchBelowAutograd():
            results: tuple[Tensor, ...] = operation(backend, "flow_alignment")(*arguments)
        ctx.backend = backend
        ctx.save_for_backward(features, order, offsets, centers, shift, anchor, *results[1:])
        return results[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradient = _backward(ctx.backend, ctx.saved_tensors, tuple(ctx.constants), grad_output)
        return None, gradient, *[None] * 9


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, order, offsets, centers, shift, anchor, *ctx.constants = inputs
    ctx.save_for_backward(features, order, offsets, centers, shift, anchor, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _registered_backward(backend: str, ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return _backward(backend, ctx.saved_tensors, tuple(ctx.constants), grad_output), *[None] * 9


def _fake(
    features: Tensor,
    order: Tensor | None,
    offsets: Tensor | None,
    centers: Tensor,
    shift: Tensor,
    anchor: Tensor | None,
    kind: int,
    eps: float,
    weight: float,
    delta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = centers.shape[0] if kind in reference.PER_CLASS else 1
    return centers.new_empty(()), centers.new_empty((2, rows)), centers.new_empty((2, centers.shape[1]))


def _fake_backward(
    grad_output: Tensor,
    features: Tensor,
    order: Tensor | None,
    offsets: Tensor | None,
    centers: Tensor,
    shift: Tensor,
    rows: Tensor,
    columns: Tensor,
) -> Tensor:
    return features.new_empty(features.shape)


register("flow_alignment", _fake, setup=_setup_context, backward=_registered_backward)
register("flow_alignment_backward", _fake_backward)
