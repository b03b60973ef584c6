"""Checks of the arguments by shape, dtype and device: no value is read, so nothing waits for a GPU."""

import torch
from torch import Tensor

FEATURES = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(
    name: str, value: Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Raise ``ValueError`` unless ``value`` is so; None in ``shape`` is any size."""
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
    """``order`` (items,) and ``offsets`` (classes + 1,), int64; or neither, and an item a class. classes None: any."""
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
    """Features (N, D) with their segments, ``shift`` (D,) and, where given, ``centers`` (C, D)."""
    check_tensor("features", features, (None, None), FEATURES, features.device)
    items, dim = features.shape
    check_floats("shift", shift, dim, device=features.device)
    if centers is not None:
        check_floats("centers", centers, None, dim, device=features.device)
    check_segments(order, offsets, items, None if centers is None else len(centers), features.device)
