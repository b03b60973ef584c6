"""Softmax regression on standardised features: the objective with its gradient, minimised by L-BFGS."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError

_LEAST = torch.finfo(
    torch.float32
).tiny  # least standard deviation of a feature, because weights grow with its reciprocal
_BLOCK = {
    "cpu": 1 << 19,
    "cuda": 1 << 25,
}  # values in a block of rows, which should stay in the cache between its two products


@dataclass(frozen=True)
class Standardiser:
    """Features (N, D) -> (features - mean) * scale, float32; mean and scale (1 / std; 0 for constant features) are (D,) float64."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Standardiser:
        """The standardiser for features (N, D) of any float dtype, with sums in float64.

        Raises ``InputError`` for a row that isn't finite, or features too large or too small for a float32 classifier.
        """
        blocks = features.split(_rows_of_block(features))
        mean = torch.stack([block.double().sum(0) for block in blocks]).sum(0) / len(features)
        if not mean.isfinite().all():
            finite = torch.cat([block.isfinite().all(1) for block in blocks])
            if not finite.all():
                raise InputError(
                    f"features must be finite, but row {int((~finite).nonzero()[0])} holds NaN or infinity"
                )
        std = (
            torch.stack([(block.double() - mean).square_().sum(0) for block in blocks]).sum(0) / len(features)
        ).sqrt()
        size, spread = mean.abs(), float(std.max())
        if not (size.max() <= 1 / _LEAST and spread <= 1 / _LEAST):  # also false if float64 overflowed
            raise InputError(f"features exceed {1 / _LEAST:.2g}, too much for a float32 classifier; scale them down")
        exact = features.dtype == torch.float64
        # The spread must exceed the rounding error of the mean; squares of values below _LEAST may underflow even in float64.
        varies = (std > (1e-12 if exact else 1e-6) * size) | ((size > 0) & (size < _LEAST))
        seen = varies & (std > 1e-7 * size) & (std > _LEAST)  # large enough for the classifier in float32
        if varies.any() and not seen.any():
            raise InputError(
                f"features have standard deviations of at most {spread:.2g} with means of up to {float(size.max()):.2g}, "
                "too small for a float32 classifier; scale them up, or subtract the mean"
            )
        return cls(mean, torch.where(seen, 1 / std.masked_fill(~seen, 1.0), 0.0))

    def __call__(self, features: Tensor) -> Tensor:
        # In float64, because a mean far above the spread would cancel in float32.
        return ((features.double() - self.mean) * self.scale).float()

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The map of raw features, in float32, that equals the map (C, D), (C,) of standardised ones."""
        weight = weight.double() * self.scale
        return weight.float(), (bias.double() - weight @ self.mean).float()


@dataclass(frozen=True)
class Fit:
    """weight (C, D) and bias (C,) for standardised features; ``converged`` is None for a solver with a fixed number of steps."""

    weight: Tensor
    bias: Tensor
    iterations: int
    converged: bool | None


def _rows_of_block(features: Tensor) -> int:
    return max(256, _BLOCK.get(features.device.type, 1 << 25) // features.shape[1])


def residual(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies (N,) of logits (C, N), and softmax minus one-hot (C, N), their gradient; ``logits`` is overwritten."""
    normaliser = logits.logsumexp(0, keepdim=True)
    losses = (normaliser - logits.gather(0, labels.unsqueeze(0))).squeeze(0)
    probabilities = logits.sub_(normaliser).exp_()
    probabilities.scatter_add_(0, labels.unsqueeze(0), -torch.ones_like(normaliser))
    return losses, probabilities


def loss_and_gradient(
    x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, weight_decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """mean cross-entropy + weight_decay / 2 * |weight|², and its gradients in weight (C, D) and bias (C,).

    x (N, D) float32, labels (N,) int64; weight, bias and the results are float64. Products within a block of rows are float32, sums
    over blocks float64.
    """
    low_weight, low_bias = weight.float(), bias.float().unsqueeze(1)
    loss, weight_gradient, bias_gradient = weight.new_zeros(()), torch.zeros_like(weight), torch.zeros_like(bias)
    size = _rows_of_block(x)
    for rows, targets in zip(x.split(size), labels.split(size), strict=True):
        # With classes as the first dimension these two products are up to twice as fast on CPUs.
        losses, error = residual((low_weight @ rows.T).add_(low_bias), targets)
        loss += losses.sum(dtype=torch.float64)
        weight_gradient += error @ rows
        bias_gradient += error.sum(1, dtype=torch.float64)
    loss = loss / len(x) + weight_decay / 2 * weight.square().sum()
    return loss, weight_gradient / len(x) + weight_decay * weight, bias_gradient / len(x)


@torch.no_grad()
def fit_lbfgs(
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    weight_decay: float,
    *,
    start: Fit | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 500,
) -> Fit:
    """The minimum of `loss_and_gradient` by L-BFGS with strong Wolfe line searches, from ``start`` or zero; the rows of x must be in random order.

    The Hessian of a class's weights is about M = mean of p (1 - p) x xᵀ, plus weight_decay (Böhning, "Multinomial logistic regression
    algorithm", 1992, gives this as a bound). The search uses coordinates in which M is the identity; M is computed at ``start`` from the
    first 8 D rows, averaged over classes. Strongly correlated features then take tens or hundreds of iterations instead of thousands.
    ``tolerance``: largest entry of the gradient in these coordinates at convergence; with float32 products at least about 3e-5.
    """
    dim = x.shape[1]
    if start is None:
        start = Fit(x.new_zeros(num_classes, dim).double(), x.new_zeros(num_classes).double(), 0, False)
    sample = x[: 8 * dim]
    chance = torch.addmm(start.bias.float(), sample, start.weight.float().T).softmax(1)
    unsure = (chance * (1 - chance)).mean(1, keepdim=True)
    level = max(float(unsure.mean(dtype=torch.float64)), 1e-6)
    hessian = ((sample * unsure).T @ sample).double() / len(sample)
    hessian.diagonal().add_(weight_decay + 1e-6 * level)  # the second term covers float32's rounding errors
    root, failed = torch.linalg.cholesky_ex(hessian)
    if failed:  # rounding errors of many strongly correlated features exceed that term
        weighted = (sample * unsure.sqrt()).double()
        hessian = weighted.T @ weighted / len(sample)
        hessian.diagonal().add_(weight_decay + 1e-6 * level)
        root = torch.linalg.cholesky(hessian)
    inverse = torch.linalg.solve_triangular(root, torch.eye(dim, dtype=root.dtype, device=x.device), upper=False)
    point = torch.cat((start.weight @ root, start.bias.unsqueeze(1) * level**0.5), 1).requires_grad_()

    def maps() -> tuple[Tensor, Tensor]:
        return point[:, :dim].detach() @ inverse, point[:, dim].detach() / level**0.5

    @torch.no_grad()
    def closure() -> Tensor:
        loss, weight_gradient, bias_gradient = loss_and_gradient(x, labels, *maps(), weight_decay)
        point.grad = torch.cat((weight_gradient @ inverse.T, bias_gradient.unsqueeze(1) / level**0.5), 1)
        return loss

    optimiser = torch.optim.LBFGS(
        [point],
        max_iter=max_iterations,
        max_eval=4 * max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    optimiser.step(closure)
    closure()  # the line search may have evaluated another point last
    assert point.grad is not None
    converged = bool(point.grad.abs().max() <= tolerance)
    return Fit(*maps(), int(optimiser.state[point].get("n_iter", 0)), converged)
