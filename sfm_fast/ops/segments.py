"""Labels, prepared once: which items belong to each class, for operations that average over classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_label_form, check_labels
from ..errors import InputError
from .cache import TensorCache


class Segments(NamedTuple):
    """Class c owns the items ``order[offsets[c] : offsets[c + 1]]``: (N,) and (C+1,), int64.

    ``in_range``: scalar bool tensor where the labels' values couldn't be read and checked, else None.
    """

    order: Tensor
    offsets: Tensor
    in_range: Tensor | None = None


def _prepare(labels: Tensor, classes: int) -> Segments:
    unreadable = _values_unreadable(labels)
    if not unreadable:
        missing = (check_labels("labels", labels, labels.shape[0], classes) == 0).nonzero().flatten()
        if len(missing):
            raise InputError(
                f"labels: class {int(missing[0])} has no feature ({len(missing)} of {classes} classes are missing)"
            )
    ordered, order = torch.sort(labels, stable=True)  # stable: a class's items are summed in their own order
    offsets = torch.searchsorted(ordered, torch.arange(classes + 1, device=labels.device))
    if not unreadable:
        return Segments(order, offsets)
    # Items of no class join the first or last one, so that every row of a gradient is written; the loss becomes NaN.
    in_range = (offsets[0] == 0) & (offsets[-1] == labels.shape[0])
    inner = offsets[1:-1]
    ends = inner.new_zeros(1), inner.new_full((1,), labels.shape[0])
    return Segments(order, torch.cat([ends[0], inner, ends[1]]), in_range)


def _values_unreadable(labels: Tensor) -> bool:
    """Where reading values would break a graph or wait for the device: compiling, exporting, capturing a CUDA graph."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or labels.is_meta:
        return True
    if torch._C._get_tracing_state() is not None:
        return True
    if type(labels) is not Tensor and isinstance(labels, torch._subclasses.FakeTensor):
        return True
    return labels.is_cuda and torch.cuda.is_current_stream_capturing()


_segments = TensorCache(_prepare)


def segments_of(labels: Tensor, items: int, classes: int, device: torch.device) -> Segments:
    """Segments of (items,) int64 labels in 0..classes-1, every class at least once; remembered for the same tensor.

    Raises ``InputError`` naming what is wrong. Values can't be read while compiling or capturing a CUDA graph: there a
    missing class or a label out of range gives a NaN loss instead.
    """
    check_label_form("labels", labels, items)
    if labels.device != device:
        raise InputError(f"labels are on {labels.device}, features on {device}; move one of them")
    return _segments(labels, classes)
