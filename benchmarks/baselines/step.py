"""A plain distillation step: the image path operation by operation, one graph over everything, torch's Adam."""

from __future__ import annotations

import torch
from torch import Tensor

from sfm_fast.data.backbones import Backbone
from sfm_fast.distill.images import level_sizes
from sfm_fast.distill.methods import Objective
from sfm_fast.reference.augment import draw_views

from . import images as baseline


class PlainStep:
    """``step(number)`` updates ``count`` images with all levels live."""

    def __init__(self, objective: Objective, backbone: Backbone, labels: Tensor, channels: int, size: int) -> None:
        self.objective, self.backbone, self.labels, self.size = objective, backbone, labels, size
        sides = level_sizes(size, "pyramid")
        self.levels = [
            torch.randn(len(labels), channels, side, side, device=backbone.device).div_(len(sides)).requires_grad_()
            for side in sides
        ]
        self.adam = torch.optim.Adam(self.levels, lr=2e-3)

    def __call__(self, step: int) -> Tensor:
        backbone, device = self.backbone, self.backbone.device
        items = torch.arange(len(self.labels), device=device)
        views = draw_views(
            items, (self.size, self.size), backbone.input_size, backbone.mean, backbone.std, seed=0, step=step
        )
        features = backbone(baseline.render_augment(self.levels, self.size, views))
        loss = self.objective.loss(features, self.labels, step)
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        return loss.detach()
