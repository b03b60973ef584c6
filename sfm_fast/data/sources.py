"""Sources of labelled real images (arrays, map-style data sets, iterables), read batch by batch."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import philox
from ..checks import check_labels
from ..errors import InputError, require_package
from .decoder import is_grey
from .loader import ReadItems, read_batches, unreadable
from .samples import image_and_label, is_batch, opened, read_sample, singles
from .transforms import ImageTransform, to_floats

SAMPLED = 64  # images examined to decide whether a data set is grey
DIGESTED = 32  # images whose contents go into a fingerprint


class ImageSource:
    """Labelled images: ``batches`` streams all of them in order, ``take`` fetches some by index.

    channels: of synthetic images made from it, 1 if it is grey, else 3. random_access: whether ``take`` reads only the images it needs,
    or all of them. once: whether it can be read once only. told: a summary of the data set in one line, or "". no_test: why a folder or archive has no test split, or "".
    """

    name: str
    class_names: list[str]
    channels: int
    random_access = True
    once = False
    told = ""
    no_test = ""

    @property
    def exact_channels(self) -> int:
        """Channels that images are read with to compute features: 3 unless all are known to be grey, because a guess could change features."""
        return self.channels

    def __len__(self) -> int:
        raise NotImplementedError

    def batches(self, batch_size: int, transform: ImageTransform) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (B, channels, crop, crop) float32 in 0..1 and labels (B,) int64."""
        raise NotImplementedError

    def take(self, indices: Sequence[int], transform: ImageTransform) -> tuple[Tensor, Tensor]:
        """Images and labels at ``indices``, in that order; this default implementation makes one pass over all images."""
        wanted: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            wanted.setdefault(index, []).append(place)
        taken: list[tuple[Tensor, Tensor] | None] = [None] * len(indices)
        position = 0
        for images, labels in self.batches(256, transform):
            for row in range(len(labels)):
                for place in wanted.get(position + row, ()):
                    taken[place] = (images[row].clone(), labels[row])
            position += len(labels)
        if any(pair is None for pair in taken):
            raise InputError(f"{self.name}: an index in {list(indices)[:8]}… is beyond its {position} images")
        pairs = [pair for pair in taken if pair is not None]
        return torch.stack([image for image, _ in pairs]), torch.stack([label for _, label in pairs])

    def draw(self, count: int, transform: ImageTransform, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """``count`` random images and labels without replacement, determined by ``seed`` and ``step``."""
        chosen = philox.permutation(len(self), seed=seed, stream=philox.Stream.REAL_BATCH, step=step)[:count]
        images, labels = self.take(chosen.tolist(), transform)
        check_labels(f"labels of {self.name}", labels, len(images), len(self.class_names))
        return images, labels

    def counts(self) -> list[int] | None:
        """Number of images of each class, or None if it isn't known without reading them."""
        return None

    def fingerprint(self) -> str:
        """16 hex digits that identify the data set independent of its location; "" if two passes may give different images."""
        return ""


class ArraySource(ImageSource):
    """Images in memory: (N, H, W) or (N, H, W, 3) uint8, labels (N,) int64."""

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> None:
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise InputError(f"images must be (N, H, W[, 3]) uint8, got {images.shape} {images.dtype}")
        if len(images) != len(labels):
            raise InputError(f"labels must be as many as images, {len(images)}, got {len(labels)}")
        self.name, self.class_names = name, list(class_names)
        tensor = torch.from_numpy(np.ascontiguousarray(images))
        self.images = tensor.unsqueeze(1) if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2)
        self.labels = torch.from_numpy(np.ascontiguousarray(labels)).long()
        self.channels = self.images.shape[1]

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int, transform: ImageTransform) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self), batch_size):
            rows = slice(start, start + batch_size)
            yield transform.batch(self.images[rows]), self.labels[rows]

    def take(self, indices: Sequence[int], transform: ImageTransform) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return transform.batch(self.images[rows]), self.labels[rows]

    def subset(self, rows: Sequence[int], name: str) -> ArraySource:
        """The images at ``rows`` as a source of their own."""
        part = copy.copy(self)
        part.name, part.images, part.labels = name, self.images[rows], self.labels[rows]
        return part

    def counts(self) -> list[int]:
        return torch.bincount(self.labels, minlength=len(self.class_names)).tolist()

    def fingerprint(self) -> str:
        digest = hashlib.sha256("\0".join(self.class_names).encode())
        for part in (self.images, self.labels):
            digest.update(f"{tuple(part.shape)}".encode())
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()[:16]


