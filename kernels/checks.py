"""Checks of arguments by shape, dtype and device. They read no values, so they don't wait for the GPU."""

import torch
from torch import Tensor

from sfm_fast.checks import MOST_CHANNELS, MOST_LEVELS, MOST_PIXELS

FEATURES = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(
    name: str, value: Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Raise ``ValueError`` unless ``value`` has these properties; None in ``shape`` allows any size."""
    if value.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be {wanted}, got {value.dtype}")
    if value.ndim != len(shape) or any(want not in (None, size) for want, size in zip(shape, value.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")


def check_floats(name: str, value: Tensor, *shape: int | None, device: torch.device) -> None:
    check_tensor(name, value, shape, (torch.float32,), device)


def check_segments(
    order: Tensor | None, offsets: Tensor | None, items: int, classes: int | None, device: torch.device
) -> None:
    """``order`` (items,) and ``offsets`` (classes + 1,) int64, or both None: one item per class; classes None: any."""
    if order is not None and offsets is not None:
        check_tensor("order", order, (items,), (torch.int64,), device)
        check_tensor("offsets", offsets, (None if classes is None else classes + 1,), (torch.int64,), device)
        if len(offsets) == 0:
            raise ValueError("offsets must have an entry more than there are classes, got none")
    elif order is not None or offsets is not None:
        raise ValueError("order and offsets must be given both or neither")
    elif classes is not None and items != classes:
        raise ValueError(f"without order, features must have a row for each of the {classes} classes, got {items}")


def check_labelled(
    features: Tensor,
    order: Tensor | None,
    offsets: Tensor | None,
    shift: Tensor,
    centers: Tensor | None = None,
) -> None:
    """Check features (N, D) with their segments, ``shift`` (D,) and, if given, ``centers`` (C, D)."""
    check_tensor("features", features, (None, None), FEATURES, features.device)
    items, dim = features.shape
    check_floats("shift", shift, dim, device=features.device)
    if centers is not None:
        check_floats("centers", centers, None, dim, device=features.device)
    check_segments(order, offsets, items, None if centers is None else len(centers), features.device)


def check_dtype(dtype: torch.dtype) -> None:
    if dtype not in FEATURES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")


def check_levels(levels: list[Tensor], rows: Tensor | None, size: int, dtype: torch.dtype) -> tuple[int, int]:
    """Check levels (N, c, r, r) float32, c 1 or 3, r <= ``size``; ``rows`` (M,) int64 or None (M = N). Gives M and c."""
    check_dtype(dtype)
    if not 1 <= len(levels) <= MOST_LEVELS:
        raise ValueError(f"levels must be 1 to {MOST_LEVELS} tensors, got {len(levels)}")
    if not 1 <= size <= MOST_PIXELS:
        raise ValueError(f"size must be 1 to {MOST_PIXELS}, got {size}")
    device, channels = levels[0].device, levels[0].shape[1] if levels[0].ndim == 4 else 1
    if channels not in (1, 3):
        raise ValueError(f"levels must have 1 or 3 channels, got {tuple(levels[0].shape)}")
    for index, level in enumerate(levels):
        side = level.shape[-1] if level.ndim else 0
        check_floats(f"levels[{index}]", level, len(levels[0]), channels, side, side, device=device)
        if not 1 <= side <= size:
            raise ValueError(f"levels[{index}] must have a side of 1 to size ({size}), got {side}")
    if rows is None:
        return len(levels[0]), channels
    check_tensor("rows", rows, (None,), (torch.int64,), device)
    if len(rows) and len(levels[0]) == 0:
        raise ValueError(f"levels must hold the images of rows, got none for {len(rows)}")
    return len(rows), channels


def check_images(name: str, images: Tensor, *shape: int | None, device: torch.device) -> None:
    check_tensor(name, images, shape, FEATURES, device)


def check_sides(sides: list[int], channels: int, height: int, width: int) -> None:
    """Check the sides of the levels of images (M, channels, height, width)."""
    if channels not in (1, 3) or height != width or not 1 <= height <= MOST_PIXELS:
        raise ValueError(f"images must be square with 1 or 3 channels, got {channels} x {height} x {width}")
    if not 1 <= len(sides) <= MOST_LEVELS or not all(1 <= side <= height for side in sides):
        raise ValueError(f"sides must be 1 to {MOST_LEVELS} numbers from 1 to {height}, got {list(sides)}")


def check_boxes(boxes: Tensor, images: int, device: torch.device) -> None:
    """Check ``boxes`` (V, 4) float32, V a multiple of the number of images."""
    check_floats("boxes", boxes, None, 4, device=device)
    if len(boxes) % images if images else len(boxes):
        raise ValueError(f"boxes must have a multiple of {images} rows, one a view, got {len(boxes)}")


def check_sizes(channels: int, outputs: int, height: int, width: int, size: int) -> None:
    """Check the sizes of images (M, channels, height, width) and their views (V, outputs, size, size)."""
    if not 1 <= channels <= MOST_CHANNELS or not 1 <= outputs <= MOST_CHANNELS or channels not in (1, outputs):
        raise ValueError(
            f"images must have 1 channel or those of mean and std ({outputs}, up to {MOST_CHANNELS}), got {channels}"
        )
    if not all(1 <= side <= MOST_PIXELS for side in (height, width, size)):
        raise ValueError(f"height, width and size must be 1 to {MOST_PIXELS}, got {height}, {width} and {size}")
    if channels * size * size >= 1 << 31:
        raise ValueError(f"a view must have fewer than 2^31 values, got {channels} x {size} x {size}")
