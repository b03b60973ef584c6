"""Original releases' checkpoint files, by their own key names: synthetic weights come back as the features they stand for."""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from sfm_fast import InputError
from sfm_fast.backbones.checkpoints import load_weights, model_options
from sfm_fast.backbones.load import load_backbone


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
    backbone = load_backbone(name, tmp_path / "vit-s-300ep.pth.tar", image_size=64, precision="fp32")
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
    assert_same_features(
        load_backbone(name, tmp_path / "dinov2_vits14_reg4_pretrain.pth", image_size=56, precision="fp32"), model, 56
    )
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
    backbone = load_backbone(name, tmp_path / "dinov3.safetensors", image_size=64, precision="fp32")
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
    with pytest.raises(InputError, match=r"norm.bias must be \(64,\) as in the backbone, got \(3,\)"):
        load_weights(model, state | {"norm.bias": torch.zeros(3)}, "x.pth")


TINY = "test_vit"


@pytest.fixture(scope="module")
def tiny():
    """Weights whose features all differ by their last digits from another initialisation's."""
    torch.manual_seed(0)
    return timm.create_model(TINY, pretrained=False, num_classes=0).state_dict()


def prefixed(state, *prefixes, scale=(1.0,)):
    scales = scale if len(scale) == len(prefixes) else (1.0,) * len(prefixes)
    return {p + key: value * s for p, s in zip(prefixes, scales, strict=True) for key, value in state.items()}


class Options(dict):
    """As several packages keep options: a table with attributes."""


class Slotted:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 3


SHAPES = {
    "plain": lambda s: s,
    "DDP": lambda s: prefixed(s, "module."),
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "compiled, DDP": lambda s: prefixed(s, "module._orig_mod."),
    "FSDP": lambda s: prefixed(s, "_fsdp_wrapped_module."),
    "Lightning": lambda s: {"state_dict": prefixed(s, "backbone."), "hyper_parameters": {"lr": 1.0}, "epoch": 3},
    "any name": lambda s: {"state_dict": prefixed(s, "a.b.net.") | {"a.head.weight": torch.zeros(2)}},
    "model_state_dict": lambda s: {
        "model_state_dict": s,
        "optimizer_state_dict": {"state": {0: {"x": torch.zeros(3)}}},
    },
    "nested": lambda s: {"app": {"state": {"network": s}}},
    "DINO": lambda s: {"student": prefixed(s, "module.backbone.", scale=(2,)), "teacher": prefixed(s, "backbone.")},
    "DINOv2": lambda s: {"model": prefixed(s, "student.backbone.", "teacher.backbone.", scale=(2, 1))},
    "MoCo": lambda s: {"state_dict": prefixed(s, "module.encoder_q.", "module.encoder_k.", scale=(1, 2))},
    "an average beside": lambda s: {"state_dict": s, "state_dict_ema": prefixed(s, "", scale=(2,))},
    "the same twice": lambda s: {"model": prefixed(s, "a.", "b.")},
    "args": lambda s: {"model": s, "args": argparse.Namespace(lr=1, path=pathlib.Path("x"))},
    "a table of options": lambda s: {"model": s, "config": Options(lr=1)},
    "slots": lambda s: {"model": s, "config": Slotted()},
    "numbers of NumPy": lambda s: {"state_dict": s, "best": np.float64(1), "rng": np.arange(3)},
    "classifier": lambda s: s | {"head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_files_as_people_save_them(tmp_path, tiny, shape):
    torch.save(SHAPES[shape](tiny), tmp_path / "w.pth")
    found = load_backbone(TINY, tmp_path / "w.pth", prepare=False).model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in tiny.items())


def test_whole_modules(tmp_path, tiny):
    model = timm.create_model(TINY, num_classes=0)
    model.load_state_dict(tiny)
    torch.save({"net": torch.nn.Sequential(model, torch.nn.Linear(2, 2))}, tmp_path / "w.pth")
    found = load_backbone(TINY, tmp_path / "w.pth", prepare=False).model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in tiny.items())