class MapSource(ImageSource):
    """Any map-style data set of items that `samples` supports, decoded by ``workers`` processes.

    channels: None: decided by a sample of the images.
    """

    def __init__(
        self,
        name: str,
        dataset: Any,
        class_names: Sequence[str],
        channels: int | None,
        workers: int,
        describe: Callable[[int], str],
    ) -> None:
        self.name, self.dataset, self.class_names = name, dataset, list(class_names)
        self.workers, self.describe = workers, describe
        self._given = channels
        self.colour = "in colour" if channels == 3 else "grey"
        self.channels = self._look() if channels is None else channels
        self.told = f"{name}: {len(self)} images of {len(self.class_names)} classes, {self.colour}"

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def exact_channels(self) -> int:
        return self._given or 3

    def _look(self) -> int:
        """1 if every image of a sample is grey, else 3."""
        places = evenly_spaced(len(self), SAMPLED)
        grey = 0
        for index in places:
            try:
                grey += self._is_grey(index)
            except Exception as error:  # a data set may raise any exception
                raise unreadable(self.describe(index), error) from error
        if places and grey == len(places):
            return 1
        self.colour = "in colour" + (f" ({grey} of {len(places)} sampled images are grey)" if grey else "")
        return 3

    def _is_grey(self, index: int) -> bool:
        image = opened(image_and_label(self.dataset[index])[0])
        if hasattr(image, "convert"):
            return is_grey(image)
        shape = tuple(image.shape) if isinstance(image, Tensor) else np.shape(image)
        return len(shape) == 2 or (len(shape) == 3 and 1 in (shape[0], shape[2]))

    def _loader(
        self, indices: Sequence[int], batch_size: int, transform: ImageTransform
    ) -> Iterator[tuple[Tensor, Tensor]]:
        view = ReadItems(self.dataset, indices, transform, self.describe, self.class_names)
        workers = self.workers if len(indices) > batch_size else 0
        for batch in read_batches(view, batch_size, workers, self.name):
            if isinstance(
                batch, str
            ):  # errors are sent as text, because an exception would include the worker's traceback
                raise InputError(batch)
            pixels, labels = batch
            yield to_floats(torch.from_numpy(pixels)), torch.from_numpy(labels)

    def batches(self, batch_size: int, transform: ImageTransform) -> Iterator[tuple[Tensor, Tensor]]:
        return self._loader(range(len(self)), batch_size, transform)

    def take(self, indices: Sequence[int], transform: ImageTransform) -> tuple[Tensor, Tensor]:
        batches = list(self._loader(indices, 256, transform))
        return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])

    def fingerprint(self) -> str:
        if not len(self):
            return ""
        digests = [self._digest(), self._digest()]
        return digests[0] if digests[0] == digests[1] else ""  # the data set applies random transforms

    def _digest(self) -> str:
        images, labels = self.take(evenly_spaced(len(self), DIGESTED), ImageTransform(64, 64, self.exact_channels))
        digest = hashlib.sha256(f"{len(self)}\0{self.class_names}".encode(errors="surrogateescape"))
        for part in (images, labels):
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()[:16]


class IterableSource(ImageSource):
    """Any iterable of items, or of batches of them, that `samples` supports, iterated again in every pass.

    A generator can only be iterated once, which is enough for statistics; use a list, a data set or a class with ``__iter__`` if
    several passes are needed.
    """

    random_access = False

    @property
    def once(self) -> bool:  # type: ignore[override]
        return iter(self.iterable) is self.iterable

    def __init__(
        self, iterable: Iterable[Any], class_names: Sequence[str], channels: int, name: str = "iterable"
    ) -> None:
        self.iterable, self.class_names, self.channels, self.name = iterable, list(class_names), channels, name
        self._started = False

    def __len__(self) -> int:
        """The number of images, or 0 if it isn't known."""
        if isinstance(self.iterable, torch.utils.data.DataLoader):  # its length counts batches
            return _length(self.iterable.dataset)
        return 0 if _holds_batches(self.iterable) else _length(self.iterable)

    def batches(self, batch_size: int, transform: ImageTransform) -> Iterator[tuple[Tensor, Tensor]]:
        if self.once and self._started:
            raise InputError(
                f"{self.name}: a generator can only be read once, but this needs a second pass; give a list or a data set"
            )
        self._started = True
        images: list[Tensor] = []
        labels: list[int] = []
        for position, item in enumerate(self._items()):
            try:
                read, target = read_sample(item, transform, self.class_names)
            except InputError as error:
                raise InputError(f"{self.name}: item {position}: {error}") from error
            images.append(to_floats(read))
            labels.append(target)
            if len(images) == batch_size:
                yield torch.stack(images), torch.tensor(labels)
                images, labels = [], []
        if images:
            yield torch.stack(images), torch.tensor(labels)

    def _items(self) -> Iterator[Any]:
        iterator = iter(self.iterable)
        position = 0
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                return
            except InputError:
                raise
            except Exception as error:  # a data set may raise any exception
                raise unreadable(f"{self.name}: item {position}", error) from error
            try:
                parts = singles(item)
                for part in parts:
                    yield part
                    position += 1
            except InputError as error:
                raise InputError(f"{self.name}: item {position}: {error}") from error


