"""Cosine alignment of every ordered pair of class flows on a compiled backend, in tiles, with O(C*D) extra memory.

If a gradient is needed, the forward computes it too, so that no tile is computed twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.flow_alignment import centre_rows
from ..reference.pair_alignment import FirstDerivative
from .library import operation, register
from .segments import Segments


class Pairs(NamedTuple):
    """The ordered pairs of centres, without those within one of ``groups`` (C,) int64; ``number``: how many."""

    groups: Tensor | None
    number: int | Tensor


def pair_alignment(
    features: Tensor,
    segments: Segments | None,
    centers: Tensor,
    shift: Tensor,
    pairs: Pairs,
    *,
    eps: float,
    high: bool,
    backend: str,
) -> Tensor:
    """mean over the ordered pairs of 1 - cos(f_ij, g_ij), a float32 scalar, once differentiable in ``features``.

    features (N, D) float32, bfloat16 or float16; centers (C, D) float32, centred; shift (D,) float32. A second derivative raises RuntimeError.
    """
    order, offsets = (None, None) if segments is None else (segments.order, segments.offsets)
    arguments = features, order, offsets, shift, centers, pairs, eps, high
    if not torch.compiler.is_compiling():
        loss: Tensor = _PairAlignment.apply(backend, *arguments)
        return loss
    means = operation(backend, "class_means")(features, order, offsets, shift)
    total, _ = operation(backend, "pair_alignment")(
        centers, centre_rows(means), pairs.groups, 0, centers.shape[0], eps, means.requires_grad, high
    )
    loss = (1 - total / pairs.number).float()
    return loss


def pair_block(
    a: Tensor, b: Tensor, groups: Tensor | None, rows: tuple[int, int], *, eps: float, high: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """The part of one rank: the sum of cosines over pairs (i in ``rows``, all j), and the gradient for these rows.

    a, b (C, D) float32, centred. Returns (float64 scalar, (rows, D) float32): the gradient is that of the sum over *all* pairs with
    respect to b[rows], so ranks add their sums, concatenate their gradients, and multiply both by -1 / pairs.
    """
    total, gradient = operation(backend, "pair_alignment")(a, b, groups, *rows, eps, True, high)
    return total, gradient


class _PairAlignment(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        features: Tensor,
        order: Tensor | None,
        offsets: Tensor | None,
        shift: Tensor,
        centers: Tensor,
        pairs: Pairs,
        eps: float,
        high: bool,
    ) -> Tensor:
        need_gradient = ctx.needs_input_grad[1]
        with torch._C._AutoDispatchBelowAutograd():
            means = operation(backend, "class_means")(features, order, offsets, shift)
            # Like `centre_rows`, but in place: for 21 841 classes each copy takes a tenth of a gigabyte.
            means -= means[0].clone()
            means -= means.mean(0)
            total, gradient = operation(backend, "pair_alignment")(
                centers, means, pairs.groups, 0, centers.shape[0], eps, need_gradient, high
            )
        ctx.backend, ctx.pairs = backend, pairs.number
        ctx.save_for_backward(features, order, offsets, gradient)
        loss: Tensor = (1 - total / pairs.number).float()
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        features, order, offsets, gradient = ctx.saved_tensors
        # Flows don't depend on a shift of all means: the gradient's columns sum to zero, so centring doesn't change it.
        gradient = gradient * (grad_output / -ctx.pairs)
        if order is not None or features.dtype != torch.float32:
            with torch._C._AutoDispatchBelowAutograd():
                gradient = operation(ctx.backend, "class_means_backward")(
                    gradient, order, offsets, features.shape[0], features.dtype
                )
        if torch.is_grad_enabled():
            gradient = FirstDerivative.apply(gradient, torch.ones_like(grad_output), features)
        return None, gradient, *[None] * 7


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.whole = inputs[3] == 0 and inputs[4] == inputs[0].shape[0] and inputs[6]
    ctx.save_for_backward(inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])


def _registered_backward(backend: str, ctx: Any, grad_total: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    if not ctx.whole:
        raise RuntimeError("pair_alignment is differentiable only over all rows and with need_gradient=True")
    b, gradient = ctx.saved_tensors
    gradient = gradient * grad_total.float()
    if torch.is_grad_enabled():
        gradient = FirstDerivative.apply(gradient, torch.ones_like(grad_total), b)
    return None, gradient, *[None] * 6


def _fake(
    a: Tensor,
    b: Tensor,
    groups: Tensor | None,
    row_start: int,
    row_stop: int,
    eps: float,
    need_gradient: bool,
    high: bool,
) -> tuple[Tensor, Tensor]:
    rows = row_stop - row_start if need_gradient else 0
    return a.new_empty((), dtype=torch.float64), a.new_empty((rows, a.shape[1]))


register("pair_alignment", _fake, setup=_setup_context, backward=_registered_backward)
