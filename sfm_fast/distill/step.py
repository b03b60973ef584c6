"""One distillation step for any objective, from views through features and loss to the update of the images, in micro-batches.

All losses depend on the images only through the features. So a step with several micro-batches computes (1) the features of all
images without a graph, (2) the loss and its gradient to the features, (3) for each micro-batch the same views again, bit for bit,
and their backward pass with its slice of that gradient. This is the gradient of the one-shot step, with the activations of one
micro-batch. The last micro-batch of (1) keeps its graph and comes first in (3), so one with all images is the one-shot step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backbones.backbone import Backbone
from ..errors import InputError
from ..measure.memory import is_out_of_memory
from ..ops.render_augment import render_augment, render_augment_backward
from ..views import Augmentation, Views, draw_views
from .objectives import Objective
from .optimiser import PyramidAdam
from .staging import InPlace

LARGEST = 1e18  # limit of a gradient's entries, whose squares must fit into float32


class StepFailed(InputError):  # noqa: N818 (the name says what happened)
    """A step could not be finished. ``torn``: whether some images had been updated before it failed."""

    def __init__(self, message: str, torn: bool) -> None:
        super().__init__(message)
        self.torn = torn


@dataclass
class MicroBatch:
    """Images [begin, end), their views ``shown`` and their features, with a graph from the views if one was kept."""

    begin: int
    end: int
    shown: Tensor
    features: Tensor


class DistillationStep:
    """Steps of one run: ``step(number)`` updates the optimiser's images in place.

    labels: (num_images,) int64. micro_batch: images per micro-batch, each with all its views; halved permanently when the device
    runs out of memory, without losing the step. staging: provides the blocks of images.
    The same images, seed, step and micro-batch size give the same update bit for bit (on a GPU if the backbone is deterministic).
    """

    def __init__(
        self,
        labels: Tensor,
        objective: Objective,
        backbone: Backbone,
        optimiser: PyramidAdam,
        *,
        augmentation: Augmentation,
        seed: int,
        micro_batch: int,
        staging: InPlace | None = None,
    ) -> None:
        self.images, self.objective, self.backbone, self.optimiser = optimiser.images, objective, backbone, optimiser
        self.labels = labels.repeat(objective.views)
        self.augmentation, self.seed = augmentation, seed
        self.micro_batch = min(micro_batch, self.images.num_images)
        self.staging = staging or InPlace()
        self.graph: MicroBatch | None = (
            None  # the micro-batch whose graph is kept, between its forward and its backward pass
        )
        self.one: Tensor | None = (
            None  # the gradient of the loss itself, reused because autograd would allocate one at every step
        )

    def __call__(self, step: int) -> Tensor:
        """Step number ``step`` (0-based). Returns the detached loss on the device; raises ``StepFailed`` if it or the gradient isn't finite."""
        loss, bad, updated = self.compute(step)
        if bad:
            what, torn = "gradient" if loss.isfinite() else "loss", bool(updated)
            undone = "some images were updated, so resume from a checkpoint" if torn else "no image was updated"
            raise StepFailed(
                f"the {what} became nan or infinite at step {step}: {undone}; try a smaller lr or precision fp32", torn
            )
        self.optimiser.steps += 1
        return loss

    def compute(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The step without waiting for the device: the loss, 1 if loss or gradient isn't finite, 1 if an image was updated; all of shape ()."""
        with self._gradients_of_backbone():
            return self._compute(step)

    @contextlib.contextmanager
    def _gradients_of_backbone(self) -> Iterator[None]:
        """During a step of an objective with ``backbone_gradients`` the model's parameters require gradients; otherwise they stay frozen."""
        model = self.backbone.model
        if not self.objective.backbone_gradients:
            yield
            return
        model.requires_grad_(True)
        try:
            yield
        finally:
            model.requires_grad_(False)
            model.zero_grad(set_to_none=True)

    def _compute(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        self.graph = None
        try:
            self.objective.prepare(step)
            views = self._draw(step)
            loss, gradient = self._loss(self._features(views), step)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise StepFailed(
                "out of memory before any image was updated: the loss, and LGM's real images, can't be split into micro-batches",
                False,
            ) from error
        bad, updated = (~loss.isfinite()).float(), torch.zeros((), device=loss.device)
        self._descend(views, gradient, bad, updated)
        self.staging.finish()
        return loss, bad, updated

    def _draw(self, step: int) -> Views:
        """Boxes and noise counters of all views, (views, images, ...). They are small, so drawing them on the host is faster."""
        count, backbone = self.images.num_images, self.backbone
        views = draw_views(
            torch.arange(self.objective.views * count),
            (self.images.size, self.images.size),
            backbone.input_size,
            backbone.mean,
            backbone.std,
            seed=self.seed,
            step=step,
            augmentation=self.augmentation,
        )
        return replace(
            views,
            boxes=views.boxes.to(backbone.device, non_blocking=True).view(-1, count, 4),
            noise_items=views.noise_items.to(backbone.device, non_blocking=True).view(-1, count),
        )

    def _features(self, views: Views) -> Tensor:
        """Features (views * images, D) as a leaf tensor; ``graph`` keeps the last micro-batch with its graph."""
        count = self.images.num_images
        features, begin = None, 0
        while begin < count:
            end = self._end(begin, count)
            try:
                part = self._forward(views, begin, end, keep=end == count)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                part = None
            if part is None:  # outside of the handler, whose traceback keeps tensors alive
                self._back_off()
                continue
            if end == count:
                self.graph = part
            block = part.features.detach().view(len(views.boxes), end - begin, -1)
            if features is None:
                features = block if end - begin == count else block.new_empty(len(block), count, block.shape[-1])
            if features is not block:
                features[:, begin:end] = block
            begin = end
        assert features is not None
        return features.flatten(0, 1).requires_grad_()

    def _loss(self, features: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The loss and its gradient to the features; releases the kept graph if memory runs out."""
        while True:
            try:
                loss = self.objective.loss(features, self.labels, step)
                if self.one is None or self.one.dtype != loss.dtype:
                    self.one = torch.ones_like(loss)
                return loss.detach(), torch.autograd.grad(loss, features, self.one)[0]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.graph is None:
                    raise
            self.graph = None

    def _descend(self, views: Views, gradient: Tensor, bad: Tensor, updated: Tensor) -> None:
        """Update all images, those of the kept graph first. ``bad`` () becomes 1 if a gradient isn't finite, ``updated`` () if an image was updated."""
        count = self.images.num_images
        gradient = gradient.view(len(views.boxes), count, -1)
        begin, stop, parts = 0, count, 0
        while begin < stop:
            held, self.graph = self.graph, None  # only the first iteration may have one
            first, last = (held.begin, held.end) if held else (begin, self._end(begin, stop))
            done = False
            try:
                self._update(views, gradient, held, first, last, bad)
                done = True
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            was_held, held = held is not None, None
            if not done:
                self._back_off(torn=parts > 0)
                continue
            parts += 1
            torch.maximum(updated, 1 - bad, out=updated)
            if was_held:
                stop = first
            else:
                begin = last

    def _end(self, begin: int, stop: int) -> int:
        """The end of the micro-batch that starts at ``begin``."""
        return min(begin + self.micro_batch, stop)

    def _forward(self, views: Views, begin: int, end: int, keep: bool) -> MicroBatch:
        """Views and features of images [begin, end), with a graph if ``keep``."""
        count, state = self.images.num_images, self.optimiser.state[:1]
        (pyramid,) = self.staging.fetch(state, begin, end)
        if end < count:
            self.staging.prefetch(state, end, self._end(end, count))
        return self._run(pyramid, views, begin, end, keep)

    def _run(self, pyramid: Tensor, views: Views, begin: int, end: int, keep: bool) -> MicroBatch:
        levels, chosen = self.images.split(pyramid), _select(views, begin, end)
        shown = render_augment(levels, self.images.size, chosen, dtype=self.backbone.dtype)
        with torch.set_grad_enabled(keep):
            return MicroBatch(begin, end, shown, self.backbone(shown.requires_grad_(keep)))

    def _update(
        self, views: Views, gradient: Tensor, held: MicroBatch | None, first: int, last: int, bad: Tensor
    ) -> None:
        """Backward pass and Adam update of images [first, last)."""
        state = self.optimiser.state
        block = self.staging.fetch(state, first, last)
        following, stop = (0, first) if held else (last, self.images.num_images)
        if following < stop:
            self.staging.prefetch(state, following, self._end(following, stop))
        graph = held or self._run(block[0], views, first, last, keep=True)
        shown, part = graph.shown, gradient[:, first:last].flatten(0, 1)
        if self.objective.backbone_gradients:
            torch.autograd.backward(graph.features, part)
            assert shown.grad is not None
            of_views = shown.grad
        else:
            (of_views,) = torch.autograd.grad(graph.features, shown, part)
        levels, chosen = self.images.split(block[0]), _select(views, first, last)
        flat = render_augment_backward(of_views, levels, self.images.size, chosen)
        # Adam squares the gradient, which must not overflow; nan fails the comparison too.
        torch.maximum(bad, (~(torch.linalg.vector_norm(flat, torch.inf) < LARGEST)).float(), out=bad)
        self.optimiser.update(block, flat, bad)
        self.staging.store(state, first, last, block)

    def _back_off(self, torn: bool = False) -> None:
        if self.backbone.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.micro_batch == 1:
            raise StepFailed(
                "out of memory with a single image per micro-batch: use fewer views, --state host, --grad-checkpointing, a smaller "
                "backbone or a device with more memory",
                torn,
            )
        self.micro_batch //= 2


def _select(views: Views, begin: int, end: int) -> Views:
    """The views of images [begin, end), ordered by view."""
    return replace(
        views, boxes=views.boxes[:, begin:end].flatten(0, 1), noise_items=views.noise_items[:, begin:end].flatten(0, 1)
    )
