"""Views: replay, independence of the batch split, geometry, noise, gradients."""

from __future__ import annotations

import pytest
import torch

from sfm_fast.reference import philox
from sfm_fast.reference.augment import NOISE_MEAN, NOISE_STD, Augmentation, augment, normalize, view_parameters

MEAN, STD = torch.tensor([0.3]), torch.tensor([0.4])
WHOLE = Augmentation(min_area=1.0, max_area=1.0, flip=False, noise=False)


def views(images, items, **options):
    return augment(images, items, 12, MEAN, STD, **({"seed": 1, "step": 2} | options))


def test_replay_and_batch_split():
    images, items = torch.rand(9, 1, 16, 16), torch.arange(9)
    whole = views(images, items)
    assert torch.equal(whole, views(images, items))
    parts = torch.cat([views(images[rows], items[rows]) for rows in (slice(0, 2), slice(2, 7), slice(7, 9))])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, views(images, items, step=3))
    assert not torch.equal(whole, views(images, items, seed=2))


def test_unit_crop_of_aspect_one_is_the_image(monkeypatch):
    monkeypatch.setattr("sfm_fast.reference.augment.LOG_ASPECT", (0.0, 0.0))
    images = torch.rand(3, 1, 12, 12)
    torch.testing.assert_close(
        views(images, torch.arange(3), augmentation=WHOLE), normalize(images, MEAN, STD), rtol=0, atol=1e-5
    )


def test_flip_mirrors(monkeypatch):
    monkeypatch.setattr("sfm_fast.reference.augment.LOG_ASPECT", (0.0, 0.0))
    monkeypatch.setattr("sfm_fast.reference.augment.FLIP_PROBABILITY", 1.1)
    images = torch.rand(3, 1, 12, 12)
    flipped = views(images, torch.arange(3), augmentation=Augmentation(1.0, 1.0, True, False))
    torch.testing.assert_close(flipped, normalize(images.flip(3), MEAN, STD), rtol=0, atol=1e-5)


def test_crop_parameters_have_the_stated_distribution():
    items = torch.arange(20000)
    theta, noisy = view_parameters(items, Augmentation(), seed=0, step=0, stream=1)
    width, height = theta[:, 0, 0].abs(), theta[:, 1, 1]
    area, aspect = width * height, width / height
    assert area.min() > 0.079
    assert area.max() < 1.001
    assert abs(area.mean() - 0.54) < 0.01
    assert aspect.min() > 0.749
    assert aspect.max() < 1.334
    assert abs(torch.log(aspect).mean()) < 0.01
    assert abs((theta[:, 0, 0] < 0).float().mean() - 0.5) < 0.02
    assert abs(noisy.float().mean() - 0.5) < 0.02
    inside = width <= 1
    assert ((theta[inside, 0, 2].abs() + width[inside]) <= 1 + 1e-5).all()


def test_noise_has_the_stated_mean_and_spread():
    images, items = torch.zeros(600, 1, 12, 12), torch.arange(600)
    noisy = view_parameters(items, Augmentation(), seed=1, step=2, stream=philox.Stream.AUGMENT_PARAMETERS)[1]
    pixels = views(images, items) * STD + MEAN
    assert pixels[~noisy].abs().max() < 1e-6
    assert abs(pixels[noisy].mean() - NOISE_MEAN) < 0.005
    assert abs(pixels[noisy].std() - NOISE_STD) < 0.005


@pytest.mark.parametrize("channels", [1, 3])
def test_gradcheck(channels):
    images = torch.rand(2, channels, 6, 6, dtype=torch.float64).requires_grad_()
    mean, std = torch.full((3,), 0.5, dtype=torch.float64), torch.full((3,), 0.2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: augment(x, torch.arange(2), 5, mean, std, seed=0, step=0), images)


def test_grey_images_fill_the_backbone_channels():
    out = augment(
        torch.rand(2, 1, 8, 8), torch.arange(2), 8, torch.zeros(3), torch.ones(3), seed=0, step=0, augmentation=WHOLE
    )
    assert out.shape == (2, 3, 8, 8)
    assert torch.equal(out[:, 0], out[:, 2])