def from_iterable(iterable: Iterable[Any], class_names: Sequence[str], channels: int = 3) -> ImageSource:
    """Labelled images from Python: a data set with ``__getitem__`` and ``__len__`` (random access), any iterable, or a DataLoader.

    An item is (image, label), with further elements ignored, or a mapping with keys such as "image" and "label". Images are as for
    `ImageTransform`, or paths, or the bytes of a file; a label is a class number, an array with one element, a one-hot vector or one
    of ``class_names``. An iterable may yield batches like a DataLoader: images (B, channels, H, W) and labels (B,). A shuffling
    DataLoader is read in its data set's order, so that all passes give the same images.

    channels: 1 (grey) or 3 (colour), channels that images are converted to. Raises ``InputError`` for data of another kind.
    """
    if channels not in (1, 3):
        raise InputError(f"channels must be 1 (grey) or 3 (colour), got {channels}")
    _check_names(class_names)
    indexed = hasattr(iterable, "__getitem__") and hasattr(iterable, "__len__")
    if isinstance(iterable, Mapping) or not (indexed or hasattr(iterable, "__iter__")):
        raise InputError(
            f"data must be a data set or an iterable of (image, label), got a {type(iterable).__name__}; from columns make "
            "list(zip(images, labels))"
        )
    # An IterableDataset inherits a __getitem__ that only raises.
    if indexed and not isinstance(iterable, torch.utils.data.IterableDataset) and not _holds_batches(iterable):
        return MapSource("data set", iterable, class_names, channels, 0, _item)
    require_package("PIL", "reading images", "distill")
    return IterableSource(_in_order(iterable), class_names, channels)


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most ``most`` of the indices below ``count``, including the first and the last."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most)).tolist()})


def _check_names(class_names: Any) -> None:
    named = isinstance(class_names, Sequence) and not isinstance(class_names, str)
    if not named or not all(isinstance(name, str) for name in class_names):
        raise InputError(f"class_names must be a list of strings, got {str(class_names)[:80]!r}")
    twice = [name for name, count in Counter(class_names).items() if count > 1]
    if twice:
        raise InputError(f"class_names must differ, got {twice[0]!r} more than once")


def _holds_batches(items: Any) -> bool:
    """Whether ``items`` is a list of batches; items of other data sets aren't read to find out."""
    if not isinstance(items, (list, tuple)) or not items:
        return False
    try:
        return is_batch(items[0])
    except InputError:  # reported with the item's number when it is read
        return False


def _item(index: int) -> str:
    return f"item {index}"


def _length(sized: Any) -> int:
    try:
        return len(sized)
    except TypeError:
        return 0


def _in_order(iterable: Iterable[Any]) -> Iterable[Any]:
    loader = torch.utils.data.DataLoader
    if not isinstance(iterable, loader):
        return iterable
    if isinstance(iterable.dataset, torch.utils.data.IterableDataset):
        if iterable.drop_last:
            raise InputError("a DataLoader with drop_last leaves images out; create it without")
        return iterable
    batches, drawn, whole = iterable.batch_sampler, iterable.sampler, not iterable.drop_last
    if type(batches) is torch.utils.data.BatchSampler:  # the user may have passed a batch sampler with its own sampler
        drawn, whole = batches.sampler, not batches.drop_last
    elif batches is not None:
        drawn = batches
    if isinstance(drawn, torch.utils.data.SequentialSampler) and whole:
        return iterable
    if type(drawn) in (torch.utils.data.SequentialSampler, torch.utils.data.RandomSampler):
        return loader(
            iterable.dataset,
            getattr(batches, "batch_size", iterable.batch_size),
            num_workers=iterable.num_workers,
            collate_fn=iterable.collate_fn,
            worker_init_fn=iterable.worker_init_fn,
            multiprocessing_context=iterable.multiprocessing_context,
        )
    raise InputError(
        f"a DataLoader with a {type(drawn).__name__} may draw other images in every pass; give its data set (loader.dataset)"
    )
