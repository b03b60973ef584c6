"""Cosine alignment of every pair flow, tile by tile in plain torch: no C*C*D tensor, no C*C matrix.

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


def _strips(classes: int, tile_elements: int) -> list[slice]:
    rows = max(1, min(classes, tile_elements // classes))
    return [slice(start, min(start + rows, classes)) for start in range(0, classes, rows)]


def pair_cosine_with_gradient(
    a: Tensor, b: Tensor, eps: float, need_gradient: bool, tile_elements: int = TILE_ELEMENTS
) -> tuple[Tensor, Tensor | None]:
    """Loss (scalar) and, where asked, its gradient with respect to ``b`` (C, D). Both inputs centred, (C, D).

    Lengths come from differences (`cdist` without the matrix-product trick), not from a Gram matrix: two equal
    rows have length exactly 0, where the Gram form leaves rounding noise above ``eps``.
    """
    classes = a.shape[0]
    pairs = classes * (classes - 1)
    # The numerator is a difference of products that nearly cancel for close classes: float64 until it is formed.
    wide_a, wide_b = a.double(), b.double()
    own = (wide_a * wide_b).sum(1)
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    gradient = torch.empty_like(b) if need_gradient else None
    exact = "donot_use_mm_for_euclid_dist"
    for rows in _strips(classes, tile_elements):
        numerator = own[rows, None] + own[None, :] - wide_a[rows] @ wide_b.T - wide_b[rows] @ wide_a.T
        f_length = torch.cdist(a[rows], a, compute_mode=exact)
        g_length = torch.cdist(b[rows], b, compute_mode=exact)
        dropped = (f_length < eps) | (g_length < eps)
        index = torch.arange(rows.start, rows.stop, device=a.device)
        dropped[index - rows.start, index] = True
        u = (1 / (f_length * g_length)).masked_fill_(dropped, 0)
        cosine = numerator.to(a.dtype) * u  # 0 where dropped, but NaN for NaN or infinite features
        total += cosine.double().sum()
        if gradient is not None:
            w = (cosine / g_length.square()).masked_fill_(dropped, 0)
            strip = a[rows] * u.sum(1, keepdim=True) - u @ a - b[rows] * w.sum(1, keepdim=True) + w @ b
            gradient[rows] = strip.mul_(-2 / pairs)
    return (1 - total / pairs).to(a.dtype), gradient


class _PairCosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, eps: float) -> Tensor:
        loss, gradient = pair_cosine_with_gradient(a, b, eps, ctx.needs_input_grad[1])
        ctx.save_for_backward(b, gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None]:
        b, gradient = ctx.saved_tensors
        return None, _FirstDerivative.apply(gradient, grad_output, b), None


class _FirstDerivative(torch.autograd.Function):
    """gradient * grad_output, tied to ``b`` so that a second derivative is an error and not a silent zero."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, grad_output: Tensor, b: Tensor) -> Tensor:
        return gradient * grad_output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, None, None]:
        raise RuntimeError(
            "pair alignment with the cosine metric can be differentiated once; a second derivative is not supported"
        )


def pair_cosine(centred_centers: Tensor, shifted_means: Tensor, eps: float) -> Tensor:
    """mean over i != j of 1 - cos(f_ij, g_ij): (C, D), (C, D) -> scalar, once differentiable in ``shifted_means``."""
    loss: Tensor = _PairCosine.apply(centred_centers, centre_rows(shifted_means), eps)
    return loss
