"""Mean of labelled features per class, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def class_means(features: Tensor, labels: Tensor, counts: Tensor, shift: Tensor) -> Tensor:
    """Mean of ``features - shift`` over each class: (N, D), (N,) int64, (C,) counts, (D,) -> (C, D).

    The shift comes off *before* the sum: features of self-supervised models have a common mean far larger than the
    spread between classes, and a float32 sum of the raw values would round the spread away. ``shift`` is in the
    compute dtype (float32 or float64) and sets the dtype of the result. Differentiable in ``features``.
    """
    shifted = features.to(shift.dtype) - shift
    sums = torch.zeros((counts.shape[0], features.shape[1]), dtype=shift.dtype, device=features.device)
    return sums.index_add(0, labels, shifted) / counts.to(shift.dtype).unsqueeze(1)
