"""The flow-alignment losses that cost O(C*D), in plain torch: `global`, `class`, mean squared error, decoupled, anchored.

Notation: mu_c the centres of the real classes, nu_c the synthetic class means, bars the means over classes.
Source: Xia et al., arXiv 2602.05391. The flow of class c points from its centre to the mean of the others,

    F_c = sum_{k != c} mu_k / (C-1) - mu_c = -C/(C-1) * (mu_c - mu_bar),

so every loss here needs only the centred rows a_c = mu_c - mu_bar and b_c = nu_c - nu_bar:

* cos(F, G) = cos(a, b): the factor cancels. It is also the cosine of *all C*C pair flows f_ij = mu_j - mu_i flattened
  together, since sum_ij <f_ij, g_ij> = 2C sum_i <a_i, b_i>.
* mean (F - G)^2 = (C/(C-1))^2 mean (a - b)^2, and the mean over pairs i != j of (f_ij - g_ij)^2 = 2C/(C-1) mean (a - b)^2.
* decoupled: the mean of the others is (sum_k nu_k - nu_c)/(C-1), linear in nu, so it too is a function of d = nu - mu.

* anchored (this project's own): rows relative to a constant point m instead of the means, a_c = mu_c - m and b_c = nu_c - m;
  mean_c [1 - cos(b_c, a_c)] + weight * mean_c h(log(|b_c| / |a_c|)), so each class has a term of its own. h is Huber's function: x^2 up
  to |x| = delta, from there on 2 delta |x| - delta^2 (Huber, Ann. Math. Statist. 35, 1964); with an infinite delta, x^2.

Inputs are already shifted by one constant row close to mu_bar (see `class_means`): subtracting the exact mean here
removes the rounding error of that constant at no cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .class_means import class_means

# Values of `kind`, the same numbers as `Kind` in csrc/kinds.h.
GLOBAL, CLASS, FLOW_MSE, PAIR_MSE, DECOUPLED, ANCHORED = range(6)
PER_CLASS = (CLASS, ANCHORED)  # kinds whose gradient has factors of its own for every class
KINDS = {
    ("global", "cosine"): GLOBAL,
    ("class", "cosine"): CLASS,
    ("global", "mse"): FLOW_MSE,
    ("class", "mse"): FLOW_MSE,
    ("pair", "mse"): PAIR_MSE,
    ("decoupled", "mse"): DECOUPLED,
    ("anchored", "cosine"): ANCHORED,
}


def flow_alignment(
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
) -> Tensor:
    """The loss ``kind``: (N, D), segments as in `class_means`, (C, D), (D,), (D,) -> scalar in ``shift``'s dtype.

    ``centers`` are centred, for DECOUPLED only shifted, for ANCHORED relative to the anchor. ``anchor``: the anchor minus ``shift``
    for ANCHORED, else None. ``weight``: alpha of DECOUPLED, the length term's weight of ANCHORED. ``delta``: of ANCHORED, see `anchored_cosine`.
    """
    means = class_means(features, order, offsets, shift)
    if kind == GLOBAL:
        return global_cosine(centers, means, eps)
    if kind == CLASS:
        return class_cosine(centers, means, eps)
    if kind == FLOW_MSE:
        return flow_mse(centers, means)
    if kind == PAIR_MSE:
        return pair_mse(centers, means)
    if kind == DECOUPLED:
        return decoupled_mse(centers, means, weight)
    assert anchor is not None
    return anchored_cosine(centers, means - anchor, eps, weight, delta)


def centre_rows(means: Tensor) -> Tensor:
    """Rows minus their mean: (C, D) -> (C, D).

    The first row is subtracted first, as a constant: this changes neither result nor gradient, but equal rows give exactly 0,
    and rows that are close together and far from 0 lose no digits.
    """
    apart = means - means[:1].detach()
    return apart - apart.mean(0, keepdim=True)


def safe_lengths(squared_a: Tensor, squared_b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Whether one of the lengths is below ``eps``, and the lengths, both exactly 1 with zero gradient if so."""
    short = (squared_a < eps * eps) | (squared_b < eps * eps)
    # Replace the lengths before the root, not after: 0 * inf in the backward of sqrt would give NaN.
    length_a = torch.where(short, torch.ones_like(squared_a), squared_a).sqrt()
    length_b = torch.where(short, torch.ones_like(squared_b), squared_b).sqrt()
    return short, length_a, length_b


