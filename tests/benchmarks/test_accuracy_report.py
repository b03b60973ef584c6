"""Tables, verdicts and the figure of the accuracy result, from rows made up for them."""

from __future__ import annotations

from typing import Any

from sfm_fast.benchmarks.accuracy.content import (
    BACKBONES,
    BOTH,
    CNN,
    CONVERGED,
    EQUAL_STEPS,
    LGM,
    LITE,
    OURS,
    VIT,
    runs,
)
from sfm_fast.benchmarks.accuracy.figure import write_figure
from sfm_fast.benchmarks.accuracy.setting_tables import settings_table
from sfm_fast.benchmarks.accuracy.tables import costs_table, full_tables, stored_table, summary, verdicts
from sfm_fast.benchmarks.accuracy.trajectory import best, has_converged

SFM = OURS + CONVERGED


def rows(
    label: str, ipc: int, made_for: tuple[str, ...], psi: str, *top1: float, mode: str = "probe"
) -> list[dict[str, Any]]:
    about = {
        "label": label,
        "ipc": ipc,
        "made_for": list(made_for),
        "distilled_on": made_for[0],
        "backbone": psi,
        "mode": mode,
    }
    points = [
        {"steps": steps, "seconds": steps / 10, "images": 10 * steps, "validation": steps / 1000, "test": top1[0]}
        for steps in (25, 50)
    ]
    cost = {"steps": 50, "seconds": 5.0, "points": points} if "real" not in label else {"std": 0.02}
    stored = {"parameters": 1000, "parameters_folded": 100, "bytes_fp32": 4000, "bytes_bf16": 2000, "fit_seconds": 0.25}
    return [about | cost | stored | {"top1": one, "seed": seed} for seed, one in enumerate(top1)]


def result(*some: list[dict[str, Any]], **more: Any) -> Any:
    return {
        "rows": [row for part in some for row in part],
        "backbones": [{"name": name} for name in BACKBONES],
        "costs": {},
        "left_out": [],
    } | more


def lines(table: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]


MADE = result(
    rows("nearest-real", 1, (VIT,), VIT, 0.6),
    rows("nearest-real", 1, (CNN,), CNN, 0.5),
    rows("nearest-real", 1, (VIT,), CNN, 0.5),
    rows("nearest-real", 1, (VIT,), CNN, 0.4, mode="inherit"),
    rows("nearest-real", 1, (VIT,), LITE, 0.5),
    rows("nearest-real", 1, (CNN,), LITE, 0.6),
    rows(SFM, 1, (VIT,), VIT, 0.70, 0.72),
    rows(SFM, 1, (CNN,), CNN, 0.60, 0.62),
    rows(SFM, 1, (VIT,), CNN, 0.52, 0.54),
    rows(SFM, 1, (LITE,), LITE, 0.9, 0.9),
    rows(BOTH + CONVERGED, 1, (VIT, CNN), VIT, 0.73, 0.73),
    rows(BOTH + CONVERGED, 1, (VIT, CNN), CNN, 0.63, 0.63),
    rows(BOTH + CONVERGED, 1, (VIT, CNN), LITE, 0.53, 0.53),
    rows(LGM + EQUAL_STEPS, 1, (VIT,), VIT, 0.71, 0.71),
    rows("alone", 1, (VIT,), VIT, 0.71, 0.71),
)


def test_the_summary_is_of_the_two_shipped_backbones() -> None:
    made = {line[0]: line[1:] for line in lines(summary(MADE))[2:]}
    assert list(made) == ["nearest-real", SFM, BOTH + CONVERGED]  # the others have no run on both
    assert made["nearest-real"] == ["1", "55.0 ± 2.0", "50.0 ± 2.0", "40.0 ± 2.0", "", "55.0 ± 2.0", "", ""]
    assert made[SFM] == ["1", "66.0 ± 1.4", "53.0 ± 1.4", "", "", "", "50", "5 s"]
    assert made[BOTH + CONVERGED] == ["1", "68.0 ± 0.0", "", "", "", "53.0 ± 0.0", "50", "5 s"]


