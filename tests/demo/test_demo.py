"""The demo's parts that run at the same time, its signs of life, and its table of costs; the demo itself is in tests/cli."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from sfm_fast import InputError
from sfm_fast.demo import progress
from sfm_fast.demo.page import cost_note, cost_rows
from sfm_fast.demo.progress import Pulse, Together

ROW = {"views": 1, "step_seconds": 0.01, "peak_bytes": 1e6, "rounds": 6}


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_jobs_run_at_the_same_time_each_with_its_share(two_threads):
    both = threading.Barrier(2, timeout=30)

    def job() -> int:
        both.wait()
        return torch.get_num_threads()

    together = Together(torch.device("cpu"))
    assert together.run({"a": job, "b": job}) == {"a": 1, "b": 1}
    assert torch.get_num_threads() == 2


def test_jobs_run_in_turn_with_one_thread(two_threads):
    torch.set_num_threads(1)
    here = threading.get_ident()
    assert Together(torch.device("cpu")).run({"a": threading.get_ident, "b": threading.get_ident}) == {
        "a": here,
        "b": here,
    }


def test_a_failed_job_stops_the_others(two_threads):
    together, begun = Together(torch.device("cpu")), threading.Event()

    def fails() -> None:
        begun.wait(30)
        raise InputError("the first error")

    def long() -> None:
        begun.set()
        for _ in range(3000):
            together.check()
            time.sleep(0.01)
        pytest.fail("not stopped")

    with pytest.raises(InputError, match="the first error"):
        together.run({"fails": fails, "long": long})


def test_pulse_says_what_is_done(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.01)
    said: list[str] = []
    enough = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        if line.endswith("sfm step 3"):
            enough.set()

    with Pulse(say) as pulse:
        pulse.part("1/4")
        pulse.state["sfm"] = "step 3"
        assert enough.wait(30)
    assert "1/4" in said
    said.clear()
    with Pulse(say, shown=False):
        time.sleep(0.05)
    assert said == []


def test_cost_ratios_have_their_interval_if_there_is_one():
    sfm = {**ROW, "name": "SFM", "time_ratio": 1.0, "time_ratio_low": 1.0, "time_ratio_high": 1.0}
    lgm = {**ROW, "name": "LGM", "time_ratio": 9.7, "time_ratio_low": 9.12, "time_ratio_high": 10.31}
    assert [row[3] for row in cost_rows([sfm, lgm])] == ["1.0", "9.7 (9.1–10.3)"]
    assert "6 rounds" in cost_note([sfm, lgm])
    few = {"time_ratio_low": None, "time_ratio_high": None}
    assert [row[3] for row in cost_rows([sfm, lgm | few])] == ["1.0", "9.7"]
    assert "too few" in cost_note([sfm | few, lgm | few])
    assert [row[3] for row in cost_rows([{**ROW, "name": "SFM"}, {**ROW, "name": "of an earlier version"}])] == [
        "1.0",
        "1.0",
    ]
