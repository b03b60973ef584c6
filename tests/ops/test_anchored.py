"""What is particular to anchored flows: what they see and don't, their parts, short flows, one class; test_anchored_arguments.py has the rest.

The definition, with and without the length term, is compared with every backend in test_flow_alignment.py and test_ops.py.
"""

from __future__ import annotations

import functools

import definitions
import pytest
import torch
from cases.losses import LOSS_CASES
from definitions import LENGTH_WEIGHT, LENGTHS, value_and_gradient

import sfm_fast
from sfm_fast.losses.evaluate import check_options, evaluate, prepare
from sfm_fast.reference import flow_alignment as reference

BACKENDS = ("torch", "cpu", "triton")
ANCHORED = ("anchored", "anchored-lengths")
both_weights = pytest.mark.parametrize("weight", [0.0, LENGTH_WEIGHT])
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labelled():
    return next(case for case in LOSS_CASES if case.name == "labelled").make(torch.float32)


# --- what the loss sees ------------------------------------------------------------------------------------------------


def test_equals_class_flows_where_the_means_agree():
    """The anchor is the mean of the centres, and of the synthetic class means too."""
    centers, features = normal(9, 5, dtype=torch.float64), normal(9, 5, seed=1, dtype=torch.float64)
    features = features - features.mean(0) + centers.mean(0)
    anchored = sfm_fast.anchored_flow_loss(features, centers, anchor=centers.mean(0))
    torch.testing.assert_close(anchored, sfm_fast.flow_alignment_loss(features, centers, alignment="class"))
    torch.testing.assert_close(anchored, sfm_fast.flow_alignment_loss(features, centers, alignment="anchored"))


def test_sees_a_common_translation_that_class_flows_do_not():
    centers, features = normal(9, 5), normal(9, 5, seed=1)
    moved = features + 2 * normal(5, seed=2)
    for alignment, seen in (("class", False), ("anchored", True)):
        before, after = (sfm_fast.flow_alignment_loss(z, centers, alignment=alignment) for z in (features, moved))
        assert ((after - before).abs() > 1e-2) == seen


def test_without_the_length_term_it_is_blind_to_lengths():
    centers, features, anchor = normal(9, 5), normal(9, 5, seed=1), normal(5, seed=2)
    scales = torch.linspace(0.1, 10, 9)[:, None]
    loss, gradient = value_and_gradient(lambda z: sfm_fast.anchored_flow_loss(z, centers, anchor=anchor), features)
    scaled = sfm_fast.anchored_flow_loss(anchor + scales * (features - anchor), centers, anchor=anchor)
    torch.testing.assert_close(scaled, loss)
    assert ((gradient * (features - anchor)).sum(1).abs() <= 1e-6).all()


def test_the_length_term_is_the_squared_logarithm_of_the_ratio():
    centers, anchor = normal(9, 5, dtype=torch.float64), normal(5, seed=2, dtype=torch.float64)
    ratios = torch.linspace(-1, 2, 9, dtype=torch.float64).exp()
    features = anchor + ratios[:, None] * (centers - anchor)
    loss = sfm_fast.anchored_flow_loss(features, centers, anchor=anchor, length_weight=0.3)
    torch.testing.assert_close(loss, 0.3 * ratios.log().square().mean())


@every_backend
def test_a_length_out_of_reach_pulls_no_harder(backend):
    """Of 1 - cos = 0: the term and its slope with log |b|, on both sides of delta and far beyond, and an infinite delta is none."""
    anchor, centers = normal(8, seed=2), normal(7, 8)
    ratios = torch.tensor([1.0, 1.05, 0.95, 1.5, 0.5, 1e4, 1e-4])
    features = anchor + ratios[:, None] * (centers - anchor)
    options = {"anchor": anchor, "length_weight": 0.3, "backend": backend}
    loss, gradient = value_and_gradient(
        lambda z: sfm_fast.anchored_flow_loss(z, centers, length_delta=0.1, **options), features
    )
    logarithm = ratios.log()
    term = torch.where(logarithm.abs() <= 0.1, logarithm.square(), 0.2 * logarithm.abs() - 0.01)
    torch.testing.assert_close(loss, 0.3 * term.mean(), rtol=1e-4, atol=1e-6)
    slope = 7 * (gradient * (features - anchor)).sum(1)
    torch.testing.assert_close(slope, 0.6 * logarithm.clamp(-0.1, 0.1), rtol=1e-2, atol=1e-4)
    square = sfm_fast.anchored_flow_loss(features, centers, **options)
    assert torch.equal(sfm_fast.anchored_flow_loss(features, centers, length_delta=1e30, **options), square)


