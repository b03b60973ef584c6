"""The performance gate catches planted regressions, and never fails what hasn't changed, however busy the machine is."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from sfm_fast import InputError, flow_alignment_loss
from sfm_fast.gate import baseline as gate_files
from sfm_fast.gate import paired
from sfm_fast.gate.gate import Gate
from sfm_fast.measure import tracker

# Nested runs forget what they imported, which torch's libraries of operators don't survive: so all of it now.
with tracker.Tracker():
    torch.ones(2, 2) @ torch.ones(2, 2)
Gate().allocated(lambda: torch.ones(2))

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


# --- the decision, on scripted times ---------------------------------------------------------------------------------


def scripted(ratio, spread, *, control=1.0, seed=0, tail=0.0):
    """Rounds of a machine: log-normal noise, with probability ``tail`` a sample takes three times as long."""
    draw = random.Random(seed)

    def one(cost):
        return cost * math.exp(draw.gauss(0, spread)) * (3.0 if draw.random() < tail else 1.0)

    return lambda count: [(one(ratio), one(1.0), one(control)) for _ in range(count)]


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
    assert "doesn't clear the limit 1.15" in found.reason


def test_a_ratio_at_the_limit_is_rarely_called():
    verdicts = Counter(paired.compare(scripted(1.15, 0.1, seed=n), 1.15).verdict for n in range(200))
    assert verdicts["passed"] <= 0.05 * 200  # each side is promised 2.5 %; room for chance
    assert verdicts["failed"] <= 0.02 * 200


def test_a_restless_control_decides_nothing():
    for ratio in (1.0, 2.0):
        found = paired.compare(scripted(ratio, 0.02, control=1.3), 1.15)
        assert found.verdict == "inconclusive"
        assert "against itself" in found.reason


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
    assert "gave up after" in found.reason


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
    paired.rounds_of(lambda: None, lambda: sum(range(300)), "cpu")(2)
    tiny, larger = max(asked[-3:]), min(asked[-3:])
    assert larger > 20  # a few microseconds each, two milliseconds a sample
    assert tiny > 2 * larger


def test_waiting_for_a_core_does_not_count_but_sleeping_does(monkeypatch):
    waits = iter([1.0, 1.5])
    monkeypatch.setattr(paired, "_waited", lambda: next(waits))
    clock = iter([10.0, 10.7])
    monkeypatch.setattr(paired.time, "perf_counter", lambda: next(clock))
    assert paired._sample(lambda: None, 1, "cpu") == pytest.approx(0.2)
    monkeypatch.undo()
    assert paired._sample(lambda: time.sleep(0.02), 1, "cpu") >= 0.019


# --- real functions --------------------------------------------------------------------------------------------------


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


# --- under pytest ----------------------------------------------------------------------------------------------------

PLANTED = """
import pytest, torch
from sfm_fast import flow_alignment_loss

pytestmark = pytest.mark.performance
centers, features = torch.randn(1000, 64), torch.randn(1000, 64, requires_grad=True)
matrix = torch.randn(160, 160)

def step():
    features.grad = None
    flow_alignment_loss(features, centers, alignment="pair").backward()

def extra_buffer():
    pairs = torch.empty(1000, 1000)
    step()

def products(count):
    def call():
        for _ in range(count):
            matrix @ matrix
    return call

def test_memory(performance_gate):
    assert performance_gate.peak_memory(step, at_most="2MB") < 2e6

def test_memory_grown(performance_gate):
    performance_gate.peak_memory(extra_buffer, at_most="2MB")

def test_time(performance_gate):
    assert performance_gate.ratio(products(10), products(20), at_most=1.0).high <= 1.0

def test_time_grown(performance_gate):
    performance_gate.ratio(products(13), products(10), at_most=1.15, seconds=30)
