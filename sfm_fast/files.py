"""Atomic writes (to a temporary file that is then renamed), locks for folders, and reading and writing of tensors and JSON."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .errors import InputError, require_package
from .units import memory

if TYPE_CHECKING:  # command lines use this module before torch is needed
    from torch import Tensor

_DTYPES = {f"torch.{name}" for name in ("float16", "bfloat16", "float32", "float64", "int64", "uint8")}
LOCK_NAME = ".sfm_fast.lock"
Metadata = dict[str, Any]  # a file's JSON values by name, besides its tensors


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], None], *, expected_bytes: int = 0) -> None:
    """Call ``write`` with a temporary file in the folder of ``path``, flush it to disk and rename it to ``path``.

    An existing file at ``path`` stays intact until the rename. Raises ``InputError`` if the disk has less than ``expected_bytes``
    free, or the folder can't be written.
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
        temporary.chmod(0o666 & ~umask)  # safetensors creates private files; use the usual permissions
        os.replace(temporary, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(f"{target}: the disk is full; no file was overwritten") from error
        raise InputError(f"{target}: can't be written ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):  # must not hide the first error
            temporary.unlink(missing_ok=True)


def expand(path: str | os.PathLike[str], argument: str) -> Path:
    """``path`` with '~' replaced by the home folder; raises ``InputError`` naming ``argument`` if there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{argument} {path}: the home folder for '~' isn't known; write the folder out") from error


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Raise ``InputError`` if ``folder`` is missing, or its disk has less than ``needed_bytes`` free."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise InputError(f"{folder}: {memory(needed_bytes)} are needed, but only {memory(free)} are free on this disk")


def check_output_file(path: str | os.PathLike[str], argument: str) -> None:
    """Raise ``InputError`` naming ``argument`` if ``path`` can't be written; meant to be called before the work."""
    target = Path(path)
    if not str(path) or target.is_dir():
        raise InputError(f"{argument} must be a file, got {'an empty name' if not str(path) else f'the folder {path}'}")
    if not target.parent.is_dir():
        raise InputError(f"{argument} {path}: no such folder {target.parent}")
    if not os.access(target.parent, os.W_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise InputError(f"{argument} {path}: can't be written")


def check_input_file(path: str | os.PathLike[str]) -> None:
    """Raise ``InputError`` if there is no file ``path``; meant to be called before the work."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")


def check_replaces_json(path: str | os.PathLike[str], argument: str) -> None:
    """Raise ``InputError`` naming ``argument`` if ``path`` is an existing file other than JSON, which should not be replaced."""
    if Path(path).is_file():
        with open(path, "rb") as file:
            start = file.read(1024).lstrip()[:1]
        if start not in (b"", b"{", b"["):
            raise InputError(f"{argument} {path}: exists and is no JSON file; choose another name")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, atomically; undecodable bytes of file names are written as backslash escapes."""

    target = Path(path)
    if target.exists() and not target.is_file():  # a device or a pipe: renaming over it would destroy it
        try:
            target.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise InputError(f"{path}: can't be written ({error.strerror})") from error
        return

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")

    write_atomically(path, write, expected_bytes=len(text))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinity are errors, because JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON-encoded metadata as one safetensors file, atomically."""
    require_package("safetensors", "saving tensors", "distill")
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    encoded = {name: json.dumps(value) for name, value in metadata.items()}
    size = sum(tensor.nbytes for tensor in contiguous.values()) + (1 << 16)

    def write(temporary: Path) -> None:
        save_file(contiguous, temporary, metadata=encoded)
        _sort_metadata(temporary)

    try:
        write_atomically(path, write, expected_bytes=size)
    except SafetensorError as error:  # raised by safetensors if the disk is full
        raise InputError(f"{path}: can't be written ({error})") from error


def _sort_metadata(path: Path) -> None:
    """Sort a safetensors file's metadata, which safetensors writes in random order, so that equal contents give equal files."""
    with open(path, "rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= length:  # always true, since this is the shortest form
            file.seek(8)
            file.write(ordered.ljust(length))


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Metadata]:
    """Read a file of `save_tensors`: tensors by name and decoded metadata.

    Raises ``InputError`` if the file is missing, truncated or no safetensors file, or has an unsupported dtype.
    """
    tensors, encoded = read_safetensors(path)
    for name, tensor in tensors.items():
        if str(tensor.dtype) not in _DTYPES:
            raise InputError(f"{path}: damaged ({name[:60]} holds {tensor.dtype})")
    try:
        metadata = {name: parse_json(text) for name, text in encoded.items() if name != "format"}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged, or not a file of this package ({error})") from error
    return tensors, metadata


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name and the metadata's strings of any safetensors file; raises ``InputError`` if it is missing or damaged."""
    require_package("safetensors", "reading tensors", "distill")
    from safetensors import SafetensorError, safe_open

    check_input_file(path)
    try:
        # By file descriptor, because safetensors can't open names that aren't UTF-8.
        with open(path, "rb") as opened, safe_open(f"/dev/fd/{opened.fileno()}", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, ValueError, AttributeError, OSError) as error:  # AttributeError: a dtype that torch lacks
        raise InputError(f"{path}: damaged or not a safetensors file ({error})") from error


def parse_json(text: str) -> Any:
    """Parse standard JSON; raises ``ValueError`` or ``RecursionError`` for anything else, also for numbers beyond float64 or 64-bit integers."""
    return json.loads(text, parse_constant=_number, parse_float=_number, parse_int=_whole_number)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no valid number in JSON")
    return value


def _whole_number(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"{text[:20]}... is no 64-bit integer")
    return int(text)


@contextlib.contextmanager
def locked_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Create ``folder`` and lock it for this process; raises ``InputError`` if another process has locked it.

    The operating system releases the lock of a killed process. Warns if the file system doesn't support locks.
    """

    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: must be a folder, got a file")
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = open(path / LOCK_NAME, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 (held open for the whole block)
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror})") from error
    with handle:
        _lock(handle, path)
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        # The file is kept: if it were removed, a third process could lock a new one while a second holds the old one.
        yield path


def check_unlocked(folder: str | os.PathLike[str]) -> None:
    """Raise ``InputError`` if another process has locked ``folder``; changes nothing, and holds the lock only for a moment."""
    path = Path(folder)
    if (path / LOCK_NAME).is_file() and os.access(path / LOCK_NAME, os.R_OK):
        with open(path / LOCK_NAME, encoding="utf-8", errors="replace") as handle, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `locked_folder` will say that the file system has no locks
            _lock(handle, path)


def _lock(handle: TextIO, folder: Path) -> None:
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            handle.seek(0)
            owner = handle.read(32).strip() or "unknown"
            raise InputError(f"{folder}: in use by another run (process {owner})") from error
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL):
            raise InputError(f"{folder}: can't be locked ({error.strerror})") from error
        warnings.warn(
            f"{folder}: this file system doesn't support locks ({error.strerror}), so two simultaneous runs in this folder would not be noticed",
            RuntimeWarning,
            stacklevel=4,
        )
