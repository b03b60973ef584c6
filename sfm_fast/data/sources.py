"""Where real images come from: arrays, map-style data sets, iterables; batch by batch, never all in memory at once."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, require_package

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's convert("L")
MOST_ASPECT = 50  # longer strips are refused: their shorter side resized to 224, 1 x 60000 pixels would be gigabytes


@dataclass(frozen=True)
class ImageTransform:
    """Resize the shorter side to ``resize`` (bicubic, antialiased), cut the central ``crop`` x ``crop``; 0..1 floats."""

    resize: int
    crop: int
    channels: int

    def __call__(self, image: Any) -> Tensor:
        """A PIL image, or an array or tensor (uint8, uint16 or float 0..1; HW, HWC or CHW) -> (channels, crop, crop) float32."""
        if hasattr(image, "convert"):
            return self._pil(image)
        array = image if isinstance(image, Tensor) else _as_tensor(np.asarray(image))
        if array.ndim == 2:
            array = array.unsqueeze(0)
        elif array.ndim == 3 and array.shape[0] not in (1, 3) and array.shape[2] in (1, 3):
            array = array.permute(2, 0, 1)
        if array.ndim != 3 or array.shape[0] not in (1, 3):
            raise InputError(f"an image must be HW, HWC or CHW with 1 or 3 channels, got shape {tuple(array.shape)}")
        return self.batch(array.unsqueeze(0))[0]

    def _pil(self, image: Any) -> Tensor:
        from PIL import Image

        _check_shape(*image.size)
        if image.mode.startswith("I;16"):  # convert("L") would clip 16 bits to white
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise InputError(f"image mode {image.mode!r} has no fixed range; store it with 8 or 16 bits a channel")
        image = image.convert("L" if self.channels == 1 else "RGB")
        width, height = image.size
        scale = self.resize / min(width, height)
        target = (max(self.resize, round(width * scale)), max(self.resize, round(height * scale)))
        if target != image.size:
            image = image.resize(target, Image.Resampling.BICUBIC)
        left, top = (target[0] - self.crop) // 2, (target[1] - self.crop) // 2
        image = image.crop((left, top, left + self.crop, top + self.crop))
        array = torch.from_numpy(np.array(image)).view(self.crop, self.crop, self.channels)
        return array.permute(2, 0, 1).float() / 255

    def batch(self, images: Tensor) -> Tensor:
        """(N, channels, H, W) uint8, uint16 or float 0..1 -> (N, self.channels, crop, crop) float32."""
        if 0 in images.shape:
            raise InputError(f"an image must have pixels, got shape {tuple(images.shape[1:])}")
        _check_shape(images.shape[3], images.shape[2])
        if images.is_complex():
            raise _wrong_pixels(images.dtype)
        if images.dtype == torch.uint16:  # the upper 8 bits, as of PIL images
            images = (images.int() >> 8).byte()
        if images.dtype == torch.uint8:
            images = images.float() / 255
        elif not images.is_floating_point() or images.min() < -1e-3 or images.max() > 1 + 1e-3:
            raise _wrong_pixels(f"{images.dtype} up to {images.max()}")
        images = images.float()
        images = match_channels(images, self.channels)
        height, width = images.shape[2:]
        scale = self.resize / min(width, height)
        target = (max(self.resize, round(height * scale)), max(self.resize, round(width * scale)))
        if target != (height, width):
            images = F.interpolate(images, target, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = (target[0] - self.crop) // 2, (target[1] - self.crop) // 2
        return images[:, :, top : top + self.crop, left : left + self.crop]


def _as_tensor(array: np.ndarray) -> Tensor:
    """A copy, which torch takes whatever the array's strides, byte order and flags."""
    if array.dtype.kind not in "biuf":
        raise InputError(f"unreadable image (an array of {array.dtype}, wanted uint8 or floats)")
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _wrong_pixels(got: object) -> InputError:
    return InputError(f"pixels must be uint8 in 0..255 or floats in 0..1, got {got}")


def _check_shape(width: int, height: int) -> None:
    if not 0 < max(width, height) <= MOST_ASPECT * min(width, height):
        raise InputError(
            f"an image of {width} x {height} pixels, wanted sides of at most {MOST_ASPECT} to 1; cut a part of it"
        )


def match_channels(images: Tensor, channels: int) -> Tensor:
    """Grey to colour by repetition, colour to grey by luminance: (N, 1 or 3, H, W) -> (N, channels, H, W)."""
    if images.shape[1] == channels:
        return images
    if images.shape[1] == 1:
        return images.expand(-1, channels, -1, -1)
    if images.shape[1] == 3 and channels == 1:
        return torch.einsum(
            "nchw,c->nhw", images, torch.tensor(LUMINANCE, dtype=images.dtype, device=images.device)
        ).unsqueeze(1)
    raise InputError(f"images have {images.shape[1]} channels, can't become {channels}")


class ImageSource:
    """Labelled images: ``batches`` streams all of them in order, ``take`` fetches some by index.

    ``random_access`` says whether ``take`` is cheap (one read an image) or a pass over everything.
    """

    name: str
    class_names: list[str]
    channels: int
    random_access = True

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


