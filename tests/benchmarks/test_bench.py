"""The harness: a wrong, failing or too large contender has a row and no time; ratios and memory are what they should be; results merge."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sfm_fast.benchmarks import runner
from sfm_fast.benchmarks.cells import Cell, fill
from sfm_fast.benchmarks.harness import SLOW, Contender, Plan, add_share, measure
from sfm_fast.benchmarks.machine import environment
from sfm_fast.benchmarks.presets import IMAGE_SHAPES, LOSS_SHAPES, PRESETS
from sfm_fast.benchmarks.registry import Options, suites
from sfm_fast.benchmarks.rows import BOOTSTRAP, Result, Row, read_result
from sfm_fast.benchmarks.suites import images as bench_render_augment
from sfm_fast.benchmarks.suites import losses as bench_flow_alignment
from sfm_fast.cli import main as cli
from sfm_fast.errors import InputError
from sfm_fast.measure import memory
from sfm_fast.measure import timing as perf

CPU = torch.device("cpu")


def named(name: str, call, verdict: str = "", **options) -> Contender:
    """A contender of a case with one number."""
    facts = {key: options.pop(key) for key in ("views", "compiled") if key in options}
    return Contender(Row("s", "c", name, "both", size=3, **facts), call, verdict, **options)


def rows_of(*contenders: Contender, **options) -> dict[str, dict]:
    found = measure(contenders, CPU, Plan(**{"seconds": 0.02} | options))
    assert [row.contender for row in found] == [contender.name for contender in contenders]
    assert all((row.suite, row.case, row.size, row.mode) == ("s", "c", 3, "both") for row in found)
    return {row.contender: row.to_json() for row in found}


def test_a_wrong_failing_or_too_large_contender_has_no_time():
    def missing():
        raise ImportError("no KeOps here")

    def broken():
        raise RuntimeError("shapes differ\nand more")

    def never():
        raise AssertionError("a wrong result must not be timed")

    a = torch.randn(64, 64)
    rows = rows_of(
        named("ours", lambda: a @ a),
        named("wrong", never, "wrong result: off by 1"),
        named("missing", missing),
        named("broken", broken),
        named("large", lambda: torch.empty(1 << 60)),
    )
    assert {name: row["status"] for name, row in rows.items()} == {
        "ours": "ok",
        "wrong": "wrong result: off by 1",
        "missing": "unsupported: no KeOps here",
        "broken": "failed: shapes differ",
        "large": "out of memory",
    }
    assert not [row for row in rows.values() if row["status"] != "ok" and ("median" in row or "peak_bytes" in row)]


def test_other_errors_are_not_swallowed():
    with pytest.raises(KeyError):
        rows_of(named("ours", lambda: {}["x"]))


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what the contenders add to it."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def test_ratio_memory_and_first_call(clock):
    a = torch.randn(256, 256)

    def work(times: int):
        clock[0] += 0.01 * times
        return [a @ a for _ in range(times)]

    rows = rows_of(
        named("ours", lambda: work(4), views=7),
        named("slower", lambda: work(12), first_seconds=123.0, compiled=True),
        seconds=1.25,
    )
    assert rows["ours"]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert rows["slower"]["ratio"] == pytest.approx({"median": 3.0, "low": 3.0, "high": 3.0})
    assert rows["ours"]["views"] == 7
    assert rows["slower"]["first_seconds"] == 123.0
    assert rows["ours"]["first_seconds"] == pytest.approx(0.04)
    assert rows["ours"]["rounds"] == rows["slower"]["rounds"] == 10
    assert [rows["slower"][key] for key in ("p20", "median", "p80")] == pytest.approx([0.12] * 3)
    assert (rows["ours"]["peak_bytes"], rows["slower"]["peak_bytes"]) == (4 * a.nbytes, 12 * a.nbytes)
    assert rows["ours"]["absolute_bytes"] >= 5 * a.nbytes


def test_a_slow_contender_is_not_run_again():
    calls = []
    rows = rows_of(
        named("ours", lambda: calls.append("ours")),
        named("slow", lambda: calls.append("slow"), first_seconds=2 * SLOW),
        memory=False,
    )
    assert "slow" not in calls
    assert (rows["slow"]["median"], rows["slow"]["rounds"]) == (2 * SLOW, 1)
    assert rows["slow"]["ratio"]["median"] > 100


def test_what_is_prepared_is_not_timed(clock):
    made, taken = [], []

    def prepare():
        clock[0] += 20
        made.append(1)
        return 5

    def call(ready):
        clock[0] += 0.001
        taken.append(ready)

    row = rows_of(named("ours", call, prepare=prepare), most=5)["ours"]
    assert set(taken) == {5}
    assert len(made) == len(taken) >= row["rounds"]
    assert (row["median"], row["p80"]) == pytest.approx((0.001, 0.001))


def test_share_of_a_ceiling():
    def share(status: str, ceilings: dict[str, float], **options) -> Row:
        row = Row("s", "c", "ours", "both", status, median=0.5)
        add_share(row, ceilings, **options)
        return row

    ceilings = {"copy_bandwidth": 100.0, "matmul_rate": 40.0}
    found = share("ok", ceilings, least_bytes=10, flops=5)
    assert (found.copy_fraction, found.matmul_fraction, found.flops) == (0.2, 0.25, 5)
    assert found.matmul_ceiling is None
    lost = share("out of memory", ceilings, flops=5)
    assert lost == Row("s", "c", "ours", "both", "out of memory", median=0.5)
    found = share("ok", ceilings | {"tf32_rate": 100.0}, flops=5, rate="tf32_rate")
    assert (found.matmul_fraction, found.matmul_ceiling, found.matmul_rate) == (0.1, "tf32_rate", 40.0)


def test_interval_of_a_ratio_covers_the_truth():
    """Of 200 noisy comparisons whose true ratio is 1.3, the 95 % interval covers it in most, and 1.0 in none."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        slow_moments = 1 + torch.rand(41, generator=generator).double()
        base = slow_moments * (1 + 0.1 * torch.randn(41, generator=generator).double().abs())
        mine = 1.3 * slow_moments * (1 + 0.1 * torch.randn(41, generator=generator).double().abs())
        found = perf.ratio(mine.tolist(), base.tolist())
        assert found.low > 1.05
        covered += found.low <= 1.3 <= found.high
    assert 180 <= covered <= 200
    with pytest.raises(ValueError, match="seconds and base must have the same number"):
        perf.ratio([1.0], [1.0, 2.0])
    assert perf.ratio([2.0, 6.0], [1.0, 2.0]) == perf.Ratio(2.5, 0.0, math.inf)  # too few rounds to say
    assert perf.ratio([2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [1.0] * 6) == perf.Ratio(4.5, 2.0, 7.0)


def test_rounds_turn_the_order():
    calls: list[str] = []
    perf.samples({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=0)
    assert "".join(calls) == "abbaab"


def test_living_bytes_counts_each_storage_once():
    before = memory.living_bytes()
    a = torch.zeros(1000)
    view = a[10:]
    assert memory.living_bytes() == before + a.nbytes
    del a, view
    with FakeTensorMode():  # what torch.compile leaves behind has no memory
        fake = torch.zeros(1000)
    assert memory.living_bytes() == before
    del fake


@pytest.mark.parametrize(
    "shape",
    dict.fromkeys(
        shape
        for preset in ("small", "laptop", "imagenet-100")
        for shape in LOSS_SHAPES[preset]
        if shape.classes * shape.dim <= 1000 * 768 and not shape.compiled
    ),
    ids=lambda shape: shape.name,
)
def test_every_loss_is_right_where_it_is_timed(shape):
    """The gate of the benchmark itself, on what it runs: ours right on every backend, and the baselines too."""
    features, centers, labels = shape.inputs(CPU)
    every = bench_flow_alignment.losses(shape, centers)
    for slow in ("C x C x D", "sfm_fast triton"):  # gigabytes, and an interpreter
        every.pop(slow, None)
    found = bench_flow_alignment.contenders(shape, every, features.requires_grad_(), centers, labels)
    assert len(found) >= 2
    assert {contender.name: contender.verdict for contender in found if contender.verdict} == {}


def test_a_wrong_loss_is_found_out():
    shape = LOSS_SHAPES["small"][0]
    features, centers, labels = shape.inputs(CPU)
    every = bench_flow_alignment.losses(shape, centers)
    every.pop("sfm_fast triton", None)
    right = every["eager"].loss
    every["planted"] = bench_flow_alignment.Entry(lambda features, labels: 1.1 * right(features, labels))
    found = bench_flow_alignment.contenders(shape, every, features.requires_grad_(), centers, labels)
    assert {contender.name: contender.verdict for contender in found if contender.verdict} == {
        "planted": "wrong result: gradient off by 1e-01"
    }


def test_a_wrong_image_path_is_found_out():
    shape = IMAGE_SHAPES["small"][0]
    levels, views = shape.inputs(CPU)
    every = bench_render_augment.paths(shape, CPU)
    every.pop("sfm_fast triton", None)
    every.pop("sfm_fast triton, render then augment", None)
    right = every["operation by operation"].path
    every["planted"] = bench_render_augment.Entry(lambda levels, views: right(levels, views).flip(3))
    found = bench_render_augment.verdicts(shape, every, levels, views)
    assert {name for name, verdict in found.items() if verdict} == {"planted"}


def row(suite: str, case: str, contender: str = "ours", mode: str = "both", **more) -> Row:
    return Row(suite, case, contender, mode, **more)


def merged(old: list[Row], *fresh: Row) -> list[Row]:
    """``old`` with the rows of one case measured again."""
    kept: dict[tuple[str, str], list[Row]] = {}
    for one in old:
        kept.setdefault((one.suite, one.case), []).append(one)
    list(fill(kept, [Cell((fresh[0].suite, fresh[0].case), lambda: list(fresh))], lambda: None, again=True))
    return runner.in_order(kept)


def test_results_merge_in_their_old_order():
    old = [row("a", "1", value=1), row("a", "1", "eager", value=1), row("a", "2", value=1), row("b", "1", value=1)]
    again = merged(old, row("a", "1", value=2))
    assert [(r.case, r.contender, r.value) for r in again] == [("1", "ours", 2), ("2", "ours", 1), ("1", "ours", 1)]
    more = merged(old, row("a", "3", value=2))
    assert [r.case for r in more] == ["1", "1", "2", "3", "1"]
    assert merged([], row("a", "1")) == [row("a", "1")]


def test_cells_that_are_there_are_not_run_again():
    """An interrupted table goes on: each result is saved before the next cell runs."""
    kept, saved = {"b": 7}, []

    def cell(name: str) -> Cell[str, str]:
        return Cell(name, lambda: f"{name} after {sorted(map(str, saved[-1:]))}")

    assert list(fill(kept, map(cell, "abc"), lambda: saved.append(dict(kept)))) == [
        ("a", "a after []"),
        ("c", "c after [\"{'b': 7, 'a': 'a after []'}\"]"),
    ]
    assert list(kept) == ["b", "a", "c"]


def test_rows_of_another_interval_or_machine_are_not_mixed():
    old = Result("small", environment(CPU), interval=BOOTSTRAP)
    with pytest.raises(InputError, match="bootstrap intervals"):
        next(runner.run("small", CPU, lambda result: None, before=old))
    old = Result("small", environment(CPU) | {"threads": 1000})
    with pytest.raises(InputError, match="threads 1000"):
        next(runner.run("small", CPU, lambda result: None, before=old))


def test_every_suite_has_presets_and_every_preset_suites():
    for suite in suites().values():
        assert set(suite.presets) <= set(PRESETS)
        assert suite.title
        assert suite.beside
    assert {name for suite in suites().values() for name in suite.presets} == set(PRESETS)


def test_environment_says_what_a_reader_needs():
    found = environment()
    assert {"cpu", "cores", "threads", "memory_bytes", "gpu", "python", "torch", "triton", "sfm_fast", "commit"} <= set(
        found
    )
    assert found["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("nothing",), "preset must be one of"),
        (("laptop", ["gpu"]), "preset laptop has losses"),
        (("full", (), "", Options(predict=True)), "has none"),
        (("imagenet-1k",), "wants a GPU"),
    ],
)
def test_bad_choices_are_refused_before_any_work(arguments, wanted):
    preset, *rest = arguments
    options = dict(zip(("chosen", "only", "options"), rest, strict=False))
    with pytest.raises(InputError, match=wanted):
        next(runner.run(preset, CPU, lambda result: None, **options))


def test_the_command_writes_every_form(tmp_path, capsys):
    folder, page = tmp_path / "bench", tmp_path / "page.html"
    only = ["bench", "--preset", "small", "--out", str(folder), "--device", "cpu", "--only"]
    assert cli.main([*only, "10x384", "--json", "-"]) == 0
    result = read_result(folder / "small.json")
    assert json.loads(capsys.readouterr().out) == result.to_json()
    assert {row.case for row in result.rows} == {"global 10x384"}
    assert result.interval == "sign test"
    assert {path.name for path in folder.iterdir()} == {"small.json", "small.md", "small.csv", "small.html"}
    assert cli.main(["bench", "report", str(folder / "small.json"), "--out", str(page)]) == 0
    assert "global 10x384" in page.read_text()
    assert cli.main([*only, "no such case"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert read_result(folder / "small.json") == result


def test_an_interrupted_run_leaves_the_old_result_and_goes_on(tmp_path, monkeypatch, capsys):
    def measured(work):
        ran.append(work)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return [row("losses", work, median=1.0, p20=1.0, p80=1.0)]

    def cells(preset, device, options):
        return (Cell(name, functools.partial(measured, name)) for name in "abc")

    ran = []
    losses = dataclasses.replace(suites()["losses"], cells=cells)
    monkeypatch.setattr(runner, "suites", lambda: {"losses": losses})
    old = tmp_path / "small.json"
    old.write_text("old")
    words = ["bench", "--preset", "small", "--out", str(tmp_path), "--device", "cpu"]
    assert cli.main(words) == 130
    assert old.read_text() == "old"
    assert (tmp_path / "small.part.json").exists()
    assert cli.main([*words, "--resume"]) == 0
    assert ran == ["a", "b", "b", "c"]
    assert [one.case for one in read_result(old).rows] == ["a", "b", "c"]
    assert not (tmp_path / "small.part.json").exists()
    assert cli.main([*words, "--resume"]) == 1
    assert "nothing was interrupted" in capsys.readouterr().err
