"""Frozen backbones: the shipped ones, or any timm model with a local checkpoint or the hub's weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_side
from ..errors import InputError, require_package
from ..files import expand
from ..reference.augment import normalize
from . import timm_models
from .checkpoints import fingerprint, load_weights, model_options, read_checkpoint
from .shipped import DEFAULT, SHIPPED, read_shipped
from .transforms import ImageTransform, match_channels

PRECISIONS = ("auto", "fp32", "bf16")


@dataclass
class Backbone:
    """A frozen model from normalised images (N, in_channels, input_size, input_size) to features (N, num_features).

    ``resize`` is the side real images are resized to before the central crop; ``fingerprint`` is a hash of the weights as they
    were loaded. ``precision`` "bf16": weights and activations are bfloat16. ``run`` is what computes: the model, or its compiled form.
    """

    name: str
    model: nn.Module
    mean: Tensor
    std: Tensor
    input_size: int
    resize: int
    in_channels: int
    num_features: int
    fingerprint: str
    precision: str = "fp32"
    run: Callable[[Tensor], Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the views that the model takes."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def image_size(self) -> int:
        """Side of synthetic images: 8/7 of the input (256 for 224), as the papers have it; small inputs keep theirs."""
        return round(self.input_size * 8 / 7) if self.input_size >= 64 else self.input_size

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for backbones that give the same features: equal weights alone may sit in another network, or see other inputs."""
        return self.name, self.fingerprint, self.input_size, self.resize, *self.mean.tolist(), *self.std.tolist()

    def __call__(self, views: Tensor) -> Tensor:
        """Features (N, num_features) float32 of normalised views; differentiable in ``views``."""
        features: Tensor = (self.model if self.run is None else self.run)(views.to(self.dtype))
        return features.float()

    def transform(self, channels: int) -> ImageTransform:
        """How real images come to this backbone's centre view."""
        return ImageTransform(self.resize, self.input_size, channels)

    @torch.no_grad()
    def features(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Features of images (N, channels, input_size, input_size) in 0..1, batch by batch, without a graph."""
        parts = [self(self.prepare(batch)) for batch in images.split(batch_size)]
        return torch.cat(parts)

    def prepare(self, images: Tensor) -> Tensor:
        """Move to the device, match channels, normalise."""
        images = images.to(self.device)
        return normalize(match_channels(images, self.in_channels), self.mean, self.std)

    def describe(self) -> dict[str, Any]:
        """Provenance: what a file made with this backbone must name."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "num_features": self.num_features,
            "input_size": self.input_size,
            "resize": self.resize,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "precision": self.precision,
        }


# What must agree for features to be the same, and what messages call it.
_RECORDED = {
    "fingerprint": "weights",
    "input_size": "input size",
    "resize": "resize",
    "num_features": "features",
    "mean": "mean",
    "std": "std",
}


def check_recorded(record: Mapping[str, Any], backbone: Backbone, told: str, role: str) -> None:
    """Raise ``InputError`` unless ``record``, an earlier ``Backbone.describe()``, is of this very ``backbone``, as far as it says.

    told: begins the message, such as "statistics: made with". role: what the message calls ``backbone``.
    """
    for key, words in _RECORDED.items():
        ours = backbone.describe()[key]
        if record.get(key, ours) != ours:
            raise InputError(
                f"{told} {record.get('name')!r} ({words} {record[key]}), {role} is {backbone.name!r} ({words} {ours})"
            )


