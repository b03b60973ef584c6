"""Counter-based random numbers: known answers, independence of the batch split, statistics."""

from __future__ import annotations

import pytest
import torch

from sfm_fast.reference import philox

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
