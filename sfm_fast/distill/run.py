"""A run in its folder: the loop over the steps, with log, image grids, checkpoints, signals and the final result."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ..backbones.backbone import Backbone
from ..errors import InputError
from ..files import Metadata, check_free_space, write_json
from ..measure.starvation import CpuShare, StarvationNotice
from ..synthetic import SyntheticSet, save_grid, save_image_folder
from .config import DistillConfig, Schedule
from .config import Every as Every
from .images import SyntheticImages, floats_per_image
from .objectives import Objective
from .progress import Reporter, Signals, peak_bytes
from .run_folder import CHECKPOINT, LOG, MARKER, RESULT, SUMMARY, clear_run, cut_log
from .run_folder import Interrupted as Interrupted
from .step import StepFailed


class Distilling(Protocol):
    """The parts of a `Distiller` that a run uses."""

    config: DistillConfig
    backbone: Backbone
    objective: Objective
    images: SyntheticImages
    labels: Tensor
    class_names: list[str]
    provenance: Metadata
    schedule: Schedule
    steps_done: int

    @property
    def micro_batch(self) -> int: ...

    def step(self) -> Tensor: ...

    def result(self) -> SyntheticSet: ...

    def save(self, path: Path) -> None: ...

    def restore(self, path: Path) -> None: ...


@dataclass
class Run:
    """One run of ``distiller`` in the locked folder ``place``."""

    distiller: Distilling
    place: Path
    every: Every
    progress: bool = True
    on_step: Callable[[int], None] | None = None

    def complete(self, resume: bool) -> Metadata:
        """Run to the end and write everything; returns the summary. See `Distiller.run`."""
        distiller, place = self.distiller, self.place
        check_free_space(place, self._bytes_to_write())
        started, begun = time.perf_counter(), None
        first = distiller.steps_done
        if resume:
            distiller.restore(place / CHECKPOINT)
            cut_log(place / LOG, distiller.steps_done)
            first = distiller.steps_done
        else:
            # An earlier run is deleted only after this one has managed a step.
            begun = self._timed_step()
            clear_run(place)
        write_json(place / MARKER, {"config": distiller.config.to_dict(), "provenance": distiller.provenance})
        (place / "grids").mkdir(exist_ok=True)
        report = self._loop(first, begun)
        self._checkpoint()
        synthetic = distiller.result()
        synthetic.save(place / RESULT)
        save_image_folder(place / "images", synthetic)
        save_grid(place / "grid.png", synthetic.images, synthetic.labels, distiller.class_names)
        summary = {
            "config": distiller.config.to_dict(),
            "provenance": distiller.provenance,
            "steps": distiller.steps_done,
            "schedule": distiller.schedule._asdict(),
            "steps_this_run": distiller.steps_done - first,
            "seconds_this_run": time.perf_counter() - started,
            "median_step_seconds": report.median_step(),
            "last_loss": report.last_loss,
            "peak_bytes": peak_bytes(distiller.backbone.device),
            "micro_batch": distiller.micro_batch,
            "result": str(place / RESULT),
        }
        write_json(place / SUMMARY, summary)
        return summary

    def _loop(self, first: int, begun: tuple[Tensor, float] | None) -> Reporter:
        """All steps from ``first`` on; ``begun``: loss and seconds of the first one, if it is done already."""
        distiller, images = self.distiller, self.distiller.images
        title = f"distil, {distiller.micro_batch} of {images.num_images} images at a time"
        memory = "peak" if distiller.backbone.device.type == "cuda" else "process"
        report = Reporter(self.place, first, distiller.config.steps, self.progress, self.every.log_every, title, memory)
        with Signals() as caught, report:
            for loss, seconds in self._steps(begun):
                report.step(distiller.steps_done, loss, seconds, peak_bytes(distiller.backbone.device))
                if self.on_step is not None:
                    self.on_step(distiller.steps_done)
                if caught.signum is not None:
                    self._checkpoint()
                    raise Interrupted(caught.signum, distiller.steps_done)
                if distiller.steps_done % self.every.grid_every == 0:
                    path = self.place / "grids" / f"{distiller.steps_done:06d}.png"
                    save_grid(path, images.pictures(), distiller.labels, distiller.class_names)
                last = distiller.steps_done == distiller.config.steps
                if distiller.steps_done % self.every.checkpoint_every == 0 and not last:
                    self._checkpoint()
        return report

    def _steps(self, begun: tuple[Tensor, float] | None) -> Iterator[tuple[Tensor, float]]:
        """Loss and seconds of every step, beginning with ``begun``; if a step fails, a checkpoint is saved."""
        if begun is not None:
            yield begun
        # Methods that read real images wait for them, and a GPU's steps are waited for.
        computes = self.distiller.backbone.device.type == "cpu" and not self.distiller.objective.needs_images
        notice = StarvationNotice()
        while self.distiller.steps_done < self.distiller.config.steps:
            share = CpuShare()
            try:
                step = self._timed_step()
            except InputError as error:
                if not (isinstance(error, StepFailed) and error.torn):
                    self._checkpoint()
                raise
            if computes and (starved := notice.add(share)):
                warnings.warn(starved, RuntimeWarning, stacklevel=2)
            yield step

    def _timed_step(self) -> tuple[Tensor, float]:
        begun = time.perf_counter()
        loss = self.distiller.step()
        return loss, time.perf_counter() - begun

    def _checkpoint(self) -> None:
        self.distiller.save(self.place / CHECKPOINT)

    def _bytes_to_write(self) -> int:
        """Disk space for two checkpoints with all levels live (the old one exists until it is replaced) and the images."""
        images = self.distiller.images
        floats = floats_per_image(images.channels, images.sizes)
        return 4 * images.num_images * (8 * floats + images.channels * images.size**2) + (1 << 22)
