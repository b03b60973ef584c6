"""Distilling a classifier: the loss, its limits, and training with a teacher."""

from __future__ import annotations

import math

import pytest
import torch

from sfm_fast import InputError
from sfm_fast.evaluation.heads import LinearMap
from sfm_fast.evaluation.linear import distillation_loss, top_k_accuracy, train_linear
from sfm_fast.evaluation.modes import Features, ProbeConfig, fit


def logits(seed, rows=4, classes=3):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(student, teacher, labels, temperature, alpha):
    """Sums of exponentials, number by number."""

    def soft(row, t):
        powers = [math.exp(value / t) for value in row]
        return [power / sum(powers) for power in powers]

    total = 0.0
    for ours, theirs, label in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        p, q = soft(theirs, temperature), soft(ours, temperature)
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        total += alpha * temperature**2 * divergence - (1 - alpha) * math.log(soft(ours, 1.0)[label])
    return total / len(labels)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_by_hand(alpha, temperature):
    student, teacher, labels = logits(0), logits(1), torch.tensor([0, 2, 1, 1])
    loss = distillation_loss(student, teacher, labels, temperature, alpha)
    assert loss.item() == pytest.approx(by_hand(student, teacher, labels, temperature, alpha), rel=1e-12)


def test_the_gradient_by_hand():
    student, teacher, labels = logits(0).requires_grad_(), logits(1), torch.tensor([0, 2, 1, 1])
    distillation_loss(student, teacher, labels, 4.0, 0.3).backward()
    soft = (student / 4).softmax(1) - (teacher / 4).softmax(1)
    hard = student.softmax(1) - torch.eye(3, dtype=torch.float64)[labels]
    torch.testing.assert_close(student.grad, (0.3 * 4.0 * soft + 0.7 * hard) / 4)  # T² / T, over 4 rows


def training(views=5, images=8):
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(images) % 4
    return 3 * torch.eye(6)[labels] + torch.randn(views, images, 6, generator=generator), labels


def test_alpha_zero_is_the_probe():
    features, labels = training()
    teacher = torch.randn(5, 8, 4, generator=torch.Generator().manual_seed(4))
    probe = train_linear(features, labels, 4, epochs=20, seed=7)
    distilled = train_linear(features, labels, 4, teacher=teacher, alpha=0.0, epochs=20, seed=7)
    assert torch.equal(probe[0], distilled[0])
    assert torch.equal(probe[1], distilled[1])
    assert not torch.equal(probe[0], train_linear(features, labels, 4, teacher=teacher, epochs=20, seed=7)[0])


def test_a_linear_teacher_is_learned_from_its_logits_alone():
    features, labels = training(views=40, images=16)
    generator = torch.Generator().manual_seed(5)
    head = LinearMap(torch.randn(4, 6, generator=generator), torch.randn(4, generator=generator))
    wrong = torch.zeros_like(labels)  # alpha 1: labels play no part
    weight, bias = train_linear(features, wrong, 4, teacher=head(features), alpha=1.0, epochs=3000)
    fresh = 3 * torch.randn(500, 6, generator=generator)
    assert top_k_accuracy(fresh @ weight.T + bias, head(fresh).argmax(1), 1) > 0.85  # chance is a quarter


def test_each_view_has_its_own_teacher():
    # Teachers of the views in another order teach something else.
    features, labels = training()
    teacher = torch.randn(5, 8, 4, generator=torch.Generator().manual_seed(4))
    one = train_linear(features, labels, 4, teacher=teacher, epochs=10)
    other = train_linear(features, labels, 4, teacher=teacher.flip(0), epochs=10)
    assert not torch.equal(one[0], other[0])


def test_mode_kd_takes_the_classifier_on_the_distilling_features():
    features, labels = training()
    phi = torch.randn(5, 8, 9, generator=torch.Generator().manual_seed(6))
    generator = torch.Generator().manual_seed(7)
    classifier = LinearMap(torch.randn(4, 9, generator=generator), torch.randn(4, generator=generator))
    config = ProbeConfig(epochs=3, views=5, temperature=2.0, alpha=0.7)  # fewer epochs than views: three views are used
    fitted = fit("kd", Features(features, phi, labels), 4, classifier, config, seed=1)
    weight, bias = train_linear(
        features[:3], labels, 4, teacher=classifier(phi[:3]), temperature=2.0, alpha=0.7, epochs=3, seed=1
    )
    assert torch.equal(fitted.head.weight, weight)
    assert torch.equal(fitted.head.bias, bias)
    assert fitted.parameters == fitted.parameters_folded == 4 * 7
    assert config.settings("kd").keys() == {"seeds", "epochs", "views", "min_area", "temperature", "alpha"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": torch.zeros(5, 8, 3)}, r"teacher must be \(5, 8, 4\)"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"alpha": -0.1}, r"alpha must be in \[0, 1\]"),
        ({"alpha": float("nan")}, r"alpha must be in \[0, 1\]"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        train_linear(*training(), 4, **options)


def first_is(value):
    features, _ = training()
    features = features.double()
    features[0, 0, 0] = value
    return features


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.full((8,), 4)}, r"labels must be in 0\.\.3, got 4\.\.4"),
        ({"labels": torch.full((8,), -100)}, r"labels must be in 0\.\.3, got -100"),
        ({"labels": torch.zeros(7).long()}, r"labels must be \(8,\)"),
        ({"labels": torch.zeros(8)}, "labels must be an int64 tensor"),
        ({"features": torch.zeros(8, 6)}, "features must be"),
        ({"features": torch.zeros(5, 8, 6).long()}, "features must be a float tensor"),
        ({"features": first_is(float("nan"))}, "features holds NaN"),
        ({"features": first_is(1e200)}, r"features reaches 1e\+200, beyond the range of float32"),
        ({"teacher": torch.full((5, 8, 4), 3e38), "temperature": 0.1}, "training left float32's range"),
        ({"teacher": torch.full((5, 8, 4), float("inf"))}, "teacher holds NaN or infinity"),
        ({"teacher": torch.zeros(5, 8, 4).long()}, "teacher must be a float tensor"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"seed": 2**64}, "seed must be in"),
    ],
)
def test_bad_input_is_named_before_training(change, message):
    features, labels = training()
    with pytest.raises(InputError, match=message):
        train_linear(**{"features": features, "labels": labels, "num_classes": 4, "epochs": 4} | change)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_features_are_taken_as_float32(dtype):
    features, labels = training()
    features, teacher = features.to(dtype), features[..., :4].to(dtype)
    weight, bias = train_linear(features, labels, 4, teacher=teacher, epochs=5)
    assert weight.dtype == bias.dtype == torch.float32
    assert torch.equal(weight, train_linear(features.float(), labels, 4, teacher=teacher.float(), epochs=5)[0])
