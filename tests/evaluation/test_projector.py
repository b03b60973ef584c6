"""The projector of classifier inheritance: ridge against least squares, its penalty, Adam, views and blends, bad input."""

from __future__ import annotations

import pytest
import torch

from sfm_fast import InputError
from sfm_fast.backbones.load import load_backbone
from sfm_fast.evaluation.projector import PENALTIES, Ridge, fit_projector
from sfm_fast.features.compute import projector_features, view_features
from sfm_fast.views import Augmentation


def pairs(views=6, images=5, dim=7, outputs=3, noise=0.5, seed=0, offset=20.0):
    """Inputs with a mean far larger than their spread, as features have, and noisy linear targets."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(views, images, dim, generator=generator, dtype=torch.float64) + offset
    weight = torch.randn(outputs, dim, generator=generator, dtype=torch.float64)
    y = x @ weight.T + 3 + noise * torch.randn(views, images, outputs, generator=generator, dtype=torch.float64)
    return x, y, weight


def by_least_squares(x, y, penalty):
    """The same problem as ordinary least squares: sqrt(λ) times the identity as further rows of the centred inputs."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    strength = penalty * (x - x_mean).square().sum() / x.shape[1]
    rows = torch.cat((x - x_mean, strength.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)))
    wanted = torch.cat((y - y_mean, torch.zeros(x.shape[1], y.shape[1], dtype=y.dtype)))
    weight = torch.linalg.lstsq(rows, wanted).solution.T
    return weight, y_mean - weight @ x_mean


@pytest.mark.parametrize("dim", [7, 60])  # fewer features than rows, and more
@pytest.mark.parametrize("penalty", [1e-6, 1e-2, 10.0])
def test_ridge_solves_the_least_squares_problem(dim, penalty):
    x, y, _ = pairs(dim=dim)
    fitted = fit_projector(x, y, penalties=[penalty])
    weight, bias = by_least_squares(x.flatten(0, 1), y.flatten(0, 1), penalty)
    torch.testing.assert_close(fitted.weight.double(), weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fitted.bias.double(), bias, rtol=1e-4, atol=1e-4)
    assert fitted.weight.dtype == torch.float32
    assert fitted.metadata["penalty"] == penalty
    assert fitted.metadata["held_out_mse"] is None


