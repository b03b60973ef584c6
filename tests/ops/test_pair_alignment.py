"""What only pair alignment has: memory without C x C, close classes, clusters, blocks of rows for ranks, one derivative."""

from __future__ import annotations

import itertools

import definitions
import pytest
import torch
from cases.losses import LOSS_CASES
from definitions import value_and_gradient

import sfm_fast
from sfm_fast.measure.memory import peak_memory
from sfm_fast.ops.pair_alignment import pair_block
from sfm_fast.reference.pair_alignment import pair_alignment

BACKENDS = ("torch", "cpu", "triton")


def pair_loss(features, centers, labels=None, backend="auto", groups=None, metric="cosine"):
    return sfm_fast.flow_alignment_loss(
        features, centers, labels, alignment="pair", metric=metric, backend=backend, groups=groups
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_is_refused(backend):
    features, centers, labels = LOSS_CASES[5].make(torch.float32)
    leaf = features.requires_grad_()
    (gradient,) = torch.autograd.grad(pair_loss(leaf, centers, labels, backend), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        (gradient.sum() + leaf.sum()).backward()


def test_reference_never_holds_a_class_by_class_matrix():
    classes, dim = 2000, 16
    a, b = (torch.randn(classes, dim) for _ in range(2))
    tile = 1 << 15
    peak = peak_memory(lambda: pair_alignment(a, b, None, 0, classes, 1e-8, True, tile_elements=tile))
    assert peak < classes * classes * 4  # one float32 C x C matrix is 16 MB
    total, gradient = pair_alignment(a, b, None, 0, classes, 1e-8, True, tile_elements=tile)
    whole, whole_gradient = pair_alignment(a, b, None, 0, classes, 1e-8, True, tile_elements=classes * classes)
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-4, atol=1e-2)


def test_cpu_kernel_needs_memory_for_classes_not_for_pairs():
    classes, dim = 3000, 16
    centers, features = torch.randn(classes, dim), torch.randn(classes, dim, requires_grad=True)
    criterion = sfm_fast.FlowAlignmentLoss(centers, alignment="pair", backend="cpu")
    peak = peak_memory(lambda: criterion(features).backward())
    assert peak < 3 * classes * dim * 4 + (1 << 20)  # one C x C matrix is 36 MB, this is 1.6


@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_close_classes(gap, backend):
    generator = torch.Generator().manual_seed(2)
    features, centers = (10 * torch.randn(4, 64, generator=generator) for _ in range(2))
    for means in (features, centers):
        means[1] = means[0] + gap * torch.randn(64, generator=generator)
    expected, expected_gradient = value_and_gradient(
        lambda z: definitions.flow_alignment(z, centers, None, "pair", "cosine"), features.double()
    )
    loss, gradient = value_and_gradient(lambda z: pair_loss(z, centers, backend=backend), features)
    assert abs(loss.double() - expected) <= 1e-5 * abs(expected)
    assert (gradient.double() - expected_gradient).norm() <= 1e-3 * expected_gradient.norm()


def _twins(centers, features):
    """Every seventh class lies close to the next one, in one of both spaces or in both."""
    for first in range(0, len(centers) - 1, 7):
        for means in ((centers,), (features,), (centers, features))[first // 7 % 3]:
            means[first + 1] = means[first] + 1e-3 * means[first + 1]


def _groups_of_ten(centers, features):
    centers[:], features[:] = (
        10 * means[:10].repeat(len(means) // 10 + 1, 1)[: len(means)] + means for means in (centers, features)
    )


def _other_lengths(centers, features):
    features *= 1e-6 * 10.0 ** (torch.arange(len(features)) % 9)[:, None]


def _far_away(centers, features):
    features += 30.0


@pytest.mark.parametrize("change", [_twins, _groups_of_ten, _other_lengths, _far_away])
@pytest.mark.parametrize("shape", [(45, 70), (150, 65)], ids=str)
def test_pairs_of_every_kind_in_one_block(change, shape):
    """The CPU kernel multiplies rows or their differences, part by part: no error beyond that of differences throughout."""
    generator = torch.Generator().manual_seed(5)
    centers, features = (torch.randn(shape, generator=generator) for _ in range(2))
    change(centers, features)
    expected, expected_gradient = value_and_gradient(lambda z: pair_loss(z, centers), features.double())
    theirs = value_and_gradient(lambda z: pair_loss(z, centers, backend="torch"), features)
    loss, gradient = value_and_gradient(lambda z: pair_loss(z, centers, backend="cpu"), features)
    scale = expected_gradient.norm(dim=1, keepdim=True)
    off = ((gradient - expected_gradient) / scale).norm()
    assert (loss - expected).abs() <= 1.5 * (theirs[0] - expected).abs() + 1e-6
    assert off <= 1.5 * ((theirs[1] - expected_gradient) / scale).norm() + 1e-5


@pytest.mark.parametrize("size", [1e15, 9e18])
def test_flows_that_float32_just_holds(size):
    """|a + b|^2 overflows before the squared lengths of the flows do."""
    features = size * torch.eye(3)
    loss, gradient = value_and_gradient(lambda z: pair_loss(z, features, backend="cpu"), features)
    assert abs(loss) <= 1e-6
    assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 1), (15, 3), (17, 33), (130, 40), (200, 129)], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_blocks_of_any_size_match_the_reference(shape, backend):
    if backend == "triton" and shape[0] > 150:
        pytest.skip("interpreted Triton is slow")
    generator = torch.Generator().manual_seed(shape[0])
    centers, features = (torch.randn(shape, generator=generator) for _ in range(2))
    expected, expected_gradient = value_and_gradient(lambda z: pair_loss(z, centers), features.double())
    loss, gradient = value_and_gradient(lambda z: pair_loss(z, centers, backend=backend), features)
    assert (loss - expected).abs() <= 1e-6
    assert (gradient - expected_gradient).abs().max() <= 1e-5 * max(expected_gradient.abs().max().item(), 5e-2)


@pytest.mark.parametrize("metric", ["cosine", "mse"])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_flows_within_a_group_are_left_out(backend, metric):
    if metric == "mse" and backend in ("cpu", "triton"):
        with pytest.raises(sfm_fast.InputError, match="doesn't support the mean squared error with groups"):
            pair_loss(torch.randn(4, 3), torch.randn(4, 3), None, backend, torch.tensor([0, 0, 1, 1]), metric)
        return
    features, centers, labels = LOSS_CASES[2].make(torch.float32)
    groups = torch.tensor([3, 0, 1, 1, 0, 7, 7, 7, 3, 0, 2, 1, 0])
    expected, expected_gradient = value_and_gradient(
        lambda z: definitions.flow_alignment(z, centers, labels, "pair", metric, groups=groups), features.double()
    )
    loss, gradient = value_and_gradient(lambda z: pair_loss(z, centers, labels, backend, groups, metric), features)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert (gradient - expected_gradient).abs().max() <= 1e-5 * expected_gradient.abs().max()
    module = sfm_fast.FlowAlignmentLoss(centers, alignment="pair", metric=metric, backend=backend, groups=groups)
    other = sfm_fast.FlowAlignmentLoss(
        centers + 1, alignment="pair", metric=metric, backend=backend, groups=torch.arange(13)
    )
    other.load_state_dict(module.state_dict())
    assert module(features, labels) == loss == other(features, labels)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("grouped", [False, True])
def test_ranks_share_the_rows(backend, grouped):
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(75, 20, generator=generator) for _ in range(2))
    a, b = a - a.mean(0), b - b.mean(0)
    groups = torch.arange(75) // 3 if grouped else None
    total, gradient = pair_alignment(a.double(), b.double(), groups, 0, 75, 1e-8, True)
    cuts = [0, 20, 21, 21, 75]
    parts = [pair_block(a, b, groups, rows, eps=1e-8, high=False, backend=backend) for rows in itertools.pairwise(cuts)]
    torch.testing.assert_close(sum(part[0] for part in parts), total, rtol=1e-5, atol=1e-4)
    together = torch.cat([part[1] for part in parts])
    assert (together - gradient).abs().max() <= 1e-5 * gradient.abs().max()


