"""How the performance gate decides on a time ratio: on scripted times, and on real functions, however busy the machine is."""

from __future__ import annotations

import contextlib
import math
import random
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from scripted_rounds import scripted

from sfm_fast import InputError, flow_alignment_loss
from sfm_fast.gate import paired
from sfm_fast.gate.gate import Gate


def test_clear_cases_are_decided():
    assert paired.compare(scripted(1.0, 0.02), 1.15).verdict == "passed"
    found = paired.compare(scripted(1.3, 0.02), 1.15)
    assert (found.verdict, found.rounds) == ("failed", 60)  # confirmed by a second batch
    assert found.ratio.low > 1.15
    assert "control" in found.reason


@pytest.mark.parametrize("tail", [0.0, 0.2])
def test_unchanged_never_fails_and_slowed_never_passes(tail):
    same = Counter(paired.compare(scripted(1.0, 0.2, seed=n, tail=tail), 1.15).verdict for n in range(150))
    slow = Counter(paired.compare(scripted(1.3, 0.2, seed=n, tail=tail), 1.15).verdict for n in range(150))
    assert same["failed"] == slow["passed"] == 0
    assert same["passed"] >= 115
    assert slow["failed"] >= 75


def test_noise_is_inconclusive():
    found = paired.compare(scripted(1.1, 0.8, tail=0.3), 1.15)
    assert found.verdict == "inconclusive"
    assert found.rounds == 240
    assert "isn't clearly below or above the limit 1.15" in found.reason


def test_a_ratio_at_the_limit_is_rarely_called():
    verdicts = Counter(paired.compare(scripted(1.15, 0.1, seed=n), 1.15).verdict for n in range(200))
    assert verdicts["passed"] <= 0.05 * 200  # each side is promised 2.5 %; room for chance
    assert verdicts["failed"] <= 0.02 * 200


def test_a_restless_control_decides_nothing():
    for ratio in (1.0, 2.0):
        found = paired.compare(scripted(ratio, 0.02, control=1.3), 1.15)
        assert found.verdict == "inconclusive"
        assert "the ratio of the baseline to itself" in found.reason


def test_one_bad_batch_does_not_fail():
    batches = [scripted(1.5, 0.02), scripted(1.0, 0.02), scripted(1.0, 0.02), scripted(1.0, 0.02)]
    assert paired.compare(lambda count: batches.pop(0)(count), 1.15).verdict == "passed"


def test_the_interval_covers_the_median():
    draw = random.Random(0)
    for count, error in ((8, 0.1), (20, 0.05), (41, 0.01)):
        found = [paired.interval([draw.gauss(0, 1) for _ in range(count)], error) for _ in range(1500)]
        missed = sum(not one.low <= 0 <= one.high for one in found) / len(found)
        assert missed <= error + 3 * math.sqrt(error / 1500)
    assert paired.interval([1.0, 2.0, 3.0], 0.05) == paired.Ratio(2.0, 0.0, math.inf)


def test_seconds_end_it():
    def slow(count):
        time.sleep(0.02)
        return scripted(1.1, 1.0)(count)

    found = paired.compare(slow, 1.15, seconds=0.01)
    assert found.rounds == 30
    assert "stopped after" in found.reason


@pytest.mark.parametrize(
    ("name", "value"),
    [("at_most", 0), ("confidence", 1.0), ("rounds", 3), ("retries", 0), ("seconds", 0), ("at_most", math.nan)],
)
def test_bad_options_are_named(name, value):
    with pytest.raises(InputError, match=name):
        Gate().ratio(pytest.fail, pytest.fail, **{"at_most": 1.0, name: value})


def test_samples_of_a_tiny_function_are_long_enough(monkeypatch):
    asked = []
    real = paired._sample
    monkeypatch.setattr(paired, "_sample", lambda call, times, device: asked.append(times) or real(call, times, device))
    paired.rounds_of(lambda: None, lambda: sum(range(3000)), "cpu")(2)
    tiny, larger = max(asked[-3:]), min(asked[-3:])
    assert larger > 20  # some ten microseconds each, two milliseconds a sample
    assert tiny > 2 * larger