def safe_cosine(dot: Tensor, squared_a: Tensor, squared_b: Tensor, eps: float) -> Tensor:
    """dot / (|a||b|), and exactly 0 with zero gradient where a length is below ``eps``; NaN stays NaN."""
    short, length_a, length_b = safe_lengths(squared_a, squared_b, eps)
    product = length_a * length_b
    # dot * 0 instead of 0, so that NaN and infinity give NaN even with a short flow. Squares that overflow must not
    # give cosine 0 either.
    return torch.where(product.isinf(), torch.nan, torch.where(short, dot * 0, dot / product))


def global_cosine(centred_centers: Tensor, shifted_means: Tensor, eps: float) -> Tensor:
    """1 - <F, G> / (|F| |G|), flattened to C*D: (C, D), (C, D) -> scalar."""
    classes = centred_centers.shape[0]
    scale = (classes / (classes - 1)) ** 2
    a, b = centred_centers, centre_rows(shifted_means)
    return 1 - safe_cosine(scale * (a * b).sum(), scale * a.square().sum(), scale * b.square().sum(), eps)


def class_cosine(centred_centers: Tensor, shifted_means: Tensor, eps: float) -> Tensor:
    """mean over c of 1 - cos(F_c, G_c): (C, D), (C, D) -> scalar."""
    classes = centred_centers.shape[0]
    scale = (classes / (classes - 1)) ** 2
    a, b = centred_centers, centre_rows(shifted_means)
    return (1 - safe_cosine(scale * (a * b).sum(1), scale * a.square().sum(1), scale * b.square().sum(1), eps)).mean()


def flow_mse(centred_centers: Tensor, shifted_means: Tensor) -> Tensor:
    """mean over c, d of (F - G)^2: (C, D), (C, D) -> scalar."""
    classes = centred_centers.shape[0]
    return (classes / (classes - 1)) ** 2 * (centred_centers - centre_rows(shifted_means)).square().mean()


def pair_mse(centred_centers: Tensor, shifted_means: Tensor) -> Tensor:
    """mean over i != j and d of (f_ij - g_ij)^2 = 2 / ((C-1) D) * sum_i |d_i - d_bar|^2: (C, D), (C, D) -> scalar."""
    classes = centred_centers.shape[0]
    return 2 * classes / (classes - 1) * (centred_centers - centre_rows(shifted_means)).square().mean()


def decoupled_mse(shifted_centers: Tensor, shifted_means: Tensor, alpha: float) -> Tensor:
    """alpha * mse(nu, mu) + (1 - alpha) * mse(others(nu), others(mu)), others_c = sum_{k != c} / (C-1) -> scalar."""
    classes = shifted_centers.shape[0]
    difference = shifted_means - shifted_centers
    # A single class has no others: only with alpha 1, and 0 / 0 must not make that NaN.
    others = (difference.sum(0, keepdim=True) - difference) / max(classes - 1, 1)
    return alpha * difference.square().mean() + (1 - alpha) * others.square().mean()


def anchored_cosine(
    anchored_centers: Tensor, anchored_means: Tensor, eps: float, length_weight: float, delta: float
) -> Tensor:
    """mean over c of 1 - cos(b_c, a_c) + length_weight * h(log(|b_c| / |a_c|)), rows relative to the anchor: (C, D), (C, D) -> scalar.

    h(x) = m (2 x - m) with m = x clipped to -delta..delta: x^2, but a straight line beyond delta.

    A class with |a_c| or |b_c| below ``eps`` counts as cosine 0 and length term 0, with gradient 0.
    """
    a, b = anchored_centers, anchored_means
    squared_a, squared_b = a.square().sum(1), b.square().sum(1)
    term = 1 - safe_cosine((a * b).sum(1), squared_a, squared_b, eps)
    if length_weight:
        _, length_a, length_b = safe_lengths(squared_a, squared_b, eps)
        # The quotient before the logarithm: a difference of logarithms would lose the digits of lengths that are nearly equal.
        logarithm = (length_b / length_a).log()
        near = logarithm.clamp(-delta, delta)  # without abs, whose second derivative is wrong at 0
        term = term + length_weight * near * (2 * logarithm - near)
    return term.mean()
