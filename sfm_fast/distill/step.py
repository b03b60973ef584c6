"""One distillation step, for any objective: views, features, loss, and back to the pixels, some images at a time.

All losses depend on the images through the features alone. So a step of several micro-batches takes (1) the features of all
images without a graph, (2) the loss and its gradient to the features, (3) each micro-batch's views again, the same to the bit,
and their way back with its slice of that gradient: the gradient of the one-shot step, with the activations of one micro-batch.
The last micro-batch of (1) keeps its graph and comes first in (3); a single one is the one-shot step.
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

LARGEST = 1e18  # of a gradient's entries: their squares must fit into float32


class StepFailed(InputError):  # noqa: N818 (says what happened)
    """The step could not be finished. ``torn``: some images were updated before that was known."""

    def __init__(self, message: str, torn: bool) -> None:
        super().__init__(message)
        self.torn = torn


@dataclass
class MicroBatch:
    """A micro-batch on its way: images [begin, end), their views and the features that remember how they came about."""

    begin: int
    end: int
    shown: Tensor
    features: Tensor


class DistillationStep:
    """Steps of one run: ``step(number)`` updates the optimiser's images in place.

    labels: (num_images,) int64. micro_batch: images a micro-batch, all views of an image in the same one; halved for good when
    the device runs out of memory, without losing the step. staging: where the blocks of images come from.
    The same images, seed, step and micro-batch give the same update bit for bit (on a GPU: up to the backbone's determinism).
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
        self.graph: MicroBatch | None = None  # the last one, between its forward and its backward
        self.one: Tensor | None = None  # the loss's own gradient, kept: autograd would fill a new one at every step

    def __call__(self, step: int) -> Tensor:
        """Step ``step`` (0-based); the detached loss, on the device. Raises ``StepFailed`` where it isn't finite."""
        loss, bad, updated = self.compute(step)
        if bad:
            what, torn = "gradient" if loss.isfinite() else "loss", bool(updated)
            undone = "some images were updated, go back to a checkpoint" if torn else "nothing was updated"
            raise StepFailed(
                f"the {what} became nan or infinite at step {step}: {undone}; try a smaller lr or precision fp32", torn
            )
        self.optimiser.steps += 1
        return loss

    def compute(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Everything that doesn't wait for the device: loss, whether something was not finite, whether anything was updated; all ()."""
        with self._gradients_of_backbone():
            return self._compute(step)

    @contextlib.contextmanager
    def _gradients_of_backbone(self) -> Iterator[None]:
        """The model's parameters require gradients for as long as a step of an objective that wants theirs; else they stay frozen."""
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
                "out of memory before any image was updated: for the loss, or for LGM's real images, there is no micro-batch",
                False,
            ) from error
        bad, updated = (~loss.isfinite()).float(), torch.zeros((), device=loss.device)
        self._descend(views, gradient, bad, updated)
        self.staging.finish()
        return loss, bad, updated

    def _draw(self, step: int) -> Views:
        """Boxes and noise counters of all views, (views, images, ...). Small, so drawn on the host, where that is faster."""
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
        """Features (views * images, D) as a leaf; the last micro-batch leaves its graph."""
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
            if part is None:  # outside of the handler, whose traceback holds on to tensors
                self._back_off()
                continue
            if end == count:
                self.graph = part
            found = part.features.detach().view(len(views.boxes), end - begin, -1)
            if features is None:
                features = found if end - begin == count else found.new_empty(len(found), count, found.shape[-1])
            if features is not found:
                features[:, begin:end] = found
            begin = end
        assert features is not None
        return features.flatten(0, 1).requires_grad_()

    def _loss(self, features: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Loss and its gradient to the features; gives the graph up where there is no room for both."""
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
        """Update all images, those of the graph first. ``bad`` () becomes 1 where that must stop, ``updated`` () where any was."""
        count = self.images.num_images
        gradient = gradient.view(len(views.boxes), count, -1)
        begin, stop, parts = 0, count, 0
        while begin < stop:
            held, self.graph = self.graph, None  # only the first time round is there one
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
        """Where the micro-batch from ``begin`` on ends."""
        return min(begin + self.micro_batch, stop)

    def _forward(self, views: Views, begin: int, end: int, keep: bool) -> MicroBatch:
        """Views and features of images [begin, end)."""
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
        """Backward and Adam of images [first, last)."""
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
            found = shown.grad
        else:
            (found,) = torch.autograd.grad(graph.features, shown, part)
        levels, chosen = self.images.split(block[0]), _select(views, first, last)
        flat = render_augment_backward(found, levels, self.images.size, chosen)
        # Adam squares it; nan fails the comparison too.
        torch.maximum(bad, (~(torch.linalg.vector_norm(flat, torch.inf) < LARGEST)).float(), out=bad)
        self.optimiser.update(block, flat, bad)
        self.staging.store(state, first, last, block)

    def _back_off(self, torn: bool = False) -> None:
        if self.backbone.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.micro_batch == 1:
            raise StepFailed(
                "out of memory with a single image a micro-batch: take fewer views, --state host, --grad-checkpointing, a smaller "
                "backbone or a larger device",
                torn,
            )
        self.micro_batch //= 2


def _select(views: Views, begin: int, end: int) -> Views:
    """Those of images [begin, end), view after view."""
    return replace(
        views, boxes=views.boxes[:, begin:end].flatten(0, 1), noise_items=views.noise_items[:, begin:end].flatten(0, 1)
    )
