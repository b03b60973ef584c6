"""Rounds of the performance gate as a machine of known noise would give them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable


def scripted(
    ratio: float, spread: float, *, control: float = 1.0, seed: int = 0, tail: float = 0.0
) -> Callable[[int], list[tuple[float, float, float]]]:
    """Rounds of a machine: log-normal noise, with probability ``tail`` a sample takes three times as long."""
    draw = random.Random(seed)

    def one(cost: float) -> float:
        return cost * math.exp(draw.gauss(0, spread)) * (3.0 if draw.random() < tail else 1.0)

    return lambda count: [(one(ratio), one(1.0), one(control)) for _ in range(count)]
