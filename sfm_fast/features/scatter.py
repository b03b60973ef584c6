"""The sum of products of features about a fixed point, from which the pooled within-class covariance follows."""

from __future__ import annotations

import torch
from torch import Tensor


class Scatter:
    """Sum of (x - s)(x - s)^T over all features x, (D, D) float64, with the first feature as the fixed point s (D,).

    The fixed point is close to the data, so the sum doesn't cancel next to a large common mean, and it lets one pass suffice.
    """

    def __init__(self, dim: int, device: torch.device | str) -> None:
        self.matrix = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self.point: Tensor | None = None

    def update(self, features: Tensor) -> None:
        """Add features (N, D) float64."""
        if self.point is None and len(features):
            self.point = features[0].clone()
        if self.point is not None:
            apart = features - self.point
            self.matrix.addmm_(apart.T, apart)

    def move(self, point: Tensor, total: Tensor, count: Tensor) -> None:
        """Take ``point`` (D,) as the fixed point; total (D,) and count (): the sum and number of all features so far."""
        if self.point is not None:
            difference = self.point - point
            cross = torch.outer(total - count * self.point, difference)
            self.matrix += cross + cross.T + count * torch.outer(difference, difference)
        self.point = point.clone()

    def within(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Pooled within-class covariance (D, D): the mean over all features of (x - mean of its class)(same)^T.

        sums (C, D) float64 and counts (C,) of the classes; every class has a feature. Exactly 0 if it is no more than the rounding of
        the total scatter, from which it is a difference, and of the means: no class has two different features then.
        """
        assert self.point is not None
        apart = self._weighted_means(sums, counts)
        within, images = torch.addmm(self.matrix, apart.T, apart, alpha=-1), counts.sum()
        total = self.matrix.trace()
        rounding = torch.finfo(torch.float64).eps * (total + self.point.norm() * (images * total).sqrt())
        if within.trace() <= 64 * rounding:
            return torch.zeros_like(within)
        within /= images
        within = (within + within.T) / 2  # a product of matrices may round its two halves differently
        within.diagonal().clamp_(min=0)  # of a feature that is constant within each class, less than 0 by rounding
        return within

    def _weighted_means(self, sums: Tensor, counts: Tensor) -> Tensor:
        """(C, D) whose product with itself, transposed first, is the scatter of the class means about the point; a class without features counts 0."""
        assert self.point is not None
        return (sums / counts.clamp(min=1).unsqueeze(1) - self.point) * counts.double().sqrt().unsqueeze(1)

    @classmethod
    def from_within(cls, within: Tensor, sums: Tensor, counts: Tensor) -> Scatter:
        """The inverse of `within`."""
        scatter = cls(len(within), within.device)
        scatter.point = sums.sum(0) / counts.sum()
        apart = scatter._weighted_means(sums, counts)
        scatter.matrix = torch.addmm(within.double() * counts.sum(), apart.T, apart)
        return scatter
