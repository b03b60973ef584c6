"""The state of a run as one safetensors file: pyramid levels, Adam's moments, step; enough to continue bit for bit.

All randomness is counter-based, so there is no generator state to keep.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..files import load_tensors, save_tensors
from .config import DistillConfig
from .images import SyntheticImages

FORMAT = "sfm_fast.checkpoint/1"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_checkpoint(
    path: str | os.PathLike[str],
    images: SyntheticImages,
    optimiser: torch.optim.Optimizer,
    step: int,
    config: DistillConfig,
    provenance: dict[str, Any],
) -> None:
    """Write the state after ``step`` steps, atomically."""
    tensors: dict[str, Tensor] = {}
    for index, level in enumerate(images.levels):
        tensors[f"level.{index}"] = level
        tensors |= {f"{name}.{index}": value for name, value in optimiser.state.get(level, {}).items()}
    metadata = {"file_format": FORMAT, "step": step, "config": config.to_dict(), "provenance": provenance}
    save_tensors(path, tensors, metadata)


def load_checkpoint(
    path: str | os.PathLike[str],
    images: SyntheticImages,
    optimiser: torch.optim.Optimizer,
    config: DistillConfig,
    provenance: dict[str, Any],
) -> int:
    """Restore what `save_checkpoint` wrote into fresh ``images`` and ``optimiser``; returns the number of steps done.

    Raises ``InputError`` where the file is damaged, or made with another configuration, backbone or centres.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("file_format") != FORMAT:
        raise InputError(
            f"{path}: not a checkpoint of this package (format {metadata.get('file_format')!r}, wanted {FORMAT!r})"
        )
    try:
        stored, made_with, step = (
            DistillConfig.from_dict(metadata["config"]),
            dict(metadata["provenance"]),
            int(metadata["step"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: damaged checkpoint ({type(error).__name__}: {error})") from error
    difference = config.difference(stored)
    if difference:
        raise InputError(
            f"{path}: made with other options ({difference}); continue with the same ones, or choose another folder"
        )
    for name, value in made_with.items():
        if provenance.get(name) != value:
            raise InputError(f"{path}: made with another {name} ({value!r}, now {provenance.get(name)!r})")
    live = sum(name.startswith("level.") for name in tensors)
    if not 1 <= live <= len(images.sizes) or step < 0:
        raise InputError(f"{path}: damaged checkpoint ({live} levels for {len(images.sizes)} sizes, step {step})")
    while len(images.levels) < live:
        images.grow()
    for group in optimiser.param_groups:
        group["params"] = list(images.levels)
    with torch.no_grad():
        for index, level in enumerate(images.levels):
            restored = _restore(tensors, index, level, path)
            if step:
                optimiser.state[level] = restored
    return step


def _restore(tensors: dict[str, Tensor], index: int, level: Tensor, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Copy the stored level into ``level``; returns its Adam state (step count, two moments)."""
    wanted = {f"level.{index}": level.shape, f"exp_avg.{index}": level.shape, f"exp_avg_sq.{index}": level.shape}
    for name, shape in {**wanted, f"step.{index}": torch.Size()}.items():
        if name not in tensors or tensors[name].shape != shape or not tensors[name].isfinite().all():
            raise InputError(f"{path}: damaged checkpoint ({name} is missing, not finite or of another shape)")
    level.copy_(tensors[f"level.{index}"])
    # Adam keeps its step count on the host unless it is fused or capturable.
    return {name: tensors[f"{name}.{index}"].to("cpu" if name == "step" else level.device) for name in _MOMENTS}
