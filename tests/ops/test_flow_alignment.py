"""The flow-alignment losses against their definition, and the identities their fast forms stand on."""

from __future__ import annotations

import definitions
import pytest
import torch
from cases.losses import LOSS_CASES
from definitions import KINDS, NAMES, value_and_gradient

import sfm_fast
from sfm_fast.reference import flow_alignment as reference
from sfm_fast.settings import FLOWS

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
# Backends that run here on CPU tensors; Triton in its interpreter (conftest.py), CUDA in test_cuda_shim.py and on a GPU.
BACKENDS = ("torch", "cpu", "triton")


def errors(case, dtype, alignment, metric, backend):
    """Error of the loss, and of the gradient relative to its largest entry."""
    features, centers, labels = case.make(dtype)
    expected, expected_gradient = definitions.expected(case.name, dtype, alignment, metric)
    loss, gradient = value_and_gradient(
        lambda z: definitions.loss(z, centers, labels, alignment=alignment, metric=metric, backend=backend),
        features,
    )
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    assert gradient.shape == features.shape
    # Where the gradient is zero (one dimension: every flow points the same way) it comes out as rounding of terms of order 1.
    scale = expected_gradient.abs().max().item()
    scale = scale if scale > 1e-9 else 1.0
    return (loss - expected).abs().item(), (gradient.double() - expected_gradient).abs().max().item() / scale


@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("alignment", "metric"), KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_torch_matches_definition(case, alignment, metric, dtype):
    loss_error, gradient_error = errors(case, dtype, alignment, metric, "torch")
    rounding = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0
    assert loss_error <= TOLERANCE[dtype] * (1 + definitions.expected(case.name, dtype, alignment, metric)[0].abs())
    assert gradient_error <= 20 * TOLERANCE[dtype] + rounding


def kernel_calls():
    """(backend, dtype, case): interpreted Triton is slow, and low precision differs in its loads alone."""
    for backend in ("cpu", "triton"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for case in LOSS_CASES:
                if backend == "cpu" or dtype == torch.float32 or case.name in ("odd", "labelled", "strided"):
                    yield pytest.param(backend, dtype, case, id=f"{backend}-{dtype}-{case.name}")


@pytest.mark.parametrize(("backend", "dtype", "case"), list(kernel_calls()))
@pytest.mark.parametrize(("alignment", "metric"), KINDS)
def test_kernels_are_as_accurate_as_torch(case, alignment, metric, dtype, backend):
    theirs = errors(case, dtype, alignment, metric, "torch")
    ours = errors(case, dtype, alignment, metric, backend)
    # Tensor-core products are formed before they are subtracted, which costs close pairs some digits.
    tolerance = 1e-5 if (backend, alignment) == ("triton", "pair") else 1e-6
    tolerance += torch.finfo(dtype).eps if dtype != torch.float32 else 0
    assert ours[0] <= 1.5 * theirs[0] + 1e-6 * (1 + definitions.expected(case.name, dtype, alignment, metric)[0].abs())
    assert ours[1] <= 1.5 * theirs[1] + tolerance


@pytest.mark.parametrize(("alignment", "metric"), KINDS)
def test_gradcheck(alignment, metric):
    features, centers, labels = next(case for case in LOSS_CASES if case.name == "labelled-two").make(torch.float64)
    leaf = features.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: definitions.loss(z, centers, labels, alignment=alignment, metric=metric), leaf
    )


@pytest.mark.parametrize("alignment", ["global", "class", "anchored", "anchored-lengths"])
def test_double_backward(alignment):
    features, centers, _ = LOSS_CASES[2].make(torch.float64)
    leaf = features.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: definitions.loss(z, centers, alignment=alignment), leaf)


@pytest.mark.parametrize(("alignment", "metric"), KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_output_scales_and_backward_repeats(alignment, metric, backend):
    features, centers, labels = LOSS_CASES[5].make(torch.float32)

    def function(z):
        return definitions.loss(z, centers, labels, alignment=alignment, backend=backend, metric=metric)

    unit = value_and_gradient(function, features)[1]
    torch.testing.assert_close(value_and_gradient(function, features, -2.5)[1], -2.5 * unit)
    assert not value_and_gradient(function, features, 0.0)[1].any()
    leaf = features.clone().requires_grad_()
    loss = function(leaf)
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(loss, leaf)[0])


