"""The harness: a wrong, failing or too large contender has a row and no time; ratios and memory are what they should be; results merge."""

from __future__ import annotations

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sfm_fast.benchmarks import runner as suites
from sfm_fast.benchmarks.harness import SLOW, Contender, measure, share_of
from sfm_fast.benchmarks.machine import environment
from sfm_fast.benchmarks.report.rows import read_result
from sfm_fast.benchmarks.shapes import IMAGE_SHAPES, LOSS_SHAPES
from sfm_fast.benchmarks.suites import images as bench_render_augment
from sfm_fast.benchmarks.suites import losses as bench_flow_alignment
from sfm_fast.cli import main as cli
from sfm_fast.errors import InputError
from sfm_fast.measure import memory
from sfm_fast.measure import timing as perf

CPU = torch.device("cpu")


def rows_of(*contenders: Contender, **options) -> dict[str, dict]:
    found = measure(
        contenders, suite="s", case={"case": "c", "size": 3}, mode="both", device=CPU, **{"seconds": 0.02} | options
    )
    assert [row["contender"] for row in found] == [contender.name for contender in contenders]
    assert all((row["suite"], row["case"], row["size"], row["mode"]) == ("s", "c", 3, "both") for row in found)
    return {row["contender"]: row for row in found}


def test_a_wrong_failing_or_too_large_contender_has_no_time():
    def missing():
        raise ImportError("no KeOps here")

    def broken():
        raise RuntimeError("shapes differ\nand more")

    def never():
        raise AssertionError("a wrong result must not be timed")

    a = torch.randn(64, 64)
    rows = rows_of(
        Contender("ours", lambda: a @ a),
        Contender("wrong", never, "wrong result: off by 1"),
        Contender("missing", missing),
        Contender("broken", broken),
        Contender("large", lambda: torch.empty(1 << 60)),
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
        rows_of(Contender("ours", lambda: {}["x"]))


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
        Contender("ours", lambda: work(4), facts={"views": 7}),
        Contender("slower", lambda: work(12), first_seconds=123.0, compiles=True),
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
        Contender("ours", lambda: calls.append("ours")),
        Contender("slow", lambda: calls.append("slow"), first_seconds=2 * SLOW),
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

    row = rows_of(Contender("ours", call, prepare=prepare), max_rounds=5)["ours"]
    assert set(taken) == {5}
    assert len(made) == len(taken) >= row["rounds"]
    assert (row["median"], row["p80"]) == pytest.approx((0.001, 0.001))


def test_share_of_a_ceiling():
    row = {"status": "ok", "median": 0.5}
    ceilings = {"copy_bandwidth": 100.0, "matmul_rate": 40.0}
    found = share_of(row, ceilings, least_bytes=10, flops=5)
    assert (found["copy_fraction"], found["matmul_fraction"], found["flops"]) == (0.2, 0.25, 5)
    assert "matmul_ceiling" not in found
    assert share_of({"status": "out of memory"}, ceilings, flops=5) == {}
    found = share_of(row, ceilings | {"tf32_rate": 100.0}, flops=5, rate="tf32_rate")
    assert (found["matmul_fraction"], found["matmul_ceiling"], found["matmul_rate"]) == (0.1, "tf32_rate", 40.0)


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
    with pytest.raises(ValueError, match="as many seconds"):
        perf.ratio([1.0], [1.0, 2.0])
    assert perf.ratio([2.0, 6.0], [1.0, 2.0]) == perf.Ratio(2.5, 2.0, 3.0)


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
    right = every["eager"]
    every["planted"] = lambda features, labels: 1.1 * right(features, labels)
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
    right = every["operation by operation"]
    every["planted"] = lambda levels, views: right(levels, views).flip(3)
    found = bench_render_augment.verdicts(shape, every, levels, views)
    assert {name for name, verdict in found.items() if verdict} == {"planted"}


def row(suite: str, case: str, contender: str = "ours", mode: str = "both", **more) -> dict:
    return {"suite": suite, "case": case, "contender": contender, "mode": mode, "status": "ok", **more}


def test_results_merge_in_their_old_order():
    old = [row("a", "1", value=1), row("a", "1", "eager", value=1), row("a", "2", value=1), row("b", "1", value=1)]
    again = suites.merged(old, [row("a", "1", value=2)])
    assert [(r["case"], r["contender"], r["value"]) for r in again] == [
        ("1", "ours", 2),
        ("2", "ours", 1),
        ("1", "ours", 1),
    ]
    more = suites.merged(old, [row("a", "3", value=2)])
    assert [r["case"] for r in more] == ["1", "1", "2", "3", "1"]
    assert suites.merged([], [row("a", "1")]) == [row("a", "1")]


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
        (("full", (), "", True), "has none"),
        (("imagenet-1k",), "wants a GPU"),
    ],
)
def test_bad_choices_are_refused_before_any_work(arguments, wanted):
    preset, *rest = arguments
    names = ("suites", "only", "predict")
    with pytest.raises(InputError, match=wanted):
        next(suites.run(preset, CPU, **dict(zip(names, rest, strict=False))))


def test_the_command_writes_every_form(tmp_path, capsys):
    folder, page = tmp_path / "bench", tmp_path / "page.html"
    only = ["bench", "--preset", "small", "--out", str(folder), "--device", "cpu", "--only"]
    assert cli.main([*only, "10x384", "--json", "-"]) == 0
    result = read_result(folder / "small.json")
    assert json.loads(capsys.readouterr().out) == result
    assert {row["case"] for row in result["rows"]} == {"global 10x384"}
    assert {path.name for path in folder.iterdir()} == {"small.json", "small.md", "small.csv", "small.html"}
    assert cli.main(["bench", "report", str(folder / "small.json"), "--out", str(page)]) == 0
    assert "global 10x384" in page.read_text()
    assert cli.main([*only, "no such case"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert read_result(folder / "small.json") == result


def test_an_interrupted_run_leaves_the_old_result(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        yield [row("losses", "fresh", median=1.0, p20=1.0, p80=1.0)], {"rows": []}
        raise KeyboardInterrupt

    monkeypatch.setattr(suites, "run", interrupted)
    old = tmp_path / "small.json"
    old.write_text("old")
    assert cli.main(["bench", "--preset", "small", "--out", str(tmp_path), "--device", "cpu"]) == 130
    assert old.read_text() == "old"
    assert (tmp_path / "small.part.json").exists()
