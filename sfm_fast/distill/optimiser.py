"""Adam on pyramids, one block of images at a time, so that the gradient of all images is never in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import adam

from .images import SyntheticImages

BETAS = (0.9, 0.999)
EPS = 1e-8


class PyramidAdam:
    """torch's fused Adam over the live levels of ``images``, one block of images at a time.

    The gradient of an image's pyramid is complete after its own micro-batch, so the update can follow immediately. State:
    ``exp_avg`` and ``exp_avg_sq``, like ``images.pyramid`` and on the same device; ``steps``, the number of finished steps.
    """

    def __init__(self, images: SyntheticImages, lr: float) -> None:
        self.images, self.lr = images, lr
        self.restart()

    def restart(self) -> None:
        """Reset the state, for the levels that are live now."""
        pyramid, self.steps = self.images.pyramid.data, 0
        self.exp_avg, self.exp_avg_sq = (
            torch.zeros(pyramid.shape, device=pyramid.device, pin_memory=self.images.pinned) for _ in range(2)
        )

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """(pyramid, exp_avg, exp_avg_sq), each (num_images, floats)."""
        return self.images.pyramid.data, self.exp_avg, self.exp_avg_sq

    def update(self, state: tuple[Tensor, ...], gradient: Tensor, skip: Tensor) -> None:
        """Update the images whose blocks of `state` are given, in place; does nothing if ``skip`` () float32 is 1."""
        pyramid, exp_avg, exp_avg_sq = state
        step = torch.full((), float(self.steps), device=pyramid.device)
        adam(
            [pyramid], [gradient], [exp_avg], [exp_avg_sq], [], [step], fused=True, found_inf=skip, amsgrad=False,
            beta1=BETAS[0], beta2=BETAS[1], lr=self.lr, weight_decay=0.0, eps=EPS, maximize=False,
        )  # fmt: skip
