"""The models of timm that docs/backbones.md names: each one exists, builds without weights, and is what the table says."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from sfm_fast.backbones.load import shape_of_backbone

PAGE = Path(__file__).parents[2] / "docs" / "backbones.md"


def rows() -> list[list[str]]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    begin = next(place for place, line in enumerate(lines) if line.startswith("| `--backbone`")) + 2
    end = next(place for place, line in enumerate(lines[begin:], begin) if not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[begin:end]]


ROWS = {row[0].strip("`"): row[1:] for row in rows()}


def test_every_name_has_weights():
    available = set(timm.list_models(pretrained=True))
    assert [name for name in ROWS if name not in available] == []
    assert len(ROWS) == len(rows()) >= 30
    wanted = {
        "DINOv2",
        "DINOv2, registers",
        "DINOv3",
        "DINOv3, ConvNeXt",
        "CLIP (OpenAI)",
        "SigLIP",
        "SigLIP 2",
        "EVA-02",
        "MAE",
    }
    assert {row[0] for row in ROWS.values()} >= wanted


def numbers(values) -> str:
    return " ".join(f"{value:.3g}" for value in (values if len(set(values)) > 1 else values[:1]))


@pytest.mark.parametrize("name", ROWS)
def test_the_row_is_what_timm_says(name):
    _, features, pooling, size, patch, parameters, mean, std, crop, license_ = ROWS[name]
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=0).eval()
    config = model.pretrained_cfg
    assert int(features) == model.num_features
    assert pooling == getattr(model, "global_pool", "avg")
    assert int(size) == config["input_size"][-1]
    assert int(patch) == model.feature_info[-1]["reduction"]
    assert parameters == f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M"
    assert (mean, std) == (numbers(config["mean"]), numbers(config["std"]))
    assert float(crop) == pytest.approx(config["crop_pct"])
    assert license_ == (config.get("license") or "not said")


@pytest.mark.parametrize(
    ("name", "features", "size", "pooling"),
    [
        ("vit_small_patch14_reg4_dinov2.lvd142m", 384, 518, "token"),
        ("vit_small_patch16_dinov3.lvd1689m", 384, 256, "avg"),
        ("convnext_tiny.dinov3_lvd1689m", 768, 224, "avg"),
        ("vit_base_patch16_clip_quickgelu_224.openai", 768, 224, "token"),
        ("vit_base_patch16_siglip_224.v2_webli", 768, 224, "map"),
        ("eva02_tiny_patch14_224.mim_in22k", 192, 224, "avg"),
        ("vit_base_patch16_224.mae", 768, 224, "token"),
    ],
)
def test_the_row_is_the_backbone_that_loads(name, features, size, pooling):
    row = ROWS[name]
    shape = shape_of_backbone(name)  # runs the model, on the meta device
    assert (row[1], row[3], row[2]) == (str(features), str(size), pooling)
    assert (shape.num_features, shape.input_size) == (features, size)
    assert row[6:8] == [numbers(shape.mean.tolist()), numbers(shape.std.tolist())]
    assert shape.resize == round(size / float(row[8]))


def test_openai_clip_is_named_with_its_own_activation():
    with torch.device("meta"):
        for name in [name for name, row in ROWS.items() if row[0] == "CLIP (OpenAI)"]:
            model = timm.create_model(name, pretrained=False)
            assert type(model.blocks[0].mlp.act).__name__ == "QuickGELU", name
