"""Where real images come from: arrays, map-style data sets, iterables; batch by batch, never all in memory at once."""

from __future__ import annotations

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

SAMPLED = 64  # images that decide whether a data set is grey
DIGESTED = 32  # images that go into the fingerprint of one that isn't files


class ImageSource:
    """Labelled images: ``batches`` streams all of them in order, ``take`` fetches some by index.

    channels: of synthetic images made from it, 1 where it is grey and 3 where it isn't. random_access: whether ``take`` is cheap (one
    read an image) or a pass over everything. told: what was found, for people, one line; "" where there is nothing to say.
    """

    name: str
    class_names: list[str]
    channels: int
    random_access = True
    told = ""

    @property
    def exact_channels(self) -> int:
        """What its images are read with to compute features: 3 unless all are known to be grey, so that no guess changes a feature."""
        return self.channels

    def __len__(self) -> int:
        raise NotImplementedError

    def batches(self, batch_size: int, transform: ImageTransform) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (B, channels, crop, crop) float32 in 0..1 and labels (B,) int64."""
        raise NotImplementedError

    def take(self, indices: Sequence[int], transform: ImageTransform) -> tuple[Tensor, Tensor]:
        """Images and labels at ``indices``, in that order; this default makes one pass and keeps what it is asked for."""
        wanted: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            wanted.setdefault(index, []).append(place)
        found: list[tuple[Tensor, Tensor] | None] = [None] * len(indices)
        position = 0
        for images, labels in self.batches(256, transform):
            for row in range(len(labels)):
                for place in wanted.get(position + row, ()):
                    found[place] = (images[row].clone(), labels[row])
            position += len(labels)
        if any(pair is None for pair in found):
            raise InputError(f"{self.name}: an index in {list(indices)[:8]}… is beyond its {position} images")
        pairs = [pair for pair in found if pair is not None]
        return torch.stack([image for image, _ in pairs]), torch.stack([label for _, label in pairs])

    def draw(self, count: int, transform: ImageTransform, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """``count`` images and labels at random without replacement, others at each ``step``; the same seed and step give the same."""
        chosen = philox.permutation(len(self), seed=seed, stream=philox.Stream.REAL_BATCH, step=step)[:count]
        images, labels = self.take(chosen.tolist(), transform)
        check_labels(f"labels of {self.name}", labels, len(images), len(self.class_names))
        return images, labels

    def counts(self) -> list[int] | None:
        """Images of each class where that is known without reading any."""
        return None

    def fingerprint(self) -> str:
        """16 hex digits that another data set hasn't, wherever it lies; "" where two passes may give different images."""
        return ""


class ArraySource(ImageSource):
    """Images in memory as bytes: (N, H, W) or (N, H, W, 3) uint8, labels (N,) int64."""

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> None:
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise InputError(f"images must be (N, H, W[, 3]) uint8, got {images.shape} {images.dtype}")
        if len(images) != len(labels):
            raise InputError(f"images has {len(images)} items, labels has {len(labels)}")
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

    def counts(self) -> list[int]:
        return torch.bincount(self.labels, minlength=len(self.class_names)).tolist()

    def fingerprint(self) -> str:
        digest = hashlib.sha256("\0".join(self.class_names).encode())
        for part in (self.images, self.labels):
            digest.update(f"{tuple(part.shape)}".encode())
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()[:16]


