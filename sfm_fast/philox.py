"""Counter-based random numbers (Philox4x32-10): every value is a pure function of its position.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). A value only depends on
(seed, stream, step, item, position), so a distillation step can be replayed exactly, with any batch
split and on any device, without storing noise or a generator's state.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Stream(IntEnum):
    """The purpose of random numbers; two streams never share values."""

    INITIAL_IMAGES = 0
    AUGMENT_PARAMETERS = 1
    AUGMENT_NOISE = 2
    REAL_AUGMENT_PARAMETERS = 3
    REAL_AUGMENT_NOISE = 4
    LINEAR_CLASSIFIER = 5
    REAL_BATCH = 6
    PROBE = 7
    HOLD_OUT = 8
    START = 9


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32: four int64 tensors of 32-bit words, broadcast together -> four more.

    ``seed`` (64 bits) is the key. Matches the known-answer vectors of Random123.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        # The 64-bit product wraps in int64, which keeps its bits; the mask undoes the sign extension of >>.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _MASK, (product1 >> 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _MASK, high0 ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _words(items: Tensor, blocks: int, seed: int, stream: int, step: int) -> Tensor:
    """(len(items), blocks, 4) int64 words below 2**32."""
    if not 0 <= step < 2**32:
        raise ValueError(f"step must be in [0, 2**32), got {step}")
    position = torch.arange(blocks, device=items.device).unsqueeze(0)
    constant = [torch.tensor(int(value), dtype=torch.int64, device=items.device) for value in (step, stream)]
    return torch.stack(
        philox4x32((position, items.to(torch.int64).unsqueeze(1), constant[0], constant[1]), seed), dim=-1
    )


def uniform(items: Tensor, count: int, *, seed: int, stream: int, step: int = 0) -> Tensor:
    """(len(items), count) float64 in the open interval (0, 1): ``count`` values for each item id (int64)."""
    words = _words(items, -(-count // 4), seed, stream, step).flatten(1)[:, :count]
    return (words.double() + 0.5) * 2.0**-32


def normal(items: Tensor, count: int, *, seed: int, stream: int, step: int = 0) -> Tensor:
    """(len(items), count) float32 standard normal values, by Box-Muller on pairs of words.

    Logarithm and cosine are computed in float64 and rounded once, so vectorised and scalar code agree to the last
    bit of float32 except for ties, with any batch split.
    """
    words = _words(items, -(-count // 4), seed, stream, step)
    u = (words.double() + 0.5) * 2.0**-32
    radius, angle = torch.sqrt(-2.0 * torch.log(u[..., 0::2])), (2.0 * math.pi) * u[..., 1::2]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(1)[:, :count].float()


def permutation(count: int, *, seed: int, stream: int, step: int = 0) -> Tensor:
    """A random order of ``range(count)`` (int64); its first entries are a draw without replacement."""
    return torch.argsort(
        uniform(torch.zeros(1, dtype=torch.int64), count, seed=seed, stream=stream, step=step)[0], stable=True
    )
