"""bundle.json as it is read: every value that the package uses is of the type that it writes, or the file is named as damaged."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checks import MOST_PIXELS
from ..errors import InputError
from ..evaluation.heads import CLASSIFIER_METADATA, PROJECTOR_METADATA
from ..files import parse_json
from ..schema import check
from ..version import __version__
from .folder import CONFIG, FORMAT, old_folder

VERSION = 1


def read_config(folder: Path) -> dict[str, Any]:
    """bundle.json, checked; raises ``InputError`` naming the file where there is none, or it is damaged or too new."""
    path = folder / CONFIG
    if not path.is_file():
        old = old_folder(Path(os.path.realpath(folder)))
        rescue = f"; an interrupted save left the old one in {old}" if (old / CONFIG).is_file() else ""
        raise InputError(f"{folder}: no bundle here ({CONFIG} is missing){rescue}")
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: damaged bundle ({error})") from error
    kind, _, version = str(config.get("file_format") if isinstance(config, dict) else None).partition("/")
    if kind != FORMAT:
        raise InputError(f"{path}: not of a bundle of this package")
    if not re.fullmatch("[1-9][0-9]{0,8}", version):
        raise InputError(f"{path}: damaged bundle (file_format is {config['file_format'][:60]!r})")
    if int(version) > VERSION:
        raise InputError(
            f"{path}: format {version}, made by sfm_fast {config.get('sfm_fast')}; this is {__version__} and reads formats up to {VERSION}"
        )
    check(path, config, _CONFIG, "bundle")
    for key in ("distilling_backbone", "evaluating_backbone"):
        if len(config[key]["mean"]) != len(config[key]["std"]):
            raise InputError(f"{path}: damaged bundle ({key}: mean and std differ in length)")
    return dict(config)


def _is_count(most: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and 0 < value <= most


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(type(value) in (int, float) for value in values)


_BACKBONE = {
    "name": lambda name: isinstance(name, str) and bool(name),
    "fingerprint": str,
    "num_features": _is_count(),
    "input_size": _is_count(MOST_PIXELS),
    "resize": _is_count(MOST_PIXELS),
    "mean": _are_numbers,
    "std": lambda std: _are_numbers(std) and min(std) > 0,
}
_CONFIG = {
    "sfm_fast?": str,
    "class_names": lambda names: isinstance(names, list) and bool(names) and all(isinstance(n, str) for n in names),
    "distilling_backbone": _BACKBONE,
    "evaluating_backbone": _BACKBONE,
    "channels": lambda channels: type(channels) is int and channels in (1, 3),
    "folded": bool,
    "made": {
        "synthetic?": (dict, None),
        "classifier?": (CLASSIFIER_METADATA, None),
        "projector?": (PROJECTOR_METADATA, None),
    },
    "accuracy": {str: {"top1": lambda top1: type(top1) in (int, float) and 0 <= top1 <= 1, "images": _is_count()}},
    "files": {str: {"bytes": int, "sha256": str}},
    "sizes": [{"what": str, "bytes": int, "detail": str}],
}
