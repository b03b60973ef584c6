"""The rules by which files of a folder, or of a .tar archive, become the labelled images of a split (for users: docs/data.md).

A class is a folder, with its images anywhere below it. A split is a folder of class folders whose name contains train, test, val or a
similar word. Hidden files are left out and counted. A layout with two possible readings is an error.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import InputError
from .decoder import endings

_WORDS = {
    "train": {"train", "training", "trn"},
    "test": {"test", "testing", "tst"},
    "val": {"val", "valid", "validation", "eval", "evaluation"},
}
_BESIDE = "set|data|dataset|images|imgs|img|split"  # suffixes, as in trainset
_JUNK = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"}


class NoSplitError(InputError):
    """A folder or archive has no such split."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An image of the class ``label``: its ``name``, a path within the split, and the ``place`` of its bytes (a path or `Member`)."""

    name: str
    label: int
    place: Any


@dataclass
class Split:
    """The ordered class names and images of a split, and the number of files left out, by reason."""

    where: str
    class_names: list[str]
    entries: list[Entry]
    left_out: Counter[str]

    def told(self, colour: str) -> str:
        """A summary in one line; ``colour``: "grey" or "in colour"."""
        counts = Counter(entry.label for entry in self.entries)
        kinds = Counter(ending(entry.name) for entry in self.entries).most_common()
        line = (
            f"{self.where}: {len(self.entries)} images ({', '.join(f'{number} {kind}' for kind, number in kinds)}) of "
            f"{len(self.class_names)} classes ({min(counts.values())} to {max(counts.values())} per class), {colour}"
        )
        left = told_counts(self.left_out)
        return f"{line}; left out: {left}" if left else line


@dataclass
class Listing:
    """The direct contents of a folder: files by name (with the place of their bytes) and folders, without those ``left_out``."""

    files: dict[str, Any] = field(default_factory=dict)
    folders: dict[str, Tree] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


class Tree:
    """A folder, on disk or in an archive. ``told``: its path, for messages."""

    def __init__(self, name: str, told: str) -> None:
        self.name, self.told = name, told

    @cached_property
    def listing(self) -> Listing:
        """Its direct contents, read at the first use."""
        raise NotImplementedError

    @cached_property
    def images(self) -> list[str]:
        """Names of the image files directly in it."""
        known = endings()
        return sorted(name for name in self.listing.files if ending(name) in known)

    @cached_property
    def holds_images(self) -> bool:
        """Whether it contains images at any depth."""
        return bool(self.images) or any(child.holds_images for child in self.listing.folders.values())

    @cached_property
    def with_images(self) -> list[Tree]:
        """Its direct subfolders that contain images."""
        return [child for child in self.ordered() if child.holds_images]

    def ordered(self) -> list[Tree]:
        """Its subfolders in natural order: c2 before c10."""
        return sorted(self.listing.folders.values(), key=lambda child: (_natural(child.name), child.name))

    def walk(self, inside: str = "") -> Iterator[tuple[str, Any]]:
        """All images at any depth: relative path and place."""
        for name in self.images:
            yield inside + name, self.listing.files[name]
        for name, child in sorted(self.listing.folders.items()):
            yield from child.walk(f"{inside}{name}/")

    def left_out(self) -> Counter[str]:
        """Number of files in this tree that aren't images, by reason."""
        images = set(self.images)
        others = (ending(name) or "no ending" for name in self.listing.files if name not in images)
        own = self.listing.left_out + Counter(f"not images ({kind})" for kind in others)
        return sum((child.left_out() for child in self.listing.folders.values()), own)


def ending(name: str) -> str:
    """The file name's ending with its dot, in lower case."""
    return posixpath.splitext(name)[1].lower()


def told_counts(counts: Counter[str]) -> str:
    """The most frequent reasons with their numbers."""
    return ", ".join(f"{reason}: {number}" for reason, number in sorted(counts.most_common(8)))


def is_hidden(name: str) -> bool:
    """Whether a name is hidden, or of a folder that operating systems create."""
    return name.startswith(".") or name in _JUNK


def find_split(root: Tree, split: str) -> Split:
    """The images of ``split`` in ``root``. Raises ``InputError`` if there is no such split, an ambiguous one, or a class without images."""
    chosen = _inner(_choose(root, split))
    _check_classes(chosen)
    classes: list[str] = []
    entries: list[Entry] = []
    for tree in chosen.ordered():
        if not tree.holds_images:
            others = told_counts(tree.left_out())
            raise InputError(f"{tree.told}: this class folder holds no images" + (f" ({others})" if others else ""))
        entries += [Entry(f"{tree.name}/{name}", len(classes), place) for name, place in tree.walk()]
        classes.append(tree.name)
    left_out = chosen.left_out()
    if chosen.images:
        left_out["in no class folder"] += len(chosen.images)
    if not entries:
        raise InputError(f"{chosen.told}: {_no_classes(chosen)}")
    return Split(chosen.told, classes, entries, left_out)


def why_no_split(root: Tree, split: str) -> str:
    """Why `find_split` would not find ``split``, or "" if it would choose a folder for it."""
    try:
        _choose(root, split)
    except InputError as error:
        return str(error)
    return ""


