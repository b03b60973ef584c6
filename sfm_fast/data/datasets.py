"""Opens a data set by name: the embedded subset, full Fashion-MNIST, a folder or archive, or a data set of timm's create_dataset."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import InputError, reason_of, require_package
from ..files import expand
from . import fashion_mnist
from .folders import open_files
from .layout import kind_of_split
from .sources import ArraySource, ImageSource, IterableSource, MapSource

EMBEDDED = "embedded"
FULL_FASHION_MNIST = "fashion-mnist"
TIMM_PREFIXES = ("hfds/", "hfids/", "wds/", "tfds/", "torch/")
HELP = (
    f"'{EMBEDDED}' (a subset of Fashion-MNIST), '{FULL_FASHION_MNIST}[:FOLDER]' (all of it), a folder (train/CLASS/*, test/CLASS/*), "
    "train.tar (an archive of CLASS/*, with test.tar in the same folder), or a name for timm's create_dataset: hfds/…, wds/…, torch/…"
)


def open_dataset(
    spec: str,
    split: str,
    *,
    root: str | None = None,
    channels: int | None = None,
    num_classes: int | None = None,
    workers: int | None = None,
) -> ImageSource:
    """Open ``spec`` (see `HELP`) and its ``split``: "train", "test", or a split name of the data set itself.

    Args:
        root: folder for the files of timm's data sets (downloads and caches).
        channels: 1 or 3, channels that images are converted to; None: 1 if 64 sampled images are all grey, else 3.
        num_classes: only needed if the data set doesn't state it.
        workers: number of processes that decode images; None: one per core, at most 8.

    Raises ``InputError`` if the data set can't be opened or has no such split.
    """
    if not spec:
        raise InputError("data must be " + HELP + ", got an empty name")
    if spec in (EMBEDDED, FULL_FASHION_MNIST) or spec.startswith(FULL_FASHION_MNIST + ":"):
        return _fashion_mnist(spec, split)
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    if spec.startswith(TIMM_PREFIXES):
        return _timm(spec, root, split, channels, num_classes, workers)
    path = expand(spec, "data")
    if path.is_dir():
        return open_files(path, split, channels, workers)
    if path.is_file() and path.suffix.lower() == ".tar":
        return open_files(_archive_of(path, split), split, channels, workers)
    if path.is_file() and path.name.lower().endswith(
        (".zip", ".tgz", ".tbz2", ".txz", ".gz", ".xz", ".bz2", ".zst", ".7z", ".rar")
    ):
        raise InputError(f"data: {spec!r} is compressed: unpack it into a folder, or into an uncompressed .tar")
    raise InputError(f"data: {spec!r} is no existing folder or .tar file; data must be {HELP}")


def _fashion_mnist(spec: str, split: str) -> ImageSource:
    if split not in ("train", "test"):
        raise InputError(f"split must be 'train' or 'test' for {spec}, got {split!r}")
    which: Any = split
    try:
        if spec == EMBEDDED:
            images, labels = fashion_mnist.load_embedded(which)
        else:
            images, labels = fashion_mnist.load_full(which, spec.partition(":")[2] or None)
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error
    return ArraySource(f"{spec}/{split}", images, labels, fashion_mnist.CLASS_NAMES)


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
    raise InputError(f"{path}: no {split} split in its folder (looked for {wanted}.tar)")


def _timm(
    spec: str, root: str | None, split: str, channels: int | None, num_classes: int | None, workers: int
) -> ImageSource:
    require_package("timm", f"the data set {spec!r}", "distill")
    import timm.data

    name = f"{spec}/{split}"
    if spec.startswith("torch/") and root is None:
        raise InputError(f"{spec}: needs the folder of its files (root, --data-root)")
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