class MapSource(ImageSource):
    """Any map-style data set of items as `samples` knows them: decoded one by one, by ``workers`` processes.

    channels: None looks at a sample of the images.
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
        """1 where every image of a sample is grey; one colour image in it makes 3."""
        places = evenly_spaced(len(self), SAMPLED)
        grey = 0
        for index in places:
            try:
                grey += self._is_grey(index)
            except Exception as error:  # data sets raise anything
                raise unreadable(self.describe(index), error) from error
        if places and grey == len(places):
            return 1
        self.colour = "in colour" + (f" ({grey} of {len(places)} images looked at are grey)" if grey else "")
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
            if isinstance(batch, str):  # errors travel as text: an exception would come back with a worker's traceback
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
        return digests[0] if digests[0] == digests[1] else ""  # a random transform of the data set's own

    def _digest(self) -> str:
        images, labels = self.take(evenly_spaced(len(self), DIGESTED), ImageTransform(64, 64, self.exact_channels))
        digest = hashlib.sha256(f"{len(self)}\0{self.class_names}".encode(errors="surrogateescape"))
        for part in (images, labels):
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()[:16]


class IterableSource(ImageSource):
    """Any iterable of items, or of batches of them, as `samples` knows them, iterated anew on every pass.

    A generator can be iterated once only, so it serves for statistics; give a list, a data set or a class with
    ``__iter__`` for anything that needs two passes.
    """

    random_access = False

    def __init__(
        self, iterable: Iterable[Any], class_names: Sequence[str], channels: int, name: str = "iterable"
    ) -> None:
        self.iterable, self.class_names, self.channels, self.name = iterable, list(class_names), channels, name
        self._started = False

    def __len__(self) -> int:
        """The number of images, or 0 where that isn't known."""
        if isinstance(self.iterable, torch.utils.data.DataLoader):  # its length counts batches
            return _length(self.iterable.dataset)
        return 0 if _holds_batches(self.iterable) else _length(self.iterable)

    def batches(self, batch_size: int, transform: ImageTransform) -> Iterator[tuple[Tensor, Tensor]]:
        once_only = iter(self.iterable) is self.iterable
        if once_only and self._started:
            raise InputError(
                f"{self.name}: a generator can be read once, and this needs a second pass; give a list or a data set"
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
            except Exception as error:  # data sets raise anything
                raise unreadable(f"{self.name}: item {position}", error) from error
            try:
                parts = singles(item)
                for part in parts:
                    yield part
                    position += 1
            except InputError as error:
                raise InputError(f"{self.name}: item {position}: {error}") from error


def from_iterable(iterable: Iterable[Any], class_names: Sequence[str], channels: int = 3) -> ImageSource:
    """Labelled images from Python: a data set with ``__getitem__`` and ``__len__`` (random access), any iterable, a DataLoader.

    An item is (image, label), anything behind these two is left aside, or a table with keys such as "image" and "label". Images as
    `ImageTransform` takes them, or paths, or the bytes of a file; a label is a class number, an array of one, a one-hot vector or one
    of ``class_names``. An iterable may give batches: images (B, channels, H, W) and labels (B,), as a DataLoader does. A shuffling
    DataLoader is read in its data set's order, so that two passes agree.

    channels: 1 (grey) or 3 (colour), what images are read as. Raises ``InputError``.
    """
    if channels not in (1, 3):
        raise InputError(f"channels must be 1 (grey) or 3 (colour), got {channels}")
    _check_names(class_names)
    indexed = hasattr(iterable, "__getitem__") and hasattr(iterable, "__len__")
    if isinstance(iterable, Mapping) or not (indexed or hasattr(iterable, "__iter__")):
        raise InputError(
            f"data must be a data set or an iterable of (image, label), got a {type(iterable).__name__}; of a table of columns give "
            "list(zip(images, labels))"
        )
    # An IterableDataset inherits a __getitem__ that only raises.
    if indexed and not isinstance(iterable, torch.utils.data.IterableDataset) and not _holds_batches(iterable):
        return MapSource("data set", iterable, class_names, channels, 0, _item)
    require_package("PIL", "reading images", "distill")
    return IterableSource(_in_order(iterable), class_names, channels)


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most ``most`` of the indices below ``count``, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most)).tolist()})


def _check_names(class_names: Any) -> None:
    named = isinstance(class_names, Sequence) and not isinstance(class_names, str)
    if not named or not all(isinstance(name, str) for name in class_names):
        raise InputError(f"class_names must be a list of texts, got {str(class_names)[:80]!r}")
    twice = [name for name, count in Counter(class_names).items() if count > 1]
    if twice:
        raise InputError(f"class_names must differ, got {twice[0]!r} more than once")


def _holds_batches(items: Any) -> bool:
    """Whether this is a list of batches: of other data sets an item isn't read for it."""
    if not isinstance(items, (list, tuple)) or not items:
        return False
    try:
        return is_batch(items[0])
    except InputError:  # said when it is read, with its number
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
            raise InputError("a DataLoader with drop_last leaves images out; make it without")
        return iterable
    batches, drawn, whole = iterable.batch_sampler, iterable.sampler, not iterable.drop_last
    if type(batches) is torch.utils.data.BatchSampler:  # one that the user made has a sampler of its own
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
