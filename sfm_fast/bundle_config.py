"""bundle.json as it is read: every value that the package uses is of the type that it writes, or the file is named as damaged."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .bundle_folder import CONFIG, FORMAT, old_folder
from .checks import MOST_PIXELS
from .errors import InputError
from .version import __version__

VERSION = 1


def read_config(folder: Path) -> dict[str, Any]:
    """bundle.json, checked; raises ``InputError`` naming the file where there is none, or it is damaged or too new."""
    path = folder / CONFIG
    if not path.is_file():
        old = old_folder(Path(os.path.realpath(folder)))
        rescue = f"; an interrupted save left the old one in {old}" if (old / CONFIG).is_file() else ""
        raise InputError(f"{folder}: no bundle here ({CONFIG} is missing){rescue}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite)
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
    _check_fields(path, "", config, _FIELDS)
    for key in ("distilling_backbone", "evaluating_backbone"):
        _check_fields(path, key, config[key], _BACKBONE)
        if len(config[key]["mean"]) != len(config[key]["std"]):
            raise InputError(f"{path}: damaged bundle ({key}: mean and std differ in length)")
    for key in ("synthetic", "classifier", "projector"):
        if not isinstance(config["made"].get(key), dict | None):
            raise InputError(f"{path}: damaged bundle (made: {key} is {_shown(config['made'][key])})")
    # Not every classifier says these.
    _check_fields(path, "made: classifier", {"test_top1": None} | (config["made"].get("classifier") or {}), _MADE)
    for data, found in config["accuracy"].items():
        _check_fields(path, f"accuracy of {data!r}", found, _ACCURACY)
    for number, row in enumerate(config["sizes"]):
        _check_fields(path, f"sizes[{number}]", row, _SIZE)
    return dict(config)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no number of JSON")
    return value


def _check_fields(path: Path, where: str, values: Any, wanted: dict[str, Callable[[Any], bool]]) -> None:
    """Raise ``InputError`` naming ``path`` unless ``values`` is an object with every field of ``wanted``, which finds its value right."""
    if not isinstance(values, dict):
        raise InputError(f"{path}: damaged bundle ({where} is {_shown(values)})")
    for key, is_right in wanted.items():
        if key not in values:
            raise InputError(f"{path}: damaged bundle ({where or 'it'} has no {key})")
        if not is_right(values[key]):
            raise InputError(f"{path}: damaged bundle ({where}{': ' if where else ''}{key} is {_shown(values[key])})")


def _shown(value: Any) -> str:
    return repr(value)[:60]


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is kind  # of JSON's types: a bool is no int


def _is_count(most: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and 0 < value <= most


def _is_part(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(type(value) in (int, float) for value in values)


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "class_names": lambda names: isinstance(names, list) and bool(names) and all(isinstance(n, str) for n in names),
    "distilling_backbone": _is(dict),
    "evaluating_backbone": _is(dict),
    "channels": lambda channels: type(channels) is int and channels in (1, 3),
    "folded": _is(bool),
    "made": _is(dict),
    "accuracy": _is(dict),
    "files": _is(dict),
    "sizes": _is(list),
}
_BACKBONE: dict[str, Callable[[Any], bool]] = {
    "name": lambda name: isinstance(name, str) and bool(name),
    "fingerprint": _is(str),
    "num_features": _is_count(),
    "input_size": _is_count(MOST_PIXELS),
    "resize": _is_count(MOST_PIXELS),
    "mean": _are_numbers,
    "std": lambda std: _are_numbers(std) and min(std) > 0,
}
_MADE: dict[str, Callable[[Any], bool]] = {"test_top1": lambda value: value is None or type(value) in (int, float)}
_ACCURACY: dict[str, Callable[[Any], bool]] = {"top1": _is_part, "images": _is_count()}
_SIZE: dict[str, Callable[[Any], bool]] = {"what": _is(str), "bytes": _is(int), "detail": _is(str)}
