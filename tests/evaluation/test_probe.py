"""Linear probes and their references."""

from __future__ import annotations

import pytest
import torch

from sfm_fast import InputError
from sfm_fast.backbones.load import load_backbone
from sfm_fast.data.datasets import open_dataset
from sfm_fast.evaluation.evaluator import Evaluator, ProbeConfig
from sfm_fast.evaluation.linear import (
    cosine_schedule,
    cross_entropy_gradient,
    gradient_of,
    top_k_accuracy,
    train_linear,
)
from sfm_fast.evaluation.references import lowest_per_class
from sfm_fast.features.compute import dataset_features, view_features
from sfm_fast.views import Augmentation


def blobs(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    return 5 * torch.eye(4)[labels] + torch.randn(count, 4, generator=generator), labels


@pytest.mark.parametrize("count", [8, 300])
def test_linear_probe_learns_and_repeats(count):
    features, labels = blobs(count)
    test, test_labels = blobs(1000, seed=1)
    weight, bias = train_linear(features.unsqueeze(0), labels, 4)
    assert top_k_accuracy(test @ weight.T + bias, test_labels, 1) > 0.9
    again = train_linear(features.unsqueeze(0), labels, 4)
    assert torch.equal(weight, again[0])
    assert not torch.equal(weight, train_linear(features.unsqueeze(0), labels, 4, seed=1)[0])


def test_top_k():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    labels = torch.tensor([1, 2])
    assert top_k_accuracy(logits, labels, 1) == 0.5
    assert top_k_accuracy(logits, labels, 2) == 1.0
    assert top_k_accuracy(logits, labels, 5) == 1.0


def test_lowest_per_class():
    score = torch.tensor([3.0, 1.0, 2.0, 0.0, 5.0])
    labels = torch.tensor([0, 0, 0, 1, 1])
    assert lowest_per_class(score, labels, 2, 2, ["a", "b"]).tolist() == [1, 2, 3, 4]
    with pytest.raises(InputError, match=r"class 1 \('b'\) has 2 images, fewer than ipc=3"):
        lowest_per_class(score, labels, 2, 3, ["a", "b"])


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator(
        load_backbone(),
        open_dataset("embedded", "test"),
        open_dataset("embedded", "train"),
        config=ProbeConfig(seeds=2, epochs=200, views=20),
        progress=False,
    )


def test_features_of_views_do_not_depend_on_the_batch(evaluator):
    images = torch.rand(5, 1, 28, 28)
    one, two = (
        view_features(evaluator.backbone, images, 4, Augmentation(noise=False), seed=1, batch_size=size)
        for size in (3, 64)
    )
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert one.shape == (4, 5, evaluator.backbone.num_features)
    assert not torch.equal(one[0], one[1])


def test_references_come_in_the_expected_order(evaluator):
    full, random, nearest = evaluator.full(), evaluator.random_real(1, 28), evaluator.nearest_real(1, 28)
    assert random["top1_mean"] < nearest["top1_mean"] < full["top1_mean"]
    assert full["top1_mean"] > 0.8
    assert random["top1_std"] > 0
    assert full["ipc"] == 600
    assert nearest["mode"] == "probe"
    assert nearest["top5_mean"] >= nearest["top1_mean"]


def test_nearest_image_is_the_nearest(evaluator):
    features, labels = dataset_features(evaluator.sets.train, evaluator.backbone, progress=False)
    images, their_labels = evaluator.sets.nearest_images(1, 28)
    assert their_labels.tolist() == list(range(10))
    for c in range(10):
        mine = features[labels == c]
        best = (mine - mine.mean(0)).norm(dim=1).argmin()
        torch.testing.assert_close(evaluator.backbone.features(images[c : c + 1])[0], mine[best], rtol=1e-4, atol=1e-4)


def test_references_need_training_images():
    evaluator = Evaluator(load_backbone(), open_dataset("embedded", "test"), progress=False)
    with pytest.raises(InputError, match="need train, the real training images"):
        evaluator.full()


@pytest.mark.parametrize("bad", [{"seeds": 0}, {"epochs": 0}, {"views": 0}, {"min_area": 2.0}])
def test_bad_options_are_named(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        ProbeConfig(**bad)


def test_gradient_of_cross_entropy_has_the_bits_of_autograd():
    logits, labels = 3 * torch.randn(250, 10, generator=torch.Generator().manual_seed(0)), torch.arange(250) % 10
    expected = gradient_of(lambda leaf: torch.nn.functional.cross_entropy(leaf, labels), logits)
    assert torch.equal(cross_entropy_gradient(logits, labels), expected)


def test_cosine_schedule_is_torchs():
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=0.01)
    schedule, seen = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 7), []
    for _ in range(7):
        seen.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert cosine_schedule(0.01, 7) == seen