@every_backend
@pytest.mark.parametrize("delta", [None, 0.1])
def test_the_curvature_of_the_length_term_where_lengths_are_equal(backend, delta):
    """d^2/dx^2 of x^2 is 2 at 0 too, where a kink could hide."""
    anchor, centers = normal(8, seed=2), normal(4, 8)
    features = centers.clone().requires_grad_()
    options = {"anchor": anchor, "length_weight": 1.0, "length_delta": delta, "backend": backend}
    loss = sfm_fast.anchored_flow_loss(features, centers, **options)
    (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
    along = centers - anchor
    (curvature,) = torch.autograd.grad((gradient * along).sum(), features)
    torch.testing.assert_close((curvature * along).sum(), torch.tensor(2.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [*ANCHORED, "decoupled"])
@every_backend
def test_the_loss_of_all_classes_is_the_sum_of_their_parts(backend, kind):
    """Micro-batches: views of the constants, without preparing or keeping anything for a part."""
    features, centers, labels = labelled()
    if kind == "decoupled":
        constants, options = prepare(centers, kind), check_options(metric="mse")._replace(alignment=kind, weight=1.0)
    else:
        constants = prepare(centers, "anchored", definitions.anchor_of(centers))
        options = check_options("anchored", **({} if kind == "anchored" else LENGTHS))

    def share(z, begin, end, backend):
        """Of the mean over all classes."""
        mine, part = (labels >= begin) & (labels < end), constants.part(begin, end)
        assert part.rows.untyped_storage().data_ptr() == constants.rows.untyped_storage().data_ptr()
        loss = evaluate(z[mine], labels[mine] - begin, part, options._replace(backend=backend))
        return (end - begin) / 10 * loss

    cuts = [(0, 1), (1, 4), (4, 10)]
    for z, backend_of_z in ((features, backend), (features.double(), "torch")):
        whole, gradient = value_and_gradient(lambda z: evaluate(z, labels, constants, options), z)
        parts = [
            value_and_gradient(functools.partial(share, begin=begin, end=end, backend=backend_of_z), z)
            for begin, end in cuts
        ]
        torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
        torch.testing.assert_close(sum(part for _, part in parts), gradient, rtol=1e-5, atol=1e-8)


# --- precision and short flows -----------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("name", ANCHORED)
def test_a_common_mean_ten_thousand_times_the_spread(name, backend):
    """As precise as class flows on the same inputs."""
    offset = 1e4 * torch.sign(normal(96, seed=1))
    features, centers = offset + normal(60, 96, seed=2), offset + normal(20, 96, seed=3)
    labels = torch.arange(60) % 20

    def error(name):
        expected, expected_gradient = value_and_gradient(
            lambda z: definitions.flow_alignment(z, centers, labels, name, "cosine"), features.double()
        )
        loss, gradient = value_and_gradient(
            lambda z: definitions.loss(z, centers, labels, alignment=name, backend=backend), features
        )
        return abs(loss - expected), (gradient - expected_gradient).norm() / expected_gradient.norm()

    assert error(name)[0] <= 2 * error("class")[0] + 2e-7
    assert error(name)[1] <= 2 * error("class")[1] + 2e-7


@every_backend
def test_the_anchor_is_not_rounded(backend):
    """To float32 it is off by a thousandth here, and the flows are a hundredth long."""
    anchor = 1e4 + normal(8, seed=1, dtype=torch.float64)
    shift = anchor.float()
    centers = shift.double() + 1e-2 * normal(5, 8, seed=2, dtype=torch.float64)
    features = shift + (torch.randint(-9, 10, (5, 8), generator=torch.Generator().manual_seed(3)) * 2.0**-10)
    expected = definitions.anchored(features, centers, None, anchor, 0.5)
    found = sfm_fast.anchored_flow_loss(features, centers, anchor=anchor, length_weight=0.5, backend=backend)
    assert abs(found - expected) <= 1e-5
    rounded = sfm_fast.anchored_flow_loss(features, centers, anchor=shift, length_weight=0.5, backend=backend)
    assert abs(rounded - expected) > 1e-4


@both_weights
@every_backend
def test_short_flows_count_one_and_have_no_gradient(backend, weight):
    """A centre at the anchor, a class mean at the anchor; the others count as ever."""
    anchor, centers, features = normal(8), normal(6, 8, seed=1), normal(6, 8, seed=2)
    rest = definitions.anchored(features[2:], centers[2:], None, anchor, weight)
    centers[0], features[1] = anchor, anchor
    loss, gradient = value_and_gradient(
        lambda z: sfm_fast.anchored_flow_loss(z, centers, anchor=anchor, length_weight=weight, backend=backend),
        features,
    )
    torch.testing.assert_close(loss.double(), (2 + 4 * rest) / 6, rtol=1e-6, atol=0)
    assert not gradient[:2].any()
    assert gradient[2:].any(1).all()
    loss, gradient = value_and_gradient(
        lambda z: sfm_fast.anchored_flow_loss(
            z, centers, anchor=anchor, length_weight=weight, backend=backend, eps=1e3
        ),
        features,
    )
    assert loss == 1
    assert not gradient.any()


@both_weights
@every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25])
def test_nan_even_where_the_centre_is_at_the_anchor(backend, weight, bad):
    anchor, centers, features = normal(8), normal(6, 8, seed=1), normal(6, 8, seed=2)
    centers[0] = anchor
    features[0 if bad != 1e25 else 1, 3] = bad  # squares beyond float32: only where the other flow has a length
    loss = sfm_fast.anchored_flow_loss(features, centers, anchor=anchor, length_weight=weight, backend=backend)
    assert loss.isnan()