@pytest.mark.parametrize("dim", [7, 60])
def test_both_forms_agree(dim):
    x, y, _ = pairs(dim=dim)
    one, two = (Ridge(x.flatten(0, 1), y.flatten(0, 1), dual=dual) for dual in (False, True))
    assert one.unit == pytest.approx(two.unit, rel=1e-10)
    for penalty in PENALTIES:
        for ours, theirs in zip(one.solve(penalty), two.solve(penalty), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.left_out_errors(PENALTIES), two.left_out_errors(PENALTIES), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dim", [7, 60])
@pytest.mark.parametrize("images", [False, True])
def test_left_out_errors_are_those_of_refits(dim, images, monkeypatch):
    """Rows one by one, and images with all their views."""
    monkeypatch.setattr("sfm_fast.evaluation.projector.BLOCK", 11)  # several blocks of rows
    x, y, _ = pairs(dim=dim)
    views, number = x.shape[:2]
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    fit, place = Ridge(x, y), torch.arange(len(x))
    for penalty in (1e-3, 0.3):
        errors = []
        for group in range(number if images else len(x)):
            out = (place % number if images else place) == group
            other = Ridge(x[~out], y[~out])
            weight, bias = other.solve(penalty * fit.unit / other.unit)  # the same λ
            errors.append((x[out] @ weight.T + bias - y[out]).square().mean())
        found = fit.left_out_errors([penalty], views if images else 1)[0]
        torch.testing.assert_close(found, torch.stack(errors).mean(), rtol=1e-7, atol=0)


def test_an_exact_relation_is_recovered():
    x, y, weight = pairs(noise=0.0)
    fitted = fit_projector(x, y)
    assert fitted.metadata["penalty"] == min(PENALTIES)
    torch.testing.assert_close(fitted.weight.double(), weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fitted(x.float()).double(), y, rtol=1e-3, atol=1e-3)


def test_a_huge_penalty_gives_the_mean():
    x, y, _ = pairs()
    fitted = fit_projector(x, y, penalties=[1e12])
    torch.testing.assert_close(fitted(x.float()).double(), y.mean((0, 1)).expand_as(y), rtol=1e-4, atol=1e-4)


def test_the_penalty_does_not_depend_on_scale_or_repetition():
    x, y, _ = pairs()
    fitted, scaled = fit_projector(x, y, penalties=[0.1]), fit_projector(1000 * x, y, penalties=[0.1])
    torch.testing.assert_close(1000 * scaled.weight, fitted.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        fit_projector(x.repeat(3, 1, 1), y.repeat(3, 1, 1), penalties=[0.1]).weight, fitted.weight, rtol=1e-4, atol=1e-6
    )


def test_the_penalty_with_the_least_held_out_error_is_chosen():
    # Views of an image share its noise: within an image a row is told by its neighbours.
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(1, 20, 12, generator=generator, dtype=torch.float64)
    x = base + 0.01 * torch.randn(5, 20, 12, generator=generator, dtype=torch.float64)
    y = base[..., :2] + 2 * torch.randn(1, 20, 2, generator=generator, dtype=torch.float64).expand(5, 20, 2)
    penalties = (1e-4, 1e-2, 1.0, 100.0)
    fitted = fit_projector(x, y, penalties=penalties)
    rows = Ridge(x.flatten(0, 1), y.flatten(0, 1))
    errors = rows.left_out_errors(penalties, 5)
    assert int(errors.argmin()) > int(
        rows.left_out_errors(penalties).argmin()
    )  # single rows would choose too small a penalty
    assert fitted.metadata["penalty"] == penalties[int(errors.argmin())]
    assert fitted.metadata["held_out_mse"] == pytest.approx(float(errors.min()), rel=1e-6)


def test_adam_comes_to_the_ridge_solution_on_easy_data():
    x, y, _ = pairs(views=8, images=16, noise=0.1, offset=0.0)
    ridge = fit_projector(x, y, penalties=[1e-6])
    adam = fit_projector(x, y, solver="adam", epochs=2000)
    torch.testing.assert_close(adam.weight, ridge.weight, rtol=0, atol=0.02)
    torch.testing.assert_close(adam.bias, ridge.bias, rtol=0, atol=0.02)
    assert adam.metadata["solver"] == "adam"
    assert "penalty" not in adam.metadata


def test_the_seed_decides_what_is_random():
    x, y, _ = pairs(images=23)
    for options in ({"solver": "adam", "epochs": 3}, {}):
        one, again = (fit_projector(x, y, seed=4, **options) for _ in range(2))
        assert torch.equal(one.weight, again.weight)
        assert torch.equal(one.bias, again.bias)
    adam = [fit_projector(x, y, seed=seed, solver="adam", epochs=3).weight for seed in (0, 1)]
    assert not torch.equal(*adam)


@pytest.mark.parametrize("value", [0.0, 0.1, 7.3e4])
def test_constant_features_give_the_mean(value):
    _, y, _ = pairs()
    fitted = fit_projector(torch.full((6, 5, 4), value), y)
    assert not fitted.weight.any()
    torch.testing.assert_close(fitted.bias.double(), y.mean((0, 1)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("views", "images"), [(1, 1), (1, 5), (6, 1), (1, 2)])
def test_too_little_to_hold_out(views, images):
    x, y, _ = pairs(views, images)
    fitted = fit_projector(x, y)
    assert fitted.weight.isfinite().all()
    assert fitted.bias.isfinite().all()
    rows = views * images
    assert (fitted.metadata["held_out_mse"] is None) == (rows == 1)
    if rows == 1:
        torch.testing.assert_close(fitted(x.float()).double(), y, rtol=1e-5, atol=1e-5)


X, Y, _ = pairs(2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X.index_fill(2, torch.tensor([1]), float("nan")), Y), "inputs holds NaN"),
        ((X, Y.index_fill(2, torch.tensor([1]), float("inf"))), "targets holds NaN or infinity"),
        ((X[:1], Y), r"targets must have the inputs' views, images and device, \(1, 3\)"),
        ((X[0], Y), "inputs must be"),
        ((X, Y[:, :0]), "targets must be"),
        ((X.long(), Y), "inputs must be a float tensor"),
        ((X, Y, "svd"), "solver must be one of"),
        ((X, Y, "ridge", []), "penalties must be one or more positive"),
        ((X, Y, "ridge", [1.0, 0.0]), "penalties must be one or more positive"),
        ((X, Y, "adam", [1.0], 0), "epochs must be at least 1"),
    ],
)
def test_bad_input_is_named(arguments, message):
    names = ("inputs", "targets", "solver", "penalties", "epochs")
    with pytest.raises(InputError, match=message):
        fit_projector(**dict(zip(names, arguments, strict=False)))


