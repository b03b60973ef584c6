"""One distillation step for any objective, from views through features and loss to the update of the images, in micro-batches.

All losses depend on the images only through the features. So a step with several micro-batches computes (1) the features of all
images without a graph, (2) the loss and its gradient to the features, (3) for each micro-batch the same views again, bit for bit,
and their backward pass with its slice of that gradient. This is the gradient of the one-shot step, with the activations of one
micro-batch. The last micro-batch of (1) keeps its graph and comes first in (3), so one with all images is the one-shot step.

A separable loss is a mean over terms, each of its own images' features: classes, or single images at cluster level. Then the three
stages run group by group, a group being as many whole terms as a micro-batch holds: nothing runs twice, and no features of all images
are in memory. A term larger than a micro-batch is a group of its own, with two passes over its micro-batches.

With several backbones the loss is the sum of theirs, and so is the gradient to the images: the backbones take turns within each group,
so that the activations of one of them are in memory at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import InputError
from ..measure.memory import is_out_of_memory
from ..ops.render_augment import render_augment, render_augment_backward
from ..views import Augmentation, Views, draw_views
from .members import Member
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
    block: tuple[
        Tensor, ...
    ]  # the pyramids, and with the last backbone's graph Adam's moments too, which are needed next


@dataclass
class Backward:
    """A backbone's backward pass of a group that is still to come: its ``views``, and the ``gradient`` (views, images, D) of its features."""

    member: Member
    views: Views
    gradient: Tensor


