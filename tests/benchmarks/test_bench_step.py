"""Benchmarks of whole steps: the gate on results, rows of steps, predictions, loading and scaling, all at small sizes."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace

import pytest
import torch

from sfm_fast import InputError
from sfm_fast.benchmarks import machine, runner
from sfm_fast.benchmarks.baselines import images as baseline
from sfm_fast.benchmarks.baselines.step import PlainStep
from sfm_fast.benchmarks.harness import Plan
from sfm_fast.benchmarks.presets import STEPS as SHAPES
from sfm_fast.benchmarks.presets import StepShape
from sfm_fast.benchmarks.registry import Options
from sfm_fast.benchmarks.rows import STANDING, Row
from sfm_fast.benchmarks.steps import rows as step_rows
from sfm_fast.benchmarks.steps.contenders import Made, Setting, Way, open_backbone, ways_of
from sfm_fast.benchmarks.steps.rows import STEPS, verdicts
from sfm_fast.benchmarks.suites import loading as bench_loading
from sfm_fast.benchmarks.suites import scaling as bench_scaling
from sfm_fast.benchmarks.suites import step as bench_step
from sfm_fast.distill.distiller import Distiller

CPU = torch.device("cpu")
SMALL = SHAPES["small"]
QUICK = Plan(0.01, least=2)
PREDICT = Options(predict=True)
# Large ones run on GPUs alone; this one's shape is theirs, in a CPU's size.
TINY = StepShape("tiny", "test_vit", 32, 3, 3, 2, (2, 1), precision="bf16", large=True)


class WithoutFlip(PlainStep):
    """Wrong: views that should be mirrored aren't."""

    def show(self, levels, views):
        x0, dx, y0, dy = views.boxes.unbind(1)
        mirrored = dx < 0
        x0 = torch.where(mirrored, self.size - 1 - x0, x0)
        boxes = torch.stack([x0, dx.abs(), y0, dy], dim=1)
        return baseline.render_augment(levels, self.size, replace(views, boxes=boxes))


def without_flip(setting, way):
    centers = setting.statistics.centers.float()
    step = WithoutFlip(
        setting.backbone, centers, setting.images(), setting.labels, 1, setting.config(way.config).augmentation
    )
    return Made(step, step.gradient)


def dicts(rows: list[Row]) -> list[dict]:
    return [row.to_json() for row in rows]


