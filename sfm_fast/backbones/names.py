"""Names of the shipped backbones and what can be chosen when one is loaded, without torch, so that command lines check it first."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError
from ..files import expand

DEFAULT = "fashion_vit"
ASSETS = Path(__file__).parent / "assets"
SHIPPED = {name: ASSETS / f"{name}.safetensors" for name in (DEFAULT, "fashion_cnn")}
PRECISIONS = ("auto", "fp32", "bf16")
WEIGHTS = ("pretrained", "random")
HUB = ("hf-hub:", "hf_hub:")  # how names of models on the hub begin, beside timm's own
ADDRESSES = (*HUB, "local-dir:")  # how all names begin that timm resolves to a place


def check_weights(name: str, checkpoint: str | os.PathLike[str] | None = None, weights: str = WEIGHTS[0]) -> None:
    """Raise ``InputError`` if the file ``checkpoint`` is missing, or if ``weights`` is unknown or can't be had for this backbone."""
    if weights not in WEIGHTS:
        raise InputError(f"weights must be one of {WEIGHTS}, got {weights!r}")
    if weights == "random" and checkpoint is not None:
        raise InputError(f"weights must be 'pretrained' if there is a checkpoint, got 'random' and {checkpoint}")
    if weights == "random" and name in SHIPPED:
        raise InputError(
            f"weights of {name!r} must be 'pretrained', got 'random': it is included with its weights and needs no download"
        )
    if checkpoint is not None and not expand(checkpoint, "checkpoint").exists():
        raise InputError(f"checkpoint {checkpoint}: no such file")
