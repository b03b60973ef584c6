"""The mean of a run's last iterates, which has less of the noise that the random views of each step add."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError


class IterateAverage:
    """Mean of the pyramids so far with weights that fade, so that it is about the mean over the last ``share`` of the steps at any time; 0: no mean.

    After t steps, step s has about the weight of (s / t)^p with p = 2 / share - 2, whose steps are as old on average as those of the
    last ``share``. So it doesn't depend on when the run will end. ``mean``: like the pyramid, on the same device. A new pyramid level
    starts it anew. Source: polynomial-decay averaging, Shamir and Zhang, "Stochastic gradient descent for non-smooth optimization" (2013).
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.mean: Tensor | None = None

    @torch.no_grad()
    def add(self, pyramid: Tensor, steps_done: int) -> None:
        """Include ``pyramid`` as it is after step number ``steps_done`` (1-based)."""
        if not self.share:
            return
        if self.mean is None or self.mean.shape != pyramid.shape:
            self.mean = pyramid.clone()
            return
        power = 2 / self.share - 2
        self.mean.lerp_(pyramid, (power + 1) / (steps_done + power))

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint."""
        return {} if self.mean is None else {"average": self.mean}

    def restore(self, tensors: dict[str, Tensor], pyramid: Tensor) -> None:
        """Restore `state`. Raises ``InputError`` if the mean is missing, isn't finite or doesn't fit ``pyramid``."""
        self.mean = None
        if not self.share:
            return
        mean = tensors.get("average")
        if mean is None or (mean.shape, mean.dtype) != (pyramid.shape, pyramid.dtype) or not mean.isfinite().all():
            found = "no average" if mean is None else f"average {tuple(mean.shape)} {mean.dtype}"
            raise InputError(f"{found} for a pyramid {tuple(pyramid.shape)} {pyramid.dtype}")
        self.mean = torch.empty_like(pyramid).copy_(mean)
