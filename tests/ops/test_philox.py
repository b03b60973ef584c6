"""Counter-based random numbers: known answers, independence of the batch split, statistics; in torch and in the kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sfm_fast import philox
from sfm_fast.ops.augment import augment
from sfm_fast.views import Views

# Known-answer vectors of Random123 for philox4x32 with 10 rounds: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    words = philox.philox4x32(tuple(torch.tensor([c]) for c in counter), key[0] | key[1] << 32)
    assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize("function", [philox.uniform, philox.normal])
def test_values_do_not_depend_on_the_batch_split(function):
    items = torch.arange(37)
    whole = function(items, 101, seed=5, stream=2, step=9)
    parts = torch.cat([function(chunk, 101, seed=5, stream=2, step=9) for chunk in items.split(7)])
    assert torch.equal(whole, parts)
    assert torch.equal(whole[[30, 2]], function(torch.tensor([30, 2]), 101, seed=5, stream=2, step=9))
    assert torch.equal(whole[:, :50], function(items, 50, seed=5, stream=2, step=9))


def test_every_key_changes_the_values():
    items = torch.arange(4)
    base = philox.uniform(items, 64, seed=1, stream=1, step=1)
    for change in ({"seed": 2}, {"seed": 1 + 2**32}, {"stream": 2}, {"step": 2}):
        other = philox.uniform(items, 64, **({"seed": 1, "stream": 1, "step": 1} | change))
        assert (other != base).double().mean() > 0.99


def test_normal_statistics():
    x = philox.normal(torch.arange(400), 2500, seed=3, stream=2).double()  # a million values: standard error 1e-3
    assert abs(x.mean()) < 5e-3
    assert abs(x.var() - 1) < 1e-2
    assert abs((x**3).mean()) < 2e-2
    assert abs((x**4).mean() - 3) < 5e-2
    assert abs((x[:-1] * x[1:]).mean()) < 5e-3  # neighbouring images
    assert abs((x[:, :-1] * x[:, 1:]).mean()) < 5e-3  # neighbouring pixels
    later = philox.normal(torch.arange(400), 2500, seed=3, stream=2, step=1).double()
    assert abs((x * later).mean()) < 5e-3  # neighbouring steps


def test_uniform_is_open_and_flat():
    u = philox.uniform(torch.arange(100), 1000, seed=0, stream=0)
    assert u.min() > 0
    assert u.max() < 1
    assert (torch.histc(u.float(), 10, 0, 1) / u.numel() - 0.1).abs().max() < 5e-3


def test_permutation_is_one():
    order = philox.permutation(1000, seed=0, stream=6, step=3)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert not torch.equal(order, philox.permutation(1000, seed=0, stream=6, step=4))


INVERSES = tuple(pow(multiplier, -1, 2**32) for multiplier in philox._MULTIPLIERS)
MASK = 2**32 - 1


def inverse(words, seed):
    """The counters whose ``philox4x32`` is ``words``."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*words)
    keys = [
        ((seed + k * philox._KEY_STEPS[0]) & MASK, ((seed >> 32) + k * philox._KEY_STEPS[1]) & MASK) for k in range(10)
    ]
    for k0, k1 in reversed(keys):
        before2, before0 = (c1 * INVERSES[1]) & MASK, (c3 * INVERSES[0]) & MASK
        high0 = ((before0 * philox._MULTIPLIERS[0]) >> 32) & MASK
        high1 = ((before2 * philox._MULTIPLIERS[1]) >> 32) & MASK
        c0, c1, c2, c3 = before0, c0 ^ high1 ^ k0, before2, c2 ^ high0 ^ k1
    return c0, c1, c2, c3


def noise(items, size, backend="cpu", channels=1, **keys):
    """(views, channels, size, size): the noise alone, as the kernels make it for images that are zero."""
    items = torch.as_tensor(items)
    mean, std = torch.zeros(channels), torch.ones(channels)
    views = Views(torch.zeros(len(items), 4), items, size, mean, std, noise_mean=0.0, noise_std=1.0, **keys)
    return augment(torch.zeros(len(items), channels, 1, 1), views, backend=backend)


def exact_normal(w0, w1):
    u0, u1 = ((torch.as_tensor(w).double() + 0.5) * 2.0**-32 for w in (w0, w1))
    radius, angle = torch.sqrt(-2 * torch.log(u0)), 2 * torch.pi * u1
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)])


def test_inverse():
    words = torch.randint(0, 2**32, (4, 50), generator=torch.Generator().manual_seed(0)).unbind()
    counters = inverse(words, 2**63 + 12345)
    assert torch.equal(torch.stack(philox.philox4x32(counters, 2**63 + 12345)), torch.stack(words))