class DistillationStep:
    """Steps of one run: ``step(number)`` updates the optimiser's images in place.

    labels: (num_images,) int64. members: the backbones, all on one device, and the losses on their features. micro_batch: images per micro-batch, each with all its views; halved permanently when the device
    runs out of memory, without losing the step. staging: provides the blocks of images. images_per_term: number of successive images
    in each term of a separable objective's loss.
    The same images, seed, step and micro-batch size give the same update bit for bit (on a GPU if the backbone is deterministic).
    """

    def __init__(
        self,
        labels: Tensor,
        members: Sequence[Member],
        optimiser: PyramidAdam,
        *,
        augmentation: Augmentation,
        seed: int,
        micro_batch: int,
        staging: InPlace | None = None,
        images_per_term: int = 1,
    ) -> None:
        self.images, self.members, self.optimiser = optimiser.images, tuple(members), optimiser
        self.device, self.views = members[0].backbone.device, members[0].objective.views
        self.separable = all(member.objective.separable for member in members)
        count = self.images.num_images
        self.labels = labels
        self.augmentation, self.seed = augmentation, seed
        self.micro_batch = min(micro_batch, count)
        self.images_per_term = images_per_term if self.separable else count
        self.group = (0, count)  # the images whose gradients are computed together
        self.staging = staging or InPlace()
        self.graph: MicroBatch | None = (
            None  # the micro-batch whose graph is kept, between its forward and its backward pass
        )
        # Made once, because every step needs them: the labels of a group's views, and the share of its terms in the loss.
        self._labels: dict[tuple[int, int], Tensor] = {}
        self._shares: dict[tuple[float, torch.dtype], Tensor] = {}

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
        models = [one.backbone.model for one in self.members if one.objective.backbone_gradients]
        for model in models:
            model.requires_grad_(True)
        try:
            yield
        finally:
            for model in models:
                model.requires_grad_(False)
                model.zero_grad(set_to_none=True)

    def _compute(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        self.graph, self.group = None, (0, 0)
        count = self.images.num_images
        bad, updated = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        views, losses = None, []
        while self.group[1] < count:
            self.group = self.group[1], self._group_end(self.group[1])
            try:
                if views is None:
                    for member in self.members:
                        member.objective.prepare(step)
                    views = [self._draw(member, step) for member in self.members]
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

    def _run_group(self, views: Sequence[Views], step: int, bad: Tensor, updated: Tensor) -> Tensor:
        """Loss and update of the group's images; returns their share of the loss. ``views``: of each backbone."""
        losses, to_come = [], []
        summed: Tensor | None = None  # of the backbones that went back
        for member, seen in zip(self.members, views, strict=True):
            loss, gradient = self._loss(member, self._features(member, seen), step)
            torch.maximum(bad, (~loss.isfinite()).float(), out=bad)
            losses.append(loss)
            backward = Backward(member, seen, gradient.view(len(seen.boxes), -1, gradient.shape[-1]))
            # Before the next backbone goes forward. The last one goes back micro-batch by micro-batch, with the updates.
            part = None if member is self.members[-1] else self._back_at_once(backward)
            if part is None:
                to_come.append(backward)
            else:
                summed = part if summed is None else summed.add_(part)
        self._descend(to_come, summed, bad, updated)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _back_at_once(self, backward: Backward) -> Tensor | None:
        """The gradient of the group's pyramids if the kept graph is of the whole group; None if there is none or memory runs out."""
        held, self.graph = self.graph, None
        if held is None:
            return None
        try:
            return self._back(backward, held)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        held = None
        self._back_off(torn=self.group[0] > 0)
        return None

    def _group_end(self, begin: int) -> int:
        """The end of the group that starts at ``begin``: as many whole terms as fit into a micro-batch, but at least one."""
        term = self.images_per_term
        return min(begin + max(term, self.micro_batch // term * term), self.images.num_images)

    def _draw(self, member: Member, step: int) -> Views:
        """Boxes and noise counters of all views, (views, images, ...). They are small, so drawing them on the host is faster.

        All backbones see the same crops, each at its own input size.
        """
        count, backbone = self.images.num_images, member.backbone
        views = draw_views(
            torch.arange(self.views * count),
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
            boxes=views.boxes.to(self.device, non_blocking=True).view(-1, count, 4),
            noise_items=views.noise_items.to(self.device, non_blocking=True).view(-1, count),
        )

    def _features(self, member: Member, views: Views) -> Tensor:
        """Features (views * images, D) of the group as a leaf tensor; ``graph`` keeps the last micro-batch if that `_keeps` its graph."""
        start, stop = self.group
        features, begin = None, start
        while begin < stop:
            end = self._end(begin, stop)
            try:
                part = self._forward(member, views, begin, end)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                part = None
            if part is None:  # outside of the handler, whose traceback keeps tensors alive
                self._back_off(torn=start > 0)
                continue
            if self._keeps(member, begin, end):
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

    def _keeps(self, member: Member, begin: int, end: int) -> bool:
        """Whether the graph of images [begin, end) is kept: of the group's last ones if they go back next, or of all that one goes back with."""
        start, stop = self.group
        return end == stop and (member is self.members[-1] or begin == start)

    def _loss(self, member: Member, features: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The share of the group's terms in the loss, and its gradient to their features; releases the kept graph if memory runs out."""
        start, stop = self.group
        if self.group not in self._labels:
            if len(self._labels) > 2 * self.images.num_images // (stop - start):  # of larger micro-batches
                self._labels.clear()
            self._labels[self.group] = self.labels[start:stop].repeat(self.views)
        labels, term, objective = self._labels[self.group], self.images_per_term, member.objective
        while True:
            try:
                if self.separable:
                    loss = objective.terms(features, labels, step, range(start // term, stop // term))
                else:
                    loss = objective.loss(features, labels, step)
                share = self._share(member.weight * (stop - start) / self.images.num_images, loss)
                return loss.detach() * share, torch.autograd.grad(loss, features, share)[0]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.graph is None:
                    raise
            self.graph = None

    def _share(self, share: float, loss: Tensor) -> Tensor:
        key = share, loss.dtype
        if key not in self._shares:
            self._shares[key] = torch.full_like(loss, share, requires_grad=False)
        return self._shares[key]

    def _descend(self, to_come: Sequence[Backward], summed: Tensor | None, bad: Tensor, updated: Tensor) -> None:
        """Update the group's images, those of the kept graph first. ``bad`` () becomes 1 if a gradient isn't finite, ``updated`` () if an image was updated.

        ``summed``: gradient of the group's pyramids by the other backbones, if there are any.
        """
        start, end = self.group
        begin, stop, parts = start, end, 0
        while begin < stop:
            held, self.graph = self.graph, None  # only the first iteration may have one
            first, last = (held.begin, held.end) if held else (begin, self._end(begin, stop))
            done = False
            try:
                done_before = None if summed is None else summed[first - start : last - start]
                self._update(to_come, done_before, held, first, last, bad)
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

    def _forward(self, member: Member, views: Views, begin: int, end: int) -> MicroBatch:
        """Views and features of images [begin, end) of the group, with a graph if it is kept."""
        block = self.staging.fetch(self._state(member, end), begin, end)
        if end < self.group[1]:
            following = self._end(end, self.group[1])
            self.staging.prefetch(self._state(member, following), end, following)
        return self._run(member, block, views, begin, end, self._keeps(member, begin, end))

    def _state(self, member: Member, end: int) -> Sequence[Tensor]:
        """The pyramids, and with the group's last images on the last backbone Adam's moments too: the update follows."""
        whole = end == self.group[1] and member is self.members[-1]
        return self.optimiser.state if whole else self.optimiser.state[:1]

    def _run(
        self, member: Member, block: tuple[Tensor, ...], views: Views, begin: int, end: int, keep: bool
    ) -> MicroBatch:
        levels, chosen = self.images.split(block[0]), _select(views, begin, end)
        shown = render_augment(levels, self.images.size, chosen, dtype=member.backbone.dtype)
        with torch.set_grad_enabled(keep):
            return MicroBatch(begin, end, shown, member.backbone(shown.requires_grad_(keep)), block)

    def _update(
        self,
        to_come: Sequence[Backward],
        summed: Tensor | None,
        held: MicroBatch | None,
        first: int,
        last: int,
        bad: Tensor,
    ) -> None:
        """Backward passes and Adam update of images [first, last); ``summed``: gradient of their pyramids by the other backbones."""
        state = self.optimiser.state
        block = held.block if held else self.staging.fetch(state, first, last)
        self._prefetch_after(held, first, last)
        for backward in reversed(to_come):  # the last backbone, whose graph is kept, first
            graph = held or self._run(backward.member, block, backward.views, first, last, keep=True)
            held = None
            part = self._back(backward, graph)
            # Into the new tensor, because the other one is needed again if memory runs out.
            summed = part if summed is None else part.add_(summed)
        assert summed is not None
        # Adam squares the gradient, which must not overflow; nan fails the comparison too.
        torch.maximum(bad, (~(torch.linalg.vector_norm(summed, torch.inf) < LARGEST)).float(), out=bad)
        self.optimiser.update(block, summed, bad)
        self.staging.store(state, first, last, block)

    def _back(self, backward: Backward, graph: MicroBatch) -> Tensor:
        """The gradient of the pyramids of the graph's images, from that of their features."""
        start, first, last = self.group[0], graph.begin, graph.end
        part = backward.gradient[:, first - start : last - start].flatten(0, 1)
        if backward.member.objective.backbone_gradients:
            torch.autograd.backward(graph.features, part)
            assert graph.shown.grad is not None
            of_views = graph.shown.grad
        else:
            (of_views,) = torch.autograd.grad(graph.features, graph.shown, part)
        levels, chosen = self.images.split(graph.block[0]), _select(backward.views, first, last)
        return render_augment_backward(of_views, levels, self.images.size, chosen)

    def _prefetch_after(self, held: MicroBatch | None, first: int, last: int) -> None:
        """Let the copies for the micro-batch after [first, last) begin: the next to be updated, or the next group's first."""
        start, end = self.group
        following, stop = (start, first) if held else (last, end)
        if following < stop:
            self.staging.prefetch(self.optimiser.state, following, self._end(following, stop))
        elif end < self.images.num_images:
            stop = self._group_end(end)
            following = self._end(end, stop)
            whole = following == stop and len(self.members) == 1
            self.staging.prefetch(self.optimiser.state[: None if whole else 1], end, following)

    def _back_off(self, torn: bool) -> None:
        if self.device.type == "cuda":
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
