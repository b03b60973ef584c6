"""One distillation step for any objective, from views through features and loss to the update of the images, in micro-batches.

All losses depend on the images only through the features. So a step with several micro-batches computes (1) the features of all
images without a graph, (2) the loss and its gradient to the features, (3) for each micro-batch the same views again, bit for bit,
and their backward pass with its slice of that gradient. This is the gradient of the one-shot step, with the activations of one
micro-batch. The last micro-batch of (1) keeps its graph and comes first in (3), so one with all images is the one-shot step.

A separable loss is a mean over terms, each of its own images' features: classes, or single images at cluster level. Then the three
stages run group by group, a group being as many whole terms as a micro-batch holds: nothing runs twice, and no features of all images
are in memory. A term larger than a micro-batch is a group of its own, with two passes over its micro-batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
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
    block: tuple[Tensor, ...]  # the pyramids, and with a graph Adam's moments too, which are needed next


class DistillationStep:
    """Steps of one run: ``step(number)`` updates the optimiser's images in place.

    labels: (num_images,) int64. micro_batch: images per micro-batch, each with all its views; halved permanently when the device
    runs out of memory, without losing the step. staging: provides the blocks of images. images_per_term: number of successive images
    in each term of a separable objective's loss.
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
        images_per_term: int = 1,
    ) -> None:
        self.images, self.objective, self.backbone, self.optimiser = optimiser.images, objective, backbone, optimiser
        count = self.images.num_images
        self.labels = labels
        self.augmentation, self.seed = augmentation, seed
        self.micro_batch = min(micro_batch, count)
        self.images_per_term = images_per_term if objective.separable else count
        self.group = (0, count)  # the images whose gradients are computed together
        self.staging = staging or InPlace()
        self.graph: MicroBatch | None = (
            None  # the micro-batch whose graph is kept, between its forward and its backward pass
        )
        # Made once, because every step needs them: the labels of a group's views, and the share of its terms in the loss.
        self._labels: dict[tuple[int, int], Tensor] = {}
        self._shares: dict[tuple[int, torch.dtype], Tensor] = {}

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
        self.graph, self.group = None, (0, 0)
        device, count = self.backbone.device, self.images.num_images
        bad, updated = torch.zeros((), device=device), torch.zeros((), device=device)
        views, losses = None, []
        while self.group[1] < count:
            self.group = self.group[1], self._group_end(self.group[1])
            try:
                if views is None:
                    self.objective.prepare(step)
                    views = self._draw(step)
                losses.append(self._run_group(views, step, bad, updated))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                torn = self.group[0] > 0
                raise StepFailed(
                    f"out of memory {'after some images were updated' if torn else 'before any image was updated'}: the loss, and "
                    "LGM's real images, can't be split into micro-batches",
                    torn,
                ) from error
        self.staging.finish()
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum(), bad, updated

    def _run_group(self, views: Views, step: int, bad: Tensor, updated: Tensor) -> Tensor:
        """Loss and update of the group's images; returns their share of the loss."""
        loss, gradient = self._loss(self._features(views), step)
        torch.maximum(bad, (~loss.isfinite()).float(), out=bad)
        self._descend(views, gradient, bad, updated)
        return loss

    def _group_end(self, begin: int) -> int:
        """The end of the group that starts at ``begin``: as many whole terms as fit into a micro-batch, but at least one."""
        term = self.images_per_term
        return min(begin + max(term, self.micro_batch // term * term), self.images.num_images)

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
        """Features (views * images, D) of the group as a leaf tensor; ``graph`` keeps the last micro-batch with its graph."""
        start, stop = self.group
        features, begin = None, start
        while begin < stop:
            end = self._end(begin, stop)
            try:
                part = self._forward(views, begin, end)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                part = None
            if part is None:  # outside of the handler, whose traceback keeps tensors alive
                self._back_off(torn=start > 0)
                continue
            if end == stop:
                self.graph = part
            block = part.features.detach().view(len(views.boxes), end - begin, -1)
            if features is None:
                features = (
                    block if (begin, end) == self.group else block.new_empty(len(block), stop - start, block.shape[-1])
                )
            if features is not block:
                features[:, begin - start : end - start] = block
            begin = end
        assert features is not None
        return features.flatten(0, 1).requires_grad_()

    def _loss(self, features: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The share of the group's terms in the loss, and its gradient to their features; releases the kept graph if memory runs out."""
        start, stop = self.group
        if self.group not in self._labels:
            if len(self._labels) > 2 * self.images.num_images // (stop - start):  # of larger micro-batches
                self._labels.clear()
            self._labels[self.group] = self.labels[start:stop].repeat(self.objective.views)
        labels, term = self._labels[self.group], self.images_per_term
        while True:
            try:
                if self.objective.separable:
                    loss = self.objective.terms(features, labels, step, range(start // term, stop // term))
                else:
                    loss = self.objective.loss(features, labels, step)
                share = self._share(stop - start, loss)
                return loss.detach() * share, torch.autograd.grad(loss, features, share)[0]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.graph is None:
                    raise
            self.graph = None

    def _share(self, images: int, loss: Tensor) -> Tensor:
        key = images, loss.dtype
        if key not in self._shares:
            self._shares[key] = torch.full_like(loss, images / self.images.num_images, requires_grad=False)
        return self._shares[key]

    def _descend(self, views: Views, gradient: Tensor, bad: Tensor, updated: Tensor) -> None:
        """Update the group's images, those of the kept graph first. ``bad`` () becomes 1 if a gradient isn't finite, ``updated`` () if an image was updated."""
        start, end = self.group
        gradient = gradient.view(len(views.boxes), end - start, -1)
        begin, stop, parts = start, end, 0
        while begin < stop:
            held, self.graph = self.graph, None  # only the first iteration may have one
            first, last = (held.begin, held.end) if held else (begin, self._end(begin, stop))
            done = False
            try:
                self._update(views, gradient[:, first - start : last - start], held, first, last, bad)
                done = True
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            was_held, held = held is not None, None
            if not done:
                self._back_off(torn=parts > 0 or start > 0)
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

    def _forward(self, views: Views, begin: int, end: int) -> MicroBatch:
        """Views and features of images [begin, end) of the group, with a graph if they are its last ones."""
        stop, keep = self.group[1], end == self.group[1]
        block = self.staging.fetch(self._state(keep), begin, end)
        if not keep:
            following = self._end(end, stop)
            self.staging.prefetch(self._state(following == stop), end, following)
        return self._run(block, views, begin, end, keep)

    def _state(self, whole: bool) -> Sequence[Tensor]:
        """The pyramids and Adam's moments, or the pyramids alone for a forward pass without a graph."""
        return self.optimiser.state if whole else self.optimiser.state[:1]

    def _run(self, block: tuple[Tensor, ...], views: Views, begin: int, end: int, keep: bool) -> MicroBatch:
        levels, chosen = self.images.split(block[0]), _select(views, begin, end)
        shown = render_augment(levels, self.images.size, chosen, dtype=self.backbone.dtype)
        with torch.set_grad_enabled(keep):
            return MicroBatch(begin, end, shown, self.backbone(shown.requires_grad_(keep)), block)

    def _update(
        self, views: Views, gradient: Tensor, held: MicroBatch | None, first: int, last: int, bad: Tensor
    ) -> None:
        """Backward pass and Adam update of images [first, last) from the ``gradient`` of their features."""
        state = self.optimiser.state
        block = held.block if held else self.staging.fetch(state, first, last)
        self._prefetch_after(held, first, last)
        graph = held or self._run(block, views, first, last, keep=True)
        shown, part = graph.shown, gradient.flatten(0, 1)
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

    def _prefetch_after(self, held: MicroBatch | None, first: int, last: int) -> None:
        """Let the copies for the micro-batch after [first, last) begin: the next to be updated, or the next group's first."""
        start, end = self.group
        following, stop = (start, first) if held else (last, end)
        if following < stop:
            self.staging.prefetch(self.optimiser.state, following, self._end(following, stop))
        elif end < self.images.num_images:
            stop = self._group_end(end)
            following = self._end(end, stop)
            self.staging.prefetch(self._state(following == stop), end, following)

    def _back_off(self, torn: bool) -> None:
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
