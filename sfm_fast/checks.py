"""Checks of arguments that several public functions share; each error names the argument, what it got and what it wants."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import InputError

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def kind_of(value: object) -> str:
    """What an error message calls ``value``: a tensor's dtype, else its type."""
    return str(value.dtype) if isinstance(value, Tensor) else f"a {type(value).__module__}.{type(value).__name__}"


def check_centers(centers: Tensor) -> None:
    """Raise ``InputError`` unless ``centers`` is a constant (C >= 2, D >= 1) float tensor."""
    if not isinstance(centers, Tensor) or not centers.is_floating_point():
        raise InputError(f"centers must be a float tensor, got {kind_of(centers)}")
    if centers.ndim != 2 or centers.shape[1] < 1:
        raise InputError(f"centers must be (classes, features), got {tuple(centers.shape)}")
    if centers.shape[0] < 2:
        raise InputError(f"centers has {centers.shape[0]} class: a flow needs at least 2 classes")
    if centers.requires_grad:
        raise InputError("centers requires grad, but the real centres are constants here: pass centers.detach()")


def check_features(name: str, features: Tensor, dim: int, against: str) -> None:
    if not isinstance(features, Tensor) or features.dtype not in FLOATS:
        raise InputError(f"{name} must be a float32, float64, bfloat16 or float16 tensor, got {kind_of(features)}")
    if features.ndim != 2 or features.shape[0] < 1:
        raise InputError(f"{name} must be (items, features) with at least one item, got {tuple(features.shape)}")
    if features.shape[1] != dim:
        raise InputError(f"{name} has {features.shape[1]} features an item, but {against} has {dim}")


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
    """Raise ``InputError`` unless ``groups`` is an int64 tensor with one entry a row of ``centers``, on its device."""
    if not isinstance(groups, Tensor) or groups.dtype != torch.int64:
        raise InputError(f"groups must be an int64 tensor, got {kind_of(groups)}")
    if groups.shape != centers.shape[:1]:
        raise InputError(f"groups must be ({centers.shape[0]},) to fit centers, got {tuple(groups.shape)}")
    if groups.device != centers.device:
        raise InputError(f"groups are on {groups.device}, centers on {centers.device}; move one of them")
