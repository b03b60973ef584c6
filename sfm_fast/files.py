"""Files that are never half-written, folders that are never shared: temporary file beside, then rename; one lock a folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import InputError, require_package

LOCK_NAME = ".sfm_fast.lock"


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], None], *, expected_bytes: int = 0) -> None:
    """Call ``write`` on a temporary file beside ``path``, flush it to disk and rename it over ``path``.

    Whatever was at ``path`` stays whole until the rename. Raises ``InputError`` where the disk has less than
    ``expected_bytes`` free, or the folder can't be written.
    """
    target = Path(path)
    check_free_space(target.parent, expected_bytes)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors makes private files; an artefact is as readable as any other
        os.replace(temporary, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(f"{target}: the disk is full; nothing was overwritten") from error
        raise InputError(f"{target}: can't be written ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):  # must not hide what went wrong
            temporary.unlink(missing_ok=True)


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Raise ``InputError`` where ``folder`` is missing, or its disk has less than ``needed_bytes`` free."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise InputError(f"{folder}: {needed_bytes / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free on this disk")


def check_output_file(path: str | os.PathLike[str], argument: str) -> None:
    """Raise ``InputError`` naming ``argument`` where no file could be written at ``path``; call it before the work."""
    target = Path(path)
    if not str(path) or target.is_dir():
        raise InputError(f"{argument} must be a file, got {'an empty name' if not str(path) else f'the folder {path}'}")
    if not target.parent.is_dir():
        raise InputError(f"{argument} {path}: no such folder {target.parent}")
    if not os.access(target.parent, os.W_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise InputError(f"{argument} {path}: can't write here")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""

    target = Path(path)
    if target.exists() and not target.is_file():  # a device or a pipe: renaming over it would destroy it
        target.write_text(text, encoding="utf-8")
        return

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write, expected_bytes=len(text))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinity are refused, since JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON-encoded metadata as one safetensors file, atomically."""
    require_package("safetensors", "saving tensors", "distill")
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    encoded = {name: json.dumps(value) for name, value in metadata.items()}
    size = sum(tensor.nbytes for tensor in contiguous.values()) + (1 << 16)
    try:
        write_atomically(
            path, lambda temporary: save_file(contiguous, temporary, metadata=encoded), expected_bytes=size
        )
    except SafetensorError as error:  # how safetensors reports a full disk
        raise InputError(f"{path}: can't be written ({error})") from error


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: tensors by name and decoded metadata.

    Raises ``InputError`` naming the file where it is missing, truncated or no safetensors file.
    """
    require_package("safetensors", "reading tensors", "distill")
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = {name: json.loads(value) for name, value in (file.metadata() or {}).items() if name != "format"}
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise InputError(f"{path}: damaged or not a safetensors file ({error})") from error
    return tensors, metadata


@contextlib.contextmanager
def locked_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Create ``folder`` and hold it for this process; raises ``InputError`` where another process holds it.

    The lock is the operating system's, so a killed process never leaves a stale one behind.
    """
    import fcntl

    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file, wanted a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = open(path / LOCK_NAME, "a+")  # noqa: SIM115 (held open for the whole block)
    except OSError as error:
        raise InputError(f"{path}: can't write here ({error.strerror})") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.seek(0)
            raise InputError(f"{path}: in use by another run (process {handle.read().strip() or 'unknown'})") from error
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        # The file stays: removing it would let a third process lock a new one while a second holds the old.
        yield path
