"""The pytest plugin of sfm_fast: options, marker and the fixture `performance_gate`; see docs/gate.md.

pytest loads this file in every run of an environment in which it is installed, so torch and sfm_fast are only imported when a test
uses the fixture.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from sfm_fast.gate.baseline import Measurement
    from sfm_fast.gate.gate import Gate

PROPERTY = "performance_gate"  # user_properties are part of the reports, also of those from pytest-xdist's workers
DEFAULT_BASELINE = "performance-baseline.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("performance gate")
    group.addoption(
        "--gate-inconclusive",
        choices=("skip", "fail", "pass"),
        default="skip",
        help="outcome of a test whose time ratio is inconclusive because the machine is too busy (default: skip)",
    )
    group.addoption(
        "--gate-baseline",
        metavar="FILE",
        help=f"expected values of unchanged(); default: {DEFAULT_BASELINE} in rootdir",
    )
    group.addoption(
        "--gate-update", action="store_true", help="write the measured values of unchanged() into the baseline file"
    )
    group.addoption("--gate-json", metavar="FILE", help="write all measurements of the run as JSON")
    parser.addini("gate_baseline", "expected values of performance_gate.unchanged(), a path from rootdir", default="")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "performance: measures time, memory or another cost through performance_gate")
    for option, path in (("--gate-json", config.getoption("gate_json")), ("--gate-baseline", _given(config))):
        if path and not config.rootpath.joinpath(path).parent.is_dir():
            raise pytest.UsageError(f"{option} {path}: no such folder")
        if path and config.rootpath.joinpath(path).is_dir():
            raise pytest.UsageError(f"{option} {path}: must be a file, got a folder")
    config.pluginmanager.register(Collector(config), "sfm_fast_collector")


@pytest.fixture
def performance_gate(request: pytest.FixtureRequest) -> Gate:
    """Asserts memory budgets, time ratios and unchanged costs; see `sfm_fast.gate.gate.Gate`."""
    from sfm_fast.gate.gate import Gate

    def record(measurement: Measurement) -> None:
        request.node.user_properties.append((PROPERTY, measurement))

    return Gate(
        request.node.nodeid,
        record=record,
        inconclusive=request.config.getoption("gate_inconclusive"),
        baseline=_baseline(request.config),
        update=request.config.getoption("gate_update"),
        pythonpath=[str(request.config.rootpath)],
    )


class Collector:
    """Gathers what the tests of one session measured, writes the files and the lines at its end."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.records: list[Measurement] = []
        self.notes: list[str] = []
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)
        if report.when == "teardown":  # the last report of a test holds what all its phases measured
            self.records += [value for name, value in report.user_properties if name == PROPERTY]  # type: ignore[misc]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(self.config, "workerinput"):  # pytest-xdist: the controller has all reports, and writes
            return
        try:
            if self.config.getoption("gate_update"):
                from sfm_fast.gate.baseline import update_baseline

                # A failed test's values are not those of code that works.
                good = [record for record in self.records if record["test"] not in self.failed]
                self.notes += update_baseline(_baseline(self.config), good)
            if path := self.config.getoption("gate_json"):
                from sfm_fast.gate.baseline import write_records

                write_records(self.config.rootpath / path, self.records)
        except (ValueError, OSError) as error:  # InputError too: what can't be read or written, in one line
            self.notes.append(f"ERROR: {error}")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not (self.records or self.notes):
            return
        terminalreporter.section("performance gate")
        colors = {"failed": "red", "inconclusive": "yellow"}
        for each in self.records:
            what = f"{each['what']} {each['name']}".strip()
            line = f"{each['verdict']:12s} {each['test']}  {what}: {each['text']}"
            terminalreporter.write_line(line, **{colors.get(each["verdict"], "green"): True})
        for note in self.notes:
            terminalreporter.write_line(note)


def _given(config: pytest.Config) -> str:
    return str(config.getoption("gate_baseline") or config.getini("gate_baseline") or "")


def _baseline(config: pytest.Config) -> Path:
    return config.rootpath / (_given(config) or DEFAULT_BASELINE)
