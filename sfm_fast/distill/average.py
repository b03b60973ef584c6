"""The mean of a run's last iterates: each step sees another view of an image, and the mean has less of that noise."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..errors import InputError


class IterateAverage:
    """Mean of the pyramid after each of a run's last steps, ``share`` of all ``steps``; 0 keeps nothing.

    ``mean`` (like the pyramid, beside it) and ``count``, steps in it. A new pyramid level starts it anew.
    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging" (1992).
    """

    def __init__(self, share: float, steps: int) -> None:
        self.share = share
        self.first = steps - round(share * steps)  # steps done before those that count
        self.mean: Tensor | None = None
        self.count = 0

    @torch.no_grad()
    def add(self, pyramid: Tensor, steps_done: int) -> None:
        """``pyramid`` as step number ``steps_done`` (1-based) left it."""
        if steps_done <= self.first:
            return
        if self.mean is None or self.mean.shape != pyramid.shape:
            self.mean, self.count = pyramid.clone(), 1
            return
        self.count += 1
        self.mean.lerp_(pyramid, 1 / self.count)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {} if self.mean is None else {"average": self.mean, "average_count": torch.tensor(self.count)}

    def restore(self, tensors: dict[str, Tensor], pyramid: Tensor, steps_done: int) -> None:
        """From `state`, after ``steps_done`` steps; a mean that began before this run's first step that counts is dropped.

        Raises ``InputError`` where it doesn't fit ``pyramid``; warns where steps that count are missing from it.
        """
        self.mean, self.count = None, 0
        if not self.share:
            return
        if "average" in tensors:
            self._take(tensors["average"], tensors.get("average_count", torch.tensor(0)), pyramid, steps_done)
        missing = steps_done - self.first - self.count
        if missing > 0:
            warnings.warn(
                f"average_last: {missing} of the last steps are missing from the mean, since the run was made for fewer steps before "
                "(or had a new pyramid level among them)",
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