def test_verdicts_say_met_and_missed() -> None:
    made = {(line[0], line[2]): line[3:] for line in lines(verdicts(MADE))[2:]}
    assert made["SFM above nearest-real, probe", "vit → cnn"] == ["at least +3.0", "+3.0", "met"]
    assert made["SFM for both above nearest-real", "unseen efficientnet"] == ["at least -3.0", "-2.0", "met"]
    assert made["SFM above LGM at equal time or more", "vit"] == ["above 0", "+0.0", "missed"]
    assert len(made) == 3


def test_full_tables_have_every_pair_in_every_mode() -> None:
    text = full_tables(MADE)
    headings = [line for line in text.splitlines() if line.startswith("###")]
    assert [heading[4:].partition(":")[0] for heading in headings] == ["1 image a class"] * 2
    first = lines(text.split("### ")[1])
    assert first[0][1:3] == ["vit → vit", "vit → cnn"]
    assert len(first[0]) == 10
    assert first[2][:3] == ["nearest-real", "60.0 ± 2.0", "50.0 ± 2.0"]
    assert ["alone", "71.0 ± 0.0"] in [line[:2] for line in first]


def test_what_inheritance_stores() -> None:
    made = lines(stored_table(MADE))
    assert made[2:] == [["vit → cnn", "1,000", "0.00 MB", "0.00 MB", "0.4 kB", "0.25 s"]]


def test_costs_say_what_was_left_out() -> None:
    step = {OURS: {"seconds": 0.1, "peak_bytes": 1e6}, LGM: {"seconds": 12.0, "peak_bytes": 9e6}}
    left = [{"label": LGM, "made_for": [VIT], "ipc": 50, "step_seconds": 12.0}]
    made = lines(costs_table(result(costs={f"{VIT}, 10": step, f"{VIT}, 50": step}, left_out=left)))
    assert made[2][-1] == ""
    assert made[3] == ["vit", "50", "100 ms", "12000 ms", "120.0", "1.0 MB", "9.0 MB", "left out"]


def test_a_figure_of_what_there_is(tmp_path) -> None:
    write_figure(MADE, tmp_path / "figure.svg")
    assert "images through the backbone" in (tmp_path / "figure.svg").read_text()


def test_convergence() -> None:
    def points(*validation: float) -> Any:
        return [{"steps": 100 * 2**place, "validation": value} for place, value in enumerate(validation)]

    assert not has_converged(points(0.5))
    assert not has_converged(points(0.5, 0.51))
    assert has_converged(points(0.5, 0.501))
    assert has_converged(points(0.5, 0.52, 0.51))
    assert best(points(0.5, 0.52, 0.51))["steps"] == 200
    early = [{"steps": 25, "validation": 0.9}, {"steps": 50, "validation": 0.1}]
    assert not has_converged(early)  # type: ignore[arg-type]


def test_every_run_can_be_configured() -> None:
    """And the table for whoever has a day has all that the usual one has."""
    usual, full = (list(runs((1, 10, 50), BACKBONES, 3, full=full)) for full in (False, True))
    for run in full:
        config = run.config(1)
        assert (config.ipc, config.seed) == (run.ipc, 1)
        assert config.steps >= 100
    names = {(run.label, run.made_for, run.ipc) for run in usual}
    assert len(names) == len(usual)
    assert names < {(run.label, run.made_for, run.ipc) for run in full}
    assert (LGM + EQUAL_STEPS, (VIT,), 50) not in names


def test_settings_are_one_line_each() -> None:
    def row(change: str, ipc: int, made_for: list[str], **top1: float) -> dict[str, Any]:
        return {"change": change, "ipc": ipc, "made_for": made_for, "top1": top1}

    both = {VIT: 70.0, CNN: 60.0, LITE: 50.0}
    made = {
        "rows": [
            row("base", 1, [VIT], **both),
            row("base", 1, [VIT, CNN], **both),
            row("start from noise", 1, [VIT], **{VIT: 61.0}),
        ]
    }
    assert lines(settings_table(made))[0] == ["change of the base", "1, vit", "1, vit + cnn"]
    assert lines(settings_table(made))[2:] == [
        ["base", "70.0 / 55.0", "70.0, 60.0 / 50.0"],
        ["start from noise", "61.0", ""],
    ]
