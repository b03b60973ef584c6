"""Class means of labelled features and their gradient, on a compiled backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .library import operation, register


def _fake(features: Tensor, order: Tensor | None, offsets: Tensor | None, shift: Tensor) -> Tensor:
    classes = features.shape[0] if offsets is None else offsets.shape[0] - 1
    return shift.new_empty((classes, features.shape[1]))


def _fake_backward(
    grad: Tensor, order: Tensor | None, offsets: Tensor | None, num_items: int, dtype: torch.dtype
) -> Tensor:
    return grad.new_empty((num_items, grad.shape[1]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, order, offsets, _ = inputs
    ctx.items, ctx.dtype = features.shape[0], features.dtype
    ctx.save_for_backward(order, offsets)


def _backward(backend: str, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    order, offsets = ctx.saved_tensors
    return operation(backend, "class_means_backward")(grad, order, offsets, ctx.items, ctx.dtype), None, None, None


register("class_means", _fake, setup=_setup_context, backward=_backward)
register("class_means_backward", _fake_backward)
