"""The suite of prepared backbones: less is kept, a wrong gradient gets no time, and the table has a line per backbone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sfm_fast.benchmarks.harness import Plan
from sfm_fast.benchmarks.presets import Batch, StepShape
from sfm_fast.benchmarks.report.tables import backbone_table, legend
from sfm_fast.benchmarks.rows import Result
from sfm_fast.benchmarks.suites import backbones

CPU = torch.device("cpu")
BATCH = Batch("resnet10t", 32, 2)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(backbones, "PLAN", Plan(seconds=0.0, least=1))


def test_a_prepared_backbone_keeps_less_and_is_one_line_of_the_table():
    prepared, loaded = rows = backbones.batch_rows(BATCH, CPU)
    assert [(row.contender, row.status, row.ours) for row in rows] == [
        ("prepared", "ok", True),
        ("as loaded", "ok", False),
    ]
    assert prepared.saved_bytes is not None
    assert loaded.saved_bytes is not None
    assert prepared.saved_bytes < 0.6 * loaded.saved_bytes
    line = backbone_table(rows).splitlines()[2]
    assert "resnet10t" in line
    assert "2 x 32 px" in line


def test_a_wrong_gradient_gets_no_time(monkeypatch):
    opened = backbones.opened

    def spoilt(*arguments):
        backbone = opened(*arguments)
        return replace(backbone, model=torch.nn.Sequential(backbone.model, torch.nn.Hardtanh(-0.1, 0.1)))

    monkeypatch.setattr(backbones, "opened", spoilt)
    prepared, loaded = backbones.batch_rows(BATCH, CPU)
    assert prepared.status.startswith("wrong result: gradient off by")
    assert loaded.measured
    assert "wrong result" in backbone_table([prepared, loaded])


def test_a_step_of_every_method_with_both_backbones():
    rows = backbones.step_rows(StepShape("tiny", "fashion_cnn", None, 2, 1, 1, ()), CPU)
    names = ("SFM", "LGM closed-form", "LGM frozen")
    assert [row.contender for row in rows] == [
        *(f"{name}{end}" for name in names for end in ("", ", as loaded")),
        "LGM stock",
    ]
    assert all(row.measured for row in rows)
    assert {row.case for row in rows} == {backbones.step_name(StepShape("tiny", "", None, 2, 1, 1, ()))}


def test_a_busy_machine_is_named_above_the_tables():
    row = replace(backbones.batch_rows(BATCH, CPU)[0], cpu_share=0.4)
    assert "**The machine was busy** in 1 of 1 cases" in legend(Result("cpu", {}, [row]))
    assert "busy" not in legend(Result("cpu", {}, [replace(row, cpu_share=0.9)]))
    assert "busy" not in legend(Result("cpu", {}, [replace(row, cpu_share=0.4, workers=2)]))  # it waits for its workers
