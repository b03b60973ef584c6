"""Which files of a folder, or of a .tar archive, are the labelled images of a split: the rules, in one place.

A class is a folder; its images lie anywhere below it. A split is a folder of class folders whose name has the word train, test, val or
the like. What is hidden is left out and counted. What could be read in two ways is refused. docs/data.md tells users all of it.
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
_BESIDE = "set|data|dataset|images|imgs|img|split"  # as in trainset
_JUNK = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"}


@dataclass(frozen=True, slots=True)
class Entry:
    """An image of the class ``label``: its ``name`` in the split, with slashes, and the ``place`` its bytes are read from."""

    name: str
    label: int
    place: Any


@dataclass
class Split:
    """What was found: class names and images, both in order, and what was left out, by reason."""

    where: str
    class_names: list[str]
    entries: list[Entry]
    left_out: Counter[str]

    def told(self, colour: str) -> str:
        """One line for people; ``colour``: "grey" or the like."""
        counts = Counter(entry.label for entry in self.entries)
        kinds = Counter(ending(entry.name) for entry in self.entries).most_common()
        line = (
            f"{self.where}: {len(self.entries)} images ({', '.join(f'{number} {kind}' for kind, number in kinds)}) of "
            f"{len(self.class_names)} classes ({min(counts.values())} to {max(counts.values())} each), {colour}"
        )
        left = told_counts(self.left_out)
        return f"{line}; left out: {left}" if left else line


@dataclass
class Listing:
    """What lies directly in a folder: files by name (with the place of their bytes) and folders, without what is ``left_out``."""

    files: dict[str, Any] = field(default_factory=dict)
    folders: dict[str, Tree] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


class Tree:
    """A folder, on the disk or in an archive. ``told``: what people know it by."""

    def __init__(self, name: str, told: str) -> None:
        self.name, self.told = name, told

    @cached_property
    def listing(self) -> Listing:
        """Read when it is asked for."""
        raise NotImplementedError

    @cached_property
    def images(self) -> list[str]:
        """Names of the image files that lie directly in it."""
        known = endings()
        return sorted(name for name in self.listing.files if ending(name) in known)

    @cached_property
    def holds_images(self) -> bool:
        """Whether there are any, however deep."""
        return bool(self.images) or any(child.holds_images for child in self.listing.folders.values())

    @cached_property
    def with_images(self) -> list[Tree]:
        """Its folders that hold images."""
        return [child for child in self.ordered() if child.holds_images]

    def ordered(self) -> list[Tree]:
        """Its folders in the order people expect: c2 before c10."""
        return sorted(self.listing.folders.values(), key=lambda child: (_natural(child.name), child.name))

    def walk(self, inside: str = "") -> Iterator[tuple[str, Any]]:
        """Every image below: its name from here, and its place."""
        for name in self.images:
            yield inside + name, self.listing.files[name]
        for name, child in sorted(self.listing.folders.items()):
            yield from child.walk(f"{inside}{name}/")

    def left_out(self) -> Counter[str]:
        """What of this tree is no image, by reason."""
        images = set(self.images)
        others = (ending(name) or "no ending" for name in self.listing.files if name not in images)
        found = self.listing.left_out + Counter(f"not images ({kind})" for kind in others)
        return sum((child.left_out() for child in self.listing.folders.values()), found)


def ending(name: str) -> str:
    """The last ending with its dot, in lower case."""
    return posixpath.splitext(name)[1].lower()


def told_counts(counts: Counter[str]) -> str:
    """The commonest reasons with their numbers."""
    return ", ".join(f"{reason}: {number}" for reason, number in sorted(counts.most_common(8)))


def is_hidden(name: str) -> bool:
    """Names that systems and tools leave behind; they are never data."""
    return name.startswith(".") or name in _JUNK


def find_split(root: Tree, split: str) -> Split:
    """The images of ``split`` in ``root``. Raises ``InputError``: no such split, more than one reading, a class without images."""
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


def kind_of_split(name: str) -> str | None:
    """ "train", "test" or "val" where ``name`` has one of their words as a part ("Training", "seg_train", "test-images", "val2017")."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    parts = [re.sub(rf"(?<=.)({_BESIDE})$", "", part.lower()) for part in parts]
    kinds = {kind for kind, words in _WORDS.items() if words & set(parts)}
    return kinds.pop() if len(kinds) == 1 else None


def _is_split_name(name: str) -> bool:
    """Whether ``name`` says nothing but that it is a split: of the folder that a user names more is wanted than a word in it."""
    words = {word for words in _WORDS.values() for word in words} | set(_BESIDE.split("|"))
    return all(part.lower() in words or kind_of_split(part) for part in re.findall(r"[A-Za-z]+", name))


