"""The documented models of timm: each one exists, builds without weights, and is what the table says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from sfm_fast.cli.main import main
from sfm_fast.data import families
from sfm_fast.data.backbones import shape_of_backbone
from sfm_fast.report.families import HEADER, family_table

PAGE = Path(__file__).parent.parent / "docs" / "backbones.md"


@pytest.fixture(scope="module")
def rows():
    return families.family_rows()


def test_every_name_has_weights(rows):
    available = set(timm.list_models(pretrained=True))
    names = [row["name"] for row in rows]
    assert [name for name in names if name not in available] == []
    assert len(set(names)) == len(names) >= 30
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
    assert {row["family"] for row in rows} >= wanted


def test_the_page_has_the_table_of_this_timm(rows):
    page = PAGE.read_text(encoding="utf-8")
    table = page.partition("<!-- table: families -->\n")[2].partition("\n<!-- end -->")[0]
    assert table == family_table(rows)
    assert table.count("\n") == len(rows) + 1
    assert all(len(line.split("|")) == len(HEADER) + 2 for line in table.splitlines())


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
def test_the_row_is_the_backbone_that_loads(rows, name, features, size, pooling):
    row = next(row for row in rows if row["name"] == name)
    shape = shape_of_backbone(name)  # runs the model, on the meta device
    assert (row["features"], row["input_size"], row["pooling"]) == (features, size, pooling)
    assert (shape.num_features, shape.input_size) == (features, size)
    assert shape.mean.tolist() == pytest.approx(row["mean"])
    assert shape.std.tolist() == pytest.approx(row["std"])
    assert shape.resize == round(size / row["crop_pct"])
    assert sum(p.numel() for p in shape.model.parameters()) == row["parameters"]


def test_openai_clip_is_named_with_its_own_activation():
    with torch.device("meta"):
        for name in families.FAMILIES["CLIP (OpenAI)"]:
            model = timm.create_model(name, pretrained=False)
            assert type(model.blocks[0].mlp.act).__name__ == "QuickGELU", name


def test_info_lists_them(capsys, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", {"EVA-02": ("eva02_tiny_patch14_224.mim_in22k",)})
    assert main(["info", "--backbones", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["families"][0]["license"] == "mit"
    assert "`eva02_tiny_patch14_224.mim_in22k`" in err
    assert set(result["shipped"]) == {"fashion_vit", "fashion_cnn"}
    assert result["backbone"] == result["shipped"]["fashion_vit"]
