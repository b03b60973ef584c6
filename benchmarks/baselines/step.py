"""A distillation step without this package's step, kernels and loss, and one with its operations in plain torch: each is one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sfm_fast.backbones.backbone import Backbone
from sfm_fast.distill.images import SyntheticImages
from sfm_fast.distill.objectives import Objective
from sfm_fast.distill.optimiser import BETAS, PyramidAdam
from sfm_fast.ops.render_augment import render_augment
from sfm_fast.views import Augmentation, Views, draw_views

from . import images as baseline
from .flow_alignment import paper_global

LR = 2e-3


def views_of(backbone: Backbone, count: int, views: int, size: int, step: int, augmentation: Augmentation) -> Views:
    """The views that this package's step draws of ``count`` images of side ``size`` with seed 0, on the backbone's device."""
    drawn = draw_views(
        torch.arange(views * count),
        (size, size),
        backbone.input_size,
        backbone.mean,
        backbone.std,
        seed=0,
        step=step,
        augmentation=augmentation,
    )
    return replace(drawn, boxes=drawn.boxes.to(backbone.device), noise_items=drawn.noise_items.to(backbone.device))


class PlainStep:
    """A step as usually written in torch: levels upsampled one by one, one graph, torch's Adam, the paper's formula.

    Noise comes from ``randn``, so repeated steps differ. It starts from the levels of ``images``, all live.
    """

    def __init__(
        self,
        backbone: Backbone,
        centers: Tensor,
        images: SyntheticImages,
        labels: Tensor,
        views: int,
        augmentation: Augmentation,
    ) -> None:
        self.backbone, self.centers, self.size, self.views = backbone, centers, images.size, views
        self.labels, self.augmentation, self.steps = labels.repeat(views), augmentation, 0
        self.levels = [level.clone().requires_grad_() for level in images.levels]
        self.adam = torch.optim.Adam(self.levels, lr=LR)

    def show(self, levels: Sequence[Tensor], views: Views) -> Tensor:
        """Views (views * N, channels, side, side) of the images, normalised."""
        rendered = baseline.render(levels, self.size)
        return baseline.augment(rendered.repeat(self.views, 1, 1, 1) if self.views > 1 else rendered, views)

    def __call__(self) -> Tensor:
        """One step; its loss."""
        count = len(self.levels[0])
        views = views_of(self.backbone, count, self.views, self.size, self.steps, self.augmentation)
        loss = paper_global(self.backbone(self.show(self.levels, views)), self.centers, self.labels)
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        self.steps += 1
        return loss.detach()

    def gradient(self) -> Tensor:
        """The gradient of the last step, (N, floats of an image)."""
        return torch.cat([level.grad.flatten(1) for level in self.levels if level.grad is not None], dim=1)


class ReferenceStep:
    """The definition: this package's operations on backend "torch", differentiated by autograd in one graph, and its Adam.

    The objective must also be made for backend "torch". Views, noise and update equal those of the package's step, up to rounding.
    """

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        images: SyntheticImages,
        labels: Tensor,
        augmentation: Augmentation,
    ) -> None:
        self.backbone, self.objective, self.images = backbone, objective, images
        self.labels, self.augmentation = labels.repeat(objective.views), augmentation
        self.optimiser, self.steps = PyramidAdam(images, LR), 0

    def __call__(self) -> Tensor:
        """One step; its loss."""
        images, objective = self.images, self.objective
        objective.prepare(self.steps)
        views = views_of(self.backbone, images.num_images, objective.views, images.size, self.steps, self.augmentation)
        leaves = [level.detach().requires_grad_() for level in images.levels]
        shown = render_augment(leaves, images.size, views, dtype=self.backbone.dtype, backend="torch")
        loss = objective.loss(self.backbone(shown), self.labels, self.steps)
        flat = torch.cat([part.flatten(1) for part in torch.autograd.grad(loss, leaves)], dim=1)
        self.optimiser.update(self.optimiser.state, flat, torch.zeros((), device=flat.device))
        self.optimiser.steps += 1
        self.steps += 1
        return loss.detach()

    def gradient(self) -> Tensor:
        """The gradient of the first step, valid until the second one: (N, floats of an image)."""
        return self.optimiser.exp_avg / (1 - BETAS[0])
