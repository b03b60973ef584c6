"""Remembers what was computed from a tensor for as long as that tensor lives unchanged."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class TensorCache(Generic[Value]):
    """``compute(tensor, *key)``, once for each tensor object, version of its contents and key.

    The entry goes with the tensor, and counts no more once the tensor was written in place. Nothing is kept while
    compiling, inside functional transforms or for inference tensors, which have no version.
    """

    def __init__(self, compute: Callable[..., Value]) -> None:
        self.compute = compute
        self._entries: dict[int, tuple[weakref.ref, int, tuple[Any, ...], Value]] = {}

    def __call__(self, tensor: Tensor, *key: Any) -> Value:
        if torch.compiler.is_compiling() or tensor.is_inference() or torch._C._are_functorch_transforms_active():
            return self.compute(tensor, *key)
        name = id(tensor)
        entry = self._entries.get(name)
        if entry is not None and entry[0]() is tensor and entry[1] == tensor._version and entry[2] == key:
            return entry[3]
        value = self.compute(tensor, *key)
        gone = weakref.ref(tensor, lambda _: self._entries.pop(name, None))
        self._entries[name] = gone, tensor._version, key, value
        return value
