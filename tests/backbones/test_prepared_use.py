"""Prepared backbones where they are used: statistics of the other kind, torch.compile, bfloat16, and what the commands say of them."""

from __future__ import annotations

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from sfm_fast import ClassStatistics, DistillConfig, InputError, load_backbone, make_distiller, prepare_frozen
from sfm_fast.cli.main import main


def initial(name: str, **options: int) -> nn.Module:
    """A timm model whose norms all matter."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=0, **options).eval().requires_grad_(False)
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 2)
    for key, value in model.named_parameters():
        if value.ndim == 1:
            torch.nn.init.normal_(value, 0, 0.1) if key.endswith("bias") else torch.nn.init.uniform_(value, 0.5, 1.5)
    return model


@pytest.mark.parametrize("prepared", [True, False])
def test_statistics_of_the_other_kind_are_refused(prepared: bool) -> None:
    made, other = (load_backbone("fashion_cnn", prepare=prepare) for prepare in (prepared, not prepared))
    stats = ClassStatistics(3, made.num_features)
    stats.update(torch.randn(30, made.num_features), torch.arange(30) % 3)
    stats.provenance = {"backbone": dict(made.describe()), "channels": 1}
    assert make_distiller(DistillConfig.paper(steps=1), made, statistics=stats).backbone.prepared == made.prepared
    words = ("prepared", r"as loaded \(--no-prepare\)")
    with pytest.raises(
        InputError,
        match=f"computed with the backbone {words[not prepared]}, but here it runs {words[prepared]}; recompute them",
    ):
        make_distiller(DistillConfig.paper(steps=1), other, statistics=stats)


def test_compiled_features_and_gradients_are_equal() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.LayerNorm(72), nn.Linear(72, 5)).eval().requires_grad_(False)
    prepared, record = prepare_frozen(model, 8)
    assert len(record.done) == 3, str(record)
    images = torch.randn(2, 3, 8, 8)

    def features_and_gradient(run: nn.Module) -> tuple[Tensor, Tensor]:
        views = images.clone().requires_grad_()
        features = run(views)
        return features.detach(), torch.autograd.grad(features.square().sum(), views)[0]

    plain = features_and_gradient(prepared)
    for ours, theirs in zip(features_and_gradient(torch.compile(prepared)), plain, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("resnet10t", 64, {}),
        ("tf_efficientnet_lite0", 64, {}),
        ("vit_small_patch16_224", 96, {"depth": 3, "img_size": 96}),
    ],
)
def test_in_bfloat16_it_is_as_accurate_as_the_original(name: str, size: int, options: dict[str, int]) -> None:
    model = initial(name, **options)
    prepared, _ = prepare_frozen(model, size)
    assert prepared is not model
    images = torch.randn(4, 3, size, size)
    exact = model(images)
    errors = [
        float((run.bfloat16()(images.bfloat16()).float() - exact).norm() / exact.norm()) for run in (prepared, model)
    ]
    assert 0 < errors[0] <= 1.1 * errors[1] + 1e-3, errors


def test_what_is_said_of_both_backbones(tmp_path, capsys) -> None:
    """What preparing leaves alone, and the precision that auto chose."""
    words = [
        "--backbone",
        "test_resnet",
        "--weights",
        "random",
        "--image-size",
        "32",
        "--mode",
        "probe",
        "--seeds",
        "1",
    ]
    words += ["--eval-backbone", "densenet121", "--eval-weights", "random", "--eval-image-size", "32", "--epochs", "1"]
    folder = tmp_path / "data"
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (32, 32), (90 * label, 40 * index, 0)).save(folder / split / name / f"{index}.png")
    code = main(["eval", "--data", str(folder), "--references", "full", "--workers", "0", "--quiet", *words])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "test_resnet runs in fp32, because " in out
    assert "densenet121 runs in fp32, because " in out
    assert "densenet121 prepared: " in out
    assert "left alone: " in out
