"""`--precision auto`: a fixed rule of hardware and structure, shown with its reason; what a file or a run records comes first."""

from __future__ import annotations

import json

import pytest
import timm
import torch

from sfm_fast import ClassStatistics, InputError, load_backbone
from sfm_fast.backbones import freeze, shape_of_backbone
from sfm_fast.backbones.precision import choose_precision, is_wide_transformer, multiplies_bf16
from sfm_fast.cli.main import main
from sfm_fast.distill.run_folder import precision_of_run

CPU = torch.device("cpu")


def set_cpu(monkeypatch, *, amx=False, avx512_bf16=False):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)


@pytest.fixture
def wide_is_narrow(monkeypatch):
    """A CPU with AMX, on which fashion_vit, 192 wide, counts as wide."""
    set_cpu(monkeypatch, amx=True)
    monkeypatch.setattr("sfm_fast.backbones.precision.WIDE", 192)


@pytest.mark.parametrize(
    ("name", "wide"),
    [
        ("vit_small_patch16_224", True),
        ("vit_base_patch14_reg4_dinov2", True),
        ("vit_small_patch16_dinov3", True),
        ("eva02_small_patch14_224", True),
        ("vit_base_patch16_siglip_224", True),
        ("swin_tiny_patch4_window7_224", False),  # begins 96 wide
        ("mixer_s32_224", False),  # mixes 49 tokens
        ("vit_tiny_patch16_224", False),
        ("fashion_vit", False),
        ("fashion_cnn", False),
        ("tf_efficientnet_lite0", False),
        ("resnet18", False),
        ("convnext_tiny", False),  # its weights are in linear layers, but between convolutions
        ("vit_base_r50_s16_224", False),
    ],
)
def test_which_models_gain(name, wide, monkeypatch):
    for prepare in (True, False):
        model = shape_of_backbone(name, prepare=prepare).model
        assert is_wide_transformer(model) == wide
        for flags in ({"amx": True}, {"avx512_bf16": True}, {}):
            set_cpu(monkeypatch, **flags)
            assert choose_precision(model, CPU).precision == ("bf16" if wide and flags else "fp32")


def test_what_the_hardware_says(monkeypatch):
    assert isinstance(multiplies_bf16(), bool)  # torch has the questions
    set_cpu(monkeypatch, amx=True)
    assert multiplies_bf16()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not multiplies_bf16()
    model = torch.nn.Linear(2, 2)
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, supported=supported: supported)
        assert choose_precision(model, torch.device("cuda")).precision == ("bf16" if supported else "fp32")
    assert choose_precision(model, torch.device("mps")).precision == "fp32"


def test_loaded_with_auto(monkeypatch):
    set_cpu(monkeypatch)
    plain = load_backbone()
    assert (plain.precision, plain.why_precision) == ("fp32", "this CPU doesn't multiply bfloat16 matrices in hardware")
    set_cpu(monkeypatch, amx=True)
    assert load_backbone().precision == "fp32"
    small = {"patch_size": 32, "num_classes": 0, "depth": 1}
    config = {"input_size": (3, 224, 224), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    wide = freeze("mine", timm.create_model("vit_small_patch16_224", **small), config, device=CPU, precision="auto")
    assert wide.precision == "bf16"
    assert wide.unprepared().precision == "bf16"
    assert "at least 384 wide" in wide.why_precision
    assert {value.dtype for value in wide.model.parameters()} == {torch.bfloat16}
    assert load_backbone(precision="bf16").why_precision == ""
    with pytest.raises(InputError, match="precision must be one of"):
        freeze("mine", torch.nn.Linear(2, 2), config, device=CPU, precision="half")


def test_the_original_of_a_backbone_has_its_precision(wide_is_narrow, monkeypatch):
    backbone = load_backbone()
    assert backbone.precision == "bf16"
    set_cpu(monkeypatch)
    assert backbone.unprepared().precision == "bf16"


def call(capsys, *words):
    code = main([*map(str, words), "--quiet", "--batch-size", "64"])
    return code, *capsys.readouterr()


@pytest.fixture
def files(tmp_path):
    """Statistics of made-up features, which are said to be of each precision."""
    backbone = load_backbone()
    stats = ClassStatistics(3, backbone.num_features)
    stats.update(torch.randn(30, backbone.num_features), torch.arange(30) % 3)
    for precision in ("fp32", "bf16"):
        stats.provenance = {"backbone": {**backbone.describe(), "precision": precision}, "channels": 1}
        stats.save(tmp_path / f"{precision}.safetensors")
    return tmp_path


SMALL = ("--grow-every", "1", "--log-every", "1")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_statistics_and_runs_keep_their_precision(precision, files, capsys, wide_is_narrow, monkeypatch):
    """Whatever auto would mean on this machine."""
    if precision == "bf16":
        set_cpu(monkeypatch)
    stats, run = files / f"{precision}.safetensors", files / "run"
    words = ["distill", "--paper", "--stats", stats, "--out", run, *SMALL]
    code, out, err = call(capsys, *words, "--steps", "1")
    assert code == 0, err
    assert f"fashion_vit runs in {precision}, because the statistics in {stats} were computed so" in out
    assert precision_of_run(run) == precision
    code, out, err = call(capsys, *words, "--steps", "2", "--resume")
    assert code == 0, err
    assert f"fashion_vit runs in {precision}, because the run in {run} began so" in out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["provenance"]["precision"] == [precision]
    other = {"fp32": "bf16", "bf16": "fp32"}[precision]
    with pytest.warns(RuntimeWarning, match=f"computed in {precision}, but the backbone runs in {other}"):
        code, out, err = call(capsys, *words, "--steps", "3", "--resume", "--precision", other)
    assert code == 1
    assert f"the run has another precision (['{precision}'], now ['{other}'])" in err
    assert "because" not in out


def test_without_a_record_the_rule_decides(files, capsys, wide_is_narrow):
    stats = ClassStatistics.load(files / "fp32.safetensors")
    del stats.provenance["backbone"]["precision"]
    stats.save(files / "old.safetensors")
    code, out, err = call(
        capsys,
        "distill",
        "--paper",
        "--stats",
        files / "old.safetensors",
        "--out",
        files / "run",
        *SMALL,
        "--steps",
        "1",
    )
    assert code == 0, err
    assert "runs in bf16, because this CPU multiplies bfloat16 matrices in hardware" in out
    assert precision_of_run(files / "none") is None
    for text in ("[1", "[]", '{"provenance": {"precision": 3}}'):
        (files / "run" / "run.json").write_text(text)
        assert precision_of_run(files / "run") is None
