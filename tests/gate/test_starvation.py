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
    share.restart()
    clock(2.0, 2.5)  # clocks differ a little
    assert share.value == 1.0


def test_notice_comes_once_and_only_from_a_starved_interval(clock):
    notice = StarvationNotice(every=10)
    clock(9.0, 1.0)
    assert notice.look() == ""  # too early to say
    clock(1.0, 8.0)
    assert notice.look() == ""  # 90 %
    clock(10.0, 3.0)
    assert "computed in only 30% of the last 10 s" in notice.look()
    clock(10.0, 3.0)
    assert notice.look() == ""
