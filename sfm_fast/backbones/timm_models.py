"""Builds timm's models without head, for an input size, dtype and memory format."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, reason_of
from .hub import hub_or_cache
from .names import ADDRESSES, SHIPPED


def check_name(name: str) -> None:
    """Raise ``InputError`` if timm has no model ``name``; "name.tag" and hub addresses are resolved by timm."""
    import timm

    if not name.startswith(ADDRESSES) and not timm.is_model(name):
        close = difflib.get_close_matches(name, [*SHIPPED, *timm.list_models()], n=5)
        raise InputError(
            f"backbone must be {' or '.join(map(repr, SHIPPED))}, or a name of timm.list_models() such as "
            f"{', '.join(close) or 'vit_base_patch14_dinov2'}, got {name!r}"
        )


def create(
    name: str, image_size: int | None, *, pretrained: bool, **options: Any
) -> tuple[nn.Module, Mapping[str, Any]]:
    """A timm model without head, and its data config; ``options`` are passed to the model.

    Without ``pretrained`` weights it has timm's initial ones, the same at every call.
    Raises ``InputError`` for an unknown name, pretrained weights that can't be downloaded, or an ``image_size`` that the model can't take.
    """
    import timm
    from timm.data import resolve_model_data_config

    check_name(name)
    sized = options if image_size is None else {**options, "img_size": image_size}
    try:
        with hub_or_cache(name) if pretrained else _fixed_seed():
            try:
                model = timm.create_model(name, pretrained=pretrained, num_classes=0, **sized)
            except TypeError:  # convolutional models take any size and have no such argument
                model = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except Exception as error:  # the hub client raises many exceptions
        reason = reason_of(error)
        if not pretrained:
            raise InputError(f"backbone {name!r} can't be built with {sized}: {reason}") from error
        raise InputError(
            f"backbone {name!r}: its pretrained weights can't be loaded ({reason}); give a local file of weights "
            "(--checkpoint FILE), or try the model without training (--weights random)"
        ) from error
    config = dict(resolve_model_data_config(model))
    if image_size not in (None, model.default_cfg.get("input_size", (0,))[-1]):
        _check_patches(name, model, int(image_size or 0))
    if image_size is not None:
        config["input_size"] = (config["input_size"][0], image_size, image_size)
    return model, config


@contextlib.contextmanager
def _fixed_seed() -> Iterator[None]:
    """Within the context torch's random numbers on the CPU are the same every time; afterwards its generator is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def _check_patches(name: str, model: nn.Module, image_size: int) -> None:
    """Raise ``InputError`` if the patches don't cover the image: timm would crop it without a warning."""
    embedding: Any = getattr(model, "patch_embed", None)
    patch = getattr(embedding, "patch_size", None)
    patch = patch[-1] if isinstance(patch, (tuple, list)) else patch
    if isinstance(patch, int) and image_size % patch and not getattr(embedding, "dynamic_img_pad", False):
        below = image_size // patch * patch
        sizes = " or ".join(str(size) for size in (below, below + patch) if size)
        raise InputError(
            f"image_size of {name!r} must be a multiple of its patches of {patch} px, got {image_size}; try {sizes}"
        )


@torch.no_grad()
def count_features(name: str, model: nn.Module, channels: int, size: int) -> int:
    """Number of features per image. Raises ``InputError`` if the model can't take this size, or doesn't return (1, features)."""
    weight = next(model.parameters())
    try:
        output = model(torch.zeros(1, channels, size, size, device=weight.device, dtype=weight.dtype))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # assertions, shapes that don't fit
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"backbone {name!r} can't take images of {size} px: {reason}") from error
    if not isinstance(output, Tensor) or output.ndim != 2:
        got = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise InputError(f"backbone {name!r} must return (1, features) for one image, got {got}")
    return int(output.shape[1])


def arrange(name: str, model: nn.Module, precision: str, grad_checkpointing: bool) -> nn.Module:
    """``model`` with the dtype, memory format and checkpointing of a run; used by its memory prediction too."""
    if precision == "bf16":
        model = model.bfloat16()
    if is_convolutional(model):
        model = model.to(memory_format=torch.channels_last)
    if grad_checkpointing:
        set_grad_checkpointing(name, model)
    return model


def is_convolutional(model: nn.Module) -> bool:
    """Whether the model consists mainly of 2-D convolutions, more than a transformer needs for its patches."""
    if any(parameter.ndim > 4 for parameter in model.parameters()):
        return False  # channels-last is for 4-D tensors
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    return convolutions > 4 and convolutions > sum(isinstance(module, nn.Linear) for module in model.modules())


def set_grad_checkpointing(name: str, model: nn.Module) -> None:
    """Enable activation checkpointing; raises ``InputError`` if the model doesn't support it."""
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, NotImplementedError, TypeError) as error:
        raise InputError(
            f"backbone {name!r} doesn't support activation checkpointing; leave grad_checkpointing off"
        ) from error
