"""The mean of a run's last iterates, which has less of the noise that the random views of each step add."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..errors import InputError


class IterateAverage:
    """Mean of the pyramids after a run's last steps; ``share`` is their fraction of all ``steps``, 0 for no mean.

    ``mean``: like the pyramid, on the same device. ``count``: steps averaged so far. A new pyramid level restarts the mean.
    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging" (1992).
    """

    def __init__(self, share: float, steps: int) -> None:
        self.share = share
        self.first = steps - round(share * steps)  # number of steps before those that are averaged
        self.mean: Tensor | None = None
        self.count = 0

    @torch.no_grad()
    def add(self, pyramid: Tensor, steps_done: int) -> None:
        """Include ``pyramid`` as it is after step number ``steps_done`` (1-based)."""
        if steps_done <= self.first:
            return
        if self.mean is None or self.mean.shape != pyramid.shape:
            self.mean, self.count = pyramid.clone(), 1
            return
        self.count += 1
        self.mean.lerp_(pyramid, 1 / self.count)

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint."""
        return {} if self.mean is None else {"average": self.mean, "average_count": torch.tensor(self.count)}

    def restore(self, tensors: dict[str, Tensor], pyramid: Tensor, steps_done: int) -> None:
        """Restore `state`, after ``steps_done`` steps; a mean that includes steps before this run's averaged ones is dropped.

        Raises ``InputError`` if the mean doesn't fit ``pyramid``; warns if averaged steps are missing from it.
        """
        self.mean, self.count = None, 0
        if not self.share:
            return
        if "average" in tensors:
            self._take(tensors["average"], tensors.get("average_count", torch.tensor(0)), pyramid, steps_done)
        missing = steps_done - self.first - self.count
        if missing > 0:
            warnings.warn(
                f"average_last: {missing} of the last steps are missing from the mean, because the run was first configured for fewer steps "
                "(or because a pyramid level was added during them)",
                RuntimeWarning,
                stacklevel=2,
            )

    def _take(self, mean: Tensor, count: Tensor, pyramid: Tensor, steps_done: int) -> None:
        if (
            mean.shape != pyramid.shape
            or not mean.isfinite().all()
            or count.dtype != torch.int64
            or count.numel() != 1
            or int(count) < 1
        ):
            raise InputError(
                f"average {tuple(mean.shape)} of {count.tolist()} steps for a pyramid {tuple(pyramid.shape)}"
            )
        if steps_done - int(count) >= self.first:
            self.mean, self.count = torch.empty_like(pyramid).copy_(mean), int(count)
