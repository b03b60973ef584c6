"""The registry of inputs that tests and benchmarks of the losses share: ragged shapes, strides, dtypes, hard values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossCase:
    """One input of a loss: ``make(dtype)`` gives features (N, D), centers (C, D) and labels (N,) or None."""

    name: str
    make: Callable[[torch.dtype], tuple[Tensor, Tensor, Tensor | None]]


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(name.encode()))


def _plain(
    classes: int, dim: int, per_class: int | None, common_mean: float = 0.0
) -> Callable[[torch.dtype], tuple[Tensor, Tensor, Tensor | None]]:
    def make(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        generator = _generator(f"{classes},{dim},{per_class},{common_mean}")
        offset = common_mean * torch.randn(dim, generator=generator, dtype=torch.float64)
        centers = offset + torch.randn(classes, dim, generator=generator, dtype=torch.float64)
        if per_class is None:
            features, labels = offset + torch.randn(classes, dim, generator=generator, dtype=torch.float64), None
        else:
            # Ragged on purpose: class c has between 1 and per_class features, in shuffled order.
            counts = torch.randint(1, per_class + 1, (classes,), generator=generator)
            labels = torch.repeat_interleave(torch.arange(classes), counts)
            labels = labels[torch.randperm(len(labels), generator=generator)]
            features = offset + torch.randn(len(labels), dim, generator=generator, dtype=torch.float64)
        return features.to(dtype), centers.float() if dtype != torch.float64 else centers, labels

    return make


def _changed(
    change: Callable[[Tensor], Tensor], classes: int = 7, dim: int = 12
) -> Callable[[torch.dtype], tuple[Tensor, Tensor, Tensor | None]]:
    def make(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        features, centers, labels = _plain(classes, dim, None)(dtype)
        return change(features), centers, labels

    return make


def _strided(features: Tensor) -> Tensor:
    wide = torch.full((features.shape[0] * 2, features.shape[1] * 3), float("nan"), dtype=features.dtype)
    wide[::2, 1::3] = features
    return wide[::2, 1::3]


def _offset(features: Tensor) -> Tensor:
    flat = torch.cat([torch.full((5,), float("nan"), dtype=features.dtype), features.flatten()])
    return flat[5:].view(features.shape)


def _identical_rows(features: Tensor) -> Tensor:
    return torch.cat([features[:1], features[:1], features[2:]])


LOSS_CASES = (
    LossCase("two-classes-one-dim", _plain(2, 1, None)),
    LossCase("two-classes", _plain(2, 5, None)),
    LossCase("odd", _plain(13, 7, None)),
    LossCase("wide", _plain(10, 192, None)),
    LossCase("many-classes", _plain(130, 33, None)),
    LossCase("labelled", _plain(10, 64, 5)),
    LossCase("labelled-two", _plain(2, 3, 4)),
    LossCase("common-mean", _plain(10, 64, 3, common_mean=30.0)),
    LossCase("transposed", _changed(lambda x: x.T.contiguous().T)),
    LossCase("strided", _changed(_strided)),
    LossCase("storage-offset", _changed(_offset)),
    LossCase("expanded", _changed(lambda x: x[:, :1].expand(-1, x.shape[1]))),
    LossCase("identical-rows", _changed(_identical_rows)),
)
