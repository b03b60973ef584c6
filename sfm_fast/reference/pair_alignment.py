"""Cosine alignment of every pair flow in plain torch, in tiles, without a C*C*D tensor or a C*C matrix.

L = mean over ordered i != j of 1 - cos(f_ij, g_ij), f_ij = mu_j - mu_i, g_ij = nu_j - nu_i. With a = mu - mu_bar,
b = nu - nu_bar and M = a b^T the numerator is M_ii + M_jj - M_ij - M_ji. For P = C(C-1), u_ij = 1/(|f_ij||g_ij|)
and w_ij = cos_ij/|g_ij|^2 (both symmetric, 0 on the diagonal and where a flow is shorter than eps),

    dL/dnu_k = -(2/P) [a_k sum_i u_ik - sum_i u_ik a_i - b_k sum_i w_ik + sum_i w_ik b_i],

so one strip of rows at a time gives both the loss and its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .flow_alignment import centre_rows

TILE_ELEMENTS = 1 << 22  # rows of a strip * C: at most 16 MiB a float32 temporary


def _strips(rows: int, columns: int, tile_elements: int) -> list[slice]:
    height = max(1, min(rows, tile_elements // columns))
    return [slice(start, min(start + height, rows)) for start in range(0, rows, height)]


def pair_alignment(
    a: Tensor,
    b: Tensor,
    groups: Tensor | None,
    row_start: int,
    row_stop: int,
    eps: float,
    need_gradient: bool,
    tile_elements: int = TILE_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """Sum of cosines over pairs i in [row_start, row_stop), j != i, and its gradient: float64 scalar, (rows, D) or (0, D).

    a, b (C, D) centred; groups (C,) int64: pairs within one group are left out. The gradient is that of the sum over *all*
    ordered pairs with respect to the block's rows of ``b``; the loss is 1 - sum / pairs.

    Lengths come from differences (`cdist` without the matrix-product trick), not from a Gram matrix: two equal
    rows have length exactly 0, where the Gram form leaves rounding noise above ``eps``.
    """
    # The numerator is a difference of products that nearly cancel for close classes: float64 until it is formed.
    wide_a, wide_b = a.double(), b.double()
    own = (wide_a * wide_b).sum(1)
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    gradient = a.new_empty((row_stop - row_start if need_gradient else 0, a.shape[1]))
    exact = "donot_use_mm_for_euclid_dist"
    for strip in _strips(row_stop - row_start, a.shape[0], tile_elements):
        rows = slice(strip.start + row_start, strip.stop + row_start)
        numerator = own[rows, None] + own[None, :] - wide_a[rows] @ wide_b.T - wide_b[rows] @ wide_a.T
        f_length = torch.cdist(a[rows], a, compute_mode=exact)
        g_length = torch.cdist(b[rows], b, compute_mode=exact)
        dropped = (f_length < eps) | (g_length < eps)
        index = torch.arange(rows.start, rows.stop, device=a.device)
        left_out = torch.zeros_like(dropped) if groups is None else groups[rows, None] == groups[None, :]
        left_out[index - rows.start, index] = True
        product = f_length * g_length
        u = (1 / product).masked_fill_(dropped, 0).masked_fill_(product.isinf(), torch.nan)
        # 0 for short flows, but NaN for NaN or infinite features; pairs within a group always count 0.
        cosine = (numerator.to(a.dtype) * u).masked_fill_(left_out, 0)
        total += cosine.double().sum()
        if need_gradient:
            u.masked_fill_(left_out, 0)
            w = (cosine / g_length.square()).masked_fill_(dropped | left_out, 0)
            sums = a[rows] * u.sum(1, keepdim=True) - u @ a - b[rows] * w.sum(1, keepdim=True) + w @ b
            gradient[strip] = sums.mul_(2)
    return total, gradient


class _PairCosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, groups: Tensor | None, pairs: int | Tensor, eps: float) -> Tensor:
        total, gradient = pair_alignment(a, b, groups, 0, a.shape[0], eps, ctx.needs_input_grad[1])
        ctx.save_for_backward(b, gradient)
        ctx.pairs = pairs
        return (1 - total / pairs).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        b, gradient = ctx.saved_tensors
        return None, FirstDerivative.apply(gradient, grad_output / -ctx.pairs, b), None, None, None


class FirstDerivative(torch.autograd.Function):
    """gradient * grad_output, connected to ``b`` so that a second derivative raises an error instead of being zero."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, grad_output: Tensor, b: Tensor) -> Tensor:
        return gradient * grad_output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, None, None]:
        raise RuntimeError(
            "pair alignment with the cosine metric can only be differentiated once; a second derivative is not supported"
        )


def pair_cosine(
    centred_centers: Tensor,
    shifted_means: Tensor,
    eps: float,
    groups: Tensor | None = None,
    pairs: int | Tensor | None = None,
) -> Tensor:
    """mean over i != j of 1 - cos(f_ij, g_ij): (C, D), (C, D) -> scalar, once differentiable in ``shifted_means``.

    With ``groups`` (C,) int64, pairs within one group are left out; ``pairs``: number of the others.
    """
    classes = centred_centers.shape[0]
    if pairs is None:
        pairs = classes * (classes - 1) if groups is None else count_pairs(groups)
    loss: Tensor = _PairCosine.apply(centred_centers, centre_rows(shifted_means), groups, pairs, eps)
    return loss


def _members(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Each centre's group as a number below C, and the size of each group: (C,), (C,), so that no shape depends on values."""
    ordered, order = groups.sort()
    starts = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).long()])
    member = torch.empty_like(groups).scatter(0, order, starts.cumsum(0))
    return member, torch.zeros_like(groups).index_add(0, member, torch.ones_like(groups))


def count_pairs(groups: Tensor) -> Tensor:
    """Ordered pairs of centres in different groups: (C,) int64 -> scalar int64."""
    return len(groups) ** 2 - _members(groups)[1].square().sum()


def grouped_pair_mse(centred_centers: Tensor, shifted_means: Tensor, groups: Tensor, pairs: int | Tensor) -> Tensor:
    """mean over pairs of different groups and d of (f_ij - g_ij)^2: (C, D), (C, D), (C,) -> scalar.

    With d = a - b, sum_ij |d_i - d_j|^2 = 2 n sum |d_i|^2 - 2 |sum d_i|^2 over any n rows; so this is the sum over all rows minus that within each group.
    """
    difference = centre_rows(centred_centers - centre_rows(shifted_means))
    classes, dim = difference.shape
    member, size = _members(groups)
    squares = difference.square().sum(1)
    sums = torch.zeros_like(difference).index_add(0, member, difference)
    within = 2 * (size[member] * squares).sum() - 2 * sums.square().sum()
    loss: Tensor = (2 * classes * squares.sum() - within) / (pairs * dim)
    return loss
