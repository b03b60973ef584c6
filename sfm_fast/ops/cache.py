"""Caches values computed from a tensor for as long as that tensor exists unchanged."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class _Entry(NamedTuple):
    owner: weakref.ref
    state: tuple[Any, ...]
    contents: Tensor | None
    value: Any


class TensorCache(Generic[Value]):
    """``compute(tensor, *key)``, computed once per tensor object, contents and key; the entry is dropped with the tensor.

    A CPU tensor's contents are compared with a copy at every call, which takes microseconds to milliseconds and notices every
    write. On a GPU that would wait for the device, so version counter and address are compared instead, which miss writes that
    bypass autograd (``.data``, collectives, replays of CUDA graphs, other libraries).

    Nothing is cached during compilation, tracing, torch.func transforms or dispatch modes, for fake tensors and other subclasses,
    or for inference tensors, which have no version counter.
    """

    def __init__(self, compute: Callable[..., Value]) -> None:
        self.compute = compute
        self._entries: dict[int, _Entry] = {}

    def __call__(self, tensor: Tensor, *key: Any) -> Value:
        if torch.compiler.is_compiling() or not _plain(tensor):
            return self.compute(tensor, *key)
        name = id(tensor)
        state = tensor._version, tensor.data_ptr(), tensor.dtype, key
        entry = self._entries.get(name)
        known = entry is not None and entry.owner() is tensor and entry.state == state
        if entry is not None and known and (entry.contents is None or torch.equal(tensor, entry.contents)):
            value: Value = entry.value
            return value
        # Not as inference tensors, which autograd couldn't save in later calls.
        with torch.inference_mode(False), torch.no_grad():
            contents = tensor.detach().clone() if tensor.device.type == "cpu" else None
            value = self.compute(tensor, *key)
        owner = weakref.ref(tensor, lambda _: self._entries.pop(name, None))
        self._entries[name] = _Entry(owner, state, contents, value)
        return value


def _plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not tensor.is_inference()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
    )
