"""Loads frozen backbones: the shipped ones, or any timm model with a local checkpoint or weights from the hub."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..checks import check_side
from ..errors import InputError, reason_of, require_package
from ..files import expand
from . import prepare as preparing
from . import timm_models
from .backbone import Backbone
from .checkpoints import fingerprint, load_weights, model_options, read_checkpoint
from .names import DEFAULT, SHIPPED, check_weights
from .names import PRECISIONS as PRECISIONS
from .precision import choose_precision
from .shipped import read_shipped


def load_backbone(
    name: str = DEFAULT,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    weights: str = "pretrained",
    device: torch.device | str = "cpu",
    image_size: int | None = None,
    precision: str = "auto",
    compile: bool = False,
    grad_checkpointing: bool = False,
    prepare: bool = True,
) -> Backbone:
    """Load a backbone, frozen and in eval mode.

    Args:
        name: "fashion_vit" or "fashion_cnn" (shipped, self-supervised on Fashion-MNIST), or any name of ``timm.list_models()``.
        checkpoint: local file of weights, .safetensors or .pth (read with ``weights_only=True``); None: timm's pretrained weights
            from the hub. For a shipped name: a file of scripts/pretrain_backbone.py, which includes the architecture.
        weights: "pretrained"; or "random" for timm's initial weights, the same every time: a try of a timm model without a download.
        image_size: input size in pixels, for models that accept other sizes than their default.
        precision: "fp32", "bf16" (weights and activations; features are returned as float32) or "auto": bf16 where it is faster by a
            fixed rule, on GPUs that support it and for wide transformers on CPUs that multiply bfloat16 matrices in hardware; else fp32.
        compile: run the model through ``torch.compile``: takes a minute at the start, then steps are faster.
        grad_checkpointing: keep only the activations between blocks and recompute the others in the backward pass, for models
            that support it (timm's ``set_grad_checkpointing``).
        prepare: compute the same features in fewer passes and with less memory, equal up to rounding; see `prepare_frozen`.

    Convolutional nets run channels-last. Raises ``InputError`` for an unknown name, a missing or damaged checkpoint, weights that don't
    fit or can't be downloaded, or a model without activation checkpointing.
    """
    require_package("timm", "loading a backbone", "distill")
    _check_precision(precision)
    _check_image_size(image_size)
    check_weights(name, checkpoint, weights)
    device = resolve_device(device)
    if name in SHIPPED:
        path = SHIPPED[name] if checkpoint is None else checkpoint
        model, config, state = read_shipped(name, path, image_size)
        load_weights(model, {key: tensor.float() for key, tensor in state.items()}, path)
    else:
        model, config = _from_timm(name, checkpoint, image_size, weights)
    options: dict[str, Any] = dict(device=device, compile=compile, grad_checkpointing=grad_checkpointing)
    backbone = freeze(name, model, config, precision=precision, prepare=prepare, **options)
    if not backbone.prepared:
        return backbone
    # Loading again, where the original is needed at all, takes less memory than keeping it.
    options |= dict(weights=weights, image_size=image_size, precision=backbone.precision)
    return replace(backbone, original=functools.partial(load_backbone, name, checkpoint, prepare=False, **options))


def freeze(
    name: str,
    model: nn.Module,
    config: Mapping[str, Any],
    *,
    device: torch.device,
    precision: str = "fp32",
    compile: bool = False,
    grad_checkpointing: bool = False,
    prepare: bool = True,
) -> Backbone:
    """A backbone from a float32 ``model`` that returns (N, features): on ``device``, frozen, in eval mode, with a fingerprint.

    ``config`` is timm's data config: "input_size" (channels, side, side), "mean" and "std" (per channel, for images in 0..1)
    and optionally "crop_pct", the input size as a fraction of the size real images are resized to. Other arguments and errors as in
    `load_backbone`.
    """
    _check_precision(precision)
    model = model.to(device).eval().requires_grad_(False)
    backbone = _describe(name, model, config, device, fingerprint(model))
    if precision == "auto":
        precision, why = choose_precision(model, device)
        backbone = replace(backbone, why_precision=why)
    return arrange(backbone, precision, grad_checkpointing, compile, prepare)


def shape_of_backbone(
    name: str = DEFAULT,
    *,
    image_size: int | None = None,
    precision: str = "fp32",
    grad_checkpointing: bool = False,
    prepare: bool = True,
) -> Backbone:
    """A backbone without weights, on torch's "meta" device, which is enough to predict memory and operations.

    Arguments and errors as in `load_backbone`; it needs no checkpoint and, for timm's own names, no network access.
    """
    require_package("timm", "building a backbone", "distill")
    if precision not in ("fp32", "bf16"):
        raise InputError(f"precision must be fp32 or bf16, got {precision!r}")
    _check_image_size(image_size)
    with torch.device("meta"):
        if name in SHIPPED:
            model, config, _ = read_shipped(name, SHIPPED[name], image_size)
        else:
            model, config = timm_models.create(name, image_size, pretrained=False)
    model = model.eval().requires_grad_(False)
    backbone = _describe(name, model, config, torch.device("cpu"), "no weights")
    return arrange(backbone, precision, grad_checkpointing, compile=False, prepare=prepare)


def resolve_device(device: torch.device | str) -> torch.device:
    """The torch device; "auto" is the GPU if there is one, else the CPU. Raises ``InputError`` if it can't be used."""
    if str(device) == "meta":
        raise InputError("device must hold values, got 'meta'")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {str(device)!r} can't be used ({reason_of(error)})") from error
    return resolved


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {PRECISIONS}, got {precision!r}")


def _check_image_size(image_size: int | None) -> None:
    if image_size is not None:
        check_side("image_size", image_size)


def _from_timm(
    name: str, checkpoint: str | os.PathLike[str] | None, image_size: int | None, weights: str
) -> tuple[nn.Module, Mapping[str, Any]]:
    timm_models.check_name(name)
    if checkpoint is None:
        return timm_models.create(name, image_size, pretrained=weights == "pretrained")
    checkpoint = expand(checkpoint, "checkpoint")
    state = read_checkpoint(checkpoint)
    model, config = timm_models.create(name, image_size, pretrained=False, **model_options(state))
    load_weights(model, state, checkpoint)
    return model, config


def _describe(name: str, model: nn.Module, config: Mapping[str, Any], device: torch.device, weights: str) -> Backbone:
    channels, size = config["input_size"][0], config["input_size"][-1]
    mean, std = (torch.as_tensor(config[key], dtype=torch.float32, device=device) for key in ("mean", "std"))
    return Backbone(
        name=name,
        model=model,
        mean=mean,
        std=std,
        input_size=size,
        resize=round(size / config.get("crop_pct", 1.0)),
        in_channels=channels,
        num_features=timm_models.count_features(name, model, channels, size),
        fingerprint=weights,
    )


def arrange(backbone: Backbone, precision: str, grad_checkpointing: bool, compile: bool, prepare: bool) -> Backbone:
    """``backbone``, with a model as loaded, as a run uses it; arguments as of `load_backbone`."""

    def arranged(model: nn.Module) -> Backbone:
        model = timm_models.arrange(backbone.name, model, precision, grad_checkpointing)
        return replace(backbone, model=model, precision=precision, run=torch.compile(model) if compile else None)

    if not prepare:
        return arranged(backbone.model)
    model, record = preparing.prepare_frozen(backbone.model, backbone.input_size, backbone.in_channels)
    changed = arranged(model)
    if model is backbone.model:
        return replace(changed, preparation=record)
    return replace(changed, prepared=preparing.VERSION, preparation=record, original=lambda: arranged(backbone.model))
