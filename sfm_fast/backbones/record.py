"""A backbone that a file recorded: its weights, stored to be loaded again without a network, and whether another is the same."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..files import Metadata, load_tensors, save_tensors
from .backbone import IDENTITY, Backbone
from .load import load_backbone
from .shipped import SHIPPED

_HUB = ("hf-hub:", "hf_hub:", "local-dir:")


def check_recorded(record: Mapping[str, Any], backbone: Backbone, told: str, role: str) -> None:
    """Raise ``InputError`` unless ``record``, an earlier ``Backbone.describe()``, is of this very ``backbone``, as far as it says.

    told: begins the message, such as "statistics: made with". role: what the message calls ``backbone``.
    """
    ours: Mapping[str, Any] = backbone.describe()
    for key, words in IDENTITY.items():
        if record.get(key, ours[key]) != ours[key]:
            raise InputError(
                f"{told} {record.get('name')!r} ({words} {record[key]}), {role} is {backbone.name!r} ({words} {ours[key]})"
            )


def is_recorded_as(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two whole ``Backbone.describe()`` tell of the same `Backbone.identity`."""
    return all(one[key] == other[key] for key in ("name", *IDENTITY))


def as_recorded(found: Backbone, record: Mapping[str, Any]) -> Backbone:
    """``found`` with mean, std and resize of ``record``, an earlier ``Backbone.describe()``.

    Raises ``InputError`` unless weights and input size are the recorded ones.
    """
    for key, told in (("fingerprint", "weights"), ("input_size", "an input size of")):
        if getattr(found, key) != record[key]:
            raise InputError(
                f"made for {record['name']!r} with {told} {record[key]}, but {found.name!r} here has {getattr(found, key)}; "
                "give the one it was made for (checkpoint=FILE, or backbone=…)"
            )
    mean, std = (torch.tensor(record[key], dtype=torch.float32, device=found.device) for key in ("mean", "std"))
    return replace(found, mean=mean, std=std, resize=record["resize"])


def check_storable(backbone: Backbone) -> None:
    """Raise ``InputError`` for a backbone that `save_weights` can't store; what it can't tell beforehand it tells then."""
    if backbone.name.startswith(_HUB):
        raise InputError(
            f"backbone {backbone.name!r} can't be built without the network, so its weights alone are of no use"
        )
    if backbone.precision != "fp32":
        raise InputError(
            f"backbone {backbone.name!r} was loaded as {backbone.precision}; its weights are stored from fp32 alone (precision)"
        )


def save_weights(path: str | os.PathLike[str], backbone: Backbone) -> None:
    """Write the weights of ``backbone`` and read them back: the very same ones, or ``InputError`` that says why not.

    Tensors that float16 holds without loss are stored so.
    """
    check_storable(backbone)
    shipped = SHIPPED.get(backbone.name)  # such a file says itself what model it is for
    metadata: Metadata = load_tensors(shipped)[1] if shipped is not None else {}
    metadata = {key: metadata[key] for key in ("architecture", "mean", "std") if key in metadata}
    save_tensors(path, {name: _small(value) for name, value in backbone.model.state_dict().items()}, metadata)
    again = load_backbone(backbone.name, path, image_size=backbone.input_size, precision="fp32")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, backbone.in_channels, backbone.input_size, backbone.input_size, generator=generator)
    # The same weights in another model (other heads, another activation) would give other features.
    with torch.no_grad():
        wanted, found = backbone(noise.to(backbone.device)).cpu(), again(noise)
    same = wanted.shape == found.shape and bool((wanted - found).abs().max() <= 1e-2 * wanted.abs().max())
    if again.fingerprint != backbone.fingerprint or not same:
        raise InputError(
            f"backbone {backbone.name!r} comes back as another from its weights alone, so they can't be stored; "
            "leave with_backbone off"
        )


def _small(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32:
        return tensor
    half = tensor.half()
    return half if torch.equal(half.float(), tensor) else tensor