def _choose(root: Tree, split: str) -> Tree:
    """The folder of class folders that ``split`` means."""
    wanted = [kind_of_split(split) or ""]
    if wanted == ["test"]:
        wanted.append("val")  # ImageNet's test images have no labels: its val folder is what people test on
    own = kind_of_split(root.name) if _is_split_name(root.name) else None
    root = _unwrap(root)
    if not root.with_images:
        raise InputError(f"{root.told}: {_no_classes(root)}")
    # What the user calls by its exact name is a split, where it holds class folders.
    exact = [child for child in root.with_images if child.name == split and child.with_images]
    splits = {child.name: kind for child in root.with_images if (kind := kind_of_split(child.name))}
    if exact and split not in splits:
        return exact[0]
    if not _are_splits(root, splits):
        if own in wanted or (own is None and wanted == ["train"]):
            return root
        told = f"it is a {own} split by its own name" if own else f"it holds {_some(root.with_images)}"
        raise InputError(f"{root.told}: no {split} split ({told})")
    alike = [[child for child in root.with_images if splits.get(child.name) == kind] for kind in wanted]
    found = exact or next((children for children in alike if children), [])
    if not found:
        raise InputError(f"{root.told}: no {split} split (it holds {_some(root.with_images)})")
    if len(found) > 1:
        raise InputError(f"{root.told}: {_some(found)} could all be the {split} split; name one of them as the split")
    return found[0]


def _are_splits(root: Tree, splits: dict[str, str]) -> bool:
    """Whether the folders in ``root`` are splits, or classes. Raises ``InputError`` where both would make sense."""
    if not splits:
        return False
    flat = {child.name for child in root.with_images if not child.with_images}
    others = [child for child in root.with_images if child.name not in splits]
    named = [child for child in root.with_images if child.name in splits]
    if flat >= splits.keys():
        if others:
            return False
        raise InputError(
            f"{root.told}: the images of {_some(named)} lie in no class folders; wanted {named[0].name}/CLASS/*.png"
        )
    if not others or len(set(splits.values())) > 1:
        return True
    # Splits hold the same classes; the parts of different classes have different names.
    inside = {tree.name for child in named for tree in child.with_images}
    if all(inside & {tree.name for tree in other.with_images} for other in others):
        return True
    raise InputError(
        f"{root.told}: {_some(named)} may be a split, or a class beside {_some(others)}; give the folder of class folders "
        f"itself, or put the classes into a folder train"
    )


def _down(tree: Tree, through: Callable[[str], bool]) -> Tree:
    """Down from folders that hold one folder and nothing else, as far as that one holds folders and ``through`` takes its name."""
    while len(tree.with_images) == 1 and not tree.images:
        (only,) = tree.with_images
        if not only.with_images or not through(only.name):
            break
        tree = only
    return tree


def _unwrap(tree: Tree) -> Tree:
    """Through any folder but a split: an unpacked archive often has one around everything."""
    return _down(tree, lambda name: kind_of_split(name) is None)


def _inner(tree: Tree) -> Tree:
    """Of a split, through folders that are called like a split, or like what it holds, such as seg_train/seg_train or train/images."""
    return _down(tree, lambda name: bool(kind_of_split(name) or re.fullmatch(_BESIDE, name.lower())))


def _check_classes(chosen: Tree) -> None:
    """Raise ``InputError`` where the folders hold nothing but splits: CLASS/train and CLASS/test would be read together."""
    classes = chosen.with_images
    if classes and all(
        not tree.images and tree.with_images and all(kind_of_split(part.name) for part in tree.with_images)
        for tree in classes
    ):
        place = f"{classes[0].name}/{classes[0].with_images[0].name}"
        raise InputError(f"{chosen.told}: splits lie inside of its folders ({place}); wanted train/CLASS/*.png")


def _no_classes(tree: Tree) -> str:
    if tree.images:
        return f"{len(tree.images)} images lie in it directly; wanted class folders (CLASS/*.png), the class of an image is its folder"
    others = told_counts(tree.left_out())
    return "holds no images" + (f"; what lies there: {others}" if others else "")


def _some(trees: list[Tree]) -> str:
    names = [repr(tree.name) for tree in trees]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _natural(name: str) -> list[Any]:
    """Digits by their value; the key has texts at even places and numbers at odd ones, so any two compare."""
    parts: list[Any] = re.split(r"(\d+)", name.lower())
    parts[1::2] = [int(digits) for digits in parts[1::2]]
    return parts
