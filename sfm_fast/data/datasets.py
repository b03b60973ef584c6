"""Opens a data set by name: the embedded subset, full Fashion-MNIST, a folder or archive, or a data set of timm's create_dataset."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import InputError, reason_of
from ..files import expand
from . import fashion_mnist
from .folders import FileSource, open_files
from .hold_out import part_of
from .layout import NoSplitError, kind_of_split
from .sources import ArraySource, ImageSource, IterableSource, MapSource
from .spec import EMBEDDED as EMBEDDED
from .spec import HELP as HELP
from .spec import TIMM_PREFIXES, HoldOut, check_spec, is_fashion_mnist


def open_dataset(
    spec: str,
    split: str,
    *,
    root: str | None = None,
    channels: int | None = None,
    num_classes: int | None = None,
    workers: int | None = None,
    hold_out: float = 0.0,
    hold_out_seed: int = 0,
) -> ImageSource:
    """Open ``spec`` (see `HELP`) and its ``split``: "train", "test", or a split name of the data set itself.

    Args:
        root: folder for the files of timm's data sets (downloads and caches).
        channels: 1 or 3, channels that images are converted to; None: 1 if 64 sampled images are all grey, else 3.
        num_classes: only needed if the data set doesn't state it.
        workers: number of processes that decode images; None: one per core, at most 8.
        hold_out: for a folder, an archive or Fashion-MNIST, the share in 0..1 of each class's training images that "train" leaves out
            and "test" consists of; 0: the data set's own splits.
        hold_out_seed: chooses these images.

    Raises ``InputError`` if the data set can't be opened or has no such split.
    """
    held = HoldOut(hold_out=hold_out, hold_out_seed=hold_out_seed)
    check_spec(spec, split, root, held)
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    own = "train" if held.hold_out else split
    if spec.startswith(TIMM_PREFIXES):
        return _timm(spec, root, own, channels, num_classes, workers)
    source = _fashion_mnist(spec, own) if is_fashion_mnist(spec) else _files(spec, own, channels, workers)
    return part_of(source, split, held) if held.hold_out else source


def _fashion_mnist(spec: str, split: str) -> ArraySource:
    which: Any = split
    try:
        if spec == EMBEDDED:
            images, labels = fashion_mnist.load_embedded(which)
        else:
            images, labels = fashion_mnist.load_full(which, spec.partition(":")[2] or None)
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error
    return ArraySource(f"{spec}/{split}", images, labels, fashion_mnist.CLASS_NAMES)


def _files(spec: str, split: str, channels: int | None, workers: int) -> FileSource:
    path = expand(spec, "data")
    if path.is_dir():
        return open_files(path, split, channels, workers)
    archive = _archive_of(path, split)
    source = open_files(archive, split, channels, workers)
    try:
        if _archive_of(path, "test") != archive:
            source.no_test = ""
    except InputError as error:
        source.no_test = str(error)
    return source


def _archive_of(path: Path, split: str) -> Path:
    """The archive with ``split``: ``path`` itself, or for the other split the archive next to it, such as test.tar or val.tar for "test"."""
    wanted = kind_of_split(split) or split
    if path.stem == split or kind_of_split(path.stem) in (None, wanted):
        return path
    for kind in (wanted, "val") if wanted == "test" else (wanted,):
        beside = [
            other for other in sorted(path.parent.glob("*.tar")) if kind in (other.stem, kind_of_split(other.stem))
        ]
        if len(beside) > 1:
            names = ", ".join(other.name for other in beside)
            raise InputError(f"{path}: {names} could all be the {split} split; give the archive itself")
        if beside:
            return beside[0]
    raise NoSplitError(f"{path}: no {split} split in its folder (looked for {wanted}.tar)")


def _timm(
    spec: str, root: str | None, split: str, channels: int | None, num_classes: int | None, workers: int
) -> ImageSource:
    import timm.data

    name = f"{spec}/{split}"
    timm_split = "validation" if split == "test" and spec.startswith(("hfds/", "hfids/", "wds/", "tfds/")) else split
    try:
        dataset: Any = timm.data.create_dataset(spec, root=root, split=timm_split, is_training=False, download=True)
        iterable = not hasattr(dataset, "__getitem__") or isinstance(dataset, timm.data.IterableImageDataset)
        class_names = _class_names(dataset, num_classes)
        if not iterable and len(dataset) == 0:
            raise InputError(f"{name}: holds no images")
    except InputError:
        raise
    except Exception as error:  # readers raise anything from KeyError to network errors
        raise InputError(f"{name}: can't be opened ({type(error).__name__}: {reason_of(error)})") from error
    if class_names is None:
        raise InputError(f"{name}: doesn't state its number of classes; give num_classes (--num-classes)")
    if iterable:
        return IterableSource(dataset, class_names, channels or 3, name)
    # Use timm's reader directly, because its data set replaces an unreadable image by the next one.
    items = getattr(dataset, "reader", None) or dataset
    return MapSource(name, items, class_names, channels, workers, _Described(dataset, name))


def _class_names(dataset: Any, num_classes: int | None) -> list[str] | None:
    reader = getattr(dataset, "reader", None)
    mapping = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    names = sorted(mapping, key=mapping.get) if mapping else getattr(dataset, "classes", None)
    features = getattr(getattr(reader, "dataset", None), "features", None)  # Hugging Face datasets
    if names is None and features is not None:
        label = features.get(getattr(reader, "label_key", "label"))
        names = getattr(label, "names", None)
    if names is None and num_classes is not None:
        names = [str(c) for c in range(num_classes)]
    return [str(n) for n in names] if names else None


class _Described:
    """The name of the item at an index, for messages; can be pickled for worker processes."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name

    def __call__(self, index: int) -> str:
        if hasattr(self.dataset, "filename"):
            return str(self.dataset.filename(index, absolute=True))
        return f"{self.name}: item {index}"
