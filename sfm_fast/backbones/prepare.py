"""The same function of a frozen model in fewer passes over its activations, and with less memory for the backward pass.

One forward pass without values records which functions the model calls (`sfm_fast.backbones.dataflow`). From this, not from names of
models, follow the changes: a batch norm whose input only it uses is folded into the convolution or linear layer before it; a
LayerScale into the linear layer or convolution before it; the affine part of a LayerNorm into the linear layers behind it. What
doesn't fit stays: a norm before a convolution, a weight that is computed or used twice.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import reason_of
from .dataflow import Call, Dataflow, observe, sharing_weights, without_values
from .frozen_layers import Affine, FrozenConv2d, FrozenConv2dSame

VERSION = 1  # recorded in files beside a backbone's identity; another number if preparing gives other bits

# Functions that only move values, and dropout, which does nothing here.
_MOVES = {
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "permute",
    "transpose",
    "contiguous",
    "dropout",
    "dropout2d",
    "squeeze",
    "unsqueeze",
}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}


@dataclass
class Preparation:
    """What `prepare_frozen` changed, and why it left a model or a part of it alone: counts by description."""

    done: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        def listed(counts: Counter[str]) -> str:
            return ", ".join(f"{count} {what}" for what, count in counts.items())

        done = listed(self.done) or "nothing to change"
        return f"{done}; left alone: {listed(self.left)}" if self.left else done


@torch.no_grad()
def prepare_frozen(model: nn.Module, size: int, channels: int = 3) -> tuple[nn.Module, Preparation]:
    """A model that computes the same function of images (N, channels, size, size) as ``model``, faster, and a record of the changes.

    ``model`` is in eval mode and stays as it is; the result shares its unchanged parameters. Folded weights are computed in float64 and
    rounded once. The result is for gradients to the images: a gradient of its weights isn't one of ``model``'s.

    A model that can't run without values, or whose features would differ, is returned as it is, and the record says why: the
    features of two images are compared (unless ``model`` is on the "meta" device), and may differ by 1e-4 of the largest one in
    float32, 1e-10 in float64 and 5e-2 in lower precision.
    """
    record = Preparation()
    try:
        shadow = without_values(model, torch.device("meta"))
        dtype = next(model.parameters()).dtype
        flow = observe(shadow, torch.empty(2, channels, size, size, device="meta", dtype=dtype))
        prepared = sharing_weights(model)
        _Folder(prepared, shadow, flow, record).fold()
        _replace_layers(prepared, record)
    except Exception as error:  # models may do anything; those that can't be prepared still run
        problem = f"it can't be observed or changed ({reason_of(error)})"
    else:
        problem = _difference(model, prepared, size, channels)
    if problem:
        return model, Preparation(left=Counter({f"model, because {problem}": 1}))
    return prepared, record


def _difference(model: nn.Module, prepared: nn.Module, size: int, channels: int) -> str:
    """How the two models' features differ, for a message; "" if they don't, or if there are no values to compare."""
    weight = next(model.parameters())
    if weight.device.type == "meta":
        return ""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, channels, size, size, generator=generator, dtype=torch.float64).to(weight)
    with full_float32():
        before = model(images)
        try:
            after = prepared(images)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return f"it then fails ({reason_of(error)})"
    limit = {torch.float64: 1e-10, torch.float32: 1e-4}.get(weight.dtype, 5e-2)
    difference = float((before - after).abs().max() / before.abs().max().clamp(min=1e-30))
    return "" if difference <= limit else f"its features would differ by {difference:.1e} of the largest"


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Compute products and convolutions of float32 in full, without TF32 or bfloat16 inside; then the process's own settings are restored.

    In TF32, torch's default for convolutions on GPUs, two orders of the same sums differ by more than float32's rounding.
    """
    backends: Any = torch.backends
    general = (backends, backends.cudnn, backends.mkldnn)
    changed: list[tuple[Any, str]] = []
    try:
        # The general settings first: what follows them needs no setting of its own, which would stay behind as one.
        for place in (
            *general,
            backends.cuda.matmul,
            backends.cudnn.conv,
            backends.mkldnn.matmul,
            backends.mkldnn.conv,
        ):
            if place.fp32_precision != "ieee":
                changed.append((place, place.fp32_precision))
                place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in changed:
            place.fp32_precision = precision


