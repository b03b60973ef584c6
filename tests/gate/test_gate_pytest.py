"""The fixture `performance_gate` in runs of pytest: planted regressions fail, baselines are written and read, the documented examples run."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripted_rounds import scripted

from sfm_fast import InputError
from sfm_fast.gate import baseline as gate_files
from sfm_fast.gate.gate import Gate
from sfm_fast.measure import tracker

# Nested runs forget what they imported, which torch's libraries of operators don't survive: so all of it now.
with tracker.Tracker():
    torch.ones(2, 2) @ torch.ones(2, 2)
Gate().allocated(lambda: torch.ones(2))

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


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
            # The buffer takes 4 MB and the pairs about 0.6 MB for each thread, so the machine decides about the rest.
            "*AssertionError: peak memory: *.* MB of at most 2.00 MB, *.* MB (+*%) over",
            "*AssertionError: time ratio 1.* is +* % over the limit: limit 1.15; ratio 1.*",
            "*= performance gate =*",
            "passed *::test_memory  peak memory: *.* MB of at most 2.00 MB",
            "failed *::test_memory_grown  peak memory: *",
            "passed *::test_time  time ratio: limit 1; ratio 0.*, control *rounds",
            "failed *::test_time_grown  time ratio: *",
        ]
    )
    content = json.loads((pytester.path / "out.json").read_text())
    assert content["format"] == gate_files.RECORDS_FORMAT
    assert [each["verdict"] for each in content["measurements"]] == ["passed", "failed", "passed", "failed"]
    assert content["measurements"][1]["measured"] > 4e6
    assert content["measurements"][3]["low"] > 1.15


@pytest.mark.parametrize(("policy", "outcome"), [("skip", "skipped"), ("fail", "failed"), ("pass", "passed")])
def test_inconclusive_is_what_the_option_says(pytester, monkeypatch, policy, outcome):
    monkeypatch.setattr("sfm_fast.gate.gate.rounds_of", lambda *_: scripted(1.1, 0.8, tail=0.3))
    pytester.makepyfile("def test_time(performance_gate): performance_gate.ratio(int, int, at_most=1.15)")
    result = pytester.runpytest_inprocess(f"--gate-inconclusive={policy}", "-rs")
    result.assert_outcomes(**{outcome: 1})
    result.stdout.fnmatch_lines(
        "inconclusive *::test_time  time ratio: limit 1.15; *isn't clearly below or above the limit*"
    )
    if policy != "pass":
        result.stdout.fnmatch_lines("*inconclusive: limit 1.15*")


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
    unknown.stdout.fnmatch_lines("*has no 'work': run pytest with --gate-update*")
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
    improved.stdout.fnmatch_lines(
        "passed *900 FLOP, baseline 1,000 (-10.0 %); improved: run with --gate-update to keep it"
    )
    gone = run(0)  # a kernel that became an eager formula, which counts as nothing
    gone.assert_outcomes(passed=1, failed=1)
    gone.stdout.fnmatch_lines("*work: 0 FLOP, baseline 1,000: the count is 0, *compare times instead*--gate-update*")
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
    with pytest.raises(InputError, match="unit of 'a' must be"):
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
    with pytest.raises(InputError, match=r"values: x: value is|no valid number in JSON"):
        Gate(baseline=path).unchanged("x", 10.0**12)


# --- the page ---


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