# Ends, the middle, where the logarithm changes its form (1 - 2^-1.5, sqrt(1/2)), borders of quadrants and octants.
RADII = (0, 1, 2, 2**16, 2**31 - 1, 2**31, 2**31 + 1, 3037000499, 3037000500, 2**32 - 2**24, 2**32 - 3, 2**32 - 2, MASK)
ANGLES = (0, 2**29 - 1, 2**29, 2**30 - 1, 2**30, 3 * 2**29, 2**31 - 1, 2**31, 3 * 2**30 - 1, 3 * 2**30, 7 * 2**29, MASK)


@pytest.mark.parametrize("w0", RADII)
@pytest.mark.parametrize("place", [0, 2])
def test_edge_words(w0, place):
    """Both pairs of a block: the other two words are drawn until a picture of 1024 pixels holds the block's position."""
    seed, size = 2**63 + 7, 1024
    others = torch.randint(0, 2**32, (2, 2**18), generator=torch.Generator().manual_seed(w0 % 1000)).unbind()
    for w1 in ANGLES:
        pair = torch.tensor(w0), torch.tensor(w1)
        counters = inverse((*pair, *others) if place == 0 else (*others, *pair), seed)
        found = (counters[0] < size * size // 4).nonzero()[0, 0]
        block, item, step, stream = (int(counter[found]) for counter in counters)
        normals = noise([item], size, seed=seed, step=step, stream=stream).flatten()[4 * block + place :][:2]
        assert (normals.double() - exact_normal(w0, w1)).abs().max() <= 2e-6


@pytest.mark.parametrize(("backend", "size"), [("cpu", 1000), ("cpu", 31), ("cpu", 1), ("torch", 31), ("triton", 13)])
def test_kernels_make_the_same_numbers(backend, size):
    items = [0, 2**32 - 1, 12345]
    for channels in (1, 3):
        keys = dict(seed=2**64 - 3, step=2**32 - 1, stream=4)
        expected = philox.normal(torch.tensor(items), channels * size * size, **keys).view(3, channels, size, size)
        made = noise(items, size, backend, channels, **keys)
        assert (made.double() - expected.double()).abs().max() <= 2e-6


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_negative_items_have_no_noise_and_grey_has_one_for_all_channels(backend):
    items = torch.tensor([-1, 3, -(2**40)])
    views = Views(torch.zeros(3, 4), items, 3, torch.zeros(2), torch.ones(2), noise_mean=0.25, noise_std=0.0)
    shown = augment(torch.zeros(3, 1, 1, 1), views, backend=backend)
    assert [part.unique().tolist() for part in shown] == [[0.0], [0.25], [0.0]]
    shown = augment(torch.zeros(3, 1, 1, 1), replace(views, noise_std=1.0), backend=backend)
    assert torch.equal(shown[1, 0], shown[1, 1])
    assert len(shown[1, 0].unique()) == 9


def correlation(one, two):
    """In standard errors."""
    return float((one * two).mean() * one.numel() ** 0.5)


def test_statistics_of_ten_million():
    x = noise(torch.arange(10), 1024, seed=3, step=4).double()
    count = x.numel()
    assert count > 10**7
    assert abs(x.mean()) < 5 / count**0.5
    assert abs(x.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs(x.pow(3).mean()) < 5 * (15 / count) ** 0.5
    assert abs(x.pow(4).mean() - 3) < 5 * (96 / count) ** 0.5
    # Tails, as far as they can be counted: P(|x| > 3) and P(|x| > 4.5).
    for bound, expected in ((3.0, 2.6997960632602e-3), (4.5, 6.795346249460e-6)):
        share = (x.abs() > bound).double().mean()
        assert abs(share - expected) < 5 * (expected / count) ** 0.5
    assert x.abs().max() < 6.7  # sqrt(-2 ln 2^-33), the largest there is


def test_independence():
    x = noise(torch.arange(6), 600, seed=3, step=4).double()
    assert abs(correlation(x[:-1], x[1:])) < 5  # images
    for distance in (1, 2, 3, 4, 8, 16):
        assert abs(correlation(x[..., :-distance], x[..., distance:])) < 5  # pixels of a row
        assert abs(correlation(x[..., :-distance, :], x[..., distance:, :])) < 5  # and of a column
        flat = x.flatten(1)
        assert abs(correlation(flat[:, :-distance].square() - 1, flat[:, distance:].square() - 1)) < 10  # variance 2
    colour = noise(torch.arange(3), 600, channels=3, seed=3, step=4).double()
    for one, two in ((0, 1), (1, 2), (0, 2)):
        assert abs(correlation(colour[:, one], colour[:, two])) < 5
    for keys in (
        {"step": 5},
        {"stream": 4},
        {"seed": 4},
        {"seed": 3 + 2**32},
        {"seed": 3 + 2**63},
        {"step": 4 + 2**31},
    ):
        other = noise(torch.arange(6), 600, **({"seed": 3, "step": 4} | keys)).double()
        assert abs(correlation(x, other)) < 5
        assert not (x == other).double().mean() > 1e-4
