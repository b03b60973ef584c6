"""Regression centres: their objective against ridge regression on real rows, invariances, limits, and what is refused."""

from __future__ import annotations

import pytest
import torch

from sfm_fast import ClassStatistics, InputError
from sfm_fast.features.regression import _Problem, regression_centers

CLASSES, DIM, IMAGES = 4, 7, 4000


@pytest.fixture(scope="module")
def real():
    """Features (N, D) of classes that overlap, and labels; each class has as many."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(IMAGES) % CLASSES
    means = torch.randn(CLASSES, DIM, generator=generator, dtype=torch.float64)
    mix = torch.eye(DIM) + 0.2 * torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
    return 2 * means[labels] + torch.randn(IMAGES, DIM, generator=generator, dtype=torch.float64) @ mix, labels


def statistics(features, labels, clusters=0):
    found = ClassStatistics(CLASSES, features.shape[1], clusters=clusters, covariance=True)
    found.update(features, labels)
    return found


def unexplained(targets, features, labels, shrinkage):
    """1 - R^2 by ridge regression on the targets (C * K, D) and ordinary regression on the real rows."""
    indicators = torch.nn.functional.one_hot(torch.arange(CLASSES).repeat_interleave(len(targets) // CLASSES)).double()
    apart = targets - targets.mean(0)
    penalty = shrinkage * apart.square().sum() / CLASSES
    left = apart.T @ apart + penalty * torch.eye(DIM, dtype=torch.float64)
    weight = torch.linalg.solve(left, apart.T @ (indicators - 1 / CLASSES))
    scores = (features - targets.mean(0)) @ weight
    wanted = torch.nn.functional.one_hot(labels).double() - 1 / CLASSES
    best = (scores * wanted).sum() / scores.square().sum()
    return float((best * scores - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("shrinkage", [0.1, 1.0])
def test_moments_are_enough(real, number, shrinkage):
    """Fewer and more targets than features, which take the two forms of the solution."""
    found = statistics(*real)
    generator = torch.Generator().manual_seed(number)
    targets = torch.randn(CLASSES * number, DIM, generator=generator, dtype=torch.float64)
    problem = _Problem(found.centers, found.within_covariance, targets, shrinkage, 1.0)
    assert float(problem.unexplained(targets)) == pytest.approx(unexplained(targets, *real, shrinkage), rel=1e-6)


@pytest.mark.parametrize("clusters", [0, 3])
def test_less_is_left_unexplained_near_the_start(real, clusters):
    found = statistics(*real, clusters)
    start = found.cluster_centers if clusters else found.centers
    share, moved = [], []
    for proximity in (0.3, 1.0, 10.0, 1e6):
        targets = found.regression_centers(start, proximity=proximity)
        assert targets.shape == start.shape
        share.append(unexplained(targets.flatten(0, -2), *real, 0.3))
        moved.append(float((targets - start).norm()))
    assert share == sorted(share)
    assert moved == sorted(moved, reverse=True)
    assert share[1] < unexplained(start.flatten(0, -2), *real, 0.3)
    assert moved[-1] < 1e-4


def test_the_common_mean_the_scale_and_the_axes_do_not_matter(real):
    features, labels = real
    expected = statistics(features, labels).regression_centers()
    turn = torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    for changed, change in (
        (features + 1e4, lambda targets: targets + 1e4),
        (features * 1e3, lambda targets: targets * 1e3),
        (features * 1e-9, lambda targets: targets * 1e-9),
        (features @ turn, lambda targets: targets @ turn),
    ):
        found, wanted = statistics(changed, labels).regression_centers(), change(expected)
        assert (found - wanted).norm() <= 1e-5 * (wanted - wanted.mean(0)).norm()


def test_classes_in_another_order(real):
    features, labels = real
    order = torch.tensor([2, 0, 3, 1])
    found = statistics(features, torch.argsort(order)[labels]).regression_centers()
    torch.testing.assert_close(found, statistics(features, labels).regression_centers()[order], rtol=1e-5, atol=1e-5)


def test_it_is_the_same_inside_no_grad_and_leaves_its_inputs(real):
    found = statistics(*real)
    centers, within = found.centers.clone(), found.within_covariance
    expected = regression_centers(centers, within)
    with torch.no_grad():
        assert torch.equal(regression_centers(centers, within), expected)
    assert torch.equal(centers, found.centers)
    assert regression_centers(centers.float(), within.float()).dtype == torch.float64


def test_data_without_any_difference_stays_as_it_is():
    found = statistics(torch.ones(8, 3), torch.arange(8) % CLASSES)
    assert torch.equal(found.regression_centers(), found.centers)
    # Classes that are points: nothing within a class, and nothing left to explain.
    points = statistics(torch.eye(CLASSES, 6).repeat(2, 1), torch.arange(8) % CLASSES)
    assert points.regression_centers().isfinite().all()


def test_what_is_wrong_is_said(real):
    found = statistics(*real)
    for wrong in (0, -1.0, float("nan"), 2e6, "auto", None, True):
        with pytest.raises(InputError, match="shrinkage must be a number above 0"):
            found.regression_centers(shrinkage=wrong)
        with pytest.raises(InputError, match="proximity must be a number above 0"):
            found.regression_centers(proximity=wrong)
    with pytest.raises(InputError, match=r"start must be \(4, 7\) or \(4, K, 7\), got \(4, 6\)"):
        found.regression_centers(torch.ones(4, 6))
    plain = ClassStatistics(CLASSES, DIM)
    plain.update(*real)
    with pytest.raises(InputError, match="holds no covariance, which regression centres need"):
        plain.regression_centers()
