"""One distillation step, for any objective: render, view, features, loss, and back to the pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.backbones import Backbone
from ..errors import InputError
from ..reference.augment import Augmentation, augment
from .images import SyntheticImages
from .methods import Objective


def distillation_step(
    images: SyntheticImages,
    labels: Tensor,
    objective: Objective,
    backbone: Backbone,
    optimiser: torch.optim.Optimizer,
    *,
    augmentation: Augmentation,
    seed: int,
    step: int,
) -> Tensor:
    """Run step ``step`` (0-based) and update ``images`` in place; returns the detached loss, on the device.

    labels: (num_images,) int64. The same images, seed and step give the same update bit for bit (on a GPU: up to the
    backbone's own determinism).
    """
    objective.prepare(step)
    rendered = images()
    repeated = rendered.repeat(objective.views, 1, 1, 1) if objective.views > 1 else rendered
    items = torch.arange(len(repeated), device=rendered.device)
    views = augment(
        repeated,
        items,
        backbone.input_size,
        backbone.mean,
        backbone.std,
        seed=seed,
        step=step,
        augmentation=augmentation,
    )
    loss = objective.loss(backbone(views), labels.repeat(objective.views), step)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    # Sums, not masks: no memory beyond a number a level. A sum that overflows is no gradient to step along either.
    sums = torch.stack(
        [loss.detach().float(), *(level.grad.sum() for level in images.levels if level.grad is not None)]
    )
    if not sums.isfinite().all():
        what = "loss" if not torch.isfinite(loss) else "gradient"
        raise InputError(
            f"the {what} became nan or infinite at step {step}: nothing was updated; try a smaller lr or precision fp32"
        )
    optimiser.step()
    backbone.model.zero_grad(set_to_none=True)  # "stock" LGM leaves gradients on the backbone
    return loss.detach()
