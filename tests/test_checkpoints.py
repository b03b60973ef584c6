"""Original releases' checkpoint files, by their own key names: synthetic weights come back as the features they stand for."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from sfm_fast import InputError
from sfm_fast.data.backbones import load_backbone
from sfm_fast.data.checkpoints import load_weights, model_options


def random_model(name, **options) -> nn.Module:
    """timm's model with weights that all matter to its features."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, **options)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(std=0.1)
            if value.ndim == 1:
                value.add_(1.0)
        for key, value in model.named_buffers():
            _ = value.fill_(1.0) if "running_var" in key else value.zero_()
    return model


@torch.no_grad()
def assert_same_features(backbone, model, size):
    views = torch.randn(2, 3, size, size)
    torch.testing.assert_close(backbone(views), model(views), rtol=1e-3, atol=1e-4)


def moco_v3(state: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """As main_moco.py of facebookresearch/moco-v3 saves it: two encoders with projectors as heads, and a predictor."""
    encoder = {**state, "head.0.weight": torch.zeros(8, 384), "head.1.running_mean": torch.zeros(8)}
    both = {
        f"module.{which}_encoder.{key}": value + (which == "momentum")
        for which in ("base", "momentum")
        for key, value in encoder.items()
    }
    return {"epoch": 300, "arch": "vit_small", "state_dict": {**both, "module.predictor.0.weight": torch.zeros(8, 8)}}


def test_moco_v3_small_has_twelve_heads(tmp_path):
    name = "vit_small_patch16_224.dino"
    model = random_model(name, num_heads=12, img_size=64)
    torch.save(moco_v3(model.state_dict()), tmp_path / "vit-s-300ep.pth.tar")
    backbone = load_backbone(name, tmp_path / "vit-s-300ep.pth.tar", image_size=64)
    assert backbone.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert_same_features(backbone, model, 64)
    six_heads = load_same(name, model)
    views = torch.randn(2, 3, 64, 64)
    assert (six_heads(views) - backbone(views)).abs().max() > 0.1  # the same weights, other features


def test_moco_v3_resnet():
    model = timm.create_model("test_resnet", num_classes=0)
    state = {f"module.base_encoder.{key}": value for key, value in model.state_dict().items()}
    assert model_options(state) == {}
    load_weights(timm.create_model("test_resnet", num_classes=0), state, "r.pth")


def test_dinov2_with_registers_by_its_own_names(tmp_path):
    name = "vit_small_patch14_reg4_dinov2.lvd142m"
    model = random_model(name, img_size=56)
    state = dict(model.state_dict())
    at_class_token = torch.randn(1, 1, 384)
    state["register_tokens"] = state.pop("reg_token")
    state["cls_token"] = state["cls_token"] - at_class_token  # the original has a position of its own for it
    state["pos_embed"] = torch.cat([at_class_token, state["pos_embed"]], dim=1)
    state["mask_token"] = torch.zeros(1, 384)
    torch.save(state, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    assert_same_features(load_backbone(name, tmp_path / "dinov2_vits14_reg4_pretrain.pth", image_size=56), model, 56)
    assert load_backbone(name, tmp_path / "dinov2_vits14_reg4_pretrain.pth", image_size=70).input_size == 70


def test_dinov3_by_its_own_names_and_in_silence(tmp_path, capsys):
    name = "vit_small_patch16_dinov3.lvd1689m"
    model = random_model(name)
    renamed = (("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"))
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in renamed:
            key = key.replace(ours, theirs)
        state[key] = value
    state |= {f"blocks.{i}.attn.qkv.bias": torch.zeros(3 * 384) for i in range(12)}
    state |= {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.ones(16)}
    save_file(state, tmp_path / "dinov3.safetensors")
    backbone = load_backbone(name, tmp_path / "dinov3.safetensors", image_size=64)
    assert_same_features(backbone, load_same(name, model), 64)
    assert capsys.readouterr().out == ""


def load_same(name: str, model: nn.Module) -> nn.Module:
    """The weights of ``model`` in timm's own ``name`` for 64 px."""
    other = timm.create_model(name, num_classes=0, img_size=64).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_weights_of_another_model_are_refused_whatever_timm_makes_of_them():
    model = timm.create_model("test_vit", num_classes=0)
    for state in (
        {"mask_token": torch.zeros(1)},
        {"encoder.x": torch.zeros(1)},
        {"visual.class_embedding": torch.zeros(1)},
    ):
        with pytest.raises(InputError, match=r"x\.pth doesn't fit the backbone: missing"):
            load_weights(model, state, "x.pth")
    state = {key: value for key, value in model.state_dict().items() if key != "norm.bias"}
    with pytest.raises(InputError, match=r"missing \['norm.bias'\] \(1\)"):
        load_weights(model, state, "x.pth")
    with pytest.raises(InputError, match=r"norm.bias is \(3,\), the backbone has \(64,\)"):
        load_weights(model, state | {"norm.bias": torch.zeros(3)}, "x.pth")
