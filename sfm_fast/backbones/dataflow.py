"""Records which torch functions a model calls, on which of its parameters and on whose results."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter


@dataclass(frozen=True)
class Call:
    """One call: ``inputs`` and ``outputs`` are the numbers of its tensors' values, ``tensors`` its input tensors in order."""

    function: Callable[..., Any]
    name: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    tensors: tuple[Tensor, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def argument(self, position: int, name: str) -> Any:
        return self.arguments[position] if len(self.arguments) > position else self.keywords.get(name)


class Dataflow:
    """The calls of one forward pass. A value is a tensor between two writes to it; each has a number."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.maker: dict[int, Call] = {}
        self.users: dict[int, list[Call]] = defaultdict(list)
        self.leaves: dict[int, Tensor] = {}  # values that no call made: images, parameters and buffers
        self.result = -1
        self._number: dict[int, int] = {}  # id of a tensor -> number of its present value
        self._alive: list[Tensor] = []  # ids stay unique only while their tensors exist
        self._values = 0

    def number(self, tensor: Tensor) -> int:
        """The number of the present value of ``tensor``."""
        if id(tensor) not in self._number:
            self.leaves[self._values] = tensor
            self._renumber(tensor)
        return self._number[id(tensor)]

    def _renumber(self, tensor: Tensor) -> None:
        self._alive.append(tensor)
        self._number[id(tensor)] = self._values
        self._values += 1

    def add(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any], result: Any
    ) -> None:
        tensors = tuple(value for value in tree_iter((arguments, keywords)) if isinstance(value, Tensor))
        results = tuple(value for value in tree_iter(result) if isinstance(value, Tensor))
        if not results:
            return  # a question such as x.shape, not a use of the values
        name = getattr(function, "__name__", "").rstrip("_")
        if name in ("reshape_as", "view_as", "expand_as"):
            tensors = tensors[:1]  # the second one gives only its shape
        inputs = tuple(map(self.number, tensors))
        for value in results:
            self._renumber(value)
        call = Call(function, name, arguments, keywords, tensors, inputs, tuple(map(self.number, results)))
        self.calls.append(call)
        for number in call.outputs:
            self.maker[number] = call
        for number in set(inputs):
            self.users[number].append(call)

    def only_user(self, number: int) -> Call | None:
        """The call that uses a value, if there is exactly one and the value isn't the result."""
        users = self.users[number]
        return users[0] if len(users) == 1 and number != self.result else None


class _Recorder(TorchFunctionMode):
    def __init__(self, flow: Dataflow) -> None:
        super().__init__()
        self.flow = flow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.flow.add(func, args, kwargs or {}, result)
        return result


@torch.no_grad()
def observe(model: nn.Module, images: Tensor) -> Dataflow:
    """The calls of ``model(images)``, whose result is the value ``result``. Raises whatever the model raises."""
    flow = Dataflow()
    with _Recorder(flow):
        result = model(images)
    flow.result = flow.number(result)
    return flow


def without_values(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of ``model`` with new parameters and buffers on ``device``; on "meta", or in a fake tensor mode, they take no memory."""

    def like(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    copies: dict[int, Any] = {id(value): nn.Parameter(like(value), False) for value in model.parameters()}
    copies |= {id(value): like(value) for value in model.buffers()}
    for module in model.modules():  # tensors in other attributes too, such as cached attention biases
        beside = {
            name: value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")
        }
        copies |= {id(value): like(value) for value in tree_iter(beside) if isinstance(value, Tensor)}
    return copy.deepcopy(model, copies)


def sharing_weights(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with the same parameters and buffers: replacing a module or a parameter in it leaves ``model`` as it is."""
    return copy.deepcopy(model, {id(value): value for value in (*model.parameters(), *model.buffers())})