def test_waiting_for_a_core_does_not_count_but_sleeping_does(monkeypatch):
    waits = iter([1.0, 1.5])
    monkeypatch.setattr(paired, "_waited", lambda: next(waits))
    clock = iter([10.0, 10.7])
    monkeypatch.setattr(paired.time, "perf_counter", lambda: next(clock))
    assert paired._sample(lambda: None, 1, "cpu") == pytest.approx(0.2)
    monkeypatch.undo()
    assert paired._sample(lambda: time.sleep(0.02), 1, "cpu") >= 0.019


def test_waiting_for_own_threads_is_no_excuse(monkeypatch):
    """A call that keeps its own threads in line for the core pays for it; only strangers' work is taken off."""
    clocks = {"perf_counter": [0.0, 1.0], "thread_time": [0.0, 0.2], "process_time": [0.0, 0.9]}
    for name, values in clocks.items():
        monkeypatch.setattr(paired.time, name, iter(values).__next__)
    waits = iter([0.0, 0.8])
    monkeypatch.setattr(paired, "_waited", lambda: next(waits))
    # 0.8 s in line, 0.7 of them while its own threads had the core: 0.1 is the strangers'.
    assert paired._sample(lambda: None, 1, "cpu") == pytest.approx(0.9)


def test_a_function_too_slow_for_a_second_look_can_fail(monkeypatch):
    now = iter(range(0, 10_000, 100))
    monkeypatch.setattr(paired.time, "perf_counter", lambda: float(next(now)))
    slow = paired.compare(lambda count: [(8.0, 1.0, 1.0)] * count, 1.2)
    assert (slow.verdict, slow.rounds) == (paired.FAILED, 30)
    now = iter(range(0, 10_000, 100))
    half = paired.compare(lambda count: [(8.0, 1.0, 1.0)] * 18 + [(1.0, 1.0, 1.0)] * 12, 1.2)
    assert half.verdict == paired.INCONCLUSIVE


# --- real functions ---


def step(classes, dim=128):
    centers, features = torch.randn(classes, dim), torch.randn(classes, dim, requires_grad=True)

    def call():
        features.grad = None
        flow_alignment_loss(features, centers, alignment="pair").backward()

    return call


@pytest.fixture
def busy():
    """Two processes that never rest, on whatever cores there are."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    yield
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_unchanged_on_a_loaded_machine_never_fails(busy):
    records = []
    gate, call = Gate(record=records.append, inconclusive="pass"), step(150)
    for _ in range(20):
        gate.ratio(call, call, at_most=1.15, seconds=5)
    verdicts = Counter(record["verdict"] for record in records)
    print(verdicts, [record["rounds"] for record in records])
    assert verdicts["failed"] == 0
    assert verdicts["passed"] >= 10


@pytest.mark.slow
def test_slowed_by_a_third_on_a_loaded_machine_is_caught(busy):
    records = []
    gate, matrix = Gate(record=records.append, inconclusive="pass"), torch.randn(160, 160)

    def products(count):
        def call():
            for _ in range(count):
                matrix @ matrix

        return call

    for _ in range(5):
        with contextlib.suppress(AssertionError):
            gate.ratio(products(13), products(10), at_most=1.15, seconds=10)
    verdicts = Counter(record["verdict"] for record in records)
    print(verdicts, [record["rounds"] for record in records])
    assert verdicts["passed"] == 0
    assert verdicts["failed"] >= 3


def test_flops_and_bytes():
    left, right = torch.randn(20, 30), torch.randn(30, 40)
    gate = Gate()
    assert gate.flops(lambda: left @ right) == 2 * 20 * 30 * 40
    assert gate.allocated(lambda: left @ right) == 20 * 40 * 4


def test_a_generator_has_done_nothing_yet():
    def lazy():
        yield torch.zeros(10**6)

    for measure in (Gate().flops, lambda call: Gate().peak_memory(call, "1GB"), lambda call: Gate().ratio(call, call)):
        with pytest.raises(InputError, match="generator"):
            measure(lazy)
