"""Pairs items with their nearest others, each used once."""

from __future__ import annotations

import torch
from torch import Tensor


def closest_pairs(distance: Tensor) -> Tensor:
    """(M,) int64 on the CPU: for each row of ``distance`` (M, N) its column, matched greedily: the closest pair first, then the closest of the rest.

    Columns are distinct if there are enough; once all are used, the remaining rows may use them again.
    """
    left, chosen = distance.clone(), torch.full((len(distance),), -1)
    for _ in range(len(distance)):
        if left.isinf().all():
            free = (chosen < 0).to(distance.device)
            left[free] = distance[free]
        row, column = divmod(int(left.argmin()), distance.shape[1])
        chosen[row] = column
        left[row], left[:, column] = float("inf"), float("inf")
    return chosen
