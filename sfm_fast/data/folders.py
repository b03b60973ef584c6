"""Data sets of labelled image files in a folder or a .tar archive."""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .decoder import endings, header_is_grey, open_image
from .layout import Entry, Listing, Split, Tree, ending, find_split, is_hidden, kind_of_split, why_no_split
from .sources import DIGESTED, MapSource, evenly_spaced

_BLOCK = 512
DEEPEST = 100  # nested folders


class FolderTree(Tree):
    """A folder on disk. Symbolic links are followed, except to a folder that contains them."""

    def __init__(self, path: Path, above: tuple[tuple[int, int], ...] = ()) -> None:
        super().__init__(Path(os.path.abspath(path)).name, str(path))
        self.path, self._above = path, above

    @cached_property
    def listing(self) -> Listing:
        listing = Listing()
        if len(self._above) > DEEPEST:
            raise InputError(f"{self.path}: folders are nested more than {DEEPEST} deep")
        try:
            here = os.stat(self.path)
            above = (*self._above, (here.st_dev, here.st_ino))
            with os.scandir(self.path) as entries:
                for entry in entries:
                    self._add(listing, entry, above)
        except OSError as error:
            raise InputError(f"{self.path}: can't be read ({error.strerror})") from error
        return listing

    def _add(self, listing: Listing, entry: os.DirEntry[str], above: tuple[tuple[int, int], ...]) -> None:
        if is_hidden(entry.name):
            listing.left_out["hidden"] += 1
        elif entry.is_dir():
            inside = entry.stat()
            if (inside.st_dev, inside.st_ino) in above:
                listing.left_out["links to an enclosing folder"] += 1
            else:
                listing.folders[entry.name] = FolderTree(self.path / entry.name, above)
        elif entry.is_file():
            listing.files[entry.name] = entry.path
        elif entry.is_symlink() and ending(entry.name) not in endings():
            listing.left_out["broken links"] += 1
        elif entry.is_symlink():
            raise InputError(f"{entry.path}: a broken link; remove or repair it")
        else:
            listing.left_out["pipes or devices"] += 1


@dataclass(frozen=True, slots=True)
class Member:
    """Offset and size of a file in an archive, in bytes."""

    offset: int
    size: int


class ArchiveTree(Tree):
    """A folder inside an archive."""

    def __init__(self, name: str, told: str) -> None:
        super().__init__(name, told)
        self._listing = Listing()

    @cached_property
    def listing(self) -> Listing:
        return self._listing

    def put(self, parts: Sequence[str], member: Member | None) -> None:
        """Add a file (or a folder, if ``member`` is None) and the folders that contain it."""
        if not parts:
            return
        if is_hidden(parts[0]):
            self._listing.left_out["hidden"] += member is not None
        elif len(parts) == 1 and member is not None:
            self._listing.files[parts[0]] = member
        else:
            child = self._listing.folders.setdefault(parts[0], ArchiveTree(parts[0], f"{self.told}/{parts[0]}"))
            assert isinstance(child, ArchiveTree)
            child.put(parts[1:], member)

    def leave_out(self, reason: str) -> None:
        """Count an entry that is left out."""
        self._listing.left_out[reason] += 1


class ImageFiles:
    """Items (PIL image, label) of a split, each read when it is indexed; picklable for worker processes.

    ``archive``: the .tar file with the images, or None for a folder.
    """

    def __init__(self, split: Split, archive: str | None = None) -> None:
        self.split, self.archive = split, archive

    def __len__(self) -> int:
        return len(self.split.entries)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        entry = self.split.entries[index]
        return open_image(self.file(entry)), entry.label

    def describe(self, index: int) -> str:
        """Path of the file of item ``index``, for messages."""
        entry = self.split.entries[index]
        return str(entry.place) if self.archive is None else f"{self.archive}/{entry.name}"

    def file(self, entry: Entry) -> str | io.BytesIO:
        """The path of the image, or for an archive its bytes."""
        return str(entry.place) if self.archive is None else io.BytesIO(self.read(entry))

    def read(self, entry: Entry) -> bytes:
        """The bytes of the image's file."""
        if self.archive is None:
            return Path(entry.place).read_bytes()
        with open(self.archive, "rb") as file:
            file.seek(entry.place.offset)
            return file.read(entry.place.size)

    def size(self, entry: Entry) -> int:
        """Size of the image's file in bytes."""
        return os.stat(entry.place).st_size if self.archive is None else int(entry.place.size)


