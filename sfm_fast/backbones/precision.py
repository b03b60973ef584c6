"""Chooses the precision of a backbone by a fixed rule: the same machine and model give the same one, so runs can be repeated."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

# Measured with AMX: ViT-S/16, 384 wide, is twice as fast in bfloat16; EfficientNet-lite0 is slower. Narrower transformers, those that
# begin narrow, such as Swin, and nets with many convolutions, such as ConvNeXt, haven't been measured and stay float32.
WIDE = 384
_MOST = 0.9  # of the linear layers are wide: all but a head or a gate
_CONVOLUTIONS = 4  # at most; a transformer has one for its patches, or a few in a stem


class Chosen(NamedTuple):
    """A ``precision``, "fp32" or "bf16", and ``why`` in words that follow "because"."""

    precision: str
    why: str


def choose_precision(model: nn.Module, device: torch.device) -> Chosen:
    """What "auto" means for ``model`` on ``device``: bf16 on a GPU that supports it, and on a CPU that multiplies bfloat16 matrices in
    hardware if the model is a wide transformer, which is then faster; else fp32."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Chosen("bf16", "the GPU computes in bfloat16")
        return Chosen("fp32", "the GPU doesn't compute in bfloat16")
    if device.type != "cpu":
        return Chosen("fp32", f"bfloat16 isn't chosen on the device {device.type}")
    if not multiplies_bf16():
        return Chosen("fp32", "this CPU doesn't multiply bfloat16 matrices in hardware")
    if not is_wide_transformer(model):
        return Chosen("fp32", f"on a CPU bfloat16 is for transformers at least {WIDE} wide")
    return Chosen(
        "bf16",
        f"this CPU multiplies bfloat16 matrices in hardware, and the model is a transformer at least {WIDE} wide",
    )


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 matrices (AMX or AVX512-BF16), and torch uses them (oneDNN)."""
    return torch.backends.mkldnn.is_available() and (
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    )


def is_wide_transformer(model: nn.Module) -> bool:
    """Whether nearly all linear layers of ``model`` have at least `WIDE` inputs and outputs, and it has at most a few convolutions: its
    structure, not its name."""
    convolutions = sum(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())
    widths = [min(module.weight.shape) for module in model.modules() if isinstance(module, nn.Linear)]
    return (
        convolutions <= _CONVOLUTIONS and bool(widths) and sum(width >= WIDE for width in widths) >= _MOST * len(widths)
    )
