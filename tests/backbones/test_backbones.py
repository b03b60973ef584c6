"""Backbones of timm: loading, freezing, input sizes, and checkpoints that don't fit."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

from sfm_fast import InputError
from sfm_fast.backbones.load import load_backbone, shape_of_backbone
from sfm_fast.backbones.timm_models import is_convolutional
from sfm_fast.files import load_tensors

TINY = "test_vit"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm.create_model(TINY, pretrained=False).state_dict(), path)
    return path


def test_features_do_not_depend_on_the_batch():
    backbone, images = load_backbone(), torch.rand(7, 1, 28, 28)
    torch.testing.assert_close(backbone.features(images, 7), backbone.features(images, 2), rtol=1e-4, atol=1e-4)


def test_gradient_reaches_the_pixels_of_a_frozen_backbone():
    backbone, images = load_backbone(), torch.rand(2, 1, 28, 28).requires_grad_()
    backbone(images).sum().backward()
    assert images.grad.abs().sum() > 0


def test_timm_model_with_a_local_checkpoint(checkpoint, tmp_path):
    backbone = load_backbone(TINY, checkpoint)
    assert backbone.in_channels == 3
    assert backbone.image_size == round(backbone.input_size * 8 / 7)
    assert backbone.features(torch.rand(2, 1, backbone.input_size, backbone.input_size)).shape == (
        2,
        backbone.num_features,
    )
    wrapped = {"state_dict": {f"module.{key}": value for key, value in load_tensors(checkpoint)[0].items()}}
    torch.save(wrapped, tmp_path / "w.pth")
    assert load_backbone(TINY, tmp_path / "w.pth").fingerprint == backbone.fingerprint


def test_bf16_is_near_fp32(checkpoint):
    images = torch.rand(2, 3, 160, 160)
    one, two = (load_backbone(TINY, checkpoint, precision=precision).features(images) for precision in ("fp32", "bf16"))
    assert two.dtype == torch.float32
    assert 0 < (one - two).abs().max() < 0.1 * one.abs().max()


def test_what_cannot_be_loaded(checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"backbone must be 'fashion_vit' or 'fashion_cnn', .* got 'vit_nothing'"):
        load_backbone("vit_nothing")
    with pytest.raises(InputError, match="no such file"):
        load_backbone(TINY, tmp_path / "none.pth")
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged"):
        load_backbone(TINY, tmp_path / "cut.safetensors")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(InputError, match="damaged, or not only weights"):
        load_backbone(TINY, tmp_path / "text.pth")
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "code.pth")
    with pytest.raises(InputError, match="doesn't fit the backbone"):
        load_backbone(TINY, tmp_path / "code.pth")
    with pytest.raises(InputError, match="doesn't fit the backbone"):
        load_backbone("test_resnet", checkpoint)
    for options, message in (
        ({"precision": "fp8"}, "precision"),
        ({"device": "nonsense"}, "device"),
        ({"device": "cuda:77"}, "can't be used"),
    ):
        with pytest.raises(InputError, match=message):
            load_backbone(**options)


def test_position_embeddings_follow_the_image_size(checkpoint):
    backbone = load_backbone(TINY, checkpoint, image_size=96)
    assert backbone.input_size == 96
    assert backbone.features(torch.rand(1, 3, 96, 96)).isfinite().all()
    for size in (0, -1):
        with pytest.raises(InputError, match="image_size must be"):
            load_backbone(TINY, checkpoint, image_size=size)
    with pytest.raises(InputError, match="image_size of 'fashion_vit' must be 28, got 64"):
        load_backbone(image_size=64)


def test_an_image_size_reaches_models_that_have_no_argument_for_it():
    for name in ("test_resnet", "resnet18"):
        shape = shape_of_backbone(name, image_size=64)
        assert (shape.input_size, shape.resize, shape.image_size) == (64, round(64 / 0.95), 73)
        assert is_convolutional(shape.model)
    assert not is_convolutional(shape_of_backbone(TINY).model)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (TINY, 60, "must be a multiple of its patches of 16 px, got 60; try 48 or 64"),
        (TINY, 7, "must be a multiple of its patches of 16 px, got 7; try 16$"),
        ("deit3_small_patch16_224", 200, "try 192 or 208"),
        ("convnext_atto", 16, "can't take images of 16 px"),
        ("maxvit_tiny_rw_224", 100, "can't take images of 100 px: height .* must be divisible by window"),
        ("levit_128s", 100, "can't take images of 100 px"),
        ("fashion_vit", 56, "image_size of 'fashion_vit' must be 28, got 56"),
        (TINY, 0, "image_size must be 1 to 16384 pixels, got 0"),
        (TINY, 20000, "image_size must be 1 to 16384 pixels, got 20000"),
    ],
)
def test_input_sizes_that_a_model_can_not_take(name, size, message):
    with pytest.raises(InputError, match=message) as caught:
        shape_of_backbone(name, image_size=size)
    assert "\n" not in str(caught.value)


def test_input_sizes_that_it_can_take(checkpoint):
    assert load_backbone(TINY, checkpoint, image_size=64).input_size == 64
    with pytest.raises(InputError, match="multiple of its patches"):
        load_backbone(TINY, checkpoint, image_size=60)
    # Its own size is no multiple, and timm trained it so.
    assert shape_of_backbone("vit_so400m_patch14_siglip_384").input_size == 384
    assert shape_of_backbone("vit_so400m_patch14_siglip_384", image_size=384).input_size == 384
