"""A bundle's folder: which files lie in it, whether they are whole, and how a new bundle takes an old one's place whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import InputError
from .version import __version__

FORMAT, VERSION = "sfm_fast.bundle", 1
CONFIG, README, IMAGES, CLASSIFIER, PROJECTOR, WEIGHTS = (
    "bundle.json",
    "README.md",
    "images.safetensors",
    "classifier.safetensors",
    "projector.safetensors",
    "backbone.safetensors",
)
TITLES = {IMAGES: "synthetic images", CLASSIFIER: "classifier", PROJECTOR: "projector", WEIGHTS: "backbone's weights"}
_WANTED = {
    "class_names": list,
    "distilling_backbone": dict,
    "evaluating_backbone": dict,
    "channels": int,
    "folded": bool,
    "made": dict,
    "accuracy": dict,
    "files": dict,
    "sizes": list,
}
BACKBONE_FIELDS = ("name", "fingerprint", "num_features", "input_size", "resize", "mean", "std")


def check_bundle_folder(folder: str | os.PathLike[str], argument: str = "folder") -> Path:
    """Where a bundle may be written: the folder itself, without symbolic links; touches nothing.

    Raises ``InputError`` naming ``argument`` unless ``folder`` is new, empty, or a bundle and nothing else, in a place that can be written.
    """
    if not str(folder):
        raise InputError(f"{argument} must be a folder, got an empty name")
    place = Path(os.path.realpath(Path(folder).expanduser()))
    if place.exists() and not place.is_dir():
        raise InputError(f"{argument} {folder}: is a file, wanted a folder")
    if place.is_dir():
        found = {entry.name for entry in place.iterdir()}
        if found and not _is_bundle(place):
            raise InputError(f"{argument} {folder}: holds other files, and no bundle; choose an empty or a new folder")
        if strange := sorted(found - {CONFIG, README, *TITLES}):
            raise InputError(
                f"{argument} {folder}: a bundle, but {strange[0]!r} in it is no part of one; move that away"
            )
    above = next(parent for parent in place.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{argument} {folder}: can't write in {above}")
    return place


def _is_bundle(place: Path) -> bool:
    try:
        return str(json.loads((place / CONFIG).read_text(encoding="utf-8"))["file_format"]).startswith(FORMAT + "/")
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def replaced_folder(folder: str | os.PathLike[str], argument: str = "folder") -> Iterator[Path]:
    """A new folder to fill, which takes the place of ``folder`` when the block ends well; else nothing changes.

    A process killed between the two renames at the end leaves the old bundle as ``.NAME.old`` beside; the next call puts it back.
    """
    place = check_bundle_folder(folder, argument)
    building, old = place.with_name(f".{place.name}.{os.getpid()}.tmp"), old_folder(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if old.is_dir() and not place.exists():
            os.replace(old, place)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        yield building
        check_bundle_folder(folder, argument)  # it may have changed meanwhile
        if place.exists():
            os.replace(place, old)
        try:
            os.replace(building, place)
        except BaseException:
            if old.exists():
                os.replace(old, place)
            raise
    except OSError as error:
        raise InputError(f"{argument} {folder}: can't be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def old_folder(place: Path) -> Path:
    """Where the bundle at ``place`` lies for the moment in which another takes its place."""
    return place.with_name(f".{place.name}.old")


def describe_file(path: Path) -> dict[str, Any]:
    """What bundle.json says of one file: bytes and SHA-256."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def checked_file(folder: Path, name: str, files: Mapping[str, Any]) -> Path:
    """The path of a file of the bundle; raises ``InputError`` naming it where it is missing or not as it was written."""
    path = folder / name
    if name not in files:
        raise InputError(f"{folder / CONFIG}: damaged bundle (it names no {name})")
    if not path.is_file():
        raise InputError(f"{path}: missing, so this bundle is not whole")
    found = describe_file(path)
    if found != files[name]:
        raise InputError(f"{path}: damaged, or of another bundle ({found['bytes']} bytes; not what {CONFIG} says)")
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """bundle.json, checked; raises ``InputError`` naming the file where there is none, or it is damaged or too new."""
    path = folder / CONFIG
    if not path.is_file():
        place = Path(os.path.realpath(folder))
        rescue = f"; an interrupted save left the old one in {old_folder(place)}" if old_folder(place).is_dir() else ""
        raise InputError(f"{folder}: no bundle here ({CONFIG} is missing){rescue}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: damaged ({error})") from error
    kind, _, version = str(config.get("file_format") if isinstance(config, dict) else None).partition("/")
    if kind != FORMAT or not version.isdigit():
        raise InputError(f"{path}: not of a bundle of this package")
    if int(version) > VERSION:
        raise InputError(
            f"{path}: format {version}, made by sfm_fast {config.get('sfm_fast')}; this is {__version__} and reads formats up to {VERSION}"
        )
    for key, kind_wanted in _WANTED.items():
        if not isinstance(config.get(key), kind_wanted):
            raise InputError(f"{path}: damaged ({key} is {str(config.get(key))[:60]})")
    if config["channels"] not in (1, 3):
        raise InputError(f"{path}: damaged (channels is {config['channels']})")
    for key in ("distilling_backbone", "evaluating_backbone"):
        if missing := [name for name in BACKBONE_FIELDS if name not in config[key]]:
            raise InputError(f"{path}: damaged ({key} has no {missing[0]})")
    for data, found in config["accuracy"].items():
        if not isinstance(found, dict) or {type(found.get(key)) for key in ("top1", "images")} != {float, int}:
            raise InputError(f"{path}: damaged (accuracy of {data!r} is {str(found)[:60]})")
    return dict(config)
