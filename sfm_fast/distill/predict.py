"""Predicts a step's peak memory and floating-point operations with fake tensors, without the device, weights or images.

The step's own code runs on tensors without data, and every allocation and release is counted. Micro-batches between the first and
the last one cost the same and are skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..backbones.backbone import Backbone
from ..backbones.dataflow import without_values
from ..data.sources import ImageSource
from ..data.transforms import ImageTransform
from ..measure.tracker import Tracker
from ..views import Views
from .config import DistillConfig
from .images import SyntheticImages
from .members import Member, backbones_of, image_size
from .objectives import METHODS, Given, Objective
from .optimiser import PyramidAdam
from .staging import FromHost, InPlace
from .step import Backward, DistillationStep, MicroBatch


@dataclass(frozen=True)
class Prediction:
    """Peak bytes of a step, their composition at the peak, and the step's floating-point operations.

    ``by_category``: bytes of the backbone's parameters, the pyramid, Adam's moments, activations kept for the backward pass, and
    everything else (views, gradients, features, temporaries). ``host_bytes``: pyramid and moments in host memory, not part of the peak.
    """

    peak_bytes: int
    by_category: dict[str, int]
    flops: int
    host_bytes: int = 0


class _SampledStep(DistillationStep):
    """A step whose groups between the first and the last do nothing, nor do a group's micro-batches between its first and its last.

    ``tracker`` counts the operations.
    """

    tracker: Tracker
    forward_flops: dict[int, float]  # per image, by member
    backward_flops: dict[int, float]

    def _group_end(self, begin: int) -> int:
        size = super()._group_end(0)
        last = (self.images.num_images - 1) // size * size
        return last if 0 < begin < last else super()._group_end(begin)

    def _run_group(self, views: Sequence[Views], step: int, bad: Tensor, updated: Tensor) -> Tensor:
        if self.group[0] > 0 and self.group[1] < self.images.num_images:
            return torch.zeros_like(bad)
        return super()._run_group(views, step, bad, updated)

    def _end(self, begin: int, stop: int) -> int:
        start, end = self.group
        last = start + (end - start - 1) // self.micro_batch * self.micro_batch
        if start < begin < last:
            return min(last, stop)
        return super()._end(begin, stop)

    def _skipped(self, begin: int, end: int) -> bool:
        return begin > self.group[0] and end < self.group[1]

    def _forward(self, member: Member, views: Views, begin: int, end: int) -> MicroBatch:
        if self._skipped(begin, end):
            rows = (end - begin) * len(views.boxes)
            features = member.backbone.mean.new_empty(rows, member.backbone.num_features)
            return MicroBatch(begin, end, features, features, ())
        return super()._forward(member, views, begin, end)

    def _update(
        self,
        to_come: Sequence[Backward],
        summed: Tensor | None,
        held: MicroBatch | None,
        first: int,
        last: int,
        bad: Tensor,
    ) -> None:
        if not self._skipped(first, last):
            super()._update(to_come, summed, held, first, last, bad)

    def _run(
        self, member: Member, block: tuple[Tensor, ...], views: Views, begin: int, end: int, keep: bool
    ) -> MicroBatch:
        before, flops = self.tracker.living(), self.tracker.flops
        graph = super()._run(member, block, views, begin, end, keep)
        self.forward_flops[self.members.index(member)] = (self.tracker.flops - flops) / (end - begin)
        if keep:
            self.tracker.keep(before, "activations")
        return graph

    def _back(self, backward: Backward, graph: MicroBatch) -> Tensor:
        flops = self.tracker.flops
        part = super()._back(backward, graph)
        images = graph.end - graph.begin
        self.backward_flops[self.members.index(backward.member)] = (self.tracker.flops - flops) / images
        return part

    @property
    def flops(self) -> float:
        """Operations of all groups after a step, without those of the objectives' preparation."""
        count, size = self.images.num_images, super()._group_end(0)
        # What goes forward twice: on the last backbone all but the last micro-batch of each group, on others groups that are no micro-batch.
        twice = count // size * ((size - 1) // self.micro_batch) * self.micro_batch
        *others, last = self.forward_flops.values()
        again = twice * last + (count if size > self.micro_batch else 0) * sum(others)
        return count * (sum(self.forward_flops.values()) + sum(self.backward_flops.values())) + again


class _SampledFromHost(FromHost):
    def __init__(self, device: torch.device, micro_batch: int) -> None:
        self.device, self.stream, self.coming, self.micro_batch = device, None, None, micro_batch

    def prefetch(self, state: Sequence[Tensor], begin: int, end: int) -> None:
        super().prefetch(state, begin, min(end, begin + self.micro_batch))


