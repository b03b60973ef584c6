"""Converts one or several photos (files, PIL images, arrays or tensors) to a backbone's input."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .decoder import open_image
from .transforms import ImageTransform


def is_one(photos: Any) -> bool:
    """Whether ``photos`` is a single photo: a path, a PIL image, or an array or tensor of fewer than four dimensions."""
    if isinstance(photos, (Tensor, np.ndarray)):
        return photos.ndim < 4
    return isinstance(photos, (str, os.PathLike)) or hasattr(photos, "convert")


def photo_batches(photos: Any, transform: ImageTransform, batch_size: int) -> Iterator[Tensor]:
    """Yield batches (B, channels, crop, crop) float32 in 0..1 of one or several photos; files are read batch by batch.

    A photo is a path, a PIL image, or an array or tensor as for `ImageTransform`; several are an iterable of these, or one tensor
    (N, channels, H, W). Raises ``InputError`` naming the photo that can't be read.
    """
    if isinstance(photos, Tensor) and photos.ndim == 4:
        for batch in photos.split(batch_size):
            yield _transformed(batch, transform.batch, "photos")
        return
    several: Iterable[Any] = [photos] if is_one(photos) else photos
    if not isinstance(several, Iterable):
        raise InputError(
            f"photos must be paths, PIL images, arrays or tensors, got a {type(photos).__module__}.{type(photos).__name__}"
        )
    numbered = enumerate(several)
    while batch := list(itertools.islice(numbered, batch_size)):
        yield torch.stack([_read(photo, transform, f"photo {index}") for index, photo in batch])


def _read(photo: Any, transform: ImageTransform, where: str) -> Tensor:
    try:
        if isinstance(photo, (str, os.PathLike)):
            where = str(photo)
            photo = open_image(photo)
        if not (hasattr(photo, "convert") or isinstance(photo, (Tensor, np.ndarray))):
            raise InputError(f"must be a path, a PIL image, an array or a tensor, got a {type(photo).__name__}")
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return _transformed(photo, transform, where)


def _transformed(photo: Any, transform: Callable[[Any], Tensor], where: str) -> Tensor:
    try:
        return transform(photo.cpu() if isinstance(photo, Tensor) else photo)
    except Exception as error:  # modes that Pillow can't convert, tensors that torch can't read
        reason = str(error) if isinstance(error, InputError) else f"unreadable image ({error})"
        raise InputError(f"{where}: {reason}") from error
