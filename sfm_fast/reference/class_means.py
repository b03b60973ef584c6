"""Mean of labelled features per class, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def class_means(features: Tensor, order: Tensor | None, offsets: Tensor | None, shift: Tensor) -> Tensor:
    """Mean of ``features - shift`` over each class: (N, D), (N,), (C+1,), (D,) -> (C, D), differentiable in ``features``.

    Class c has the items ``order[offsets[c] : offsets[c + 1]]``; if both are None, every item is its own class. The shift
    is subtracted *before* the sum: features of self-supervised models have a common mean much larger than the spread between
    classes, which a float32 sum of the raw values would round off. ``shift`` has the compute dtype (float32 or float64), which
    is also that of the result. A class without items gives NaN.
    """
    shifted = features.to(shift.dtype) - shift
    if order is None or offsets is None:
        return shifted
    positions = torch.arange(len(order), device=order.device)
    classes = torch.searchsorted(offsets, positions, right=True) - 1
    sums = torch.zeros((len(offsets) - 1, features.shape[1]), dtype=shift.dtype, device=features.device)
    return sums.index_add(0, classes, shifted[order]) / offsets.diff().to(shift.dtype).unsqueeze(1)