"""


def test_planted_regressions_fail_and_are_reported(pytester):
    pytester.makepyfile(PLANTED)
    result = pytester.runpytest_inprocess("--gate-json=out.json", "--gate-inconclusive=fail", "--strict-markers")
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(
        [
            "*AssertionError: peak memory: 5.0* MB of at most 2.00 MB, 3.0* MB (+15*%) over",
            "*AssertionError: time ratio 1.* is +* % over the limit: at most 1.15 wanted; ratio 1.*",
            "*= performance gate =*",
            "passed *::test_memory  peak memory: 1.0* MB of at most 2.00 MB",
            "failed *::test_memory_grown  peak memory: *",
            "passed *::test_time  time ratio: at most 1 wanted; ratio 0.*, control *rounds",
            "failed *::test_time_grown  time ratio: *",
        ]
    )
    content = json.loads((pytester.path / "out.json").read_text())
    assert content["format"] == gate_files.RECORDS_FORMAT
    assert [each["verdict"] for each in content["measurements"]] == ["passed", "failed", "passed", "failed"]
    assert content["measurements"][3]["low"] > 1.15


@pytest.mark.parametrize(("policy", "outcome"), [("skip", "skipped"), ("fail", "failed"), ("pass", "passed")])
def test_inconclusive_is_what_the_option_says(pytester, monkeypatch, policy, outcome):
    monkeypatch.setattr("sfm_fast.gate.gate.rounds_of", lambda *_: scripted(1.1, 0.8, tail=0.3))
    pytester.makepyfile("def test_time(performance_gate): performance_gate.ratio(int, int, at_most=1.15)")
    result = pytester.runpytest_inprocess(f"--gate-inconclusive={policy}", "-rs")
    result.assert_outcomes(**{outcome: 1})
    result.stdout.fnmatch_lines("inconclusive *::test_time  time ratio: at most 1.15 wanted; *doesn't clear the limit*")
    if policy != "pass":
        result.stdout.fnmatch_lines("*inconclusive: at most 1.15*")


def test_baseline_cycle(pytester):
    def run(value, *options):
        pytester.makepyfile(
            f"def test_a(performance_gate): performance_gate.unchanged('work', {value}, unit='FLOP')\n"
            "def test_b(performance_gate): performance_gate.unchanged('other', 7)\n"
        )
        return pytester.runpytest_inprocess(*options)

    path = pytester.path / "performance-baseline.json"
    unknown = run(1000)
    unknown.assert_outcomes(failed=2)
    unknown.stdout.fnmatch_lines("*doesn't know 'work': run pytest with --gate-update*")
    assert not path.exists()
    run(1000, "--gate-update").assert_outcomes(passed=2)
    written = path.read_text()
    assert list(json.loads(written)["values"]) == ["other", "work"]
    run(1000).assert_outcomes(passed=2)
    run(1009).assert_outcomes(passed=2)
    grown = run(1011)
    grown.assert_outcomes(passed=1, failed=1)
    grown.stdout.fnmatch_lines("*work: 1,011 FLOP, baseline 1,000 (+1.1 %), more than 1.0% over*")
    improved = run(900)
    improved.assert_outcomes(passed=2)
    improved.stdout.fnmatch_lines("passed *900 FLOP, baseline 1,000 (-10.0 %); improved: keep it with --gate-update")
    gone = run(0)  # a kernel that became an eager formula, which counts as nothing
    gone.assert_outcomes(passed=1, failed=1)
    gone.stdout.fnmatch_lines(
        "*work: 0 FLOP, baseline 1,000: nothing was counted, *compare times instead*--gate-update*"
    )
    assert path.read_text() == written  # only an update writes
    run(900, "--gate-update", "-k", "test_a").stdout.fnmatch_lines("*work 1000 -> 900")
    assert {name: each["value"] for name, each in json.loads(path.read_text())["values"].items()} == {
        "other": 7,
        "work": 900,
    }


def test_baseline_from_the_ini_file_and_from_the_command_line(pytester):
    pytester.makepyfile("def test_a(performance_gate): performance_gate.unchanged('a', 1)")
    pytester.makeini("[pytest]\ngate_baseline = costs/base.json")
    missing = pytester.runpytest_inprocess("--gate-update")
    assert missing.ret == pytest.ExitCode.USAGE_ERROR
    missing.stderr.fnmatch_lines("*costs/base.json: no such folder*")
    (pytester.path / "costs").mkdir()
    pytester.runpytest_inprocess("--gate-update").assert_outcomes(passed=1)
    pytester.runpytest_inprocess("--gate-update", "--gate-baseline=mine.json").assert_outcomes(passed=1)
    assert (pytester.path / "costs" / "base.json").read_text() == (pytester.path / "mine.json").read_text()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"format": "other", "values": {}}', '{"format": "sfm_fast gate baseline 1", "values": {"a": 3}}'],
)
def test_a_damaged_baseline_is_named(tmp_path, content):
    path = tmp_path / "base.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"base\.json: damaged.* baseline of performance_gate"):
        Gate(baseline=path).unchanged("a", 1)


def test_a_damaged_baseline_is_never_overwritten(pytester):
    path = pytester.path / "performance-baseline.json"
    path.write_text('{"values": ')
    pytester.makepyfile("def test_a(performance_gate): performance_gate.unchanged('a', 1)")
    result = pytester.runpytest_inprocess("--gate-update")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines("*performance-baseline.json: damaged, or not a baseline*")
    assert path.read_text() == '{"values": '


def test_one_name_with_two_values_is_not_written(pytester):
    pytester.makepyfile(
        "def test_a(performance_gate): performance_gate.unchanged('x', 1)\n"
        "def test_b(performance_gate): performance_gate.unchanged('x', 2)\n"
    )
    result = pytester.runpytest_inprocess("--gate-update")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines("ERROR: *not updated: 'x' is 1 in *::test_a and 2 in *::test_b")
    assert not (pytester.path / "performance-baseline.json").exists()


def test_bad_values_are_named(tmp_path):
    gate = Gate(baseline=tmp_path / "b.json")
    for arguments, message in (
        (("", 1), "name"),
        (("a", -1), "value of 'a'"),
        (("a", math.nan), "value of 'a'"),
        (("a", True), "value of 'a'"),
        (("a", 1, 1.5), "tolerance"),
    ):
        with pytest.raises(InputError, match=message):
            gate.unchanged(*arguments[:2], **({"tolerance": arguments[2]} if len(arguments) > 2 else {}))
    gate_files.update_baseline(
        tmp_path / "b.json", [{"verdict": "updated", "test": "t", "name": "a", "measured": 0, "unit": "bytes"}]
    )
    with pytest.raises(InputError, match="unit of 'a' is 's'"):
        gate.unchanged("a", 0, unit="s")
    gate.unchanged("a", 0, unit="bytes")
    with pytest.raises(AssertionError, match="the baseline is 0"):
        gate.unchanged("a", 1, unit="bytes")
    with pytest.raises(InputError, match="skip, fail, pass"):
        Gate(inconclusive="maybe")


@pytest.mark.slow
def test_xdist_workers_report_and_one_process_writes(pytester):
    tests = "".join(f"def test_{name}(performance_gate): performance_gate.unchanged('{name}', 5)\n" for name in "abcd")
    pytester.makepyfile(tests)
    result = pytester.runpytest_subprocess("-n2", "--gate-update", "--gate-json=out.json")
    result.assert_outcomes(passed=4)
    assert list(gate_files.read_baseline(pytester.path / "performance-baseline.json")) == ["a", "b", "c", "d"]
    assert len(json.loads((pytester.path / "out.json").read_text())["measurements"]) == 4
    result.stdout.fnmatch_lines(["*= performance gate =*", "updated *::test_? *"])


def test_the_plugin_costs_other_projects_nothing(pytester, pytestconfig):
    assert pytestconfig.pluginmanager.get_plugin("sfm_fast").__name__ == "pytest_sfm_fast"  # by its entry point
    code = "import pytest_sfm_fast, sys; assert 'torch' not in sys.modules and 'sfm_fast' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    pytester.makepyfile("import sys\ndef test_a(): assert 'torch' not in sys.modules and 'sfm_fast' not in sys.modules")
    result = pytester.runpytest_subprocess("-p", "no:hypothesispytest", "-p", "no:benchmark")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*performance gate*")


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_example_runs(pytester):
    pytester.copy_example(str(DOCS / "examples" / "test_performance.py"))
    pytester.runpytest_inprocess("--gate-update").assert_outcomes(passed=4)
    pytester.runpytest_inprocess("-m", "performance").assert_outcomes(passed=4)


def test_the_page_quotes_the_examples():
    page = (DOCS / "gate.md").read_text()
    for name, language in (("test_performance.py", "python"), ("performance-gate.yml", "yaml")):
        assert f"```{language}\n{(DOCS / 'examples' / name).read_text()}```" in page


def test_the_workflow_is_yaml_and_its_options_exist(pytester):
    yaml = pytest.importorskip("yaml")
    steps = yaml.safe_load((DOCS / "examples" / "performance-gate.yml").read_text())["jobs"]["gate"]["steps"]
    assert any("pytest -m performance --gate-json" in step.get("run", "") for step in steps)
    usage = pytester.runpytest_inprocess("--help").stdout.str()
    for option in set(re.findall(r"--gate-[a-z]+", (DOCS / "gate.md").read_text())):
        assert option in usage


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


def test_a_generator_has_done_nothing_yet():
    def lazy():
        yield torch.zeros(10**6)

    for measure in (Gate().flops, lambda call: Gate().peak_memory(call, "1GB"), lambda call: Gate().ratio(call, call)):
        with pytest.raises(InputError, match="generator"):
            measure(lazy)


def test_values_of_numpy_and_values_of_failed_tests(pytester):
    pytester.makepyfile(
        """
        import numpy as np
        def test_good(performance_gate):
            performance_gate.unchanged("good", np.float64(3.5))
            performance_gate.unchanged("count", np.int64(7))
        def test_bad(performance_gate):
            performance_gate.unchanged("bad", 77)
            assert False
        """
    )
    pytester.runpytest_inprocess("--gate-update").assert_outcomes(passed=1, failed=1)
    values = json.loads((pytester.path / "performance-baseline.json").read_text())["values"]
    assert {name: entry["value"] for name, entry in values.items()} == {"good": 3.5, "count": 7}


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1", "true"])
def test_a_baseline_that_lets_everything_pass_is_refused(tmp_path, value):
    path = tmp_path / "baseline.json"
    entry = f'{{"value": {value}, "unit": "", "torch": "2"}}'
    path.write_text(f'{{"format": "sfm_fast gate baseline 1", "values": {{"x": {entry}}}}}')
    with pytest.raises(InputError, match=r"values: x: value is|no number of JSON"):
        Gate(baseline=path).unchanged("x", 10.0**12)