@pytest.fixture(scope="module", autouse=True)
def _quick_ceiling():
    """A smaller product than the benchmark's, whose seconds would be most of these tests'."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_step, "matmul_rate", functools.partial(machine.matmul_rate, size=512))
        yield


@pytest.fixture(scope="module")
def small_rows():
    return dicts(bench_step.rows("small", CPU, plan=Plan(0.01, least=3)))


def test_every_contender_is_right_and_a_wrong_one_is_caught():
    wrong = Way("SFM without flip", without_flip, SMALL.images, replays_noise=False, predictable=False)
    found = verdicts([*ways_of(SMALL), wrong], SMALL, open_backbone(SMALL, CPU))
    assert found.pop(wrong.name).startswith("wrong result: gradient off by ")
    assert set(found.values()) == {""}


def test_a_micro_batched_step_with_another_gradient_is_caught():
    def other_loss(setting, way):
        return ways_of(SMALL)[0].make(setting, replace(way, config=replace(way.config, alignment="class")))

    wrong = Way("SFM micro-batch 2", other_loss, 2)
    ways = [ways_of(SMALL)[0], wrong]
    right, row = dicts(bench_step.rows(SMALL, CPU, modes=("step",), plan=QUICK, ways=ways))
    assert right["status"] == "ok"
    assert row["status"].startswith("wrong result")
    assert not {"median", "ratio", "peak_bytes"} & row.keys()


def test_wrong_lgm_is_caught():
    lgm = [way for way in ways_of(SMALL) if way.is_lgm]
    assert [way.name for way in lgm] == ["LGM closed-form", "LGM frozen", "LGM stock"]
    brighter = replace(lgm[0], config=replace(lgm[0].config, min_area=0.9))
    found = verdicts([brighter, *lgm[1:]], SMALL, open_backbone(SMALL, CPU))
    assert found["LGM closed-form"].startswith("wrong result")
    assert found["LGM stock"] == found["LGM frozen"] == ""


def test_rows_of_steps(small_rows):
    names = [way.name for way in ways_of(SMALL)]
    assert [row["contender"] for row in small_rows] == 2 * names
    assert names[0] == "SFM one-shot"
    json.dumps(small_rows)
    for row in small_rows:
        assert row["status"] == "ok", row
        assert (row["suite"], row["case"]) == ("step", "small: 4 classes, ipc 1")
        assert 0 < row["p20"] <= row["median"] <= row["p80"]
        assert row["ratio"]["low"] <= row["ratio"]["median"]
        assert row["ours"] == (row["contender"].startswith("SFM") and row["contender"] != "SFM plain torch")
        assert row["peak_bytes"] > 0
        assert row["steps"] == (STEPS if row["mode"] == "steps" else 1)
        assert "first_seconds" not in row  # the verdict's step came before
        assert row["views"] == (2 if row["contender"].startswith("LGM") else 1)
        assert row["images"] == row["classes"] * row["ipc"] == 4
    one, several = (next(row for row in small_rows if row["mode"] == mode) for mode in ("step", "steps"))
    assert several["flops"] == STEPS * one["flops"]
    assert several["median"] > one["median"]
    assert one["matmul_fraction"] == pytest.approx(one["flops"] / one["median"] / one["matmul_rate"])


def test_measured_memory_is_what_was_predicted(small_rows):
    for row in small_rows:
        if "predicted_bytes" in row:
            predicted = row["predicted_bytes"] - sum(row["by_category"][name] for name in STANDING)
            assert row["peak_bytes"] == pytest.approx(predicted, rel=0.03)


def test_micro_batches_cost_a_forward(small_rows):
    """Published as a loss: the ratio of a micro-batched step to the one-shot step is above 1, in operations and as a rule in time."""
    by_name = {row["contender"]: row for row in small_rows if row["mode"] == "step"}
    one_shot, parts, anchored = (
        by_name[f"SFM {name}"] for name in ("one-shot", "micro-batch 2", "anchored micro-batch 2")
    )
    assert 1.1 < parts["flops"] / one_shot["flops"] < 1.5
    assert parts["peak_bytes"] < 0.7 * one_shot["peak_bytes"]
    # A separable loss doesn't need the second forward.
    assert anchored["flops"] == one_shot["flops"]
    assert anchored["peak_bytes"] <= 1.01 * parts["peak_bytes"]


@pytest.mark.parametrize("preset", ["laptop", TINY], ids=["laptop", "tiny"])
def test_predicted_rows(preset):
    rows = dicts(bench_step.rows(preset, CPU, options=PREDICT))
    names = [row["contender"] for row in rows]
    assert {"SFM one-shot", "LGM closed-form", "LGM frozen", "LGM stock"} < set(names)
    assert any("micro-batch" in name for name in names)
    assert any("state on host" in name for name in names)
    for row in rows:
        assert (row["status"], row["mode"]) == ("predicted", "step")
        assert "median" not in row
        standing = sum(row["by_category"][name] for name in STANDING)
        assert row["absolute_bytes"] == row["peak_bytes"] + standing == sum(row["by_category"].values())
        assert row["flops"] > 0


def test_presets_of_imagenet_have_the_papers_numbers():
    hundred, thousand = SHAPES["imagenet-100"], SHAPES["imagenet-1k"]
    assert (hundred.classes, hundred.lgm_views, thousand.classes, thousand.lgm_views) == (100, 10, 1000, 3)
    assert {hundred.backbone, thousand.backbone} == {"vit_base_patch14_dinov2"}
    assert {hundred.image_size, thousand.image_size} == {224}


def test_a_large_preset_is_refused_on_a_cpu():
    with pytest.raises(InputError, match=r"imagenet-100.*needs a CUDA GPU.*predict"):
        bench_step.rows("imagenet-100", CPU)
    with pytest.raises(InputError, match="preset must be one of"):
        bench_step.rows("desktop", CPU)


def test_a_tiny_preset_like_imagenets_runs():
    preset = replace(TINY, large=False)
    rows = dicts(bench_step.rows(preset, CPU, ways=ways_of(preset)[:1], modes=("step",), plan=QUICK))
    assert [(row["contender"], row["status"]) for row in rows] == [("SFM one-shot", "ok")]
    assert rows[0]["precision"] == "bf16"


def test_cases_are_chosen_by_name_and_keep_all_contenders():
    options = {"chosen": ["step"], "options": PREDICT}
    ((rows, _),) = runner.run("laptop", CPU, lambda result: None, only="10 classes", **options)
    assert {"SFM one-shot", "LGM frozen"} < {row.contender for row in rows}
    # Ratios are over ours: it can't be left out.
    assert not list(runner.run("laptop", CPU, lambda result: None, only="LGM", **options))


def test_a_step_that_ran_in_smaller_micro_batches_is_out_of_memory(monkeypatch):
    """A run would go on with what is left; a benchmark would measure another contender."""
    one_shot = ways_of(SMALL)[0]
    setting = Setting(SMALL, open_backbone(SMALL, CPU))
    made = one_shot.make(setting, one_shot)
    made.step()
    monkeypatch.setattr(Distiller, "micro_batch", property(lambda self: 2))
    with pytest.raises(MemoryError, match="out of memory"):
        made.step()


def test_one_by_one_as_on_a_gpu(monkeypatch):
    """Turns are taken with the first contender alone; one that needs its memory too is tried again without it."""
    released = []
    monkeypatch.setattr(step_rows, "release", released.append)
    setting = Setting(SMALL, open_backbone(SMALL, CPU))
    one_shot, parts = ways_of(SMALL)[:2]

    def hungry(setting, way):
        raise MemoryError("out of memory")

    ways = [one_shot, Way("SFM hungry", hungry, 4), parts]
    run = step_rows.StepRun(
        setting, Row("step", "x"), CPU, QUICK, dict.fromkeys((way.name for way in ways), ""),
        dict.fromkeys(way.name for way in ways),
    )  # fmt: skip
    (rows,) = map(dicts, run._one_by_one(ways, ["step"]))
    assert [row["contender"] for row in rows] == [way.name for way in ways]
    assert [row["status"] for row in rows] == ["ok", "out of memory", "ok"]
    assert rows[0]["ratio"] == {"median": 1, "low": 1, "high": 1}
    assert rows[2]["ratio"]["median"] != 1
    assert rows[2]["peak_bytes"] < rows[0]["peak_bytes"]
    assert len(released) >= 6


def test_a_step_that_the_card_has_no_room_for_is_not_tried(monkeypatch):
    setting = Setting(SMALL, open_backbone(SMALL, CPU))
    ours, stock = (way for way in ways_of(SMALL) if way.name in ("SFM one-shot", "LGM stock"))
    tried = []
    ways = [
        replace(way, make=lambda setting, way: tried.append(way.name) or ours.make(setting, ours))
        for way in (ours, stock)
    ]
    guesses = {way.name: way.predict(setting) for way in ways}
    small, large = (guesses[way.name].peak_bytes for way in ways)
    assert small < large
    run = step_rows.StepRun(setting, Row("step", "x"), CPU, QUICK, dict.fromkeys(guesses, ""), guesses)
    monkeypatch.setattr(step_rows, "card_memory", lambda device: large - 1)
    (rows,) = map(dicts, run._one_by_one(ways, ["step"]))
    assert tried == ["SFM one-shot"]
    assert rows[0]["status"] == "ok"
    assert (
        rows[1]["status"] == f"out of memory: predicted {large / 1e9:.1f} GB, the card has {(large - 1) / 1e9:.1f} GB"
    )
    assert rows[1]["predicted_bytes"] == large
    assert "median" not in rows[1]
    monkeypatch.setattr(step_rows, "card_memory", lambda device: large)
    (rows,) = map(dicts, run._one_by_one(ways, ["step"]))
    assert [row["status"] for row in rows] == ["ok", "ok"]


@pytest.fixture(scope="module")
def loading_rows():
    preset = replace(SMALL, data="embedded", classes=10)
    loading = bench_loading.Loading(preset, CPU, 1, Plan(0.05, least=2, memory=False))
    return dicts([row for cell in loading.cells() for row in cell.work()])


def test_rows_of_loading(loading_rows):
    load, step = ([row for row in loading_rows if row["mode"] == mode] for mode in ("load", "step"))
    assert [row["contender"] for row in load] == [
        "open_dataset, this process",
        "open_dataset, 1 workers",
        "loader kept open, 1 workers",
    ]
    assert "in memory" in step[0]["contender"]
    assert len(step) == 3
    for row in loading_rows:
        assert row["status"] == "ok", row
        assert row["file_type"] == "png"
    for row in load:
        assert row["images"] == 20
        assert row["images_per_second"] == pytest.approx(20 / row["median"])
    json.dumps(loading_rows)


def test_files_that_read_as_something_else_are_caught(tmp_path):
    preset = replace(SMALL, data="embedded", classes=10)
    files = bench_loading.write_files(preset, tmp_path)
    source = bench_loading.open_dataset(str(tmp_path), "train", channels=1, workers=0)
    transform = bench_loading.ImageTransform(28, 28, 1)
    assert bench_loading.verdict_of(source, files, transform) == ""
    shutil.copy(tmp_path / "00001" / "00000.png", tmp_path / "00000" / "00000.png")
    assert bench_loading.verdict_of(source, files, transform).startswith("wrong result")


def test_photographs_are_as_large_as_imagenets(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_loading, "DISTINCT", 2)
    files = bench_loading.write_files(replace(TINY, image_size=224), tmp_path)
    paths = sorted(tmp_path.rglob("*.jpg"))
    assert len(paths) >= 2 * TINY.lgm_batch
    assert 60_000 < files.bytes_each < 160_000
    source = bench_loading.open_dataset(str(tmp_path), "train", channels=3, workers=0)
    assert bench_loading.verdict_of(source, files, bench_loading.ImageTransform(256, 256, 3)) == ""


def test_rows_of_scaling():
    found = dicts([row for cell in bench_scaling.cases("small", CPU, plan=QUICK) for row in cell.work()])
    axes = {row["varied"]: sorted({r["value"] for r in found if r["varied"] == row["varied"]}) for row in found}
    assert axes == {"classes": [2, 4], "ipc": [1, 2], "views": [1], "dim": [64]}
    assert {row["contender"] for row in found} == {"SFM one-shot", "SFM micro-batch 2", "LGM frozen"}
    for row in found:
        assert row["status"] == "ok", row
        assert row["case"] == f"{row['varied']} {row['value']}"
        predicted = row["predicted_bytes"] - sum(row["by_category"][name] for name in STANDING)
        assert row["peak_bytes"] == pytest.approx(predicted, rel=0.05)
    by_classes = [r["peak_bytes"] for r in found if r["varied"] == "classes" and r["contender"] == "SFM one-shot"]
    assert by_classes[1] == pytest.approx(2 * by_classes[0], rel=0.05)
    json.dumps(found)


def test_scaling_out_of_time_is_predicted():
    (cell,) = (cell for cell in bench_scaling.cases("small", CPU, budget=0.0) if cell.name == "classes 4")
    rows = cell.work()
    assert {row.status for row in rows} == {"predicted"}
    assert all(row.flops > 0 and row.peak_bytes > 0 for row in rows)


def test_scaling_of_imagenet_is_predicted_without_a_gpu():
    cells = bench_scaling.cases("imagenet-100", CPU, predict=True)
    rows = dicts(next(cell for cell in cells if cell.name == "classes 1000").work())
    assert [row["contender"] for row in rows] == ["SFM one-shot", "SFM micro-batch 32", "LGM frozen"]
    assert rows[2]["absolute_bytes"] > 9 * rows[0]["absolute_bytes"]
    with pytest.raises(InputError, match="needs a CUDA GPU"):
        next(bench_scaling.cases("imagenet-100", CPU))
    with pytest.raises(InputError, match="suite 'scaling'"):
        next(bench_scaling.cases("imagenet-1k", CPU))
