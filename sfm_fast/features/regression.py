"""Regression centres: targets on which ridge regression learns a classifier that predicts the classes of the real data well.

With targets t_i (N, D), their mean m, A the rows t_i - m, Y the rows e_c - 1/C of their classes c, and the shrinkage lambda,

    W = A^T (A A^T + lambda tr(A A^T)/C I)^-1 Y

is the ridge regression of the classes on the targets. Of the real data, each class counting once, it needs no more than the class means
mu_c and the pooled within-class covariance S_w: for x drawn from them, the best multiple of (x - m) W leaves the share

    1 - R^2 = 1 - tr(W^T B)^2 / ((1 - 1/C) tr(W^T S W)),
    B = 1/C sum_c (mu_c - m)(e_c - 1/C)^T,   S = S_w + 1/C sum_c (mu_c - m)(mu_c - m)^T

of the variance of the classes' indicators unexplained. The targets minimise

    1 - R^2 + proximity * mean |t - s|^2 / u^2,

with s the centres they start from and u^2 the mean variance of a feature, by L-BFGS from s. So they stay near real features, which images can
reach. This is the linear case of kernel inducing points (Nguyen, Chen and Lee, "Dataset meta-learning from kernel ridge-regression", 2021),
with moments of the features instead of images. Measurements: docs/derivation.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..options import number_of
from ..settings import PROXIMITY, SHRINKAGE

LARGEST = 1e6  # of both
ITERATIONS = 200  # of L-BFGS, which takes 15 to 80 for features of images


def regression_centers(
    centers: Tensor,
    within: Tensor,
    start: Tensor | None = None,
    *,
    shrinkage: float = SHRINKAGE,
    proximity: float = PROXIMITY,
) -> Tensor:
    """Targets of the shape of ``start``, float64 on the device of ``centers``.

    centers: (C, D) class means. within: (D, D), the within-class covariance, of any float dtype. start: what they start from and stay near,
    (C, D) or (C, K, D) for K targets of each class; None: the class means. shrinkage: lambda above 0, up to 1e6. proximity: above 0, up to 1e6.
    Raises ``InputError`` for other values. Takes up to `ITERATIONS` times O(N D min(N, D)) operations.
    """
    for name, value in (("shrinkage", shrinkage), ("proximity", proximity)):
        if not 0 < number_of(value) <= LARGEST:
            raise InputError(f"{name} must be a number above 0, up to {LARGEST:g}, got {value!r}")
    means = centers.detach().double().cpu()
    begin = means if start is None else start.detach().double().cpu()
    if begin.ndim not in (2, 3) or (begin.shape[0], begin.shape[-1]) != means.shape:
        raise InputError(
            f"start must be ({len(means)}, {means.shape[1]}) or ({len(means)}, K, {means.shape[1]}), got {tuple(begin.shape)}"
        )
    mean = means.mean(0)
    apart, covariance = means - mean, within.detach().double().cpu()
    unit = (covariance.diagonal().mean() + apart.square().mean()).sqrt()
    if unit == 0:
        return begin.clone().to(centers.device)
    problem = _Problem(
        apart / unit, covariance / unit / unit, (begin - mean).flatten(0, -2) / unit, float(shrinkage), float(proximity)
    )
    targets: Tensor = (problem.solve() * unit + mean).view_as(begin)
    return targets.to(centers.device)


class _Problem:
    """The minimisation, in units of u about the mean of the class means, so that a large common mean costs no digits.

    means: (C, D). covariance: (D, D). start: (N, D), the same number for each class, in order.
    """

    def __init__(self, means: Tensor, covariance: Tensor, start: Tensor, shrinkage: float, proximity: float) -> None:
        self.means, self.covariance, self.start = means, covariance, start
        self.shrinkage, self.proximity = shrinkage, proximity
        self.classes = len(means)
        self.labels = torch.arange(self.classes).repeat_interleave(len(start) // self.classes)
        self.indicators = torch.nn.functional.one_hot(self.labels).double() - 1 / self.classes

    def classifier(self, apart: Tensor) -> Tensor:
        """W (D, C), of targets without their mean (N, D)."""
        count, dim = apart.shape
        penalty = self.shrinkage * apart.square().sum() / self.classes
        if count <= dim:
            kernel = apart @ apart.T + penalty * torch.eye(count, dtype=apart.dtype)
            weight: Tensor = apart.T @ torch.linalg.solve(kernel, self.indicators)
        else:
            scatter = apart.T @ apart + penalty * torch.eye(dim, dtype=apart.dtype)
            weight = torch.linalg.solve(scatter, apart.T @ self.indicators)
        return weight

    def unexplained(self, targets: Tensor) -> Tensor:
        """1 - R^2."""
        mean = targets.mean(0)
        weight, means = self.classifier(targets - mean), self.means - mean
        aligned = (means * weight.T).sum() / self.classes - (means @ weight).mean()  # tr(W^T B)
        length = (weight * (self.covariance @ weight)).sum() + (means @ weight).square().sum() / self.classes
        return 1 - aligned.square() / length / (1 - 1 / self.classes)

    def solve(self) -> Tensor:
        targets = self.start.clone().requires_grad_()
        optimiser = torch.optim.LBFGS(
            [targets],
            max_iter=ITERATIONS,
            tolerance_grad=1e-6 / targets.numel(),  # the objective is a mean over all numbers
            tolerance_change=1e-6,  # of the objective, which is between 0 and 1: classifiers don't notice less
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = self.unexplained(targets) + self.proximity * (targets - self.start).square().mean()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimiser.step(closure)
        return targets.detach()