class MapSource(ImageSource):
    """Any map-style data set of (image, label): decoded one by one, by ``workers`` processes."""

    def __init__(
        self,
        name: str,
        dataset: Any,
        class_names: Sequence[str],
        channels: int,
        workers: int,
        describe: Callable[[int], str],
    ) -> None:
        self.name, self.dataset, self.class_names, self.channels = name, dataset, list(class_names), channels
        self.workers, self.describe = workers, describe

    def __len__(self) -> int:
        return len(self.dataset)

    def _loader(
        self, indices: Sequence[int], batch_size: int, transform: ImageTransform
    ) -> Iterator[tuple[Tensor, Tensor]]:
        view = _View(self.dataset, indices, transform, self.describe)
        workers = self.workers if len(indices) > batch_size else 0
        for batch in torch.utils.data.DataLoader(view, batch_size, num_workers=workers, collate_fn=_collate):
            if isinstance(batch, str):  # errors travel as text: an exception would come back with a worker's traceback
                raise InputError(batch)
            yield batch

    def batches(self, batch_size: int, transform: ImageTransform) -> Iterator[tuple[Tensor, Tensor]]:
        return self._loader(range(len(self)), batch_size, transform)

    def take(self, indices: Sequence[int], transform: ImageTransform) -> tuple[Tensor, Tensor]:
        batches = list(self._loader(indices, 256, transform))
        return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


class IterableSource(ImageSource):
    """Any iterable of (image, label), iterated anew on every pass; images as `ImageTransform` takes them.

    A generator can be iterated once only, so it serves for statistics; give a list, a data set or a class with
    ``__iter__`` for anything that needs two passes.
    """

    random_access = False

    def __init__(
        self, iterable: Iterable[tuple[Any, int]], class_names: Sequence[str], channels: int, name: str = "iterable"
    ) -> None:
        self.iterable, self.class_names, self.channels, self.name = iterable, list(class_names), channels, name
        self._started = False

    def __len__(self) -> int:
        try:
            return len(self.iterable)  # type: ignore[arg-type]
        except TypeError:
            return 0

    def batches(self, batch_size: int, transform: ImageTransform) -> Iterator[tuple[Tensor, Tensor]]:
        once_only = iter(self.iterable) is self.iterable
        if once_only and self._started:
            raise InputError(
                f"{self.name}: a generator can be read once, and this needs a second pass; give a list or a data set"
            )
        self._started = True
        images: list[Tensor] = []
        labels: list[int] = []
        for position, pair in enumerate(self.iterable):
            read, target = _read(functools.partial(_same, pair), transform, f"{self.name}: item {position}")
            images.append(read)
            labels.append(target)
            if len(images) == batch_size:
                yield torch.stack(images), torch.tensor(labels)
                images, labels = [], []
        if images:
            yield torch.stack(images), torch.tensor(labels)


class _View(torch.utils.data.Dataset):
    def __init__(
        self, dataset: Any, indices: Sequence[int], transform: ImageTransform, describe: Callable[[int], str]
    ) -> None:
        self.dataset, self.indices, self.transform, self.describe = dataset, indices, transform, describe

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Tensor, int] | str:
        index = int(self.indices[place])
        try:
            return _read(lambda: self.dataset[index], self.transform, self.describe(index))
        except InputError as error:
            return str(error)


def _same(pair: Any) -> Any:
    return pair


def _read(fetch: Callable[[], tuple[Any, int]], transform: ImageTransform, where: str) -> tuple[Tensor, int]:
    try:
        image, label = fetch()
    except Exception as error:  # Pillow raises half a dozen kinds on damaged files
        raise InputError(f"{where}: unreadable image ({error})") from error
    try:
        target = operator.index(label.item() if isinstance(label, Tensor) else label)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: the label must be an integer, got {label!r}") from error
    if not 0 <= target < 2**31:
        raise InputError(f"{where}: the label must be a class number, got {target}")
    try:
        return transform(image), target
    except Exception as error:
        reason = str(error) if isinstance(error, InputError) else f"unreadable image ({error})"
        raise InputError(f"{where}: {reason}") from error


def _collate(samples: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor] | str:
    for sample in samples:
        if isinstance(sample, str):
            return sample
    pairs = [sample for sample in samples if not isinstance(sample, str)]
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def from_iterable(iterable: Iterable[tuple[Any, int]], class_names: Sequence[str], channels: int = 3) -> ImageSource:
    """Labelled images from any Python iterable of (image, label); data sets with ``__getitem__`` get random access."""
    if channels not in (1, 3):
        raise InputError(f"channels must be 1 (grey) or 3 (colour), got {channels}")
    if hasattr(iterable, "__getitem__") and hasattr(iterable, "__len__"):
        return MapSource("data set", iterable, class_names, channels, 0, lambda index: f"item {index}")
    require_package("PIL", "reading images", "distill")
    return IterableSource(iterable, class_names, channels)
