"""A bundle's folder: which files lie in it, whether they are whole, and how a new bundle takes an old one's place whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import expand, parse_json

FORMAT = "sfm_fast.bundle"
CONFIG, README, IMAGES, CLASSIFIER, PROJECTOR, WEIGHTS = (
    "bundle.json",
    "README.md",
    "images.safetensors",
    "classifier.safetensors",
    "projector.safetensors",
    "backbone.safetensors",
)
TITLES = {IMAGES: "synthetic images", CLASSIFIER: "classifier", PROJECTOR: "projector", WEIGHTS: "backbone's weights"}


def check_bundle_folder(folder: str | os.PathLike[str], argument: str = "folder") -> Path:
    """Where a bundle may be written: the folder itself, without symbolic links; touches nothing.

    Raises ``InputError`` naming ``argument`` unless ``folder`` is new, empty, or a bundle and nothing else, in a place that can be written,
    and what lies beside as `old_folder`, if anything, is a bundle and nothing else too.
    """
    if not str(folder):
        raise InputError(f"{argument} must be a folder, got an empty name")
    place = Path(os.path.realpath(expand(folder, argument)))
    if place.exists() and not place.is_dir():
        raise InputError(f"{argument} {folder}: is a file, wanted a folder")
    if place.is_dir():
        if any(place.iterdir()) and not _is_bundle(place):
            raise InputError(f"{argument} {folder}: holds other files, and no bundle; choose an empty or a new folder")
        if strange := _strange_entries(place):
            raise InputError(
                f"{argument} {folder}: a bundle, but {strange[0]!r} in it is no part of one; move that away"
            )
    old = old_folder(place)
    if os.path.lexists(old) and (old.is_symlink() or not _is_bundle(old) or _strange_entries(old)):
        raise InputError(
            f"{argument} {folder}: {old} lies beside, where a bundle is kept while it is replaced; move that away"
        )
    above = next(parent for parent in place.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{argument} {folder}: can't write in {above}")
    return place


def _is_bundle(place: Path) -> bool:
    try:
        return str(parse_json((place / CONFIG).read_text(encoding="utf-8"))["file_format"]).startswith(FORMAT + "/")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _strange_entries(place: Path) -> list[str]:
    """Names of what is no part of a bundle: other files, and folders whatever their names."""
    parts = {CONFIG, README, *TITLES}
    return sorted(entry.name for entry in place.iterdir() if entry.name not in parts or not entry.is_file())


def _remove(bundle: Path) -> None:
    """Delete a bundle's files, and the folder if nothing else is in it; killed halfway, it leaves what is still seen as a bundle."""
    for name in (*TITLES, README, CONFIG):
        (bundle / name).unlink(missing_ok=True)
    bundle.rmdir()


@contextlib.contextmanager
def replaced_folder(folder: str | os.PathLike[str], argument: str = "folder") -> Iterator[Path]:
    """A new folder to fill, which takes the place of ``folder`` when the block ends well; else nothing changes.

    A process killed between the two renames at the end leaves the old bundle as ``.NAME.old`` beside; the next call puts it back.
    """
    place = check_bundle_folder(folder, argument)
    building, old = place.with_name(f".{place.name}.{secrets.token_hex(6)}.tmp"), old_folder(place)
    moved = False
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if old.is_dir():
            if place.exists() and any(place.iterdir()):
                _remove(old)
            else:
                os.replace(old, place)
        building.mkdir()
        try:
            yield building
            check_bundle_folder(folder, argument)  # it may have changed meanwhile
            if moved := place.exists():
                os.replace(place, old)
            try:
                os.replace(building, place)
            except BaseException:
                if moved:
                    os.replace(old, place)
                raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{argument} {folder}: can't be written ({error.strerror or error})") from error
    if moved:
        with contextlib.suppress(OSError):  # the new one is in its place; the next call tries again
            _remove(old)


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
