"""Pre-trained models worth distilling for: their names in timm, family by family. All else about them comes from timm itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..errors import require_package

FAMILIES: dict[str, tuple[str, ...]] = {
    "DINOv2": tuple(f"vit_{size}_patch14_dinov2.lvd142m" for size in ("small", "base", "large", "giant")),
    "DINOv2, registers": tuple(
        f"vit_{size}_patch14_reg4_dinov2.lvd142m" for size in ("small", "base", "large", "giant")
    ),
    "DINOv3": tuple(f"vit_{size}_patch16_dinov3.lvd1689m" for size in ("small", "base", "large")),
    "DINOv3, ConvNeXt": tuple(f"convnext_{size}.dinov3_lvd1689m" for size in ("tiny", "small", "base", "large")),
    # The originals' activation is QuickGELU; timm's plain names run the same weights with GELU.
    "CLIP (OpenAI)": (
        "vit_base_patch32_clip_quickgelu_224.openai",
        "vit_base_patch16_clip_quickgelu_224.openai",
        "vit_large_patch14_clip_quickgelu_224.openai",
    ),
    "SigLIP": (
        "vit_base_patch16_siglip_224.webli",
        "vit_large_patch16_siglip_256.webli",
        "vit_so400m_patch14_siglip_384.webli",
    ),
    "SigLIP 2": (
        "vit_base_patch16_siglip_224.v2_webli",
        "vit_large_patch16_siglip_256.v2_webli",
        "vit_so400m_patch14_siglip_378.v2_webli",
    ),
    "EVA-02": (
        "eva02_tiny_patch14_224.mim_in22k",
        "eva02_small_patch14_224.mim_in22k",
        "eva02_base_patch14_224.mim_in22k",
        "eva02_large_patch14_224.mim_m38m",
    ),
    "MAE": ("vit_base_patch16_224.mae", "vit_large_patch16_224.mae", "vit_huge_patch14_224.mae"),
    "DINO": ("vit_small_patch16_224.dino", "vit_base_patch16_224.dino"),
}


def rows_of(names: Iterable[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """What timm says of each (family, name), without a network, weights or memory for them.

    Gives "family", "name", "features", "pooling" ("token": the class token; "avg": the mean of patch tokens or of the last map;
    "map": attention pooling), "input_size" (px), "patch_size" (px of the image a token, or a pixel of the last map, stands for),
    "parameters" (of the model without head), "mean", "std" (of each channel, for images in 0..1), "crop_pct" and "license".
    """
    require_package("timm", "listing timm's models", "distill")
    import timm

    for family, name in names:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, num_classes=0).eval()
        config = model.pretrained_cfg
        pooling = getattr(model, "global_pool", "avg")
        yield {
            "family": family,
            "name": name,
            "features": int(model.num_features),
            "pooling": pooling,
            "input_size": int(config["input_size"][-1]),
            "patch_size": int(model.feature_info[-1]["reduction"]),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "mean": list(config["mean"]),
            "std": list(config["std"]),
            "crop_pct": float(config["crop_pct"]),
            "license": str(config.get("license") or "not said"),
        }


def family_rows() -> list[dict[str, Any]]:
    """`rows_of` every model of `FAMILIES`, in order: some seconds."""
    return list(rows_of((family, name) for family, names in FAMILIES.items() for name in names))
