"""Checks of arguments that several public functions share; each error names the argument, what it must be and what it is."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import InputError
from .settings import MOST_PIXELS as MOST_PIXELS
from .views import Views

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def kind_of(value: object) -> str:
    """The kind of ``value`` for error messages: a tensor's dtype, else the type."""
    return str(value.dtype) if isinstance(value, Tensor) else f"a {type(value).__module__}.{type(value).__name__}"


def check_centers(centers: Tensor, fewest: int = 2) -> None:
    """Raise ``InputError`` unless ``centers`` is a constant (C >= ``fewest``, D >= 1) float tensor."""
    if not isinstance(centers, Tensor) or not centers.is_floating_point():
        raise InputError(f"centers must be a float tensor, got {kind_of(centers)}")
    if centers.ndim != 2 or centers.shape[1] < 1:
        raise InputError(f"centers must be (classes, features), got {tuple(centers.shape)}")
    if centers.shape[0] < fewest:
        raise InputError(
            f"centers must have at least {fewest} class{'es' if fewest > 1 else ''}, got {centers.shape[0]}"
        )
    if centers.requires_grad:
        raise InputError("centers must not require grad, because the real centres are constants: pass centers.detach()")


def check_anchor(anchor: Tensor, centers: Tensor) -> None:
    """Raise ``InputError`` unless ``anchor`` is a constant float tensor (D,) that fits ``centers`` (C, D), on its device."""
    if not isinstance(anchor, Tensor) or not anchor.is_floating_point():
        raise InputError(f"anchor must be a float tensor, got {kind_of(anchor)}")
    if anchor.shape != centers.shape[1:]:
        raise InputError(f"anchor must be ({centers.shape[1]},) to fit centers, got {tuple(anchor.shape)}")
    if anchor.device != centers.device:
        raise InputError(f"anchor is on {anchor.device}, centers on {centers.device}; move one of them")
    if anchor.requires_grad:
        raise InputError("anchor must not require grad, because it is a constant: pass anchor.detach()")


def check_features(name: str, features: Tensor, dim: int, against: str) -> None:
    if not isinstance(features, Tensor) or features.dtype not in FLOATS:
        raise InputError(f"{name} must be a float32, float64, bfloat16 or float16 tensor, got {kind_of(features)}")
    if features.ndim != 2 or features.shape[0] < 1:
        raise InputError(f"{name} must be (items, features) with at least one item, got {tuple(features.shape)}")
    if features.shape[1] != dim:
        raise InputError(f"{name} must have {dim} features per item like {against}, got {features.shape[1]}")


