"""The distance of LGM's linear gradient from the flow for a drawn classifier and a finite batch: first order, exact, bounded.

Derived in docs/derivation.md, with the same names: C classes, N features z with class means mu_c, g = dl/d(W, b) at
W = 0, b = 0 (the flow times (C-1)/C^2), g(W) the same at W with entries N(0, sigma^2) and b = 0. All distances are relative,
|g(W) - g| / |g|, and root mean squares over draws. The data must be balanced, since only then is g the flow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sfm_fast.errors import InputError


@dataclass(frozen=True)
class Moments:
    """The moments of N features in C balanced classes that the formulas need.

    common: |mu_bar|^2. between: mean over c of |mu_c - mu_bar|^2. within: mean of |z - mu_y|^2.
    second: Frobenius norm of mean z z^T.
    """

    classes: int
    images: int
    common: float
    between: float
    within: float
    second: float

    @property
    def gradient(self) -> float:
        """|g|."""
        return math.sqrt(self.between / self.classes)


def moments(features: Tensor, labels: Tensor, classes: int) -> Moments:
    """Moments of features (N, D) float with labels (N,) int64 in 0..classes-1, in float64.

    Raises ``InputError`` if the classes are not equally large, or if all their means are equal.
    """
    counts = torch.bincount(labels, minlength=classes)
    if len(counts) != classes or counts.min() != counts.max() or classes < 2:
        raise InputError(f"labels must be {classes} (at least 2) equally large classes, got counts {counts.tolist()}")
    z = features.double()
    centers = class_centers(z, labels, classes)
    mean = centers.mean(0)
    stats = Moments(
        classes=classes,
        images=len(z),
        common=mean.square().sum().item(),
        between=(centers - mean).square().sum(1).mean().item(),
        within=(z - centers[labels]).square().sum(1).mean().item(),
        second=(z.T @ z / len(z)).norm().item(),
    )
    if stats.between == 0:
        raise InputError("features must differ between classes: all class means are one point, and there is no flow")
    return stats


def class_centers(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Class means (C, D) of balanced features."""
    sums = torch.zeros(classes, features.shape[1], dtype=features.dtype).index_add_(0, labels, features)
    return sums / (len(features) // classes)


def flow_gradient(centers: Tensor) -> Tensor:
    """g, the linear gradient at zero weights and balanced classes: (C, D) centres -> (C*D + C,), -(mu_c - mu_bar)/C and zeros."""
    flows = (centers.mean(0) - centers) / len(centers)
    return torch.cat([flows.flatten(), flows.new_zeros(len(centers))])


def softmax_variance_bound(tau: Tensor, classes: int) -> Tensor:
    """Bound on E|softmax(a) - 1/C|^2 for a ~ N(0, tau^2 I): the root of u = tau^2 (1/C + u)(1 - 1/C - u).

    Sharp at both ends: tau^2 (C-1)/C^2 for small tau, 1 - 1/C for large.
    """
    square = tau.double().square()
    start = square * (classes - 1) / classes**2
    linear = 1 - square * (1 - 2 / classes)
    root = (linear.square() + 4 * square * start).sqrt()
    # Two forms of one root of square*u^2 + linear*u - start = 0, each without cancellation for one sign of `linear`.
    positive = 2 * start / (linear + root)
    return torch.where(linear > 0, positive, (root - linear) / (2 * square).clamp_min(torch.finfo(torch.float64).tiny))


def jacobian_bound(tau: Tensor, classes: int) -> Tensor:
    """Bound on the root of E|J|^2, J = diag(p) - p p^T the softmax's Jacobian at a ~ N(0, tau^2 I): at most 1/2."""
    square_sum = (1 / classes + softmax_variance_bound(tau, classes)).clamp_max(0.5)
    return (square_sum * (1 - square_sum)).sqrt()


def weights_first_order(stats: Moments, sigma: float) -> float:
    """Relative distance of g(W) to g at first order in sigma; the mean square over W is exact at that order."""
    second = stats.second**2 + stats.common
    return sigma * math.sqrt((stats.classes - 1) * second) / (stats.classes * stats.gradient)


def weights_bound(features: Tensor, stats: Moments, sigma: float) -> float:
    """Bound on the relative distance of g(W) to g, for every sigma: the smaller of a sharp and a saturating bound."""
    z = features.double()
    norms = z.norm(dim=1)
    j = jacobian_bound(sigma * norms, stats.classes)
    weighted = (z.T * j) @ z / len(z)
    sharp = sigma * math.sqrt(weighted.square().sum().item() + (j * norms).mean().item() ** 2)
    spread = softmax_variance_bound(sigma * norms, stats.classes)
    saturating = (spread * (norms.square() + 1)).sqrt().mean().item()
    distance: float = min(sharp, saturating) / stats.gradient
    return distance


def batch_distance(stats: Moments, n: int, *, stratified: bool) -> float:
    """Exact relative distance to g of the gradient at W = 0 on n images drawn without replacement.

    ``stratified``: n / C of every class (n a multiple of C); otherwise n of all images, as LGM draws them.
    """
    c = stats.classes
    if stratified:
        each, drawn = stats.images // c, n // c
        left = (each - drawn) / max(1, each - 1)
        return math.sqrt(left * (c - 1) / n * stats.within / stats.between)
    left = (stats.images - n) / max(1, stats.images - 1)
    return math.sqrt(left / n * ((c - 1) * (stats.within + stats.common + 1) / stats.between + c - 2))


def batch_bound(features: Tensor, stats: Moments, n: int, sigma: float) -> float:
    """Bound on the relative distance to g of the gradient at W on n images drawn without replacement from all."""
    c = stats.classes
    norms = features.double().norm(dim=1)
    spread = softmax_variance_bound(sigma * norms, c)
    left = (stats.images - n) / max(1, stats.images - 1)
    sampling = left / n * (((1 - 1 / c + spread) * (norms.square() + 1)).mean().item() - stats.gradient**2)
    return math.hypot(weights_bound(features, stats, sigma), math.sqrt(max(0.0, sampling)) / stats.gradient)


def least_cosine(distance: float) -> float:
    """The smallest cosine of g and g + d with |d| = distance * |g|: -1 if d can cancel g."""
    return math.sqrt(1 - distance**2) if distance < 1 else -1.0


def usual_cosine(distance: float) -> float:
    """The cosine of g and g + d for d perpendicular to g, as unbiased errors nearly are in many dimensions."""
    return 1 / math.sqrt(1 + distance**2)