def load_backbone(
    name: str = DEFAULT,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    image_size: int | None = None,
    precision: str = "auto",
    compile: bool = False,
    grad_checkpointing: bool = False,
) -> Backbone:
    """Load a backbone, frozen and in eval mode.

    Args:
        name: "fashion_vit" or "fashion_cnn" (shipped, self-supervised on Fashion-MNIST), or any name of ``timm.list_models()``.
        checkpoint: local weights, .safetensors or .pth (read with ``weights_only=True``); None takes timm's pretrained
            weights from the hub. By a shipped name: a file of scripts/pretrain_backbone.py, which holds its architecture.
        image_size: input side in pixels where the model can take another than its default.
        precision: "fp32", "bf16" (weights and activations; features come back float32) or "auto": bf16 on GPUs that have it, else
            fp32.
        compile: run the model through ``torch.compile``: a minute at the start, then faster steps.
        grad_checkpointing: keep the activations at block borders alone and compute the others again in the backward, for models
            that know how (timm's ``set_grad_checkpointing``).

    Convolutional nets run channels-last. Raises ``InputError``: unknown name, missing or damaged checkpoint, weights that don't fit,
    no network, a model without checkpointing.
    """
    require_package("timm", "loading a backbone", "distill")
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    _check_image_size(image_size)
    device = resolve_device(device)
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp32"
    if name in SHIPPED:
        path = SHIPPED[name] if checkpoint is None else checkpoint
        model, config, state = read_shipped(name, path, image_size)
        load_weights(model, {key: tensor.float() for key, tensor in state.items()}, path)
    else:
        model, config = _from_timm(name, checkpoint, image_size)
    return freeze(
        name,
        model,
        config,
        device=device,
        precision=precision,
        compile=compile,
        grad_checkpointing=grad_checkpointing,
    )


def freeze(
    name: str,
    model: nn.Module,
    config: dict[str, Any],
    *,
    device: torch.device,
    precision: str = "fp32",
    compile: bool = False,
    grad_checkpointing: bool = False,
) -> Backbone:
    """A backbone of a float32 ``model`` that gives (N, features): on ``device``, frozen, in eval mode, weights fingerprinted.

    ``config`` is timm's data config: "input_size" (channels, side, side), "mean" and "std" (of each channel, for images in 0..1)
    and, if real images are to be cut from larger ones, "crop_pct". The other arguments, and errors, as of `load_backbone`.
    """
    model = model.to(device).eval().requires_grad_(False)
    backbone = _describe(name, model, config, device, fingerprint(model))
    return _arrange(backbone, precision, grad_checkpointing, compile)


def shape_of_backbone(
    name: str = DEFAULT, *, image_size: int | None = None, precision: str = "fp32", grad_checkpointing: bool = False
) -> Backbone:
    """A backbone without weights, on torch's "meta" device: all that predicting memory and operations takes.

    Arguments and errors as of `load_backbone`; neither a checkpoint nor, for timm's own names, a network is needed.
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
    return _arrange(
        _describe(name, model, config, torch.device("cpu"), "no weights"), precision, grad_checkpointing, compile=False
    )


def resolve_device(device: torch.device | str) -> torch.device:
    """The torch device; "auto" is the current GPU, else the CPU. Raises ``InputError`` for one that can't be used."""
    if str(device) == "meta":
        raise InputError("device 'meta' holds no values")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {str(device)!r} can't be used ({str(error).splitlines()[0]})") from error
    return resolved


def _check_image_size(image_size: int | None) -> None:
    if image_size is not None:
        check_side("image_size", image_size)


def _from_timm(
    name: str, checkpoint: str | os.PathLike[str] | None, image_size: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    timm_models.check_name(name)
    if checkpoint is None:
        return timm_models.create(name, image_size, pretrained=True)
    checkpoint = expand(checkpoint, "checkpoint")
    if not checkpoint.exists():
        raise InputError(f"checkpoint {checkpoint}: no such file")
    state = read_checkpoint(checkpoint)
    model, config = timm_models.create(name, image_size, pretrained=False, **model_options(state))
    load_weights(model, state, checkpoint)
    return model, config


def _describe(name: str, model: nn.Module, config: dict[str, Any], device: torch.device, weights: str) -> Backbone:
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


def _arrange(backbone: Backbone, precision: str, grad_checkpointing: bool, compile: bool) -> Backbone:
    model = timm_models.arrange(backbone.name, backbone.model, precision, grad_checkpointing)
    return replace(backbone, model=model, precision=precision, run=torch.compile(model) if compile else None)