class FileSource(MapSource):
    """A split of a folder or archive."""

    dataset: ImageFiles

    def __init__(self, files: ImageFiles, channels: int | None, workers: int) -> None:
        split = files.split
        super().__init__(split.where, files, split.class_names, channels, workers, files.describe)
        self.told = split.told(self.colour)

    @property
    def labels(self) -> Tensor:
        """The class numbers of all images, (N,) int64."""
        return torch.tensor([entry.label for entry in self.dataset.split.entries])

    def subset(self, rows: Sequence[int], name: str) -> FileSource:
        """The images at ``rows`` as a source of their own."""
        files = self.dataset
        part = replace(files.split, where=name, entries=[files.split.entries[row] for row in rows])
        return FileSource(ImageFiles(part, files.archive), self._given, self.workers)

    def _is_grey(self, index: int) -> bool:
        return header_is_grey(self.dataset.file(self.dataset.split.entries[index]))

    def counts(self) -> list[int]:
        counts = Counter(entry.label for entry in self.dataset.split.entries)
        return [counts[label] for label in range(len(self.class_names))]

    def fingerprint(self) -> str:
        """Hash of class names, every file's name and size, and the contents of 32 evenly spaced files; computed once."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        files = self.dataset
        digest = hashlib.sha256("\0".join(self.class_names).encode(errors="surrogateescape"))
        for entry in files.split.entries:
            digest.update(f"\0{entry.name}\0{files.size(entry)}".encode(errors="surrogateescape"))
        for index in evenly_spaced(len(files), DIGESTED):
            digest.update(files.read(files.split.entries[index]))
        return digest.hexdigest()[:16]


def open_files(path: Path, split: str, channels: int | None, workers: int) -> FileSource:
    """``split`` of a folder or a .tar archive by the rules of `layout`. Raises ``InputError`` like `find_split` and `read_archive`."""
    archive = None if path.is_dir() else str(path)
    root: Tree = FolderTree(path) if archive is None else read_archive(path)
    source = FileSource(ImageFiles(find_split(root, split), archive), channels, workers)
    source.no_test = why_no_split(root, "test")
    return source


def read_archive(path: Path) -> ArchiveTree:
    """The files in a .tar archive. Raises ``InputError`` if it is damaged anywhere or truncated."""
    try:
        with tarfile.open(path, "r:") as archive:
            members = archive.getmembers()
            end = archive.offset
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}: damaged, or no uncompressed .tar archive ({error})") from error
    _check_end(path, end)
    tree = ArchiveTree(kind_of_split(path.stem) or path.stem, str(path))
    by_name = {_normal(member.name): member for member in members}
    folders = {name[:place] for name in by_name for place, letter in enumerate(name) if letter == "/"}
    for member in members:
        name = _normal(member.name)
        parts = [part for part in name.split("/") if part]
        if len(parts) > DEEPEST:
            raise InputError(f"{path}: {member.name[:80]}… is nested more than {DEEPEST} folders deep")
        where = _followed(name, by_name)
        target = by_name.get(where)
        hidden = any(is_hidden(part) for part in parts)
        if where != name and not hidden and (where in folders if target is None else target.isdir()):
            raise InputError(
                f"{path}: {member.name} is a link to a folder; pack the archive with links followed (tar -h)"
            )
        if target is None or target.islnk() or target.issym():
            if not hidden and ending(member.name) in endings():
                raise InputError(f"{path}: {member.name} is a link whose target isn't in the archive")
            tree.leave_out("hidden" if hidden else "broken links")
        elif target.issparse():
            raise InputError(f"{path}: {member.name} is stored as a sparse file; pack the archive without sparse files")
        elif target.isfile():
            tree.put(parts, Member(target.offset_data, target.size))
        elif target.isdir():
            tree.put(parts, None)
    return tree


def _followed(name: str, by_name: Mapping[str, tarfile.TarInfo]) -> str:
    """The name that a link in the archive finally points to, after at most 8 links (more are taken for a cycle)."""
    for _ in range(8):
        member = by_name.get(name)
        if member is None or not (member.islnk() or member.issym()):
            break
        beside = posixpath.dirname(member.name) if member.issym() else ""
        name = _normal(posixpath.join(beside, member.linkname))
    return name


def _normal(name: str) -> str:
    return posixpath.normpath("/" + name).lstrip("/")


def _check_end(path: Path, end: int) -> None:
    """Raise ``InputError`` unless the archive ends at byte ``end``: Python's tarfile takes any unreadable header for the end."""
    with open(path, "rb") as file:
        file.seek(end)
        mark = file.read(_BLOCK)
        if len(mark) < _BLOCK or any(mark):
            raise InputError(
                f"{path}: damaged or truncated at byte {end} (no end-of-archive mark); get or pack it again"
            )
        blocks: Iterable[bytes] = iter(lambda: file.read(1 << 20), b"")
        if any(any(block) for block in blocks):
            raise InputError(
                f"{path}: has data after its end at byte {end}: it is damaged, or several archives were concatenated; unpack it"
            )