@pytest.mark.parametrize(("alignment", "metric"), KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_not_written(alignment, metric, backend):
    features, centers, labels = LOSS_CASES[5].make(torch.float32)
    copies = features.clone(), centers.clone(), labels.clone()
    value_and_gradient(
        lambda z: definitions.loss(z, centers, labels, alignment=alignment, backend=backend, metric=metric),
        features,
    )
    for tensor, copy in zip((features, centers, labels), copies, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize(("alignment", "metric"), KINDS)
def test_order_of_labels_does_not_matter(alignment, metric):
    features, centers, labels = LOSS_CASES[5].make(torch.float64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    one = definitions.loss(features, centers, labels, alignment=alignment, metric=metric)
    two = definitions.loss(features[order], centers, labels[order], alignment=alignment, metric=metric)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("alignment", "metric"), KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_common_mean_a_thousand_times_the_spread(alignment, metric, backend):
    generator = torch.Generator().manual_seed(1)
    offset = 1000 * torch.sign(torch.randn(96, generator=generator))
    features, centers = (offset + torch.randn(n, 96, generator=generator) for n in (60, 20))
    labels = torch.arange(60) % 20
    expected, expected_gradient = value_and_gradient(
        lambda z: definitions.flow_alignment(z, centers, labels, alignment, metric), features.double()
    )
    loss, gradient = value_and_gradient(
        lambda z: definitions.loss(z, centers, labels, alignment=alignment, backend=backend, metric=metric),
        features,
    )
    assert abs(loss.double() - expected) <= 1e-5 * abs(expected)
    assert (gradient.double() - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize("alignment", FLOWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_short_flows_count_as_cosine_zero(alignment, backend):
    centers = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    same = torch.full((5, 8), 3.0)
    loss, gradient = value_and_gradient(
        lambda z: definitions.loss(z, centers, alignment=alignment, backend=backend), same
    )
    assert loss == 1.0
    assert not gradient.any()
    loss, gradient = value_and_gradient(
        lambda z: definitions.loss(z, torch.ones(5, 8), alignment=alignment, backend=backend), centers
    )
    assert loss == 1.0
    assert not gradient.any()


@pytest.mark.parametrize(("alignment", "metric"), KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_come_out_as_nan(alignment, metric, bad, backend):
    features, centers, _ = LOSS_CASES[3].make(torch.float32)
    features[1, 2] = bad
    assert (
        definitions.loss(features, centers, alignment=alignment, backend=backend, metric=metric)
        .isfinite()
        .logical_not()
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("alignment", "metric"), KINDS)
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 1e3), (1e-4, 1.0)])
def test_features_together_far_from_the_centres(alignment, metric, scale, offset, backend):
    """As those of images that are still noise."""
    generator = torch.Generator().manual_seed(3)
    centers, features = torch.randn(40, 32, generator=generator), torch.randn(40, 32, generator=generator)
    features = scale * features + offset

    def loss(z, which):
        return definitions.loss(z, centers, alignment=alignment, metric=metric, backend=which)

    expected, expected_gradient = value_and_gradient(lambda z: loss(z, "torch"), features.double())
    value, gradient = value_and_gradient(lambda z: loss(z, backend), features)
    # float32 features near 1000 carry spreads of 1 to 5 digits less than usual, whatever computes with them.
    assert abs(value - expected) <= 1e-5 * (1 + expected)
    assert (gradient - expected_gradient).norm() <= 3e-4 * expected_gradient.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alignment", FLOWS)
def test_equal_features_have_no_gradient(alignment, backend):
    features = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)).expand(6, 20) * 45
    centers = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    loss, gradient = value_and_gradient(
        lambda z: definitions.loss(z, centers, alignment=alignment, backend=backend), features
    )
    assert loss == 1.0
    assert not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alignment", NAMES)
def test_squares_beyond_float32_are_nan_and_not_a_right_angle(alignment, backend):
    features, centers, _ = LOSS_CASES[3].make(torch.float32)
    assert definitions.loss(features * 1e25, centers, alignment=alignment, backend=backend).isnan()


def test_global_cosine_equals_all_pair_flows_flattened():
    features, centers, _ = LOSS_CASES[2].make(torch.float64)
    f, g = definitions.pair_flows(centers).flatten(), definitions.pair_flows(features).flatten()
    torch.testing.assert_close(sfm_fast.flow_alignment_loss(features, centers), 1 - (f @ g) / (f.norm() * g.norm()))
    a, b = reference.centre_rows(centers), reference.centre_rows(features)
    torch.testing.assert_close(f @ g, 2 * len(centers) * (a * b).sum())


def test_flow_is_the_scaled_centred_mean():
    means = LOSS_CASES[2].make(torch.float64)[1]
    classes = len(means)
    torch.testing.assert_close(definitions.flows(means), -classes / (classes - 1) * reference.centre_rows(means))


def test_pair_mse_is_the_scaled_variance_of_differences():
    features, centers, _ = LOSS_CASES[2].make(torch.float64)
    classes, dim = centers.shape
    d = reference.centre_rows(centers - features)
    torch.testing.assert_close(
        sfm_fast.flow_alignment_loss(features, centers, alignment="pair", metric="mse"),
        2 / ((classes - 1) * dim) * d.square().sum(),
    )


def test_global_dot_product_does_not_see_the_mean():
    features, centers, _ = LOSS_CASES[2].make(torch.float64)
    flow = definitions.flows(centers)
    torch.testing.assert_close((flow * features).sum(), (flow * reference.centre_rows(features)).sum())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_decoupled_matches_definition(case, alpha, backend):
    features, centers, labels = case.make(torch.float32)
    expected, expected_gradient = value_and_gradient(
        lambda z: definitions.decoupled(z, centers, labels, alpha), features.double()
    )
    loss, gradient = value_and_gradient(
        lambda z: sfm_fast.decoupled_flow_loss(z, centers, labels, alpha=alpha, backend=backend), features
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6 * expected_gradient.abs().max().item()
    )


def test_module_equals_function_and_survives_its_state_dict():
    features, centers, labels = LOSS_CASES[5].make(torch.float32)
    module = sfm_fast.FlowAlignmentLoss(centers, alignment="class")
    other = sfm_fast.FlowAlignmentLoss(torch.randn_like(centers), alignment="class")
    other.load_state_dict(module.state_dict())
    assert torch.equal(
        module(features, labels), sfm_fast.flow_alignment_loss(features, centers, labels, alignment="class")
    )
    assert torch.equal(module(features, labels), other(features, labels))
    assert "alignment='class'" in repr(module)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_losses_share_one_feature_tensor(backend):
    features, centers, labels = LOSS_CASES[5].make(torch.float32)
    leaf = features.requires_grad_()
    losses = [definitions.loss(leaf, centers, labels, alignment=alignment, backend=backend) for alignment in NAMES]
    single = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in losses]
    sum(losses).backward()
    torch.testing.assert_close(leaf.grad, sum(single))