@pytest.fixture(scope="module")
def backbone():
    return load_backbone()


def test_blends_are_the_same_on_every_backbone_and_batch_size(backbone):
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(5, 1, 28, 28, generator=generator)
    augmentation = Augmentation(noise=False)
    plain = view_features(backbone, images, 6, augmentation, seed=4)
    mixed = view_features(backbone, images, 6, augmentation, seed=4, blend=True)
    again = view_features(backbone, images, 6, augmentation, seed=4, blend=True, batch_size=7)
    torch.testing.assert_close(mixed, again, rtol=1e-4, atol=1e-4)
    assert (mixed - plain).abs().amax(-1).min() > 1e-3  # other crops, other pictures
    same = images[:1].expand(5, -1, -1, -1)  # a blend of equal images is the image
    torch.testing.assert_close(
        view_features(backbone, same, 6, augmentation, seed=4, blend=True),
        view_features(backbone, same[:1].expand(30, -1, -1, -1), 1, augmentation, seed=4, blend=True).view(6, 5, -1),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_projector_features_are_views_then_blends(backbone):
    images = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(3))
    augmentation = Augmentation(noise=False)
    found = projector_features(backbone, images, 5, augmentation, seed=1)
    plain = view_features(backbone, images, 5, augmentation, seed=1)
    torch.testing.assert_close(found[:3], plain[:3], rtol=1e-4, atol=1e-4)
    blends = view_features(backbone, images, 2, augmentation, seed=1, blend=True)
    torch.testing.assert_close(found[3:], blends)
    torch.testing.assert_close(
        projector_features(backbone, images, 5, augmentation, seed=1, plain=plain), found, rtol=1e-4, atol=1e-4
    )
    assert projector_features(backbone, images, 1, augmentation, seed=1).shape == (1, 3, backbone.num_features)


@pytest.mark.parametrize(
    ("inputs", "targets", "options", "message"),
    [
        (1e-30, 1e10, {}, "left float32's range: inputs of up to"),
        (1.0, 1e200, {}, "targets reaches .* beyond the range of float32"),
        (1e160, 1.0, {}, "inputs reaches .* beyond the range of float32"),
        (1e30, 1.0, {"solver": "adam", "epochs": 2}, "left float32's range"),
        (1.0, 1.0, {"seed": 2**64}, r"seed must be in \[0, 2\*\*64\), got 18446744073709551616"),
        (1.0, 1.0, {"seed": -1}, "seed must be in"),
        (1.0, 1.0, {"metadata": {"file_format": 3}}, "metadata must not have the reserved keys file_format"),
    ],
)
def test_scales_seeds_and_metadata_that_can_not_be(inputs, targets, options, message):
    x, y, _ = pairs(3, 4, offset=0.0)
    with pytest.raises(InputError, match=message):
        fit_projector(inputs * x, targets * y, **options)