class _Folder:
    """Folds the layers of ``model`` that ``flow``, recorded from its copy ``shadow``, shows to be foldable."""

    def __init__(self, model: nn.Module, shadow: nn.Module, flow: Dataflow, record: Preparation) -> None:
        self.model, self.flow, self.record = model, flow, record
        self.names: dict[int, list[str]] = {}
        for name, tensor in (
            *shadow.named_parameters(remove_duplicate=False),
            *shadow.named_buffers(remove_duplicate=False),
        ):
            self.names.setdefault(id(tensor), []).append(name)
        self.uses = Counter(id(tensor) for call in flow.calls for tensor in call.tensors)

    def fold(self) -> None:
        calls = self.flow.calls
        for call in calls:
            if call.name == "batch_norm":
                self._fold_batch_norm(call)
        for call in calls:
            if call.name in ("mul", "__mul__", "__rmul__") and len(call.tensors) == 2:
                self._fold_scale(call)
        for call in calls:
            if call.name == "layer_norm":
                self._fold_layer_norm(call)

    def _owner(self, tensor: Any) -> tuple[Any, str, str] | None:
        """Module of ``model``, its path, and the attribute of a parameter or buffer that has one name and is used once; else None."""
        names = self.names.get(id(tensor), [])
        if len(names) != 1 or self.uses[id(tensor)] != 1:
            return None
        path, _, attribute = names[0].rpartition(".")
        return self.model.get_submodule(path), path, attribute

    def _replace(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, module.eval())

    def _layer_before(self, number: int, *, moved: bool) -> Call | None:
        """The convolution or linear layer whose result a value is, through functions that only move values if ``moved``; None if
        another call uses one of these values."""
        while (call := self.flow.maker.get(number)) is not None and self.flow.only_user(number) is not None:
            if call.name == "linear" or (call.name in _CONVOLUTIONS and len(call.tensors) <= 3):
                return call
            if call.name not in _MOVES or not moved:
                return None
            number = call.inputs[0]
        return None

    def _layer(self, call: Call | None, outputs: int) -> Any:
        """The module of a convolution or linear layer with constant weight and bias of its own, used once and with ``outputs`` channels."""
        owner = None if call is None else self._owner(call.argument(1, "weight"))
        if call is None or owner is None or owner[2] != "weight":
            return None
        module, bias = owner[0], call.argument(2, "bias")
        known = bias is None or (self._owner(bias) or (None,))[0] is module
        fits = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and len(module.weight) == outputs
        return module if known and fits and not hasattr(module, "parametrizations") else None

    def _fold_batch_norm(self, call: Call) -> None:
        owner = self._owner(call.argument(1, "running_mean"))
        if owner is None or call.argument(5, "training"):
            self.record.left["batch norms without statistics of their own"] += 1
            return
        norm, path, _ = owner
        rest = _behind_norm(norm)
        if rest is None:
            self.record.left[f"batch norms of class {type(norm).__name__}"] += 1
            return
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        scale = (variance + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -mean * scale if norm.bias is None else norm.bias.double() - mean * scale
        before = self._layer_before(call.inputs[0], moved=False)
        if before is None and call.tensors[0].ndim == 2:  # after a linear layer whose tokens were flattened
            before = self._layer_before(call.inputs[0], moved=True)
            before = before if before is not None and before.name == "linear" else None
        layer = self._layer(before, len(scale))
        if layer is None:
            like = norm.running_mean
            rest = [Affine(scale.to(like), shift.to(like)), *rest]
            self.record.left["batch norms, as one multiplication and addition"] += 1
        else:
            _set_map(layer, _rows(layer, scale), _bias(layer) * scale + shift)
            self.record.done[
                f"batch norms folded into {'linear layers' if isinstance(layer, nn.Linear) else 'convolutions'}"
            ] += 1
        self._replace(path, rest[0] if len(rest) == 1 else nn.Sequential(*rest))

    def _fold_scale(self, call: Call) -> None:
        for value, factor in (call.inputs, call.inputs[::-1]):
            while (maker := self.flow.maker.get(factor)) is not None and maker.name in _MOVES:
                factor = maker.inputs[0]
            owner = self._owner(self.flow.leaves.get(factor))
            if owner is None:
                continue
            module, path, attribute = owner
            scale = getattr(module, attribute)
            layer = self._layer(self._layer_before(value, moved=True), scale.numel())
            if not isinstance(scale, nn.Parameter) or layer is None:
                continue
            scale = scale.double().flatten()
            _set_map(layer, _rows(layer, scale), _bias(layer) * scale)
            if type(module).__name__.startswith("LayerScale"):
                self._replace(path, nn.Identity())
            else:  # such as ConvNeXt's blocks, which leave the product out without a factor
                setattr(module, attribute, None)
            self.record.done["layer scales folded"] += 1
            return

    def _fold_layer_norm(self, call: Call) -> None:
        owner = self._owner(call.argument(2, "weight"))
        bias = call.argument(3, "bias")
        number = call.outputs[0]
        users = self.flow.users[number]
        layers = [
            self._layer(user, len(user.argument(1, "weight"))) if user.name == "linear" else None for user in users
        ]
        if owner is None or owner[2] != "weight" or number == self.flow.result or not layers:
            return
        norm = owner[0]
        if (bias is not None and (self._owner(bias) or (None,))[0] is not norm) or any(
            layer is None or layer.in_features != len(norm.weight) for layer in layers
        ):
            return
        scale = norm.weight.double()
        for layer in layers:
            assert isinstance(layer, nn.Linear)
            weight = layer.weight.double()
            shifted = _bias(layer) if norm.bias is None else _bias(layer) + weight @ norm.bias.double()
            _set_map(layer, weight * scale, shifted if layer.bias is not None or norm.bias is not None else None)
        norm.weight = norm.bias = None
        self.record.done["layer norms folded into linear layers"] += 1


def _behind_norm(norm: Any) -> list[nn.Module] | None:
    """What the module of a batch norm does after it, none of it as Identity; None if this isn't known."""
    if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return [nn.Identity()]
    if type(norm).__name__ in ("BatchNormAct2d", "BatchNormAct3d"):  # timm's, with dropout and activation
        return [norm.drop, norm.act]
    return None


def _rows(layer: Any, scale: Tensor) -> Tensor:
    """The layer's weight in float64, each output channel times its ``scale``."""
    weight: Tensor = layer.weight.double()
    return weight * scale.view(-1, *(1,) * (weight.ndim - 1))


def _bias(layer: Any) -> Tensor:
    weight: Tensor = layer.weight
    bias: Tensor = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias
    return bias.double()


def _set_map(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype), False)
    layer.bias = None if bias is None else nn.Parameter(bias.to(dtype), False)


def _replace_layers(model: nn.Module, record: Preparation) -> None:
    """Convolutions that don't keep their input for the backward pass, and no modules for dropout."""
    for module in [*model.modules()]:
        same = type(module).__name__ == "Conv2dSame"  # timm's; other subclasses may do anything
        known = isinstance(module, nn.Conv2d) and (type(module) is nn.Conv2d or same)
        if known and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module.__class__ = FrozenConv2dSame if same else FrozenConv2d
            record.done["convolutions that keep no input"] += 1
        for name, child in module.named_children():
            if isinstance(child, nn.modules.dropout._DropoutNd) or type(child).__name__ == "DropPath":
                setattr(module, name, nn.Identity().eval())
