"""What the tests of bundles share: two backbones, a classifier, synthetic images, and bundles of them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from sfm_fast import Bundle
from sfm_fast.backbones.load import load_backbone
from sfm_fast.data.datasets import open_dataset
from sfm_fast.evaluation.heads import Classifier
from sfm_fast.synthetic import SyntheticSet


@pytest.fixture(scope="session")
def vit():
    return load_backbone()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    import timm

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm.create_model("test_vit", pretrained=False, img_size=32).state_dict(), path)
    return str(path)


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint):
    """Another backbone, in colour and of another input size."""
    return load_backbone("test_vit", tiny_checkpoint, image_size=32)


@pytest.fixture(scope="session")
def test_data():
    source = open_dataset("embedded", "test")
    return source.images[:150].float() / 255, source.labels[:150]


@pytest.fixture(scope="session")
def classifier(vit):
    """The nearest class mean as a linear map, (2 m_c x - |m_c|^2) / 10, around the common mean."""
    train = open_dataset("embedded", "train")
    features = vit.features(train.images[:400].float() / 255)
    means = torch.stack([features[train.labels[:400] == c].mean(0) for c in range(10)])
    weight = (means - means.mean(0)) / 5
    bias = -(means - means.mean(0)).square().sum(1) / 10 - weight @ means.mean(0)
    metadata = {"backbone": vit.describe(), "images": 6000, "test_top1": 0.75, "test_data": "embedded/test"}
    return Classifier(weight, bias, train.class_names, metadata)


@pytest.fixture(scope="session")
def synthetic(vit, classifier):
    """The first real image of each class, with a metadata of a run."""
    train = open_dataset("embedded", "train")
    first = [int((train.labels == c).nonzero()[0]) for c in range(10)]
    noise = torch.rand(10, 1, 28, 28, generator=torch.Generator().manual_seed(0)) / 100
    images = (train.images[first].float() / 255 + noise).clamp(0, 1)
    metadata = {"backbones": [vit.describe()], "config": {"method": "sfm"}, "steps_done": 3}
    return SyntheticSet(images, torch.arange(10), train.class_names, metadata)


@pytest.fixture(scope="session")
def same(synthetic, classifier, vit):
    return Bundle.create(synthetic, classifier, vit)


@pytest.fixture(scope="session")
def joined(synthetic, classifier, vit, tiny):
    return Bundle.create(synthetic, classifier, vit, tiny, views=4)
