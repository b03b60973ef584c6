"""EfficientNet-lite0 from its pip package: the right weights in the right places."""

from __future__ import annotations

import pytest
import timm
import torch

from sfm_fast import InputError
from sfm_fast.backbones import efficientnet_lite as efficientnet_lite0
from sfm_fast.backbones.load import load_backbone
from sfm_fast.data.datasets import open_dataset

pytest.importorskip(efficientnet_lite0.PACKAGE)


@pytest.fixture(scope="module")
def backbone():
    return efficientnet_lite0.load_efficientnet_lite0()


def test_what_it_is(backbone):
    assert (backbone.name, backbone.num_features, backbone.in_channels) == ("tf_efficientnet_lite0", 1280, 3)
    assert (backbone.input_size, backbone.resize, backbone.mean.tolist(), backbone.std.tolist()) == (
        64,
        73,
        [0.5] * 3,
        [0.5] * 3,
    )
    assert {m.eps for m in backbone.unprepared().model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-3}
    assert not any(p.requires_grad for p in backbone.model.parameters())
    larger = efficientnet_lite0.load_efficientnet_lite0(image_size=96)
    assert larger.fingerprint == backbone.fingerprint
    assert larger.features(torch.rand(1, 3, 96, 96)).shape == (1, 1280)
    with pytest.raises(InputError, match="image_size must be"):
        efficientnet_lite0.load_efficientnet_lite0(image_size=0)


def test_classes_of_pictures_it_never_saw_lie_apart(backbone):
    """Wrongly placed weights of fitting shapes would give about 0.5 or less."""
    features = {}
    for split in ("train", "test"):
        images, labels = next(open_dataset("embedded", split).batches(300, backbone.transform(1)))
        features[split] = (backbone.features(images, 100), labels)
    (train, train_labels), (test, test_labels) = features["train"], features["test"]
    centres = torch.stack([train[train_labels == label].mean(0) for label in range(10)])
    assert (torch.cdist(test, centres).argmin(1) == test_labels).float().mean() >= 0.62


def test_logits_are_those_of_the_original_network():
    """Five of 1000 for a drawn picture, computed once by EfficientNet-Lite-PyTorch, the network the package was made for.

    With the usual eps of batch normalisation, 1e-5 for 1e-3, the first would be 2.66.
    """
    place = torch.linspace(-1, 1, 96)
    picture = torch.stack([torch.sin(k * torch.outer(place, place) + 3 * place) for k in (3.0, 5.0, 7.0)])[None]
    model = timm.create_model(efficientnet_lite0.NAME, pretrained=False).eval()
    model.load_state_dict(efficientnet_lite0.state_dict())
    with torch.no_grad():
        logits = model(picture)[0]
    wanted = torch.tensor([1.5007, -0.0024, -2.7860, -2.8812, -2.2795])
    torch.testing.assert_close(logits[[0, 250, 500, 750, 999]], wanted, rtol=1e-3, atol=2e-3)
    assert logits.topk(3).indices.tolist() == [502, 641, 644]


def test_as_a_local_checkpoint(backbone, tmp_path):
    path = str(tmp_path / "lite0.safetensors")
    efficientnet_lite0.main([path])
    loaded = load_backbone("tf_efficientnet_lite0", path, image_size=64)
    assert loaded.describe() == backbone.describe()
    for wrong, message in (
        (str(tmp_path / "lite0.pth"), "must end in .safetensors"),
        (str(tmp_path / "no" / "x.safetensors"), "no such folder"),
    ):
        with pytest.raises(SystemExit, match=message):
            efficientnet_lite0.main([wrong])


def test_weights_out_of_place_are_refused(tmp_path, monkeypatch):
    def refused(message, names):
        # safetensors sorts by size and name, torch files keep the order given
        torch.save({name: state[name] for name in names}, tmp_path / "w.pth")
        with pytest.raises(InputError, match=message):
            efficientnet_lite0.state_dict(tmp_path / "w.pth")

    state = efficientnet_lite0.read_checkpoint(efficientnet_lite0.weights_file())
    names = list(state)
    refused("must hold 296 tensors as timm's tf_efficientnet_lite0, got 295", names[1:])
    refused(
        r"_bn0.bias \(32,\) is at the position of bn1.weight",
        [names[0], names[2], names[1], *names[3:]],
    )
    first, second = names.index("_blocks.2._expand_conv.weight"), names.index("_blocks.3._expand_conv.weight")
    names[first], names[second] = names[second], names[first]
    refused(r"_blocks\.2\._expand_conv.weight \(144, 24, 1, 1\) is at the position of", names)  # of the same shape
    monkeypatch.setattr(efficientnet_lite0, "PACKAGE", "not_installed_anywhere")
    with pytest.raises(
        InputError, match=r"needs the package 'not_installed_anywhere': pip install 'sfm_fast\[bench\]'"
    ):
        efficientnet_lite0.load_efficientnet_lite0()
