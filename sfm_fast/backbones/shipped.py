"""The backbones included in the package, and how their files are loaded."""

from __future__ import annotations

import math
import os

from torch import Tensor, nn

from ..checks import check_side
from ..errors import InputError
from ..files import Metadata, load_tensors
from .names import ASSETS as ASSETS
from .names import DEFAULT as DEFAULT
from .names import SHIPPED as SHIPPED


def build_shipped(architecture: Metadata) -> nn.Module:
    """The timm model that a shipped file's metadata describes, without weights.

    ``architecture`` holds "timm_class" ("VisionTransformer" or "ByobNet") and its arguments; a ByobNet's "cfg" holds the
    fields of timm's ``ByoModelCfg``, and "img_size" is the side of its training images.
    """
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
    from timm.models.vision_transformer import VisionTransformer

    options = dict(architecture)
    kind = options.pop("timm_class", None)
    if kind == "VisionTransformer":
        transformer: nn.Module = VisionTransformer(**options)
        return transformer
    if kind == "ByobNet":
        options.pop("img_size")  # a convolutional net takes any size
        cfg = dict(options.pop("cfg"))
        blocks = tuple(ByoBlockCfg(**block) for block in cfg.pop("blocks"))
        convolutional: nn.Module = ByobNet(ByoModelCfg(blocks=blocks, **cfg), **options)
        return convolutional
    raise InputError(f"timm_class must be VisionTransformer or ByobNet, got {kind!r}")


def read_shipped(
    name: str, path: str | os.PathLike[str], image_size: int | None = None
) -> tuple[nn.Module, Metadata, dict[str, Tensor]]:
    """A file of scripts/pretrain_backbone.py: its model without weights, its data config, and the stored weights.

    Only convolutional models take another ``image_size`` than they were trained with. Raises ``InputError`` if the file is missing,
    damaged or not made by the script, holds invalid values, or if the model can't take the size.
    """
    tensors, metadata = load_tensors(path)
    if not {"architecture", "mean", "std"} <= metadata.keys():
        raise InputError(
            f"checkpoint {path}: not made by scripts/pretrain_backbone.py; give the name of the timm model that it belongs to"
        )
    architecture = metadata["architecture"]
    try:
        channels, size = int(architecture["in_chans"]), int(architecture["img_size"])
        check_side("img_size", size)
        model = build_shipped(architecture)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # InputError is a ValueError; timm's models raise any of these for invalid arguments.
        raise InputError(f"checkpoint {path}: its architecture can't be built ({str(error)[:200]})") from error
    for key in ("mean", "std"):
        values = metadata[key]
        numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
        if not numbers or len(values) != channels or not all(abs(value) < math.inf for value in values):
            raise InputError(
                f"checkpoint {path}: {key} must be {channels} numbers, one per channel, got {str(values)[:80]}"
            )
    if min(metadata["std"]) <= 0:
        raise InputError(f"checkpoint {path}: std must be positive, got {metadata['std']}")
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"checkpoint {path}: {key} holds NaN or infinity")
    if image_size not in (None, size) and architecture["timm_class"] != "ByobNet":
        raise InputError(f"image_size of {name!r} must be {size}, got {image_size}")
    size = image_size or size
    return model, {"input_size": (channels, size, size), "mean": metadata["mean"], "std": metadata["std"]}, tensors
