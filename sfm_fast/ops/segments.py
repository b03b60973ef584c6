"""Groups labelled items by class, for operations that average over classes; computed once per tensor of labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_label_form, check_labels
from ..errors import InputError
from .cache import TensorCache


class Segments(NamedTuple):
    """Class c has the items ``order[offsets[c] : offsets[c + 1]]``: (N,) and (C+1,), int64.

    ``in_range``: scalar bool tensor if the labels' values couldn't be read and checked, else None.
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
    ordered, order = torch.sort(
        labels, stable=True
    )  # stable, so that a class's items are summed in their original order
    offsets = torch.searchsorted(ordered, torch.arange(classes + 1, device=labels.device))
    if not unreadable:
        return Segments(order, offsets)
    # Items with invalid labels are put into the first or last class, so that every row of a gradient is written; the loss becomes NaN.
    in_range = (offsets[0] == 0) & (offsets[-1] == labels.shape[0])
    inner = offsets[1:-1]
    ends = inner.new_zeros(1), inner.new_full((1,), labels.shape[0])
    return Segments(order, torch.cat([ends[0], inner, ends[1]]), in_range)


def _values_unreadable(labels: Tensor) -> bool:
    """Whether reading values would break a graph or wait for the device: when compiling, exporting or capturing a CUDA graph."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or labels.is_meta:
        return True
    if torch._C._get_tracing_state() is not None:
        return True
    if type(labels) is not Tensor and isinstance(labels, torch._subclasses.FakeTensor):
        return True
    return labels.is_cuda and torch.cuda.is_current_stream_capturing()


_segments = TensorCache(_prepare)


def segments_of(labels: Tensor, items: int, classes: int, device: torch.device) -> Segments:
    """Segments of (items,) int64 labels in 0..classes-1, every class at least once; cached for the same tensor.

    Raises ``InputError`` if labels have another form, are out of range or lack a class. While compiling or capturing a CUDA graph
    values can't be read: then a missing class or a label out of range gives a NaN loss instead.
    """
    check_label_form("labels", labels, items)
    if labels.device != device:
        raise InputError(f"labels are on {labels.device}, features on {device}; move one of them")
    return _segments(labels, classes)
