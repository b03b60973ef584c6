"""Discriminant centres: targets whose nearest-target rule is the regularised linear discriminant of the real data.

With mu_c the class means, mu_bar their mean, S_w the pooled within-class covariance, lambda the shrinkage and kappa the scale:

    P = (S_w + lambda tr(S_w)/D I)^-1,   A_c = P (mu_c - mu_bar),   n = |mu - mu_bar|_F / |A|_F,
    t_c = mu_bar + d + kappa n A_c,

where d is the shortest vector with (A_c - A_bar) . d = r_c - r_bar, r_c = (mu_c - mu_bar) . A_c / 2 - kappa n |A_c|^2 / 2.

Then |x - t_c|^2 is smallest where (x - mu_bar) . A_c - (mu_c - mu_bar) . A_c / 2 is largest, which is the linear discriminant for classes of
equal probability. With more classes than D + 1 the equations for d have no exact solution, and d is that of least squares. All of it
depends on mu only through mu - mu_bar, so a large common mean costs no digits. Proof: docs/derivation.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..options import number_of

COSINE = 0.85  # between the flows to the targets and those to the class means, for shrinkage "auto"
LEAST, MOST = 1e-3, 1e4  # limits of shrinkage "auto"
LARGEST = 1e6  # of shrinkage and scale


def discriminant_centers(
    centers: Tensor, within: Tensor, *, shrinkage: float | str = "auto", scale: float | str = "auto"
) -> Tensor:
    """(C, D) float64 on the device of ``centers``, from class means (C, D) and the within-class covariance (D, D) of any float dtype.

    shrinkage: lambda in 0..1e6; "auto": see `choose_shrinkage`. scale: kappa above 0, up to 1e6; "auto": 1.
    Raises ``InputError`` for other values, and for a shrinkage that leaves the covariance singular.
    """
    for name, value, zero in (("shrinkage", shrinkage, True), ("scale", scale, False)):
        if isinstance(value, str) and value == "auto":
            continue
        if not 0 <= number_of(value) <= LARGEST or (value == 0 and not zero):
            least = "from 0" if zero else "above 0 and"
            raise InputError(f"{name} must be 'auto' or a number {least} up to {LARGEST:g}, got {value!r}")
    # On the CPU, whose least squares finds the shortest solution of rank-deficient equations.
    means = centers.detach().double().cpu()
    mean = means.mean(0)
    apart = means - mean
    length = torch.linalg.vector_norm(apart)
    if length == 0:
        return means.clone().to(centers.device)
    apart /= length  # from here on in units in which the flows and the mean variance are 1, so that nothing overflows
    axes = _axes(within)
    penalty = _shrinkage(apart, axes) if isinstance(shrinkage, str) else float(shrinkage)
    if axes.variances[0] + penalty <= 8 * torch.finfo(torch.float32).eps * axes.variances[-1]:
        raise InputError(  # that is the covariance's own precision
            "shrinkage must be larger for a singular covariance, as of fewer images than features or of features that depend on each "
            f"other, got {shrinkage!r}"
        )
    directions = apart @ (axes.vectors / (axes.variances + penalty)) @ axes.vectors.T
    directions *= (1.0 if isinstance(scale, str) else float(scale)) / torch.linalg.vector_norm(directions)
    # These are kappa n A. The equations for d are multiplied by kappa n too.
    rule = ((apart - directions) * directions).sum(1, keepdim=True) / 2
    offset = torch.linalg.lstsq(directions - directions.mean(0), rule - rule.mean(), driver="gelsd").solution
    targets: Tensor = mean + length * (offset.squeeze(1) + directions)
    return targets.to(centers.device)


def choose_shrinkage(centers: Tensor, within: Tensor) -> float:
    """The smallest lambda with which A, flattened, has a cosine of at least `COSINE` with mu - mu_bar, within `LEAST` and `MOST`.

    The smaller lambda is, the better the targets' rule, but the farther they are from the class means: where single images can't bring
    their features. This angle bounds that distance in the same way for every backbone (docs/derivation.md shows accuracies).
    """
    means = centers.detach().double().cpu()
    apart = means - means.mean(0)
    return _shrinkage(apart / torch.linalg.vector_norm(apart), _axes(within))


def _shrinkage(apart: Tensor, axes: _Axes) -> float:
    energy = (apart @ axes.vectors).square().sum(0)  # of the flows, on each axis
    low, high = math.log(LEAST), math.log(MOST)
    for _ in range(40):  # the cosine grows with lambda
        middle = (low + high) / 2
        weights = 1 / (axes.variances + math.exp(middle))
        cosine = (energy * weights).sum() / (energy.sum() * (energy * weights.square()).sum()).sqrt()
        low, high = (low, middle) if cosine >= COSINE else (middle, high)
    return math.exp(high)


class _Axes(NamedTuple):
    """Eigenvalues (D,) of the covariance divided by their mean, in ascending order, and eigenvectors (D, D)."""

    variances: Tensor
    vectors: Tensor


def _axes(within: Tensor) -> _Axes:
    """The axes of the covariance, or those of the identity if no class has two different images."""
    covariance = within.detach().double().cpu()
    average = covariance.diagonal().mean()
    if average <= 0:
        covariance, average = torch.eye(len(covariance), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    variances, vectors = torch.linalg.eigh(covariance / average)
    if variances[0] < -1e-3 * variances[-1]:  # far above the rounding of float32
        raise InputError(
            f"within must be a covariance, without negative eigenvalues, got {variances[0]:.3g} times the mean variance"
        )
    return _Axes(variances.clamp(min=0), vectors)
