"""The staged run on a GPU: limits that hold, summaries at once, smoke's comparison, results, tables. No GPU needed."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from sfm_fast.benchmarks.gpu import install, results, run, smoke, steps, times
from sfm_fast.benchmarks.gpu.stages import PlanError, Stage, Summary, check
from sfm_fast.benchmarks.gpu.stages import run as run_stages
from sfm_fast.benchmarks.gpu.tables import NOTHING, gpu_step_table, kernel_table, read_all, shown_kernels
from sfm_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def stage(name: str, code: str, limit: float = 20.0, **options: object) -> Stage:
    return Stage(name, limit, [sys.executable, "-c", code], "log", **options)  # type: ignore[arg-type]


def outcome(folder: Path, *stages: Stage, most: float = 1000.0) -> tuple[list[str], list[str]]:
    summary = Summary(folder / "summary.txt")
    failed = run_stages(stages, folder, summary, most=most, root=folder)
    return failed, (folder / "summary.txt").read_text().splitlines()


@pytest.mark.parametrize(("words", "most"), [((), 420), (("--second",), 200), (("--dry-run",), 1800)])
def test_the_limits_add_up(words, most):
    """By the script itself, which prints the sum."""
    command = ["scripts/gpu.sh", "--plan", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env={**ENVIRONMENT})
    *lines, total = done.stdout.splitlines()
    limits = [float(line.split(" s  ")[0]) for line in lines]
    assert sum(limits) == float(total.split(" s of ")[0]) <= most
    assert float(total.split("at most ")[1].removesuffix(" s")) == most
    names = [line.split(" s  ")[1].split(":")[0] for line in lines]
    if not words:
        assert names[:5] == ["card", "install", "build", "smoke", "times"], "the most telling first"
    assert len(set(names)) == len(names)


ENVIRONMENT = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}


def test_pytest_finds_the_linked_package():
    """With the checkout on its path it would find sfm_fast without kernels/ and benchmarks/."""
    plan = run.Plan(Path("out"), Path("work"), False)
    commands = [list(stage.command) for stage in plan.first() if "pytest" in stage.command]
    assert len(commands) == 2
    assert all(command[1:4] == ["-P", "-m", "pytest"] for command in commands)


def test_what_tools_say_of_errors_is_in_the_summary(tmp_path):
    lines = [*(f"========= Error {number}" for number in range(9)), "==ERROR== refused", "========= noise"]
    _, said = outcome(tmp_path, stage("memcheck", f"print({chr(10).join(lines)!r})"))
    assert said[1:-1] == [f"  Error {number}" for number in range(6)]
    _, said = outcome(tmp_path, stage("ncu", "print('==ERROR== The driver refuses')"))
    assert "  ERROR== The driver refuses" in said


def test_at_most_six_files():
    assert len(run.FILES) <= 6
    assert len(run.FILES_OF_SECOND) <= 6
    assert not set(run.FILES) & set(run.FILES_OF_SECOND), "the second run must not remove what the first has left"


def test_a_plan_that_is_too_long_is_refused(tmp_path):
    stages = [stage("one", "open('ran', 'w')", 30), stage("two", "", 31)]
    with pytest.raises(PlanError, match="61 s, more than 60"):
        outcome(tmp_path, *stages, most=60)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(PlanError, match="limit of 3 s"):
        check([stage("short", "", 3)], 60)


def test_a_stage_never_stops_the_next(tmp_path):
    failed, lines = outcome(
        tmp_path,
        stage("good", "print('== 12 ms'); print('noise')"),
        stage("bad", "raise SystemExit(3)"),
        Stage("missing", 20.0, ["no-such-program"], "log"),
        stage("last", "import os; os.abort()"),
    )
    assert failed == ["bad", "missing", "last"]
    assert lines[0] == "plan: good 20, bad 20, missing 20, last 20; together at most 80 s of 1000"
    assert lines[1] == "  12 ms"
    assert [line.split(",")[0] for line in lines[2:]] == [
        "good: ok", "bad: failed with 3", "missing: did not start (No such file or directory: no-such-program)", "last: failed with -6",
    ]  # fmt: skip
    log = (tmp_path / "log").read_text()
    assert "---- good" in log
    assert "noise" in log


def test_a_stage_is_interrupted_at_its_limit_and_then_ended(tmp_path):
    """At the interrupt pytest still says what it has; who ignores it, or a child of theirs, is killed."""
    # The interrupt comes 3 seconds before the limit: on a busy machine Python may take some to start.
    polite = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('== stopped in the middle')"
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(61.25)']); time.sleep(60)"
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    started = time.monotonic()
    failed, lines = outcome(
        tmp_path, stage("polite", polite, 13), stage("parent", child, 5), stage("stubborn", stubborn, 5)
    )
    assert time.monotonic() - started < 40
    assert failed == ["polite", "parent", "stubborn"]
    assert "  stopped in the middle" in lines
    assert sum("stopped at its limit" in line for line in lines) == 3
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "sleep(61.25)" not in running


def test_lines_are_in_the_summary_before_the_stage_ends(tmp_path):
    code = "import pathlib, time\nprint('== first row', flush=True)\ntime.sleep(1.5)\n"
    code += "print('==', 'first row' in pathlib.Path('summary.txt').read_text())"
    _, lines = outcome(tmp_path, stage("times", code))
    assert "  True" in lines


def test_what_earlier_stages_leave_may_be_used(tmp_path):
    slow = "import time; time.sleep(4)"
    failed, lines = outcome(
        tmp_path,
        stage("build", "", 30, needed=lambda: False),
        stage("tests", slow, 5, more=10),
        stage("others", slow, 5, more=0.5),
    )
    assert failed == ["others"]
    assert lines[1] == "build: not needed"
    assert lines[2].endswith("of 15")
    assert lines[3].endswith("of 6")


SMOKE = """render                                       3    32 error 0 bad 0  1.5000000e+00 2.0000000e+01 -3.0000000e+00
gram high                                   65   361 error 0 bad 0  1.0000000e+00 2.0000000e+01 -3.0000000e+00
failures 0
"""


def test_smoke_is_compared_number_by_number():
    assert smoke.differences(SMOKE, SMOKE) == []
    assert smoke.differences(SMOKE.replace("2.0000000e+01", "2.0001000e+01"), SMOKE) == []
    assert len(smoke.differences(SMOKE.replace("1.5000000e+00", "1.9000000e+00"), SMOKE)) == 1
    assert smoke.differences(SMOKE.replace("1.0000000e+00", "1.9000000e+00"), SMOKE) == [], "TF32 products"
    exact = SMOKE.replace("gram high ", "gram highest")
    assert len(smoke.differences(exact.replace("1.0000000e+00", "1.9000000e+00"), exact)) == 1
    assert "bad 4" in smoke.differences(SMOKE.replace("bad 0", "bad 4", 1), SMOKE)[0]
    assert "error 719" in smoke.differences(SMOKE.replace("error 0", "error 719", 1), SMOKE)[0]
    assert "instead of" in smoke.differences(SMOKE.replace("render", "Render"), SMOKE)[0]
    assert smoke.differences(SMOKE.split("gram")[0], SMOKE) == ["1 results instead of 2"]
    nan = smoke.differences(SMOKE.replace("1.5000000e+00", "nan"), SMOKE)
    assert len(nan) == 1


def test_libraries_of_other_sources_are_left_alone(tmp_path, capsys):
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    install.copy_libraries(tmp_path)
    assert "make gpu-prepare" in capsys.readouterr().out
    (tmp_path / "contents.json").write_text(json.dumps({"libraries": "0" * 64}))
    install.copy_libraries(tmp_path)
    assert "other sources" in capsys.readouterr().out
    assert install.hash_of_sources("csrc") == install.hash_of_sources("csrc") != install.hash_of_sources("csrc/cuda")


def test_the_linked_package_is_importable(tmp_path):
    install.link(tmp_path / "site")
    code = "import sfm_fast.kernels.segments, sfm_fast.benchmarks.gpu.times, pytest_sfm_fast, sfm_fast; print(sfm_fast.__file__)"
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == str(tmp_path / "site" / "sfm_fast" / "__init__.py")


MACHINE = {"gpu": "NVIDIA H200", "torch": "2.11.0+cu130", "triton": "3.6.0", "commit": "abc1234"}
CEILINGS = {"copy_bandwidth": 4.3e12, "matmul_rate": 5e13, "tf32_rate": 4e14, "bf16_rate": 7.9e14}


def time_rows() -> list[dict[str, object]]:
    pair = "pair 21841x1024 float32 highest"
    made = [
        times.Time(pair, "cuda new", seconds=0.041, floor_seconds=0.029, share=0.707, peak_bytes=196_000_000),
        times.Time(pair, "cuda old", seconds=0.052, floor_seconds=0.029, share=0.55),
        times.Time(pair, "triton", status="out of memory"),
        times.Time("global 1000x768 float32", "cuda new", seconds=9e-6, warm_seconds=7e-6, floor_seconds=4e-6, share=0.44),
        times.Time("render 100x3x256 to 224 float32, forward", "triton", seconds=1e-3, status="differs from the first contender by 1e-01"),
    ]  # fmt: skip
    return [asdict(row) for row in made]


def gpu_files(folder: Path) -> None:
    bench = {"format": times.FORMAT, "environment": MACHINE, "ceilings": CEILINGS, "rows": time_rows()}
    (folder / "bench.json").write_text(json.dumps(bench))
    (folder / "summary.txt").write_text("plan\ncorrectness: ok\n")
    rows = [
        steps.StepTime("imagenet-100", "SFM one-shot", images=100, seconds=0.1, images_per_second=1000.0, mfu=0.41, peak_bytes=5_600_000_000),
        steps.StepTime("imagenet-100", "LGM frozen", images=100, seconds=0.93, images_per_second=107.5, peak_bytes=52_000_000_000),
        steps.StepTime("imagenet-100", "LGM stock", status="left out: predicted 88 GB, the card has 78 GB"),
    ]  # fmt: skip
    whole = {"format": steps.FORMAT, "environment": MACHINE, "rows": [asdict(row) for row in rows]}
    (folder / "steps.json").write_text(json.dumps(whole))


def test_results_and_tables(tmp_path):
    gpu_files(tmp_path)
    written = results.keep(tmp_path, results=tmp_path / "results")
    assert [str(path.relative_to(tmp_path)) for path in written] == [
        "results/nvidia-h200/kernels.json", "results/nvidia-h200/steps.json",
    ]  # fmt: skip
    kernels = read_all(tmp_path / "results", "kernels.json")
    assert kernels["NVIDIA H200"]["summary"] == ["plan", "correctness: ok"]
    table = kernel_table(kernels)
    assert "copy 4.30 TB/s, TF32 400 TFLOP/s" in table
    assert table.count("pair 21841x1024") == 3
    for words in ("41", "29", "71 %", "196", "out of memory", "differs from the first contender"):
        assert words in table
    short = shown_kernels(kernels)
    assert short.count("pair 21841x1024") == 1, "the fastest alone"
    assert "52" not in short.split("cuda new")[1].split("\n")[0]
    table = gpu_step_table(read_all(tmp_path / "results", "steps.json"))
    for words in ("1.00x", "9.30x", "41 %", "5.60", "52.00", "left out: predicted 88 GB"):
        assert words in table
    assert kernel_table({}) == gpu_step_table({}) == shown_kernels({}) == NOTHING


def test_a_dry_run_is_no_result_of_a_gpu(tmp_path):
    gpu_files(tmp_path)
    bench = json.loads((tmp_path / "bench.json").read_text())
    for change, wanted in (
        ({"environment": {**MACHINE, "gpu": None}}, "not measured on a GPU"),
        ({"format": "another"}, "wanted the format"),
    ):
        (tmp_path / "bench.json").write_text(json.dumps({**copy.deepcopy(bench), **change}))
        with pytest.raises(InputError, match=wanted):
            results.keep(tmp_path, results=tmp_path / "results")
    (tmp_path / "bench.json").write_text("{")
    with pytest.raises(InputError, match="can't be read"):
        results.keep(tmp_path, results=tmp_path / "results")
    assert not (tmp_path / "results").exists()
    with pytest.raises(InputError, match="found neither"):
        results.keep(tmp_path / "nothing", results=tmp_path / "results")


def test_times_go_on_after_an_error_and_in_another_process(tmp_path, monkeypatch):
    """What goes wrong costs its own row; a process that takes over leaves the rows alone that are there."""
    import torch

    def broken():
        raise ValueError("no such shape")

    def call(backend):
        if backend == "triton":
            raise AssertionError("not here")
        return lambda: (torch.ones(4),)

    monkeypatch.setattr(times, "cases", lambda device: iter([broken, lambda: iter([times.Case("case", call, 16.0)])]))
    monkeypatch.setattr(times, "ceilings", lambda device: CEILINGS)
    out = tmp_path / "bench.json"
    assert not times.Run(torch.device("cpu"), out, 60)()
    rows = {(row["case"], row["contender"]): row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == [("group 0", ""), ("case", "cpu new"), ("case", "cpu old"), ("case", "triton")]
    assert rows["group 0", ""]["status"] == "error: ValueError: no such shape"
    assert rows["case", "triton"]["status"] == "error: AssertionError: not here"
    assert rows["case", "cpu old"]["status"] == "ok"
    before = out.read_text()
    monkeypatch.setattr(times, "timed", lambda *arguments: pytest.fail("measured again"))
    times.Run(torch.device("cpu"), out, 60, resume=True)()
    assert out.read_text() == before


def test_predictions_made_beforehand_are_taken(tmp_path):
    """A GPU's seconds are not spent on fake tensors; what is predicted not to fit is left out."""
    import torch

    preset = steps.find_shape("small")
    setting = steps.Setting(preset, steps.open_backbone(preset, torch.device("cpu")))
    way = steps.ways(preset)[0]
    row = steps.measured(way, setting, 1e12, {"small": {way.name: [123, 456]}})
    assert (row.predicted_bytes, row.flops) == (123, 456)
    assert row.seconds is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "card_memory", lambda device: 78_000_000_000)
        row = steps.measured(way, setting, 1e12, {"small": {way.name: [88_000_000_000, 456]}})
    assert row.status == "left out: predicted 88 GB, the card has 78 GB"
    assert row.seconds is None


def test_a_wrong_kernel_gets_no_time():
    """A contender whose result differs from the first one's has a status and no seconds."""
    import torch

    right, wrong = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 1.5])
    case = times.Case("case", lambda backend: lambda: (wrong if backend == "cpu" else right,), 16.0)
    row, _ = times.timed(case, times.Contender("cpu", "old"), (right,), torch.device("cpu"), CEILINGS)
    assert row.seconds is None
    assert row.status.startswith("differs from the first contender by")
    assert "differs" in row.line()
    for value in (float("nan"), float("inf")):
        bad = times.Case("case", lambda backend, value=value: lambda: (torch.full((4,), value), right), 16.0)
        for expected in (None, (right, right)):
            row, results = times.timed(bad, times.Contender("cpu", "new"), expected, torch.device("cpu"), CEILINGS)
            assert row.status == "wrong: not all of its results are finite"
            assert row.seconds is None
            assert results is None, "what is wrong must not be what others are held against"
    row, _ = times.timed(case, times.Contender("triton"), (right,), torch.device("cpu"), CEILINGS)
    assert row.status == "ok"
    assert row.seconds is not None
