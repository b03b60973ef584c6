"""Caches values computed from tensors for as long as these tensors exist unchanged."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class _Watched(NamedTuple):
    owner: weakref.ref
    state: tuple[Any, ...]
    contents: Tensor | None


class _Entry(NamedTuple):
    watched: tuple[_Watched, ...]
    value: Any


class TensorCache(Generic[Value]):
    """``compute(*arguments)``, computed once per arguments: tensors by object and contents, others by value.

    An entry is dropped with any of its tensors.

    A CPU tensor's contents are compared with a copy at every call, which takes microseconds to milliseconds and notices every
    write. On a GPU that would wait for the device, so version counter and address are compared instead, which miss writes that
    bypass autograd (``.data``, collectives, replays of CUDA graphs, other libraries).

    Nothing is cached during compilation, tracing, torch.func transforms or dispatch modes, for fake tensors and other subclasses,
    or for inference tensors, which have no version counter.
    """

    def __init__(self, compute: Callable[..., Value]) -> None:
        self.compute = compute
        self._entries: dict[tuple[Any, ...], _Entry] = {}

    def __call__(self, *arguments: Any) -> Value:
        if torch.compiler.is_compiling():
            return self.compute(*arguments)
        # Loops instead of comprehensions and methods, since this is a good part of what a call of a small loss takes.
        tensors: list[Tensor] = []
        values: list[Any] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                if not _plain(argument):
                    return self.compute(*arguments)
                tensors.append(argument)
                values.append(id(argument))
            else:
                values.append(argument)
        name = tuple(values)
        entry = self._entries.get(name)
        if entry is not None:
            for tensor, (owner, state, contents) in zip(tensors, entry.watched, strict=True):
                if owner() is not tensor or state != _state(tensor):
                    break
                if contents is not None and not torch.equal(tensor, contents):
                    break
            else:
                value: Value = entry.value
                return value
        # Not as inference tensors, which autograd couldn't save in later calls.
        with torch.inference_mode(False), torch.no_grad():
            copies = [tensor.detach().clone() if tensor.device.type == "cpu" else None for tensor in tensors]
            value = self.compute(*arguments)
        watched = tuple(
            _Watched(weakref.ref(tensor, lambda _: self._entries.pop(name, None)), _state(tensor), copied)
            for tensor, copied in zip(tensors, copies, strict=True)
        )
        self._entries[name] = _Entry(watched, value)
        return value


def _state(tensor: Tensor) -> tuple[Any, ...]:
    return tensor._version, tensor.data_ptr(), tensor.dtype


def _plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not tensor.is_inference()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
    )
