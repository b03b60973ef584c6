"""The state of a run as one safetensors file (pyramid levels, Adam's moments, step), from which it continues bit for bit.

All randomness is counter-based, so there is no generator state to save.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..files import Metadata, load_tensors, save_tensors
from ..schema import check
from .average import IterateAverage
from .config import DistillConfig, Schedule
from .images import SyntheticImages
from .optimiser import PyramidAdam

FORMAT = "sfm_fast.checkpoint/4"
_STATE = ("pyramid", "exp_avg", "exp_avg_sq")
_METADATA = {
    "config": dict,
    "provenance": dict,
    "step": int,
    "micro_batch": int,
    "micro_batch_asked?": (int, lambda value: value == "auto"),
    "live_levels": int,
    "lr": lambda value: type(value) in (int, float) and 0 < value < float("inf"),
    "grow_every": lambda value: type(value) is int and value >= 1,
}


class Progress(NamedTuple):
    """``steps`` done; the current ``micro_batch`` size, and the one ``asked`` for in the options; the run's ``schedule``."""

    steps: int
    micro_batch: int
    schedule: Schedule
    asked: int | str = "auto"


def save_checkpoint(
    path: str | os.PathLike[str],
    images: SyntheticImages,
    optimiser: PyramidAdam,
    average: IterateAverage,
    config: DistillConfig,
    provenance: Metadata,
    progress: Progress,
) -> None:
    """Write the state of a run after ``progress``, atomically."""
    tensors: dict[str, Tensor] = {"adam_steps": torch.tensor(optimiser.steps)}
    tensors |= dict(zip(_STATE, optimiser.state, strict=True)) | average.state()
    metadata = {
        "file_format": FORMAT,
        "step": progress.steps,
        "config": config.to_dict(),
        "provenance": provenance,
        "micro_batch": progress.micro_batch,
        "micro_batch_asked": progress.asked,
        "lr": progress.schedule.lr,
        "grow_every": progress.schedule.grow_every,
        "live_levels": images.live,
    }
    save_tensors(path, tensors, metadata)


def load_checkpoint(
    path: str | os.PathLike[str],
    images: SyntheticImages,
    optimiser: PyramidAdam,
    average: IterateAverage,
    config: DistillConfig,
    provenance: Metadata,
) -> Progress:
    """Restore a file of `save_checkpoint` into new ``images``, ``optimiser`` and ``average``; returns the progress of the run.

    Raises ``InputError`` if the file is damaged, or from a run with another configuration, backbone or centres.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("file_format") != FORMAT:
        raise InputError(
            f"{path}: not a checkpoint of this package (format must be {FORMAT!r}, got {metadata.get('file_format')!r})"
        )
    check(path, metadata, _METADATA, "checkpoint")
    made_with = metadata["provenance"]
    step, micro_batch, live = (metadata[name] for name in ("step", "micro_batch", "live_levels"))
    try:
        stored = DistillConfig.from_dict(metadata["config"])
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged checkpoint ({type(error).__name__}: {error})") from error
    difference = config.difference(stored)
    if difference:
        raise InputError(
            f"{path}: the run has other options ({difference}); resume it with the same options, or choose another folder"
        )
    for name, value in made_with.items():
        if provenance.get(name) != value:
            raise InputError(f"{path}: the run has another {name} ({value!r}, now {provenance.get(name)!r})")
    if not 1 <= live <= len(images.sizes) or step < 0:
        raise InputError(f"{path}: damaged checkpoint ({live} levels for {len(images.sizes)} sizes, step {step})")
    adam_steps = tensors.get("adam_steps", torch.tensor(-1))
    if (
        adam_steps.dtype != torch.int64
        or adam_steps.numel() != 1
        or not 0 <= int(adam_steps) <= step
        or micro_batch < 1
    ):
        raise InputError(f"{path}: damaged checkpoint (adam_steps {adam_steps.tolist()}, micro-batch {micro_batch})")
    images.allocate(live)
    optimiser.restart()
    optimiser.steps = int(adam_steps)
    for name, flat in zip(_STATE, optimiser.state, strict=True):
        stored_flat = tensors.get(name)
        if (
            stored_flat is None
            or (stored_flat.shape, stored_flat.dtype) != (flat.shape, flat.dtype)
            or not stored_flat.isfinite().all()
        ):
            raise InputError(
                f"{path}: damaged checkpoint ({name} is missing, not finite, or of another shape or dtype)"
            )
        flat.copy_(stored_flat)
    try:
        average.restore(tensors, images.pyramid.data)
    except InputError as error:
        raise InputError(f"{path}: damaged checkpoint ({error})") from error
    schedule = Schedule(metadata["lr"], metadata["grow_every"])
    return Progress(step, micro_batch, schedule, metadata.get("micro_batch_asked", "auto"))
