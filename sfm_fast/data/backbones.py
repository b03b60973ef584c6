"""Frozen backbones: the shipped ViT, or any timm model with a local checkpoint or the hub's weights."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, require_package
from ..files import load_tensors
from ..reference.augment import normalize
from .sources import ImageTransform, match_channels

SHIPPED = "fashion_vit"
SHIPPED_FILE = Path(__file__).parent / "assets" / f"{SHIPPED}.safetensors"
PRECISIONS = ("auto", "fp32", "bf16")
_HEAD_PREFIXES = ("head.", "fc.", "classifier.", "head_dist.")
_WRAPPERS = ("module.", "backbone.", "model.", "encoder.")


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


def load_backbone(
    name: str = SHIPPED,
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
        name: "fashion_vit" (shipped, self-supervised on Fashion-MNIST) or any name of ``timm.list_models()``.
        checkpoint: local weights, .safetensors or .pth (read with ``weights_only=True``); None takes timm's pretrained
            weights from the hub.
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
    if image_size is not None and image_size < 1:
        raise InputError(f"image_size must be at least 1, got {image_size}")
    device = resolve_device(device)
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp32"
    if name == SHIPPED:
        model, config = _shipped(SHIPPED_FILE if checkpoint is None else checkpoint)
        if image_size not in (None, config["input_size"][-1]):
            raise InputError(f"image_size of {SHIPPED!r} is {config['input_size'][-1]}, got {image_size}")
    else:
        model, config = _from_timm(name, checkpoint, image_size)
    model = model.to(device).eval().requires_grad_(False)
    channels, size = config["input_size"][0], config["input_size"][-1]
    num_features = _count_features(name, model, channels, size)
    mean, std = (torch.tensor(config[key], dtype=torch.float32, device=device) for key in ("mean", "std"))
    weights = fingerprint(model)
    model = _arrange(name, model, precision, grad_checkpointing)
    return Backbone(
        name=name,
        model=model,
        run=torch.compile(model) if compile else None,
        mean=mean,
        std=std,
        input_size=size,
        resize=round(size / config.get("crop_pct", 1.0)),
        in_channels=channels,
        num_features=num_features,
        fingerprint=weights,
        precision=precision,
    )


@torch.no_grad()
def _count_features(name: str, model: nn.Module, channels: int, size: int) -> int:
    weight = next(model.parameters())
    output = model(torch.zeros(1, channels, size, size, device=weight.device, dtype=weight.dtype))
    if output.ndim != 2:
        raise InputError(f"backbone {name!r} gives {tuple(output.shape)} for one image, wanted (1, features)")
    return int(output.shape[1])


def _arrange(name: str, model: nn.Module, precision: str, grad_checkpointing: bool) -> nn.Module:
    """Dtype, memory format and checkpointing, as a run and its prediction both have them."""
    if precision == "bf16":
        model = model.bfloat16()
    if _is_convolutional(model):
        model = model.to(memory_format=torch.channels_last)
    if grad_checkpointing:
        set_grad_checkpointing(name, model)
    return model


def _is_convolutional(model: nn.Module) -> bool:
    """Whether 2-D convolutions do the work: more of them than the patches of a transformer need."""
    if any(parameter.ndim > 4 for parameter in model.parameters()):
        return False  # channels-last is for 4-D tensors
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    return convolutions > 4 and convolutions > sum(isinstance(module, nn.Linear) for module in model.modules())


def set_grad_checkpointing(name: str, model: nn.Module) -> None:
    """Switch activation checkpointing on; raises ``InputError`` where the model has none."""
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, NotImplementedError, TypeError) as error:
        raise InputError(f"backbone {name!r} has no activation checkpointing; leave grad_checkpointing off") from error


def shape_of_backbone(
    name: str = SHIPPED, *, image_size: int | None = None, precision: str = "fp32", grad_checkpointing: bool = False
) -> Backbone:
    """A backbone without weights, on torch's "meta" device: all that predicting memory and operations takes.

    Arguments and errors as of `load_backbone`; neither a checkpoint nor, for timm's own names, a network is needed.
    """
    require_package("timm", "building a backbone", "distill")
    if precision not in ("fp32", "bf16"):
        raise InputError(f"precision must be fp32 or bf16, got {precision!r}")
    if image_size is not None and image_size < 1:
        raise InputError(f"image_size must be at least 1, got {image_size}")
    config: dict[str, Any]
    if name == SHIPPED:
        backbone = load_backbone(image_size=image_size)
        model, shape = backbone.model.to("meta"), (backbone.in_channels, backbone.input_size)
        config = {"mean": backbone.mean, "std": backbone.std, "input_size": (*shape, shape[1])}
    else:
        with torch.device("meta"):
            model, config = _create(name, image_size, pretrained=False)
    channels, size = config["input_size"][0], config["input_size"][-1]
    model = _arrange(name, model.eval().requires_grad_(False), precision, grad_checkpointing)
    mean, std = (torch.as_tensor(config[key], dtype=torch.float32) for key in ("mean", "std"))
    return Backbone(
        name=name,
        model=model,
        mean=mean,
        std=std,
        input_size=size,
        resize=size,
        in_channels=channels,
        num_features=_count_features(name, model, channels, size),
        fingerprint="no weights",
        precision=precision,
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


def fingerprint(model: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 over names, dtypes and bytes of the state, in sorted order."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _shipped(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The ViT in a file of scripts/pretrain_backbone.py, which holds its architecture beside the weights."""
    from timm.models.vision_transformer import VisionTransformer

    tensors, metadata = load_tensors(path)
    if not {"architecture", "mean", "std"} <= metadata.keys():
        raise InputError(
            f"checkpoint {path}: not made by scripts/pretrain_backbone.py; name the timm model it belongs to"
        )
    architecture = dict(metadata["architecture"])
    architecture.pop("timm_class")
    model = VisionTransformer(**architecture)
    _load_weights(model, {key: tensor.float() for key, tensor in tensors.items()}, path)
    size = (architecture["in_chans"], architecture["img_size"], architecture["img_size"])
    return model, {"input_size": size, "mean": metadata["mean"], "std": metadata["std"]}


