"""The Distiller: the loop around the step, with progress, logs, picture grids, checkpoints and signals."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbones.backbone import Backbone
from ..errors import InputError
from ..files import check_free_space, locked_folder, write_json
from ..measure.memory import free_memory
from ..synthetic import SyntheticSet, save_grid, save_image_folder
from .average import IterateAverage
from .checkpoint import load_checkpoint, save_checkpoint
from .config import DistillConfig, Execution
from .images import SyntheticImages, floats_per_image
from .objectives import Objective
from .optimiser import PyramidAdam
from .plan import largest_micro_batch
from .predict import predict_step
from .progress import Reporter, Signals, peak_bytes
from .run_folder import CHECKPOINT, LOG, MARKER, RESULT, SUMMARY, check_intervals, check_run_folder, clear_run, cut_log
from .staging import FromHost, InPlace
from .step import DistillationStep, StepFailed


class Interrupted(Exception):  # noqa: N818 (no error: the run was asked to stop, and its state is saved)
    """A signal stopped the run after its state was saved; ``signum`` says which."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}; the state is saved, continue with --resume"
        )
        self.signum, self.step = signum, step


class Distiller:
    """Distils synthetic images by repeating a `DistillationStep`.

    Args:
        config: what to compute.
        backbone: frozen model.
        objective: the loss; see `sfm_fast.distill.objectives`.
        class_names: C names; there are ``config.ipc`` images of each, image i has label i mod C.
        channels: of the synthetic images, 1 or 3.
        provenance: what the run depends on besides config (backbone, centres, data); a resume checks it.
        execution: micro-batch and place of the state.
    """

    def __init__(
        self,
        config: DistillConfig,
        backbone: Backbone,
        objective: Objective,
        class_names: list[str],
        channels: int,
        provenance: dict[str, Any] | None = None,
        execution: Execution = Execution(),
    ) -> None:
        self.execution = execution
        self.config, self.backbone, self.objective, self.class_names = config, backbone, objective, class_names
        self.provenance = {"backbone": backbone.fingerprint, "precision": backbone.precision, **(provenance or {})}
        classes = len(class_names)
        self.labels = torch.arange(classes * config.ipc, device=backbone.device) % classes
        host = execution.state == "host"
        self.images = SyntheticImages(
            len(self.labels),
            channels,
            config.size or backbone.image_size,
            parametrization=config.parametrization,
            seed=config.seed,
            device="cpu" if host else backbone.device,
            pinned=host and backbone.device.type == "cuda",
        )
        self.optimiser = PyramidAdam(self.images, config.lr)
        self.average = IterateAverage(config.average_last, config.steps)
        self.staging = FromHost(backbone.device) if host else InPlace()
        self.steps_done = 0
        self._stepper: DistillationStep | None = None

    @property
    def micro_batch(self) -> int:
        """Images whose activations exist at once."""
        return self._step.micro_batch

    @property
    def _step(self) -> DistillationStep:
        if self._stepper is None:
            asked = self.execution.micro_batch
            self._stepper = self._make_step(self._largest() if asked == "auto" else int(asked))
        return self._stepper

    def _make_step(self, micro_batch: int) -> DistillationStep:
        return DistillationStep(
            self.images,
            self.labels,
            self.objective,
            self.backbone,
            self.optimiser,
            augmentation=self.config.augmentation,
            seed=self.config.seed,
            micro_batch=micro_batch,
            staging=self.staging,
        )

    def _largest(self) -> int:
        """The largest micro-batch that fits the budget with all levels live."""
        budget = self.execution.memory_budget

        def peak(micro_batch: int) -> int:
            return predict_step(
                self.config,
                self.backbone,
                len(self.class_names),
                self.images.channels,
                micro_batch,
                host_state=self.execution.state == "host",
                # Where the free memory was counted the model was there already; a budget is meant for everything.
                count_parameters=budget is not None,
            ).peak_bytes

        free = free_memory(self.backbone.device) if budget is None else budget
        try:
            found = largest_micro_batch(peak, self.images.num_images, free)
        except InputError:
            raise
        except Exception as error:  # of a model that can't run without values; memory may be plenty all the same
            warnings.warn(
                f"the memory of {self.backbone.name!r} can't be predicted ({type(error).__name__}): all images go into one "
                "micro-batch, which is halved when memory runs out; --micro-batch chooses another",
                RuntimeWarning,
                stacklevel=2,
            )
            return self.images.num_images
        if budget is not None and found == 1 and peak(1) > budget:
            raise InputError(
                f"memory_budget of {budget / 1e9:.3g} GB is too small: one image at a time is predicted to take {peak(1) / 1e9:.3g} GB"
            )
        return found

    def grow_fully(self) -> None:
        """Make all levels live at once: to measure a step as most of a run has it."""
        while not self.images.fully_grown:
            self.images.grow()
        self.optimiser.restart()

    def step(self) -> Tensor:
        """One step; adds a pyramid level first when one is due. Returns the loss as a tensor on the device."""
        due = min(1 + self.steps_done // self.config.grow_every, len(self.images.sizes))
        if self.images.live < due:
            self.images.grow()
            self.optimiser.restart()
        loss = self._step(self.steps_done)
        self.steps_done += 1
        self.average.add(self.images.pyramid.data, self.steps_done)
        return loss

    @torch.no_grad()
    def result(self) -> SyntheticSet:
        """The images as they are now, or the mean of the last ones where the configuration asks for it."""
        metadata = {
            "config": self.config.to_dict(),
            "provenance": self.provenance,
            "backbone": self.backbone.describe(),
            "steps_done": self.steps_done,
        }
        return SyntheticSet(self.images.pictures(self.average.mean), self.labels.cpu(), self.class_names, metadata)

    def run(
        self,
        folder: str | Path,
        *,
        resume: bool = False,
        overwrite: bool = False,
        checkpoint_every: int = 500,
        grid_every: int = 500,
        log_every: int = 10,
        progress: bool = True,
        on_step: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:
        """Run to ``config.steps`` and write everything into ``folder``; returns the summary, also in summary.json.

        Writes log.jsonl, TensorBoard events where that package is installed, grids/, checkpoint.safetensors and, at the end,
        synthetic.safetensors and images/. A folder that holds a run is continued with ``resume``, replaced with
        ``overwrite`` and otherwise an error; one that holds anything else is always an error. SIGINT, SIGTERM and SIGUSR1 save the state and raise `Interrupted`.
        """
        check_intervals(checkpoint_every=checkpoint_every, grid_every=grid_every, log_every=log_every)
        check_run_folder(folder, resume=resume, overwrite=overwrite)
        with locked_folder(folder) as place:
            check_run_folder(folder, resume=resume, overwrite=overwrite)
            check_free_space(place, self._bytes_to_write())
            started, first, begun = time.perf_counter(), self.steps_done, None
            if resume:
                self._continue(place)
                first = self.steps_done
            else:
                # An earlier run is replaced only once this one has shown that it can make a step.
                begun = self._timed_step()
                clear_run(place)
            write_json(place / MARKER, {"config": self.config.to_dict(), "provenance": self.provenance})
            (place / "grids").mkdir(exist_ok=True)
            with (
                Signals() as caught,
                Reporter(
                    place,
                    place / LOG,
                    first,
                    self.config.steps,
                    progress,
                    log_every,
                    f"distil, {self.micro_batch} of {self.images.num_images} images at a time",
                    "peak" if self.backbone.device.type == "cuda" else "process",
                ) as report,
            ):
                for loss, seconds in self._steps(place, begun):
                    report.step(self.steps_done, loss, seconds, peak_bytes(self.backbone.device))
                    if on_step is not None:
                        on_step(self.steps_done)
                    if caught.signum is not None:
                        self._checkpoint(place)
                        raise Interrupted(caught.signum, self.steps_done)
                    if self.steps_done % grid_every == 0:
                        path = place / "grids" / f"{self.steps_done:06d}.png"
                        save_grid(path, self.images.pictures(), self.labels, self.class_names)
                    if self.steps_done % checkpoint_every == 0 and self.steps_done < self.config.steps:
                        self._checkpoint(place)
            self._checkpoint(place)
            synthetic = self.result()
            synthetic.save(place / RESULT)
            save_image_folder(place / "images", synthetic)
            save_grid(place / "grid.png", synthetic.images, synthetic.labels, self.class_names)
            summary = {
                "config": self.config.to_dict(),
                "provenance": self.provenance,
                "steps": self.steps_done,
                "steps_this_run": self.steps_done - first,
                "seconds_this_run": time.perf_counter() - started,
                "median_step_seconds": report.median_step(),
                "last_loss": report.last_loss,
                "peak_bytes": peak_bytes(self.backbone.device),
                "micro_batch": self.micro_batch,
                "result": str(place / RESULT),
            }
            write_json(place / SUMMARY, summary)
            return summary

    def _bytes_to_write(self) -> int:
        """A checkpoint with all levels live, another one beside it while it is replaced, and the images."""
        images = self.images
        floats = floats_per_image(images.channels, images.sizes)
        return 4 * images.num_images * (8 * floats + images.channels * images.size**2) + (1 << 22)

    def _timed_step(self) -> tuple[Tensor, float]:
        begun = time.perf_counter()
        loss = self.step()
        return loss, time.perf_counter() - begun

    def _steps(self, place: Path, begun: tuple[Tensor, float] | None) -> Iterator[tuple[Tensor, float]]:
        """Loss and seconds of every step, the one already made first; a step that fails leaves a checkpoint behind."""
        if begun is not None:
            yield begun
        while self.steps_done < self.config.steps:
            try:
                step = self._timed_step()
            except InputError as error:
                if not (isinstance(error, StepFailed) and error.torn):
                    self._checkpoint(place)
                raise
            yield step

    def _continue(self, place: Path) -> None:
        checkpoint = place / CHECKPOINT
        self.steps_done, micro_batch, asked = load_checkpoint(
            checkpoint, self.images, self.optimiser, self.average, self.config, self.provenance
        )
        # Another one would round differently; it may have been halved meanwhile.
        if self.execution.micro_batch in ("auto", asked):
            self._stepper = self._make_step(micro_batch)
        if self.steps_done > self.config.steps:
            raise InputError(f"{place}: has run {self.steps_done} steps already, more than steps={self.config.steps}")
        cut_log(place / LOG, self.steps_done)

    def _checkpoint(self, place: Path) -> None:
        save_checkpoint(
            place / CHECKPOINT,
            self.images,
            self.optimiser,
            self.average,
            self.steps_done,
            self.config,
            self.provenance,
            self.micro_batch,
            self.execution.micro_batch,
        )