class _NoImages(ImageSource):
    """A data set of ``count`` images without values."""

    name = "no images"

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def draw(self, count: int, transform: ImageTransform, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
        images = torch.empty(count, transform.channels, transform.crop, transform.crop)
        return images, torch.zeros(count, dtype=torch.int64)


class _Objective(Objective):
    """``wrapped``, counting the operations of its `prepare`."""

    prepare_flops = 0

    def __init__(self, wrapped: Objective, tracker: Tracker) -> None:
        self.tracker = tracker
        self.wrapped, self.views, self.backbone_gradients = wrapped, wrapped.views, wrapped.backbone_gradients
        self.separable = wrapped.separable

    @classmethod
    def build(cls, config: Any, given: Given) -> _Objective:
        raise NotImplementedError("wraps an existing objective")

    def prepare(self, step: int) -> None:
        before = self.tracker.flops
        # "stock" computes the features of real images with a graph.
        self.tracker.fresh = "activations" if self.backbone_gradients else "workspace"
        self.wrapped.prepare(step)
        self.tracker.fresh = "workspace"
        self.prepare_flops = self.tracker.flops - before

    def loss(self, features: Tensor, labels: Tensor, step: int) -> Tensor:
        return self.wrapped.loss(features, labels, step)

    def terms(self, features: Tensor, labels: Tensor, step: int, chosen: range) -> Tensor:
        return self.wrapped.terms(features, labels, step, chosen)


def _build(config: DistillConfig, backbone: Backbone, classes: int, channels: int) -> Objective:
    """The objective of ``config``, with centres and images without values."""
    shape = (classes, config.ipc) if config.level == "cluster" else (classes,)
    centers = torch.empty(*shape, backbone.num_features, device=backbone.device)
    mean = centers.new_empty(backbone.num_features)
    images = _NoImages(config.ipc * config.views_per_step * classes)
    return METHODS[config.method].build(config, Given(backbone, classes, channels, centers, mean, images))


def predict_step(
    config: DistillConfig,
    backbone: Backbone | Sequence[Backbone],
    classes: int,
    channels: int,
    micro_batch: int | None = None,
    *,
    host_state: bool = False,
    count_parameters: bool = True,
) -> Prediction:
    """The predicted cost of a step of ``config`` with all levels live; see `Prediction`.

    backbone: one or several, with weights, or without from `shape_of_backbone`. micro_batch: images at a time (None: all).
    count_parameters: whether the backbones' weights are part of the peak.
    """
    backbones = backbones_of(backbone)
    if METHODS[config.method].trains_backbone(config):
        backbones = tuple(one.unprepared() for one in backbones)
    tracker, device = Tracker(), backbones[0].device
    count, size = classes * config.ipc, image_size(config, backbones)
    with FakeTensorMode(), tracker:
        members = []
        for one in backbones:
            model = without_values(one.model, device)
            tracker.assign("parameters" if count_parameters else "", model.state_dict(keep_vars=True).values())
            stand_in = replace(
                one,
                model=model,
                mean=torch.empty(len(one.mean), device=device),
                std=torch.empty(len(one.std), device=device),
                run=None,
            )
            members.append(Member(stand_in, _Objective(_build(config, stand_in, classes, channels), tracker)))
        images = SyntheticImages(1, channels, size, parametrization=config.parametrization)
        images.num_images = count
        images.pyramid = nn.Parameter(torch.empty(count, 0, device="cpu" if host_state else device), False)
        images.allocate(len(images.sizes))
        optimiser = PyramidAdam(images, config.schedule(len(images.sizes)).lr)
        pyramid, *moments = optimiser.state
        average = torch.empty_like(pyramid) if config.average_last else None
        tracker.assign("" if host_state else "pyramid", [pyramid, *([] if average is None else [average])])
        tracker.assign("" if host_state else "adam", moments)
        step = _SampledStep(
            torch.empty(count, dtype=torch.int64, device=device),
            members,
            optimiser,
            augmentation=config.augmentation,
            seed=config.seed,
            micro_batch=micro_batch or count,
            staging=_SampledFromHost(device, micro_batch or count) if host_state else InPlace(),
            images_per_term=config.images_per_term,
        )
        step.tracker, step.forward_flops, step.backward_flops = tracker, {}, {}
        tracker.restart()  # the peak must not include the preparation
        step.compute(0)
    prepared = sum(one.objective.prepare_flops for one in members if isinstance(one.objective, _Objective))
    kept = [pyramid, *moments, *([] if average is None else [average])]
    host = sum(tensor.nbytes for tensor in kept) if host_state else 0
    return Prediction(tracker.peak, tracker.at_peak(), round(prepared + step.flops), host)
