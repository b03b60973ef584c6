"""Weights in files: reading them without running code, fitting them to a model, telling two apart."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files import load_tensors

_HEAD_PREFIXES = ("head.", "fc.", "classifier.", "head_dist.")
_MOCO_V3 = "base_encoder."  # beside "momentum_encoder." and "predictor."; main_moco.py of facebookresearch/moco-v3
_WRAPPERS = ("module.", _MOCO_V3, "backbone.", "model.", "encoder.")


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


def model_options(state: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of timm's model that no shape in ``state`` shows, but its origin does.

    Every vision transformer of MoCo v3 has 12 heads (its vits.py), also the small one, where timm's has 6: the weights would
    fit either, and give other features.
    """
    moco_v3 = any(key.removeprefix("module.").startswith(f"{_MOCO_V3}blocks.") for key in state)
    return {"num_heads": 12} if moco_v3 else {}


def load_weights(model: nn.Module, state: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Load ``state``, of the file ``path``, into ``model``: every weight or none.

    Wrappers' prefixes are taken off, and a classifier that the model lacks is left out. Where keys or shapes differ, timm's own
    conversion for this kind of model has a go: original releases' key names, position embeddings at another input size. Raises
    ``InputError`` for weights that don't fit.
    """
    expected = model.state_dict()
    state = _unwrap(state, expected.keys())
    if not _fits(_without_head(state, expected), expected):
        state = _convert(model, state)
    state = _without_head(state, expected)
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


def fingerprint(model: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 over names, dtypes and bytes of the state, in sorted order."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _fits(state: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return state.keys() == expected.keys() and all(state[key].shape == expected[key].shape for key in state)


def _without_head(state: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key in expected or not key.startswith(_HEAD_PREFIXES)}


def _unwrap(state: dict[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    wanted = set(expected)
    while not wanted & state.keys():
        prefix = next((p for p in _WRAPPERS if any(key.startswith(p) for key in state)), None)
        if prefix is None:
            return state
        state = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    return state


def _convert(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` through the ``checkpoint_filter_fn`` beside timm's model, or as it is where that has none or can't."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some of timm's print; stdout may be carrying JSON
            return dict(convert(dict(state), model))
    except Exception:  # weights of quite another model: the caller says what doesn't fit
        return state