def _from_timm(
    name: str, checkpoint: str | os.PathLike[str] | None, image_size: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise InputError(f"checkpoint {checkpoint}: no such file")
    model, config = _create(name, image_size, pretrained=checkpoint is None)
    if checkpoint is not None:
        _load_weights(model, read_checkpoint(checkpoint), checkpoint)
    return model, config


def _create(name: str, image_size: int | None, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A timm model without head, and its data config."""
    import timm
    from timm.data import resolve_model_data_config

    # "name.tag" and hub addresses are resolved by timm; a plain name must exist.
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise InputError(
            f"unknown backbone {name!r}; wanted {SHIPPED!r} or a name of timm.list_models(), such as {', '.join(close) or 'vit_base_patch14_dinov2'}"
        )
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        try:
            model = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
        except TypeError:  # convolutional models take any size and no such argument
            model = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:  # the hub client raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"backbone {name!r}: no pretrained weights to be had ({reason}); give a local checkpoint (--checkpoint FILE)"
        ) from error
    config = dict(resolve_model_data_config(model))
    if image_size is not None:
        config["input_size"] = (config["input_size"][0], image_size, image_size)
    return model, config


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a .safetensors file, or in a torch file read with ``weights_only=True`` (never any code)."""
    if str(path).endswith(".safetensors"):
        return load_tensors(path)[0]
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise nearly anything; torch's own advice would be to run their code
        raise InputError(f"checkpoint {path}: damaged, or more than weights ({type(error).__name__})") from error
    for key in ("state_dict", "model", "model_ema", "teacher"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    state = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, dict) else {}
    if not state:
        raise InputError(f"checkpoint {path}: holds no weights")
    return state


def _load_weights(model: nn.Module, state: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    expected = model.state_dict()
    state = _unwrap(state, expected.keys())
    if "pos_embed" in state and "pos_embed" in expected and state["pos_embed"].shape != expected["pos_embed"].shape:
        state = _resample_positions(model, state)  # a ViT at another --image-size than its checkpoint's
    state = {key: value for key, value in state.items() if key in expected or not key.startswith(_HEAD_PREFIXES)}
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        raise InputError(
            f"checkpoint {path} doesn't fit the backbone: missing {missing[:3]} ({len(missing)}), unknown {extra[:3]} ({len(extra)})"
        )
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise InputError(
                f"checkpoint {path}: {key} is {tuple(value.shape)}, the backbone has {tuple(expected[key].shape)}"
            )
    model.load_state_dict(state)


def _resample_positions(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    return dict(checkpoint_filter_fn(state, model)) if isinstance(model, VisionTransformer) else state


def _unwrap(state: dict[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    wanted = set(expected)
    while not wanted & state.keys():
        prefix = next((p for p in _WRAPPERS if any(key.startswith(p) for key in state)), None)
        if prefix is None:
            return state
        state = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    return state
