"""Counts memory by category and floating-point operations of code that runs on tensors, including fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

CATEGORIES = ("parameters", "pyramid", "adam", "activations", "workspace")


@dataclass
class _Entry:
    category: str
    size: int


class Tracker(TorchDispatchMode):
    """Counts bytes of existing storages by category, as operations allocate and Python releases them, and floating-point operations."""

    def __init__(self) -> None:
        super().__init__()
        self.known: weakref.WeakKeyDictionary[Any, _Entry] = weakref.WeakKeyDictionary()
        self.flops = self.total = self.peak = 0
        self.fresh = "workspace"  # category of new allocations
        self.events: list[tuple[_Entry, int]] = []  # allocations (1) and releases (-1)
        self.peak_event = 0

    def assign(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Count the tensors' storages under ``category``; "" leaves them out."""
        for tensor in tensors:
            entry = self.known.get(tensor.untyped_storage())
            if entry is None:
                self._add(tensor, category)
            else:
                self.total += entry.size * (bool(category) - bool(entry.category))
                entry.category = category

    def living(self) -> set[int]:
        return {id(entry) for entry in self.known.values()}

    def keep(self, before: set[int], category: str) -> None:
        """Assign the storages that were allocated since `living` returned ``before``, and still exist, to ``category``."""
        for entry in self.known.values():
            if id(entry) not in before and entry.category == "workspace":
                entry.category = category

    def restart(self) -> None:
        """Reset the peak to the current total."""
        self.events = [(entry, 1) for entry in self.known.values()]
        self.peak, self.peak_event = self.total, len(self.events)

    def at_peak(self) -> dict[str, int]:
        """Bytes by category when the total was largest."""
        sizes = dict.fromkeys(CATEGORIES, 0)
        for entry, sign in self.events[: self.peak_event]:
            if entry.category:
                sizes[entry.category] += sign * entry.size
        return sizes

    def _add(self, tensor: Tensor, category: str) -> None:
        storage = tensor.untyped_storage()
        entry = _Entry(category, storage.nbytes())
        self.known[storage] = entry
        weakref.finalize(storage, self._happen, entry, -1)
        self._happen(entry, 1)

    def _happen(self, entry: _Entry, sign: int) -> None:
        self.events.append((entry, sign))
        if entry.category:
            self.total += sign * entry.size
        if self.total > self.peak:
            self.peak, self.peak_event = self.total, len(self.events)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.flops += _flops(function, args, kwargs or {}, result)
        if function is torch.ops.aten.convolution_backward.default:
            scratch = _Entry("workspace", args[2].nbytes)  # a copy of the weight in the layout for the product
            self._happen(scratch, 1)
            self._happen(scratch, -1)
        for value in tree_iter(result):
            if isinstance(value, Tensor) and value.untyped_storage() not in self.known:
                self._add(value, self.fresh)
        return result


def _flops(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    aten = torch.ops.aten
    if (
        function is aten._scaled_dot_product_flash_attention_for_cpu.default
    ):  # torch's registry only has the GPU operations
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if function is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    packet = function._overloadpacket
    return int(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0
