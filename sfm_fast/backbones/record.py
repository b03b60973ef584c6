"""Compares a backbone with the record of one in a file, and stores a backbone's weights so that they load without network access."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..files import Metadata, load_tensors, save_tensors
from .backbone import IDENTITY, Backbone
from .load import load_backbone
from .names import ADDRESSES, SHIPPED


def check_recorded(record: Mapping[str, Any], backbone: Backbone, told: str, role: str) -> None:
    """Raise ``InputError`` if ``record``, an earlier ``Backbone.describe()``, differs from ``backbone`` in one of its entries.

    told: start of the message, such as "statistics: made with". role: how the message names ``backbone``.
    """
    current: Mapping[str, Any] = backbone.describe()
    for key, words in IDENTITY.items():
        if record.get(key, current[key]) != current[key]:
            raise InputError(
                f"{told} {record.get('name')!r} ({words} {record[key]}), but {role} is {backbone.name!r} ({words} {current[key]})"
            )


def check_among_recorded(records: Sequence[Mapping[str, Any]], backbone: Backbone, told: str, role: str) -> None:
    """Like `check_recorded` for a file made with the backbones of several ``records``, of which ``backbone`` must be one; none: no check."""
    for record in records[1:]:
        with contextlib.suppress(InputError):
            return check_recorded(record, backbone, told, role)
    try:
        check_recorded(records[0] if records else {}, backbone, told, role)
    except InputError as error:
        others = ", ".join(repr(record.get("name")) for record in records[1:])
        raise InputError(f"{error}" + (f", and it is none of the others either: {others}" if others else "")) from None


def is_recorded_as(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two complete ``Backbone.describe()`` have the same `Backbone.identity`."""
    return all(one[key] == other[key] for key in ("name", *IDENTITY))


def as_recorded(backbone: Backbone, record: Mapping[str, Any]) -> Backbone:
    """``backbone`` with mean, std and resize of ``record``, an earlier ``Backbone.describe()``.

    Raises ``InputError`` unless weights and input size are the recorded ones.
    """
    for key, words in (("fingerprint", "weights"), ("input_size", "an input size of")):
        if getattr(backbone, key) != record[key]:
            raise InputError(
                f"made for {record['name']!r} with {words} {record[key]}, but {backbone.name!r} here has {getattr(backbone, key)}; "
                "give the one it was made for (checkpoint=FILE, or backbone=…)"
            )
    mean, std = (torch.tensor(record[key], dtype=torch.float32, device=backbone.device) for key in ("mean", "std"))
    return replace(backbone, mean=mean, std=std, resize=record["resize"])


def check_storable(backbone: Backbone) -> None:
    """Raise ``InputError`` for a backbone that `save_weights` can't store, as far as this is known before saving it."""
    if backbone.name.startswith(ADDRESSES):
        raise InputError(
            f"backbone {backbone.name!r} can't be built without network access, so its weights can't be stored"
        )
    if backbone.precision != "fp32":
        raise InputError(
            f"precision of backbone {backbone.name!r} must be fp32 to store its weights, got {backbone.precision}"
        )


def save_weights(path: str | os.PathLike[str], backbone: Backbone) -> None:
    """Write the weights of ``backbone``, read them back and compare; raises ``InputError`` if the features would differ.

    Tensors that float16 represents exactly are stored as float16.
    """
    check_storable(backbone)
    shipped = SHIPPED.get(backbone.name)  # a shipped backbone's file must include the architecture
    metadata: Metadata = load_tensors(shipped)[1] if shipped is not None else {}
    metadata = {key: metadata[key] for key in ("architecture", "mean", "std") if key in metadata}
    save_tensors(
        path, {name: _small(value) for name, value in backbone.unprepared().model.state_dict().items()}, metadata
    )
    again = load_backbone(backbone.name, path, image_size=backbone.input_size, precision="fp32")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, backbone.in_channels, backbone.input_size, backbone.input_size, generator=generator)
    # The same weights in another model (other heads, another activation) would give other features.
    with torch.no_grad():
        wanted, features = backbone(noise.to(backbone.device)).cpu(), again(noise)
    same = wanted.shape == features.shape and bool((wanted - features).abs().max() <= 1e-2 * wanted.abs().max())
    if again.fingerprint != backbone.fingerprint or not same:
        raise InputError(
            f"backbone {backbone.name!r} gives other features when it is loaded from its stored weights, so they can't be stored; "
            "leave with_backbone off"
        )


def _small(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32:
        return tensor
    half = tensor.half()
    return half if torch.equal(half.float(), tensor) else tensor
