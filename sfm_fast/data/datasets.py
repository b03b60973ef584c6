"""Open a data set by name: the embedded subset, full Fashion-MNIST, a folder or archive, anything timm's create_dataset opens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import InputError, require_package
from . import fashion_mnist
from .sources import ArraySource, ImageSource, IterableSource, MapSource

EMBEDDED = "embedded"
FULL_FASHION_MNIST = "fashion-mnist"
TIMM_PREFIXES = ("hfds/", "hfids/", "wds/", "tfds/", "torch/")
HELP = (
    f"'{EMBEDDED}' (a subset of Fashion-MNIST), '{FULL_FASHION_MNIST}[:FOLDER]' (all of it), a folder (train/CLASS/*.png, test/CLASS/*.png), "
    "train.tar (CLASS/*.png inside, test.tar beside it), or a name timm's create_dataset opens: hfds/…, wds/…, torch/…"
)
_SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val", "validation")}


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
        root: folder of data for timm's names (downloads and caches).
        channels: 1 or 3; None takes what the first image has.
        num_classes: needed only where the data set doesn't say.
        workers: processes that decode images; None takes one a core, at most 8.

    Raises ``InputError`` that says what is missing.
    """
    if not spec:
        raise InputError("data: an empty name; wanted " + HELP)
    if spec in (EMBEDDED, FULL_FASHION_MNIST) or spec.startswith(FULL_FASHION_MNIST + ":"):
        return _fashion_mnist(spec, split)
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    if spec.startswith(TIMM_PREFIXES):
        return _timm(spec, root, split, channels, num_classes, workers, download=True)
    path = Path(spec).expanduser()
    if path.is_dir():
        folder = _split_folder(path, split)
        _check_class_folders(folder)
        return _timm("", str(folder), split, channels, num_classes, workers, name=str(folder))
    if path.is_file() and path.suffix == ".tar":
        archive = _split_archive(path, split)
        # No tar info pickled beside the archive, and no open file handle shared between forked workers.
        return _timm(
            "",
            str(archive),
            split,
            channels,
            num_classes,
            workers,
            name=str(archive),
            cache_tarinfo=False,
            cache_tarfiles=False,
        )
    raise InputError(f"data: {spec!r} is no folder or .tar file here; wanted {HELP}")


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


def _split_folder(path: Path, split: str) -> Path:
    """path/train, path/test, … ; the folder itself is a train split if it has no such subfolders."""
    names = _SPLIT_FOLDERS.get(split, (split,))
    for name in names:
        if (path / name).is_dir():
            return path / name
    has_splits = any((path / name).is_dir() for names in _SPLIT_FOLDERS.values() for name in names)
    if split == "train" and not has_splits:
        return path
    raise InputError(f"{path}: no {split} split (looked for the folders {', '.join(names)})")


def _check_class_folders(folder: Path) -> None:
    """Raise ``InputError`` naming a class folder without images: timm would leave the class out and shift the labels."""
    from timm.data.readers.img_extensions import get_img_extensions

    suffixes = tuple(get_img_extensions())
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.startswith("."):
            files = (name for _, _, names in os.walk(child) for name in names)
            if not any(name.lower().endswith(suffixes) for name in files):
                raise InputError(f"{child}: this class folder holds no images")


def _split_archive(path: Path, split: str) -> Path:
    """train.tar itself for "train"; beside it test.tar or val.tar for "test"."""
    if split == "train" or path.stem == split:
        return path
    beside = [path.with_name(f"{name}.tar") for name in _SPLIT_FOLDERS.get(split, (split,))]
    for archive in beside:
        if archive.is_file():
            return archive
    raise InputError(f"{path}: no {split} split beside it (looked for {', '.join(archive.name for archive in beside)})")


def _timm(
    spec: str,
    root: str | None,
    split: str,
    channels: int | None,
    num_classes: int | None,
    workers: int,
    *,
    name: str = "",
    download: bool = False,
    **reader_options: Any,
) -> ImageSource:
    require_package("timm", f"the data set {name or spec!r}", "distill")
    import timm.data
    from PIL import Image

    name = name or f"{spec}/{split}"
    timm_split = "validation" if split == "test" and spec.startswith(("hfds/", "hfids/", "wds/", "tfds/")) else split
    try:
        dataset: Any = timm.data.create_dataset(
            spec, root=root, split=timm_split, is_training=False, download=download, **reader_options
        )
        iterable = not hasattr(dataset, "__getitem__") or isinstance(dataset, timm.data.IterableImageDataset)
        class_names = _class_names(dataset, num_classes)
        if not iterable and len(dataset) == 0:
            raise InputError(f"{name}: holds no images")
    except InputError:
        raise
    except Exception as error:  # readers raise anything from KeyError to network errors
        raise InputError(
            f"{name}: can't be opened ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"
        ) from error
    if class_names is None:
        raise InputError(f"{name}: doesn't say how many classes it has; give num_classes (--num-classes)")
    if iterable:
        return IterableSource(dataset, class_names, channels or 3, name)

    reader = getattr(dataset, "reader", None)
    if not spec and root is not None and root.endswith(".tar") and reader is not None:
        tops = {sample[0].path.removeprefix("./").partition("/")[0] for sample in reader.samples}
        if inside := tops & {name for names in _SPLIT_FOLDERS.values() for name in names}:
            raise InputError(
                f"{name}: holds the splits {sorted(inside)} in one archive; wanted train.tar, and test.tar beside it"
            )

    def describe(index: int) -> str:
        return str(dataset.filename(index, absolute=True)) if hasattr(dataset, "filename") else f"{name}: item {index}"

    read = _ReaderView(reader) if reader is not None else dataset
    if channels is None:
        try:
            first = read[0][0]
        except Exception as error:  # Pillow raises half a dozen kinds
            raise InputError(f"{describe(0)}: unreadable image ({error})") from error
        channels = 1 if isinstance(first, Image.Image) and first.mode in ("L", "1", "I", "I;16", "F") else 3
    return MapSource(name, read, class_names, channels, workers, describe)


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


class _ReaderView:
    """timm's reader without the data set around it, which would skip unreadable images and return their neighbour."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        image, label = self.reader[index]
        if not hasattr(image, "convert"):
            with Image.open(image) as opened:
                opened.load()
                image = opened
        return image, label
