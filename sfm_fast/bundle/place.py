"""Where a bundle may be written or read, and the dtypes of its weights; without torch, for command lines."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError
from ..files import Metadata, check_output_file, expand, parse_json

FORMAT = "sfm_fast.bundle"
DTYPES = ("bf16", "fp32")


def check_bundle_file(path: str | os.PathLike[str], argument: str = "path") -> Path:
    """The path to write a bundle to, with symbolic links resolved; changes nothing.

    Raises ``InputError`` naming ``argument`` unless ``path`` is new or a bundle, in a folder that can be written.
    """
    if not str(path):
        raise InputError(f"{argument} must be a file, got an empty name")
    target = Path(os.path.realpath(expand(path, argument)))
    if target.is_file() and not is_bundle(target):
        raise InputError(f"{argument} {path}: exists and is no bundle; choose another name")
    above = next(parent for parent in target.parents if parent.exists())
    check_output_file(target if above == target.parent else above / target.name, argument)
    return target


def is_bundle(path: Path) -> bool:
    """Whether the file's header says that it is a bundle, of any version."""
    try:
        return str(_header(path).get("file_format", "")).startswith(f'"{FORMAT}/')
    except (OSError, ValueError, RecursionError):
        return False


def _header(path: Path) -> Metadata:
    """The metadata of a safetensors file, without reading its tensors."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > 100_000_000:  # safetensors' own limit
            raise ValueError("no safetensors file")
        metadata = parse_json(file.read(length).decode())["__metadata__"]
    if not isinstance(metadata, dict):
        raise ValueError("no metadata")
    return metadata


def check_bundle_there(path: Path) -> None:
    """Raise ``InputError`` if there is no file ``path``."""
    if not path.is_file():
        raise InputError(f"{path}: no bundle here" + (" (it is a folder)" if path.is_dir() else ""))