# --- one class ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [None, torch.zeros(1, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)])
@every_backend
def test_a_single_class(backend, labels):
    count = 1 if labels is None else len(labels)
    features, centers, anchor = normal(count, 7), normal(1, 7, seed=1), normal(7, seed=2)
    for ours, definition in (
        (
            lambda z: sfm_fast.anchored_flow_loss(
                z, centers, labels, anchor=anchor, length_weight=0.7, backend=backend
            ),
            lambda z: definitions.anchored(z, centers, labels, anchor, 0.7),
        ),
        (
            lambda z: sfm_fast.decoupled_flow_loss(z, centers, labels, backend=backend),
            lambda z: (definitions.class_means(z, labels, 1) - centers.double()).square().mean(),
        ),
    ):
        expected, expected_gradient = value_and_gradient(definition, features.double())
        loss, gradient = value_and_gradient(ours, features)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-7)
    module = sfm_fast.FlowAlignmentLoss(centers, alignment="anchored", anchor=anchor, backend=backend)
    torch.testing.assert_close(
        module(features, labels).double(), definitions.anchored(features, centers, labels, anchor, 0.0)
    )


@pytest.mark.parametrize("kind", range(6))
def test_operations_take_a_single_class_only_where_it_has_a_meaning(kind):
    one, point = torch.ones(1, 3), torch.zeros(3)
    anchor = point if kind == reference.ANCHORED else None

    def run(weight):
        return torch.ops.sfm_fast.flow_alignment(one, None, None, one, point, anchor, kind, 1e-8, weight, 0.1)

    for weight in (0.5, 1.0):
        if kind == reference.ANCHORED or (kind == reference.DECOUPLED and weight == 1):
            assert all(result.isfinite().all() for result in run(weight))
        else:
            with pytest.raises(RuntimeError, match="fewest"):
                run(weight)


@pytest.mark.parametrize("prefix", ["", "triton_"])
def test_operations_want_an_anchor_for_their_kind_alone(prefix):
    operation = getattr(torch.ops.sfm_fast, f"{prefix}flow_alignment")
    rows, point = torch.ones(2, 3), torch.zeros(3)
    for kind, anchor in ((reference.ANCHORED, None), (reference.CLASS, point), (reference.ANCHORED, point[:2])):
        with pytest.raises((RuntimeError, ValueError), match="anchor"):
            operation(rows, None, None, rows, point, anchor, kind, 1e-8, 0.0, 0.1)