def test_all_centres_in_one_group_is_an_error():
    with pytest.raises(sfm_fast.InputError, match="no flow is left"):
        pair_loss(torch.randn(4, 3), torch.randn(4, 3), groups=torch.zeros(4, dtype=torch.int64))


BAD_GROUPS = {
    "dtype": (torch.zeros(4), "groups must be an int64 tensor"),
    "shape": (torch.zeros(3, dtype=torch.int64), r"groups must be \(4,\)"),
    "type": ([0, 1, 2, 3], "groups must be an int64 tensor, got a builtins.list"),
}


@pytest.mark.parametrize("name", BAD_GROUPS)
def test_bad_groups(name):
    groups, message = BAD_GROUPS[name]
    with pytest.raises(sfm_fast.InputError, match=message):
        pair_loss(torch.randn(4, 3), torch.randn(4, 3), groups=groups)


def test_groups_are_for_pair_alignment():
    with pytest.raises(sfm_fast.InputError, match="alignment must be 'pair' if groups is given"):
        sfm_fast.flow_alignment_loss(torch.randn(4, 3), torch.randn(4, 3), groups=torch.arange(4))


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_groups_hide_nan_only_within_themselves(backend, bad):
    features, centers, _ = LOSS_CASES[2].make(torch.float32)
    features[2, 3] = bad
    groups = torch.arange(13) // 2
    assert pair_loss(features, centers, None, backend, groups).isnan()


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_precision_is_accepted_everywhere(precision):
    features, centers, labels = LOSS_CASES[5].make(torch.float32)
    exact = pair_loss(features.double(), centers, labels)
    for backend in BACKENDS:
        loss = sfm_fast.flow_alignment_loss(
            features, centers, labels, alignment="pair", backend=backend, precision=precision
        )
        assert (loss - exact).abs() <= (1e-6 if precision == "highest" else 2e-3)