class Runs:
    """Makes a folder when it is unpickled; ``call`` is what the file names."""

    def __init__(self, call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call, ("ran",)


def make_folder(name):
    pathlib.Path(name).mkdir()


@pytest.mark.parametrize("call", [make_folder, os.mkdir])
def test_no_code_of_a_file_is_run(tmp_path, tiny, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": tiny, "extra": Runs(call)}, "w.pth")
    with contextlib.suppress(InputError):  # some modules' names torch refuses whatever stands for them
        load_backbone(TINY, "w.pth")
    assert not (tmp_path / "ran").exists()
    torch.load("w.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (lambda s: {"a": s, "b": prefixed(s, "", scale=(2,))}, "holds 2 networks that fit, 'a.', 'b.'; save only the one to use"),
        (lambda s: {"x": 1, "args": argparse.Namespace()}, "holds no weights"),
        (lambda s: [1, 2], "holds no weights"),
        (lambda s: {"model": {k: v for k, v in s.items() if "norm.bias" not in k}}, r"doesn't fit the backbone: missing \['norm"),
        (lambda s: {"model": prefixed(s, "net.") | {"net.norm.bias": torch.zeros(3)}}, r"norm.bias must be \(64,\)"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(tmp_path, tiny, shape, message):
    torch.save(shape(tiny), tmp_path / "w.pth")
    with pytest.raises(InputError, match=rf"w\.pth.*{message}") as caught:
        load_backbone(TINY, tmp_path / "w.pth")
    assert "\n" not in str(caught.value)


def test_programs_are_named(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "w.pt"))
    with pytest.raises(InputError, match=r"w\.pt: must hold weights .*, got a TorchScript program"):
        load_backbone(TINY, tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a git-lfs pointer"),
        (b"\n<!DOCTYPE html><html>404</html>", "is a web page, not weights"),
        (b'{"weight_map": {}}', "is JSON, not weights; if it is an index"),
        (b"", "damaged, or not only weights"),
    ],
)
def test_what_lies_in_the_place_of_weights(tmp_path, content, message):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_backbone(TINY, tmp_path / "w.pth")


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match="is a folder; give the file of weights in it"):
        load_backbone(TINY, tmp_path)


@pytest.mark.parametrize("name", ["w.pth", "w.SafeTensors", "w"])
def test_safetensors_by_any_name(tmp_path, tiny, name):
    save_file(dict(tiny), tmp_path / name, metadata={"format": "pt"})
    assert load_backbone(TINY, tmp_path / name).num_features == 64


@pytest.mark.parametrize(
    "change",
    [
        lambda v: (v * 10).to(torch.int8),
        lambda v: v.to(torch.float8_e4m3fn),
        lambda v: v.to(torch.complex64),
        lambda v: v.to_sparse(),
        lambda v: v.to("meta"),
    ],
)
def test_weights_that_are_no_plain_floats_are_refused(tmp_path, tiny, change):
    torch.save({key: change(value) for key, value in tiny.items()}, tmp_path / "w.pth")
    with pytest.raises(
        InputError, match=r"must be a plain float32, float16 or bfloat16 tensor|damaged, or not only weights"
    ):
        load_backbone(TINY, tmp_path / "w.pth")


def test_a_base_encoder_that_is_not_moco_v3_s(tmp_path, tiny):
    torch.save({f"base_encoder.{key}": value for key, value in tiny.items()}, tmp_path / "w.pth")
    found = load_backbone(TINY, tmp_path / "w.pth", prepare=False).model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in tiny.items())
    wide = {"base_encoder.blocks.0.norm1.weight": torch.zeros(384)}
    assert model_options(wide) == {}
    assert model_options(wide | {"momentum_encoder.x": torch.zeros(1)}) == {"num_heads": 12}
