"""Converts the items of data sets, in their various forms, to (image, class number)."""

from __future__ import annotations

import io
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .decoder import open_image
from .transforms import ImageTransform

IMAGE_KEYS = ("image", "img", "images", "pixel_values", "jpg", "jpeg", "png", "webp")
LABEL_KEYS = ("label", "labels", "target", "targets", "class", "cls", "y")


def read_sample(item: Any, transform: ImageTransform, class_names: Sequence[str]) -> tuple[Tensor, int]:
    """(pixels, class number) of one item: (image, label[, …]) or a mapping with keys such as "image" and "label".

    Raises ``InputError`` if the item has another form or can't be read.
    """
    image, label = image_and_label(item)
    target = class_number(label, class_names)
    try:
        image = opened(image)
        return transform.pixels(image.detach().cpu() if isinstance(image, Tensor) else image), target
    except InputError:
        raise
    except Exception as error:  # arrays that torch can't read, modes that Pillow can't convert
        raise InputError(f"unreadable image ({error})") from error


def image_and_label(item: Any) -> tuple[Any, Any]:
    """The first two elements of a tuple or list, or the image and label of a mapping."""
    if isinstance(item, Mapping):
        return item[_key(item, IMAGE_KEYS, "image")], item[_key(item, LABEL_KEYS, "label")]
    if isinstance(item, (tuple, list)) and len(item) >= 2:
        return item[0], item[1]
    raise InputError(
        f"an item must be (image, label) or a mapping with 'image' and 'label', got {_told(item)}"
        + (f" of {len(item)}" if isinstance(item, (tuple, list)) else "")
    )


def singles(item: Any) -> Iterator[Any]:
    """The samples in an item of an iterable: the item itself, or those of a DataLoader's batch (images (B, …), labels (B,))."""
    image, label = image_and_label(item)
    if not is_batch(item):
        yield image, label
        return
    labels = label if hasattr(label, "__len__") and np.ndim(label) else [label]
    if len(image) != len(labels):
        raise InputError(f"a batch must have as many labels as images, got {len(labels)} for {len(image)}")
    yield from zip(image, labels, strict=True)


def is_batch(item: Any) -> bool:
    """Whether an item holds several images: a tensor or array of four dimensions, or a list of images."""
    image, label = image_and_label(item)
    several = isinstance(image, (Tensor, np.ndarray)) and image.ndim == 4
    return several or (isinstance(image, (list, tuple)) and not isinstance(label, int))


def class_number(label: Any, class_names: Sequence[str]) -> int:
    """The class number of ``label``: an integer, an array with one element, a one-hot vector, or a class name.

    Raises ``InputError`` for anything else, such as mixtures of classes (CutMix, MixUp) or several classes.
    """
    if isinstance(label, str):
        if label not in class_names:
            raise InputError(f"the label must be a class number or one of the class names, got {label!r}")
        return list(class_names).index(label)
    if isinstance(label, (Tensor, np.ndarray, list, tuple)):
        try:
            values = torch.as_tensor(label).detach().cpu().flatten()
        except (TypeError, ValueError, RuntimeError):
            raise InputError(
                f"the label must be a class number, a one-hot vector or a class name, got {str(label)[:80]}"
            ) from None
        if values.numel() == 1:
            label = values.item()
        elif values.numel():
            return _one_hot(values, class_names)
    if isinstance(label, (float, np.floating)) and float(label).is_integer():
        label = int(label)
    if isinstance(label, np.bool_):
        label = bool(label)
    try:
        target = operator.index(label)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise InputError(f"the label must be an integer, got {label!r}") from error
    if target < 0:
        raise InputError(f"the label must be a class number, got {target} (data without labels?)")
    if target >= len(class_names):
        raise InputError(f"the label must be below {len(class_names)}, the number of classes, got {target}")
    return target


def _one_hot(values: Tensor, class_names: Sequence[str]) -> int:
    place = int(values.double().argmax())
    if len(values) != len(class_names):
        raise InputError(f"the label must be one class, got {len(values)} numbers for {len(class_names)} classes")
    if values.double().count_nonzero() != 1 or values[place] != 1:
        listed = ", ".join(f"{value:g}" for value in values.double().tolist()[:6])
        raise InputError(f"the label must be one class, got a mixture or several ({listed}…); give data without mixing")
    return place


def _key(item: Mapping[Any, Any], usual: tuple[str, ...], told: str) -> str:
    keys = [key for key in usual if key in item]
    if not keys:
        keys = [key for key in item if isinstance(key, str) and key.endswith(told)]
    if len(keys) != 1 and not (keys and keys[0] == told):
        raise InputError(
            f"an item must have one {told}, got the keys {', '.join(map(str, item))}; give (image, label) pairs instead"
        )
    return str(keys[0])


def opened(image: Any) -> Any:
    """``image``, opened if it is a path, a file, bytes, or an undecoded image of Hugging Face datasets."""
    if isinstance(image, Mapping) and ("bytes" in image or "path" in image):
        image = image.get("bytes") or image.get("path") or ""
    if isinstance(image, (bytes, bytearray)):
        return open_image(io.BytesIO(image))
    if isinstance(image, str) or hasattr(image, "__fspath__") or hasattr(image, "read"):
        return open_image(image)
    return image


def _told(item: Any) -> str:
    return f"a {type(item).__module__}.{type(item).__qualname__}".replace("builtins.", "")
