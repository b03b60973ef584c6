"""What a performance gate looks like: copy, put your own functions in, run `pytest test_performance.py`."""

import pytest
import torch

pytestmark = pytest.mark.performance

points, centers = torch.randn(400, 64), torch.randn(300, 64)


def squared_distances():
    """The function under test: |p|^2 - 2 p c + |c|^2, by one matrix product."""
    return points.square().sum(1, keepdim=True) - 2 * points @ centers.T + centers.square().sum(1)


def squared_distances_naive():
    """What it replaced: a (400, 300, 64) tensor of differences."""
    return (points[:, None] - centers).square().sum(2)


def test_correct():
    """A gate on a wrong result is worth nothing."""
    torch.testing.assert_close(squared_distances(), squared_distances_naive(), rtol=1e-4, atol=1e-3)


def test_memory(performance_gate):
    performance_gate.peak_memory(squared_distances, at_most="2MB")


def test_time(performance_gate):
    performance_gate.ratio(
        squared_distances, squared_distances_naive, at_most=0.2
    )  # measured at 0.01 to 0.05: a limit far from that would notice little


def test_work(performance_gate):
    performance_gate.unchanged("distances flops", performance_gate.flops(squared_distances), unit="FLOP")
    performance_gate.unchanged("distances memory", performance_gate.allocated(squared_distances), unit="bytes")