CENTERS, LABELS = torch.randn(3, 4), torch.tensor([0, 1, 2])
BAD_CALLS = {
    "one class": (dict(centers=CENTERS[:1]), "at least 2 classes"),
    "integer features": (dict(features=torch.zeros(3, 4, dtype=torch.int64)), "features must be a float32"),
    "vector": (dict(features=torch.zeros(4)), r"got \(4,\)"),
    "wrong dim": (dict(features=torch.zeros(3, 5)), "must have 4 features per item like centers, got 5"),
    "wrong rows": (
        dict(features=torch.zeros(2, 4)),
        "features must have 3 rows, one mean per class, if labels is None, got 2",
    ),
    "label range": (dict(labels=torch.tensor([0, 1, 3])), r"0\.\.2, got 0\.\.3"),
    "negative label": (dict(labels=torch.tensor([0, 1, -1])), r"got -1\.\.1"),
    "label dtype": (dict(labels=LABELS.int()), "int64"),
    "label shape": (dict(labels=LABELS[:2]), r"must be \(3,\)"),
    "empty class": (dict(labels=torch.tensor([0, 0, 2])), "class 1 has no feature"),
    "alignment": (dict(alignment="cls"), "alignment must be one of"),
    "metric": (dict(metric="l2"), "metric must be one of"),
    "backend": (dict(backend="tpu"), "backend must be"),
    "absent backend": (dict(backend="cuda"), "can't run this call"),
    "eps": (dict(eps=-1.0), "eps must be"),
    "eps whose square is 0 in float32": (dict(eps=1e-30), "eps must be a number from 1e-18 to 1e30, got 1e-30"),
    "centers need grad": (dict(centers=CENTERS.clone().requires_grad_()), "detach"),
    "no items": (dict(features=torch.zeros(0, 4), labels=LABELS[:0]), "at least one item"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_names_the_argument(name):
    changes, message = BAD_CALLS[name]
    with pytest.raises(sfm_fast.InputError, match=message):
        sfm_fast.flow_alignment_loss(**({"features": torch.randn(3, 4), "centers": CENTERS} | changes))


@pytest.mark.parametrize("alignment", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_shows_even_beside_short_flows(alignment, backend):
    features = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    features[0, 0] = float("nan")
    assert definitions.loss(features, torch.ones(3, 4), alignment=alignment, backend=backend).isnan()
