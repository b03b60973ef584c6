"""Weights without network access: one question to the hub, its cache, and timm's initial weights."""

from __future__ import annotations

import pytest
import torch

from sfm_fast import InputError, load_backbone
from sfm_fast.backbones import hub
from sfm_fast.cli import main as cli


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The hub doesn't answer, and its cache is an empty folder, which is returned."""
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "answers", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_hub_that_does_not_answer_is_one_line(offline, capsys, monkeypatch):
    import timm

    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("built"))
    assert cli.main(["stats", "--backbone", "test_vit", "--out", str(offline / "s"), "--quiet"]) == 1
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1
    assert "can't be reached, and they aren't in the local cache" in err
    assert "--checkpoint FILE" in err
    assert "--weights random" in err


def test_the_environment_forbids_to_ask(offline, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "answers", lambda: pytest.fail("asked"))
    for name in ("test_vit", "hf-hub:some/model"):
        with pytest.raises(InputError, match="HF_HUB_OFFLINE is set, and they aren't in the local cache"):
            load_backbone(name)


def test_the_cache_is_used_without_asking_again(offline):
    import timm
    from huggingface_hub import constants
    from safetensors.torch import save_file

    wanted = timm.create_model("test_vit", pretrained=False)
    snapshots = offline / f"models--{timm.models.get_pretrained_cfg('test_vit').hf_hub_id.replace('/', '--')}"
    (snapshots / "snapshots" / "1").mkdir(parents=True)
    (snapshots / "refs").mkdir()
    (snapshots / "refs" / "main").write_text("1")
    save_file(wanted.state_dict(), snapshots / "snapshots" / "1" / "model.safetensors")
    loaded = load_backbone("test_vit", prepare=False)
    assert torch.equal(loaded.model.pos_embed, wanted.pos_embed)
    assert constants.HF_HUB_OFFLINE is False


def test_a_question_to_nobody_is_answered_with_no(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port, where nobody listens
    assert not hub.answers()


def test_random_weights_are_the_same_every_time_and_leave_the_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = load_backbone("test_vit", weights="random")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert load_backbone("test_vit", weights="random").fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "fashion_vit", "weights": "random"}, "weights of 'fashion_vit' must be 'pretrained', got 'random'"),
        ({"name": "test_vit", "weights": "random", "checkpoint": "x"}, "must be 'pretrained' if there is a checkpoint"),
        ({"name": "test_vit", "weights": "no"}, r"weights must be one of \('pretrained', 'random'\), got 'no'"),
        ({"name": "test_vit", "checkpoint": "none.pth"}, "checkpoint none.pth: no such file"),
    ],
)
def test_weights_that_cannot_be_had(options, message):
    with pytest.raises(InputError, match=message):
        load_backbone(**options)


def test_the_command_takes_random_weights(tmp_path, capsys):
    words = ["stats", "--backbone", "test_vit", "--weights", "random", "--out", str(tmp_path / "s"), "--quiet"]
    assert cli.main(words) == 0
