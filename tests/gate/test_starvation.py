"""Noticing that other processes use the CPUs, with a scripted clock."""

from __future__ import annotations

import pytest

from sfm_fast.measure import starvation
from sfm_fast.measure.starvation import CpuShare, StarvationNotice


@pytest.fixture
def clock(monkeypatch):
    """A function that lets wall time and this thread's computing time pass."""
    now = {"wall": 100.0, "computed": 7.0}
    monkeypatch.setattr(starvation.time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(starvation.time, "thread_time", lambda: now["computed"])

    def passes(wall: float, computed: float) -> None:
        now["wall"] += wall
        now["computed"] += computed

    return passes


def test_share_is_computing_time_over_wall_time(clock):
    share = CpuShare()
    clock(4.0, 1.0)
    assert (share.seconds, share.value) == (4.0, 0.25)
    share = CpuShare()
    clock(2.0, 2.5)  # clocks differ a little
    assert share.value == 1.0


def test_notice_comes_once_and_only_from_starved_steps(clock):
    notice = StarvationNotice(every=10)

    def step(wall: float, computed: float) -> str:
        clock(30.0, 0.1)  # between steps: a checkpoint on a slow disk, which is no starvation
        share = CpuShare()
        clock(wall, computed)
        return notice.add(share)

    assert step(6.0, 5.0) == ""  # too early to say
    assert step(4.0, 4.0) == ""  # 90 %
    assert "computed in only 30% of the last 10 s of steps" in step(10.0, 3.0)
    assert step(10.0, 3.0) == ""
