"""Linear gradient matching: closed form against autograd, and its identity with flow matching at zero weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests_data import labelled

import sfm_fast
from sfm_fast.reference import gradient_matching as lgm


def test_closed_form_is_the_gradient():
    features, labels = labelled(40, 9, 6)
    weight, bias = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(
        lgm.linear_gradient(features, labels, weight, bias),
        lgm.linear_gradient_autograd(features, labels, weight, bias, False),
    )


def test_all_three_forms_give_the_same_loss_and_feature_gradient():
    (syn, syn_labels), (real, real_labels) = labelled(12, 9, 6, seed=1), labelled(50, 9, 6, seed=2)
    weight, bias = 0.1 * torch.randn(6, 9, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    one, two = (syn.clone().requires_grad_() for _ in range(2))
    closed = sfm_fast.linear_gradient_matching_loss(one, syn_labels, real, real_labels, weight, bias)
    twice = lgm.gradient_distance(
        lgm.linear_gradient_autograd(two, syn_labels, weight, bias, True),
        lgm.linear_gradient_autograd(real, real_labels, weight, bias, False),
    )
    torch.testing.assert_close(closed, twice)
    torch.testing.assert_close(torch.autograd.grad(closed, one), torch.autograd.grad(twice, two))


def test_gradcheck():
    (syn, syn_labels), (real, real_labels) = labelled(8, 5, 4, seed=1), labelled(20, 5, 4, seed=2)
    weight, bias = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: sfm_fast.linear_gradient_matching_loss(z, syn_labels, real, real_labels, weight, bias),
        syn.requires_grad_(),
    )


def test_at_zero_weights_the_gradient_is_the_flow_and_the_loss_is_sfm():
    classes, dim = 6, 9
    (syn, syn_labels), (real, real_labels) = (
        labelled(3 * classes, dim, classes, seed=1),
        labelled(20 * classes, dim, classes, seed=2),
    )
    weight, bias = torch.zeros(classes, dim, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
    centers = torch.stack([real[real_labels == c].mean(0) for c in range(classes)])
    gradient = lgm.linear_gradient(real, real_labels, weight, bias)
    flow = (centers.sum(0) - centers) / (classes - 1) - centers
    torch.testing.assert_close(gradient[: classes * dim].view(classes, dim), (classes - 1) / classes**2 * flow)
    torch.testing.assert_close(gradient[classes * dim :], torch.zeros(classes, dtype=torch.float64))
    torch.testing.assert_close(
        sfm_fast.linear_gradient_matching_loss(syn, syn_labels, real, real_labels, weight, bias),
        sfm_fast.flow_alignment_loss(syn, centers, syn_labels),
    )


def test_distance_to_the_flow_is_first_order_in_the_weights():
    classes, dim = 6, 9
    real, real_labels = labelled(20 * classes, dim, classes)
    direction = torch.randn(classes, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    at_zero = lgm.linear_gradient(real, real_labels, 0 * direction, torch.zeros(classes, dtype=torch.float64))

    def distance(scale: float) -> float:
        return (
            (
                lgm.linear_gradient(real, real_labels, scale * direction, torch.zeros(classes, dtype=torch.float64))
                - at_zero
            )
            .norm()
            .item()
        )

    assert distance(1e-3) / distance(1e-4) == pytest.approx(10, rel=0.02)


def test_softmax_residual_is_what_cross_entropy_has():
    features, labels = labelled(10, 4, 3)
    weight, bias = (
        torch.randn(3, 4, dtype=torch.float64).requires_grad_(),
        torch.randn(3, dtype=torch.float64).requires_grad_(),
    )
    F.cross_entropy(features @ weight.T + bias, labels).backward()
    expected = torch.cat([weight.grad.flatten(), bias.grad])
    torch.testing.assert_close(lgm.linear_gradient(features, labels, weight.detach(), bias.detach()), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(4)}, "weight must be"),
        ({"bias": torch.zeros(5)}, "bias must be"),
        ({"syn_features": torch.zeros(4, 3)}, "syn_features must have 5 features per item like weight, got 3"),
        ({"real_labels": torch.tensor([0, 9])}, "real_labels must be in 0..3"),
        ({"syn_labels": torch.zeros(4)}, "int64"),
    ],
)
def test_bad_input(changes, message):
    call = {
        "syn_features": torch.randn(4, 5),
        "syn_labels": torch.arange(4),
        "real_features": torch.randn(2, 5),
        "real_labels": torch.tensor([0, 1]),
        "weight": torch.zeros(4, 5),
        "bias": torch.zeros(4),
    }
    with pytest.raises(sfm_fast.InputError, match=message):
        sfm_fast.linear_gradient_matching_loss(**(call | changes))
