"""The claims: met and missed on made-up rows, errors where a claim that is stood for is missed, and the predicted ones for real."""

from __future__ import annotations

import json
import math

import pytest
import torch

from sfm_fast.benchmarks import claims
from sfm_fast.benchmarks.claims import Goals, accuracy_claim, broken, imagenet_claims, step_claims
from sfm_fast.benchmarks.report.tables import claims_table
from sfm_fast.benchmarks.rows import Claim, Row, read_claims

PARTS = {"parameters": 10, "pyramid": 20, "adam": 40, "activations": 300, "workspace": 30}
GOALS = {
    "memory": Goals(10.0, 50.0, {"SFM parts": "paper"}),
    "time": Goals(4.0, 10.0, {"SFM parts": "goal"}),
}


def row(name, status="ok", **values):
    defaults = {"absolute_bytes": 400, "peak_bytes": 330, "predicted_bytes": 400, "by_category": PARTS, "flops": 1000}
    times = {"median": 1.0} if status == "ok" else {}
    return Row("step", "here", name, "step", status, ours=name != "LGM frozen", **{**defaults, **times, **values})


def step_rows(**values):
    return [
        row("SFM one-shot", absolute_bytes=500, peak_bytes=430, median=0.1),
        row("SFM parts", **({"absolute_bytes": 100, "peak_bytes": 30, "median": 0.2} | values)),
        row("LGM frozen", absolute_bytes=1200, peak_bytes=1130, median=2.2),
    ]


def found(rows, **options):
    return {(c.contender, c.claim): c for c in step_claims(rows, "here", GOALS, **({"whole": True} | options))}


def test_memory_and_time_of_the_same_contender_stand_beside_each_other():
    told = found(step_rows())
    assert list(told) == [(name, what) for name in ("SFM one-shot", "SFM parts") for what in ("memory", "time")]
    memory, time = told["SFM parts", "memory"], told["SFM parts", "time"]
    assert (memory.measured, memory.met_paper, memory.met_goal, memory.kind) == (
        12,
        True,
        False,
        "measured",
    )
    assert time.measured == pytest.approx(11)
    assert time.met_paper
    assert time.met_goal
    missed = told["SFM one-shot", "memory"]
    assert (missed.measured, missed.met_paper, missed.stands_for) == (2.4, False, "")
    assert not broken(list(told.values()))
    assert found(step_rows(), whole=False)["SFM parts", "memory"].measured == pytest.approx(1130 / 30)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"absolute_bytes": 121}, "memory"),
        ({"median": 0.23}, "time"),
        ({"median": math.nan}, "time"),
    ],
)
def test_a_worse_measurement_breaks_the_claim(values, what):
    told = list(found(step_rows(**values)).values())
    (message,) = broken(told)
    assert message.startswith(f"{what} of SFM parts, here: wanted ")


def test_what_did_not_run_is_predicted_and_counted():
    rows = step_rows()
    rows[2] = row("LGM frozen", "out of memory", predicted_bytes=5000, flops=9000)
    told = found(rows)
    memory, counted = told["SFM parts", "memory"], told["SFM parts", "operations"]
    assert (memory.measured, memory.kind) == (12.5, "predicted")
    assert (counted.measured, counted.kind, counted.unit) == (9, "counted", "x fewer")
    assert (counted.met_paper, counted.met_goal, counted.stands_for) == (None, None, "")
    assert ("SFM parts", "time") not in told  # operations are not time, and meet no claim of it
    beyond = found(rows, whole=False)["SFM parts", "memory"]
    assert beyond.measured == pytest.approx((5000 - 70) / (400 - 70))


def test_accuracy_is_paired():
    told = accuracy_claim("here", "sfm-decoupled", [71.0, 73.0, 72.0], [70.0, 71.0, 71.5], "paper")
    assert told.measured == pytest.approx((1 + 2 + 0.5) / 3)
    assert told.standard_error == pytest.approx(0.441, abs=1e-3)
    assert told.met_paper
    assert told.met_goal is None
    assert not broken([told])
    worse = accuracy_claim("here", "sfm-decoupled", [70.0, 70.0, 70.0], [70.0, 71.0, 71.0], "paper")
    assert not worse.met_paper
    assert broken([worse])
    honest = accuracy_claim("here", "sfm", [60.0, 60.0], [70.0, 70.0], "")
    assert not honest.met_paper
    assert not broken([honest])
    assert "-0.5 (missed)" in claims_table([honest])


def test_the_table_says_what_was_missed():
    table = claims_table(step_claims(step_rows(), "here", GOALS, whole=True))
    lines = {line.split("|")[3].strip() + line.split("|")[1].strip(): line for line in table.splitlines()[2:]}
    assert "10 (missed)" in lines["SFM one-shotmemory"]
    assert "10 (met)" in lines["SFM partsmemory"]
    assert "50 (missed)" in lines["SFM partsmemory"]
    assert "x faster" in lines["SFM partstime"]
    unclaimed = Claim("operations", "here", "SFM", measured=3.0, kind="counted", unit="x fewer")
    assert (unclaimed.met_paper, unclaimed.met_goal) == (None, None)
    assert "met" not in claims_table([unclaimed])


def test_imagenet_as_predicted():
    told = imagenet_claims(torch.device("cpu"))
    assert not broken(told)
    stood = {(c.setting, c.contender, c.claim) for c in told if c.stands_for == "goal"}
    hundred = "ImageNet-100, A = 10"
    assert (hundred, "SFM micro-batch 8", "memory") in stood
    best = (hundred, "SFM anchored micro-batch 8")
    assert {(*best, "memory"), (*best, "operations")} <= stood
    assert ("ImageNet-1k, A = 3", "SFM micro-batch 16", "memory") in stood
    assert {c.kind for c in told if c.claim == "memory"} == {"predicted"}
    assert {c.kind for c in told if c.claim != "memory"} == {"counted"}
    json.dumps([c.to_json() for c in told])


@pytest.mark.parametrize("wrong", [True, False])
def test_the_command_writes_the_table_and_fails_on_a_broken_claim(wrong, tmp_path, monkeypatch, capsys):
    told = step_claims(step_rows(absolute_bytes=300 if wrong else 100), "here", GOALS, whole=True)
    monkeypatch.setattr(claims, "imagenet_claims", lambda device: told)
    monkeypatch.setattr(claims, "laptop_claims", list)
    monkeypatch.setattr("sys.argv", ["claims", "--out", str(tmp_path / "claims.json"), "--fast"])
    assert claims.main() == int(wrong)
    assert json.loads((tmp_path / "claims.json").read_text())["claims"] == [one.to_json() for one in told]
    assert read_claims(tmp_path / "claims.json") == told
    assert ("wanted 10" in capsys.readouterr().out) == wrong


@pytest.mark.parametrize("status", ["wrong result: gradient off by 9e+00", "failed: shapes differ"])
def test_a_wrong_contender_claims_nothing(status):
    rows = step_rows()
    rows[1] = row("SFM parts", status, predicted_bytes=100, flops=1)
    told = [each for each in step_claims(rows, "here", GOALS, whole=True) if each.contender == "SFM parts"]
    assert not any(each.met_paper for each in told)
    assert len(broken(told)) >= 1
