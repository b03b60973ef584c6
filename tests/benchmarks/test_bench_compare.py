"""`sfm-fast bench compare`: every verdict on two result files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from sfm_fast.benchmarks import compare
from sfm_fast.benchmarks.rows import Result, Row
from sfm_fast.cli import main as cli
from sfm_fast.errors import InputError
from sfm_fast.measure.timing import Ratio

ENVIRONMENT = {"cpu": "a CPU", "gpu": None, "torch": "2.14.1", "threads": 2}


def command(*words: object) -> int:
    """The exit code of `sfm-fast bench compare` with these words."""
    try:
        return cli.main(["bench", "compare", *map(str, words)])
    except SystemExit as stop:
        return int(stop.code)


def row(contender: str = "eager", low: float = 3.8, high: float = 4.2, **changed: object) -> Row:
    found = Row(
        "losses", "pair 300x384", contender, "both", ours=contender.startswith("sfm_fast"), median=1e-3, p20=1e-3, p80=1e-3,
        ratio=Ratio((low + high) / 2, low, high), peak_bytes=1000, flops=5000,
    )  # fmt: skip
    return replace(found, **changed)


def result(*rows: Row, **environment: object) -> Result:
    return Result("laptop", {**ENVIRONMENT, **environment}, list(rows) or [OURS, row()])


def verdicts(base: Result, head: Result, **limits: object) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for change in compare.compare_files(base, head, compare.Limits(**limits))[0]:
        found.setdefault(change.kind, []).append(change.verdict)
    return found


OURS = row("sfm_fast cpu", 1, 1)


@pytest.mark.parametrize(
    ("head", "limits", "kind", "verdict"),
    [
        ([OURS, row()], {}, "ratio", "unchanged"),
        ([replace(OURS, peak_bytes=1010), row()], {}, "bytes", "unchanged"),
        ([replace(OURS, peak_bytes=1011), row()], {}, "bytes", "regression"),
        ([replace(OURS, peak_bytes=1011), row()], {"tolerance": 0.02}, "bytes", "unchanged"),
        ([replace(OURS, peak_bytes=900), row()], {}, "bytes", "improved"),
        ([replace(OURS, flops=6000), row()], {}, "flops", "regression"),
        ([replace(OURS, flops=0), row()], {}, "flops", "regression"),  # eager formulas count as nothing
        ([replace(OURS, flops=None), row()], {}, "flops", "regression"),
        ([replace(OURS, peak_bytes=0), row()], {}, "bytes", "regression"),
        ([OURS, row(low=3.0, high=3.41)], {}, "ratio", "regression"),  # 3.42 is 3.8 less 10 %
        ([OURS, row(low=3.0, high=3.43)], {}, "ratio", "unchanged"),
        ([OURS, row(low=3.0, high=3.41)], {"time_tolerance": 0.2}, "ratio", "unchanged"),
        ([OURS, row(low=4.7, high=4.9)], {}, "ratio", "improved"),
        ([replace(OURS, status="out of memory"), row()], {}, "rows", "regression"),
        ([replace(OURS, status="wrong result: off by 1"), row()], {}, "rows", "regression"),
        ([OURS, row(status="out of memory")], {}, "rows", "not compared"),
        ([OURS], {}, "rows", "regression"),
        ([OURS], {"allow_missing": True}, "rows", "only in base"),
        ([OURS, row(), row("new")], {}, "rows", "only in head"),
    ],
)
def test_verdicts_on_result_files(head, limits, kind, verdict):
    found = verdicts(result(), result(*head), **limits)
    assert verdict in found[kind]
    bad = [name for names in found.values() for name in names if name == "regression"]
    assert bool(bad) == (verdict == "regression")


def test_a_count_of_nothing_is_told_in_whichever_direction():
    nothing = result(replace(OURS, flops=0), row())
    for base, head in ((result(), nothing), (nothing, result())):
        changes, _ = compare.compare_files(base, head, compare.Limits(tolerance=10))
        (change,) = (each for each in changes if each.kind == "flops")
        assert change.verdict == "regression"
        assert "the count is 0" in change.note
    for kind in ("bytes", "flops"):
        assert compare.judge(kind, "x", 0, 0, 0.01).verdict == "unchanged"


def test_other_environments_compare_no_times():
    slower = result(replace(OURS, peak_bytes=2000), row(low=1.0, high=1.1), threads=8)
    changes, notes = compare.compare_files(result(), slower, compare.Limits())
    assert "threads 2 and 8" in notes[0]
    assert [c.verdict for c in changes if c.kind == "bytes"] == ["regression"]
    assert not [c for c in changes if c.kind == "ratio"]
    changes, notes = compare.compare_files(
        result(), replace(slower, environment={**ENVIRONMENT, "gpu": "H"}), compare.Limits()
    )
    assert changes == []
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("before", "after", "kind", "verdict"),
    [
        ({"low": 1.4, "high": 1.5}, {"low": 2.1, "high": 2.3}, "ratio", "regression"),
        ({"low": 1.4, "high": 1.5}, {"low": 0.8, "high": 0.9}, "ratio", "improved"),
        ({}, {"peak_bytes": 1500}, "bytes", "regression"),
        ({}, {"status": "out of memory"}, "rows", "regression"),
    ],
)
def test_another_way_of_ours_is_judged_as_ours(before, after, kind, verdict):
    base = result(OURS, row("sfm_fast torch", **before))
    assert verdicts(base, result(OURS, row("sfm_fast torch", **(before | after))))[kind][-1] == verdict


def test_what_a_baseline_takes_is_no_regression():
    assert "regression" not in str(verdicts(result(), result(OURS, row(peak_bytes=9000, flops=9000))))


def test_two_presets_are_refused():
    with pytest.raises(InputError, match="laptop and small"):
        verdicts(result(), replace(result(), preset="small"))


def test_files_on_the_command_line(tmp_path, capsys):
    base, head, out, page = (tmp_path / name for name in ("base.json", "head.json", "out.json", "page.md"))
    base.write_text(json.dumps(result().to_json()))
    head.write_text(json.dumps(result(replace(OURS, peak_bytes=1500), row()).to_json()))
    assert command(base, base) == 0
    assert "0 regression" not in capsys.readouterr().out
    assert command(base, head, "--json", out, "--markdown", page) == 1
    assert "| bytes: losses: pair 300x384, sfm_fast cpu, both |" in page.read_text()
    written = json.loads(out.read_text())
    assert written["regressions"] == 1
    assert written["rows"][0]["verdict"] == "regression"
    assert written["rows"][0]["change"] == pytest.approx(0.5)
    assert command(base, head, "--only", "flops,times") == 0


def test_bad_input_ends_before_any_work(tmp_path, capsys):
    good, other, broken = (tmp_path / name for name in ("good.json", "other.json", "broken.json"))
    good.write_text(json.dumps(result().to_json()))
    other.write_text('{"rows": []}')
    broken.write_text("{")
    for words, wanted in (
        ([], "two result files, base and head, got 0"),
        ([good], "got 1"),
        ([good, tmp_path / "none.json"], "can't be read"),
        ([good, other], "key 'format'"),
        ([good, broken], "no JSON"),
        ([good, good, "--tolerance", "-0.1"], "--tolerance must be"),
        ([good, good, "--time-tolerance", "nan"], "--time-tolerance must be"),
        ([good, good, "--only", "bytes,hours"], "--only: 'hours' is none of"),
        ([good, good, "--markdown", tmp_path / "no" / "where.md"], "no such folder"),
    ):
        assert command(*words) == 2, words
        assert wanted in capsys.readouterr().err
