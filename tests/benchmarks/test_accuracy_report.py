"""Tables and verdicts of the accuracy result, from rows made up for it."""

from itertools import product
from typing import Any

from sfm_fast.benchmarks.accuracy.tables import OURS, full_tables, stored_table, summary, verdicts

NAMES = ("fashion_vit", "tf_efficientnet_lite0")


def result(top1: dict[tuple[str, str], float]) -> dict[str, Any]:
    """A row for each label, mode and pair of backbones; ``top1`` by label and mode."""
    rows = []
    for (label, mode), (phi, psi) in product(top1, product(NAMES, NAMES)):
        full = label == "full"
        rows.append(
            {
                "label": label, "mode": mode, "steps": None if full else 5, "distilled_on": phi, "backbone": psi, "ipc": 60 if full else 1,
                "top1_mean": top1[label, mode] - (0.1 if phi != psi else 0), "top1_std": 0.01,
                "peak_bytes": None if full else 2_000_000 if phi == NAMES[0] else 5_000_000,
                "distillation_seconds": None if full else 10.0, "parameters": 1000, "parameters_folded": 100,
                "bytes_fp32": 4000, "bytes_bf16": 2000, "fit_seconds": 0.25,
            }
        )  # fmt: skip
    return {"rows": rows, "backbones": [{"name": name} for name in NAMES]}


def lines(table: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]


def test_the_summary_parts_own_and_other_backbones() -> None:
    made = lines(summary(result({("full", "probe"): 0.9, (OURS, "probe"): 0.7, (OURS, "inherit"): 0.8})))
    assert [row[0] for row in made[2:]] == ["full", OURS]
    assert made[3] == [OURS, "1", "70.0 ± 1.0", "60.0 ± 1.0", "70.0 ± 1.0", "", "20 s", "5.0 MB"]
    assert made[2][-2:] == ["", ""]


def test_verdicts_say_met_and_missed() -> None:
    values = {
        ("lgm", "probe"): 0.704,
        ("lgm, equal time", "probe"): 0.701,
        (OURS, "probe"): 0.7,
        (OURS, "inherit"): 0.72,
    }
    made = {(row[0], row[2]): row[3:] for row in lines(verdicts(result(values)))[2:]}
    assert made[f"{OURS} against lgm", "vit"] == ["at least -0.5", "-0.4", "met"]
    assert made[f"{OURS} against lgm, equal time", "efficientnet"] == ["above 0", "-0.1", "missed"]
    assert made[f"inherit against probe, {OURS}", "vit → efficientnet"] == ["at least +3.0", "+2.0", "missed"]
    assert (f"inherit against probe, {OURS}", "vit → vit") not in made
    assert len(made) == 6


def test_full_tables_have_every_pair_in_every_mode() -> None:
    text = full_tables(result({("full", "probe"): 0.9, (OURS, "probe"): 0.7, (OURS, "kd"): 0.8}))
    headings = [line for line in text.splitlines() if line.startswith("###")]
    assert len(headings) == 2
    assert "1 image a class" in headings[0]
    first = lines(text.split("### ")[1])
    assert first[0][1:] == ["vit → vit", "vit → efficientnet", "efficientnet → vit", "efficientnet → efficientnet"]
    assert [row[0] for row in first[2:]] == ["full", OURS]
    assert first[3][1:3] == ["70.0 ± 1.0", "60.0 ± 1.0"]


def test_what_inheritance_stores() -> None:
    made = lines(stored_table(result({(OURS, "inherit"): 0.7, ("lgm", "inherit"): 0.6})))
    assert len(made) == 2 + 4
    assert made[2] == ["vit → vit", "1,000", "0.00 MB", "0.00 MB", "0.4 kB", "0.25 s"]


def test_full_data_of_ten_images_a_class_is_no_table_of_its_own() -> None:
    made = result({("full", "probe"): 0.9, (OURS, "probe"): 0.7})
    made["rows"] = [row | {"ipc": 10} if row["label"] == "full" else row for row in made["rows"]]
    made["rows"] += [row | {"ipc": 10, "top1_mean": 0.75} for row in made["rows"] if row["label"] == OURS]
    first, second = full_tables(made).split("### ")[1:]
    assert "75.0" not in first
    assert "90.0" in first
    assert "75.0" in second


def test_the_summary_compares_like_with_like() -> None:
    made = result({("full", "probe"): 0.9, (OURS, "probe"): 0.7, ("lgm", "probe"): 0.6})
    gap = [row for row in made["rows"] if (row["label"], row["distilled_on"]) != ("lgm", NAMES[1])]
    for row in gap:
        row["top1_mean"] -= 0.2 * (row["distilled_on"] == NAMES[1])
    rows = lines(summary(made | {"rows": gap}))
    assert [row[2] for row in rows[2:]] == ["90.0 ± 1.0", "70.0 ± 1.0", "60.0 ± 1.0"]