def kind_of_split(name: str) -> str | None:
    """ "train", "test" or "val" if ``name`` contains one of their words ("Training", "seg_train", "test-images", "val2017")."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    parts = [re.sub(rf"(?<=.)({_BESIDE})$", "", part.lower()) for part in parts]
    kinds = {kind for kind, words in _WORDS.items() if words & set(parts)}
    return kinds.pop() if len(kinds) == 1 else None


def _is_split_name(name: str) -> bool:
    """Whether all words of ``name`` mean a split; for the user's own folder, one such word in its name isn't enough."""
    words = {word for words in _WORDS.values() for word in words} | set(_BESIDE.split("|"))
    return all(part.lower() in words or kind_of_split(part) for part in re.findall(r"[A-Za-z]+", name))


def _choose(root: Tree, split: str) -> Tree:
    """The folder of class folders for ``split``."""
    wanted = [kind_of_split(split) or ""]
    if wanted == ["test"]:
        wanted.append("val")  # ImageNet's test images have no labels, so its val folder is used for tests
    own = kind_of_split(root.name) if _is_split_name(root.name) else None
    root = _unwrap(root)
    if not root.with_images:
        raise InputError(f"{root.told}: {_no_classes(root)}")
    # A folder with exactly the name that the user gives is the split, if it contains class folders.
    exact = [child for child in root.with_images if child.name == split and child.with_images]
    splits = {child.name: kind for child in root.with_images if (kind := kind_of_split(child.name))}
    if exact and split not in splits:
        return exact[0]
    if not _are_splits(root, splits):
        if own in wanted or (own is None and wanted == ["train"]):
            return root
        reason = f"by its own name it is a {own} split" if own else f"it holds {_some(root.with_images)}"
        raise NoSplitError(f"{root.told}: no {split} split ({reason})")
    by_kind = [[child for child in root.with_images if splits.get(child.name) == kind] for kind in wanted]
    candidates = exact or next((children for children in by_kind if children), [])
    if not candidates:
        raise NoSplitError(f"{root.told}: no {split} split (it holds {_some(root.with_images)})")
    if len(candidates) > 1:
        raise InputError(
            f"{root.told}: {_some(candidates)} could all be the {split} split; name one of them as the split"
        )
    return candidates[0]


def _are_splits(root: Tree, splits: dict[str, str]) -> bool:
    """Whether the folders in ``root`` are splits rather than classes. Raises ``InputError`` if they could be either."""
    if not splits:
        return False
    flat = {child.name for child in root.with_images if not child.with_images}
    others = [child for child in root.with_images if child.name not in splits]
    named = [child for child in root.with_images if child.name in splits]
    if flat >= splits.keys():
        if others:
            return False
        raise InputError(
            f"{root.told}: the images of {_some(named)} must be in class folders, {named[0].name}/CLASS/*.png"
        )
    if not others or len(set(splits.values())) > 1:
        return True
    # Splits have the same classes, so their subfolders have common names; subfolders of classes don't.
    inside = {tree.name for child in named for tree in child.with_images}
    if all(inside & {tree.name for tree in other.with_images} for other in others):
        return True
    raise InputError(
        f"{root.told}: {_some(named)} may be a split, or a class like {_some(others)}; give the folder of class folders "
        f"itself, or move the classes into a folder train"
    )


def _down(tree: Tree, through: Callable[[str], bool]) -> Tree:
    """Descend while a folder holds a single folder and no images, that one holds folders too, and ``through`` accepts its name."""
    while len(tree.with_images) == 1 and not tree.images:
        (only,) = tree.with_images
        if not only.with_images or not through(only.name):
            break
        tree = only
    return tree


def _unwrap(tree: Tree) -> Tree:
    """Descend through enclosing folders other than splits, which unpacked archives often have."""
    return _down(tree, lambda name: kind_of_split(name) is None)


def _inner(tree: Tree) -> Tree:
    """Descend in a split through folders named like a split or its contents, as in seg_train/seg_train or train/images."""
    return _down(tree, lambda name: bool(kind_of_split(name) or re.fullmatch(_BESIDE, name.lower())))


def _check_classes(chosen: Tree) -> None:
    """Raise ``InputError`` if the class folders hold only splits: CLASS/train and CLASS/test would be read together."""
    classes = chosen.with_images
    if classes and all(
        not tree.images and tree.with_images and all(kind_of_split(part.name) for part in tree.with_images)
        for tree in classes
    ):
        place = f"{classes[0].name}/{classes[0].with_images[0].name}"
        raise InputError(
            f"{chosen.told}: its class folders contain splits ({place}), but the layout must be train/CLASS/*.png"
        )


def _no_classes(tree: Tree) -> str:
    if tree.images:
        return f"{len(tree.images)} images are directly in it, but they must be in class folders (CLASS/*.png)"
    others = told_counts(tree.left_out())
    return "holds no images" + (f"; left out: {others}" if others else "")


def _some(trees: list[Tree]) -> str:
    names = [repr(tree.name) for tree in trees]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _natural(name: str) -> list[Any]:
    """Sorting key that orders digits by value: strings at even positions, numbers at odd ones, so that all keys compare."""
    parts: list[Any] = re.split(r"(\d+)", name.lower())
    parts[1::2] = [int(digits) for digits in parts[1::2]]
    return parts