def check_label_form(name: str, labels: Tensor, items: int) -> None:
    """Raise ``InputError`` unless ``labels`` is an (items,) int64 tensor."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise InputError(f"{name} must be an int64 tensor, got {kind_of(labels)}")
    if labels.shape != (items,):
        raise InputError(f"{name} must be ({items},) to fit the features, got {tuple(labels.shape)}")


def check_labels(name: str, labels: Tensor, items: int, classes: int) -> Tensor:
    """Counts per class, (classes,) int64; raises ``InputError`` unless labels are (items,) int64 in 0..classes-1."""
    check_label_form(name, labels, items)
    low, high = labels.aminmax() if items else (torch.tensor(0), torch.tensor(0))
    if low < 0 or high >= classes:
        raise InputError(f"{name} must be in 0..{classes - 1}, got {int(low)}..{int(high)}")
    return torch.bincount(labels, minlength=classes)


def check_groups(groups: Tensor, centers: Tensor) -> None:
    """Raise ``InputError`` unless ``groups`` is an int64 tensor with one entry per row of ``centers``, on its device."""
    if not isinstance(groups, Tensor) or groups.dtype != torch.int64:
        raise InputError(f"groups must be an int64 tensor, got {kind_of(groups)}")
    if groups.shape != centers.shape[:1]:
        raise InputError(f"groups must be ({centers.shape[0]},) to fit centers, got {tuple(groups.shape)}")
    if groups.device != centers.device:
        raise InputError(f"groups are on {groups.device}, centers on {centers.device}; move one of them")


def told_differences(one: Sequence[str], other: Sequence[str]) -> str:
    """The differences between two lists of class names, for a message."""
    apart = sorted(set(one) ^ set(other))
    if not apart:
        return "they differ in order" if len(one) == len(other) else "they differ in how often a name occurs"
    if len({unicodedata.normalize("NFC", name) for name in apart}) < len(apart):
        # For example file names from macOS, which look the same.
        return f"they differ in the Unicode form of {', '.join(map(ascii, apart[:4]))}"
    return f"they differ in {apart[:6]}"


def check_class_names(names: Sequence[str], wanted: Sequence[str], told: str, owner: str) -> None:
    """Raise ``InputError`` unless two lists of class names are the same, in the same order.

    told: start of the message, the object with ``names``. owner: the owner of ``wanted``, such as "the test set's".
    """
    if list(names) != list(wanted):
        differ = told_differences(names, wanted)
        raise InputError(f"{told}: its {len(names)} classes are not {owner} {len(wanted)} ({differ})")


VIEW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Limits of the kernels; the same numbers as in csrc/kinds.h.
MOST_LEVELS = 16  # levels of a pyramid
MOST_CHANNELS = 16  # channels of a view


def check_side(name: str, side: int) -> None:
    if isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)):
        raise InputError(f"{name} must be a number of pixels (int), got {kind_of(side)}")
    if not 1 <= side <= MOST_PIXELS:
        raise InputError(f"{name} must be 1 to {MOST_PIXELS} pixels, got {side}")


def check_view_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in VIEW_DTYPES:
        raise InputError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")


def check_levels(levels: Sequence[Tensor], size: int) -> list[Tensor]:
    """The levels as a list; raises ``InputError`` unless they are (N, 1 or 3, r, r) of one device and dtype, r <= size."""
    if isinstance(levels, torch.nn.ParameterList):
        levels = list(levels)
    if isinstance(levels, Tensor) or not isinstance(levels, Sequence) or not 1 <= len(levels) <= MOST_LEVELS:
        got = f"{len(levels)} of them" if isinstance(levels, (list, tuple)) else kind_of(levels)
        raise InputError(f"levels must be a list of 1 to {MOST_LEVELS} tensors, got {got}")
    first = levels[0]
    for k, level in enumerate(levels):
        if not isinstance(level, Tensor) or level.dtype not in (torch.float32, torch.float64):
            raise InputError(f"levels[{k}] must be a float32 or float64 tensor, got {kind_of(level)}")
        if level.ndim != 4 or level.shape[2] != level.shape[3] or level.shape[1] not in (1, 3):
            raise InputError(f"levels[{k}] must be (images, 1 or 3 channels, side, side), got {tuple(level.shape)}")
        if not 1 <= level.shape[-1] <= size:
            raise InputError(f"levels[{k}] must have a side of 1 to {size} pixels, got {level.shape[-1]}")
        if level.shape[:2] != first.shape[:2] or level.dtype != first.dtype or level.device != first.device:
            raise InputError(
                f"levels[{k}] must be like levels[0], {tuple(first.shape[:2])} {first.dtype} on {first.device}, "
                f"got {tuple(level.shape[:2])} {level.dtype} on {level.device}"
            )
    return list(levels)


def check_indices(name: str, indices: Tensor, count: int, device: torch.device) -> None:
    """Raise ``InputError`` unless ``indices`` is a 1-D int64 tensor on ``device``; values are only checked on CPUs."""
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.ndim != 1:
        raise InputError(f"{name} must be a 1-D int64 tensor, got {kind_of(indices)}")
    if indices.device != device:
        raise InputError(f"{name} are on {indices.device}, the images on {device}; move one of them")
    readable = device.type == "cpu" and type(indices) is Tensor and not torch.compiler.is_compiling()
    if readable and len(indices):
        low, high = indices.aminmax()
        if low < 0 or high >= count:
            raise InputError(f"{name} must be in 0..{count - 1}, got {int(low)}..{int(high)}")


def check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dtype not in FLOATS:
        raise InputError(f"images must be a float32, float64, bfloat16 or float16 tensor, got {kind_of(images)}")
    if images.ndim != 4 or not all(1 <= side <= MOST_PIXELS for side in images.shape[2:]):
        raise InputError(
            f"images must be (images, channels, height, width) of at most {MOST_PIXELS} pixels, got {tuple(images.shape)}"
        )


def check_views(views: Views, images: int, channels: int, device: torch.device) -> None:
    """Raise ``InputError`` unless ``views`` fit ``images`` images of ``channels`` channels on ``device``."""
    if not isinstance(views, Views):
        raise InputError(f"views must be sfm_fast.Views, got {kind_of(views)}")
    check_side("views.size", views.size)
    tensors = {"boxes": torch.float32, "noise_items": torch.int64, "mean": torch.float32, "std": torch.float32}
    for name, dtype in tensors.items():
        value = getattr(views, name)
        if not isinstance(value, Tensor) or value.dtype != dtype:
            raise InputError(f"views.{name} must be a {dtype} tensor, got {kind_of(value)}")
        if value.device != device:
            raise InputError(f"views.{name} is on {value.device}, the images on {device}; move one of them")
    if views.boxes.ndim != 2 or views.boxes.shape[1] != 4:
        raise InputError(f"views.boxes must be (views, 4), got {tuple(views.boxes.shape)}")
    count = len(views.boxes)
    if views.noise_items.shape != (count,):
        raise InputError(f"views.noise_items must be ({count},) to fit boxes, got {tuple(views.noise_items.shape)}")
    if count % images if images else count:
        raise InputError(f"views must be the same number for each image, got {count} views of {images} images")
    if views.mean.ndim != 1 or not 1 <= len(views.mean) <= MOST_CHANNELS or views.std.shape != views.mean.shape:
        raise InputError(
            f"views.mean and views.std must be (channels,), got {tuple(views.mean.shape)} and {tuple(views.std.shape)}"
        )
    if channels not in (1, len(views.mean)):
        raise InputError(f"images must have 1 or {len(views.mean)} channels to fit views.mean, got {channels}")
    stream = int(views.stream)  # an IntEnum's comparison breaks Dynamo in torch 2.11
    if not 0 <= views.seed < 2**64 or not 0 <= views.step < 2**32 or not 0 <= stream < 2**32:
        raise InputError(
            f"views.seed must be in [0, 2**64), views.step and views.stream in [0, 2**32), "
            f"got {views.seed}, {views.step} and {stream}"
        )
