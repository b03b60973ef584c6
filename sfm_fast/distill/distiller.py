"""The Distiller: the state of a distillation run, and its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..files import Metadata
from ..synthetic import SyntheticSet
from .average import IterateAverage
from .checkpoint import Progress, load_checkpoint, save_checkpoint
from .config import DistillConfig, Execution
from .images import SyntheticImages, class_labels
from .members import Member, image_size
from .optimiser import PyramidAdam
from .plan import choose_micro_batch
from .run import Every, Run
from .run_folder import open_run_folder
from .staging import FromHost, InPlace
from .step import DistillationStep


class Distiller:
    """Distils synthetic images by repeating a `DistillationStep`.

    Args:
        config: options of the run.
        members: the frozen backbones, of which there is usually one, and the losses on their features (`sfm_fast.distill.objectives`).
        class_names: C names; each class has ``config.ipc`` images, one after the other.
        channels: of the synthetic images, 1 or 3.
        provenance: identifies the other inputs of the run (centres or data); checked when the run is resumed.
        execution: micro-batch size and where the state is stored.
        start: called before the first step, gives the pictures (C * ipc, channels, size, size) in 0..1 that the images start from; None: noise.
    """

    def __init__(
        self,
        config: DistillConfig,
        members: Sequence[Member],
        class_names: list[str],
        channels: int,
        provenance: Metadata | None = None,
        execution: Execution = Execution(),
        start: Callable[[], Tensor] | None = None,
    ) -> None:
        self.execution = execution
        self.config, self.members, self.class_names = config, tuple(members), class_names
        self.backbones = tuple(member.backbone for member in members)
        # Most runs have one backbone, and others are of the same kind.
        self.backbone, self.objective = members[0].backbone, members[0].objective
        self.provenance = {
            "backbone": [one.fingerprint for one in self.backbones],
            "precision": [one.precision for one in self.backbones],
            "prepared": [one.prepared for one in self.backbones],
            **(provenance or {}),
        }
        classes = len(class_names)
        device = self.backbone.device
        self.labels = class_labels(classes, config.ipc, device)
        host = execution.state == "host"
        self.images = SyntheticImages(
            len(self.labels),
            channels,
            image_size(config, self.backbones),
            parametrization=config.parametrization,
            seed=config.seed,
            device="cpu" if host else device,
            pinned=host and device.type == "cuda",
        )
        self.schedule = config.schedule(len(self.images.sizes))
        self.optimiser = PyramidAdam(self.images, self.schedule.lr)
        self.average = IterateAverage(config.average_last or 0.0)
        self.staging = FromHost(device) if host else InPlace()
        self.steps_done, self._start = 0, start
        self._stepper: DistillationStep | None = None

    @property
    def micro_batch(self) -> int:
        """Number of images whose activations are in memory at a time."""
        return self._step.micro_batch

    @property
    def _step(self) -> DistillationStep:
        if self._stepper is None:
            asked = self.execution.micro_batch
            self._stepper = self._make_step(
                choose_micro_batch(
                    self.config, self.backbones, len(self.class_names), self.images.channels, self.execution
                )
                if asked == "auto"
                else int(asked)
            )
        return self._stepper

    def _make_step(self, micro_batch: int) -> DistillationStep:
        return DistillationStep(
            self.labels,
            self.members,
            self.optimiser,
            augmentation=self.config.augmentation,
            seed=self.config.seed,
            micro_batch=micro_batch,
            staging=self.staging,
            images_per_term=self.config.images_per_term,
        )

    def grow_fully(self) -> None:
        """Make all pyramid levels live, as they are in most of a run, to measure such a step; the images stay noise."""
        self._start = None
        while not self.images.fully_grown:
            self.images.grow()
        self.optimiser.restart()

    def step(self) -> Tensor:
        """One step, before which real images are taken as the start, or a pyramid level is added, when that is due. Returns the loss as a tensor on the device."""
        if self._start is not None and self.steps_done == 0:
            self.images.start_from(self._start())
            self.optimiser.restart()
            self._start = None
        due = min(1 + self.steps_done // self.schedule.grow_every, len(self.images.sizes))
        if self.images.live < due:
            self.images.grow()
            self.optimiser.restart()
        loss = self._step(self.steps_done)
        self.steps_done += 1
        self.average.add(self.images.pyramid.data, self.steps_done)
        return loss

    @torch.no_grad()
    def result(self) -> SyntheticSet:
        """The current images, or with ``config.average_last`` their mean over the last steps."""
        metadata = {
            "config": self.config.to_dict(),
            "provenance": self.provenance,
            "backbones": [one.describe() for one in self.backbones],
            "steps_done": self.steps_done,
            "schedule": self.schedule._asdict(),
        }
        return SyntheticSet(self.images.pictures(self.average.mean), self.labels.cpu(), self.class_names, metadata)

    def run(
        self,
        folder: str | Path,
        *,
        resume: bool = False,
        overwrite: bool = False,
        checkpoint_every: int = Every.checkpoint_every,
        grid_every: int = Every.grid_every,
        log_every: int = Every.log_every,
        progress: bool = True,
        on_step: Callable[[int], None] | None = None,
    ) -> Metadata:
        """Run to ``config.steps`` and write the results into ``folder``; returns the summary, which summary.json holds too.

        Writes log.jsonl, TensorBoard events if that package is installed, grids/, checkpoint.safetensors and, at the end,
        synthetic.safetensors and images/. If the folder holds a run, ``resume`` continues it, ``overwrite`` replaces it, and without
        either it is an error; other files in it are always an error. SIGINT, SIGTERM and SIGUSR1 save the state and raise `Interrupted`.
        """
        every = Every(checkpoint_every=checkpoint_every, grid_every=grid_every, log_every=log_every)
        with open_run_folder(folder, resume=resume, overwrite=overwrite) as place:
            return Run(self, place, every, progress, on_step).complete(resume)

    def save(self, path: Path) -> None:
        """Write a checkpoint of the run."""
        done = Progress(self.steps_done, self.micro_batch, self.schedule, self.execution.micro_batch)
        save_checkpoint(path, self.images, self.optimiser, self.average, self.config, self.provenance, done)

    def restore(self, path: Path) -> None:
        """Continue from the checkpoint at ``path``; raises ``InputError`` if it is damaged, has other options or more than ``config.steps`` steps."""
        done = load_checkpoint(path, self.images, self.optimiser, self.average, self.config, self.provenance)
        self.steps_done = done.steps
        # The run's own, which ``config`` determines if it says them, but which would follow a new number of steps otherwise.
        self.schedule, self.optimiser.lr = done.schedule, done.schedule.lr
        # Another micro-batch size would round differently; the checkpoint's may have been halved since the run began.
        if self.execution.micro_batch in ("auto", done.asked):
            self._stepper = self._make_step(done.micro_batch)
        if self.steps_done > self.config.steps:
            raise InputError(
                f"{path.parent}: the run has done {self.steps_done} steps already, more than steps={self.config.steps}"
            )
