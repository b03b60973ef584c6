"""`sfm-fast bench compare`: every verdict on result files; regressions planted in real commits, built and measured."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sfm_fast.benchmarks import compare, compare_build, compare_client, compare_times, quantities, worker
from sfm_fast.benchmarks.report.rows import FORMAT
from sfm_fast.cli import main as cli
from sfm_fast.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {"cpu": "a CPU", "gpu": None, "torch": "2.14.1", "threads": 2}


def command(*words: object) -> int:
    """The exit code of `sfm-fast bench compare` with these words."""
    try:
        return cli.main(["bench", "compare", *map(str, words)])
    except SystemExit as stop:
        return int(stop.code)


# --- two result files ---------------------------------------------------------------------------------------------------


def row(contender: str = "eager", low: float = 3.8, high: float = 4.2, **changed: object) -> dict:
    case = {"suite": "losses", "case": "pair 300x384", "contender": contender, "mode": "both", "status": "ok"}
    ratio = {"median": (low + high) / 2, "low": low, "high": high}
    return {
        **case,
        "median": 1e-3,
        "p20": 1e-3,
        "p80": 1e-3,
        "ratio": ratio,
        "peak_bytes": 1000,
        "flops": 5000,
        **changed,
    }


def result(*rows: dict, **environment: object) -> dict:
    ours = row("sfm_fast cpu", 1, 1)
    return {
        "format": FORMAT,
        "preset": "laptop",
        "environment": {**ENVIRONMENT, **environment},
        "rows": list(rows) or [ours, row()],
    }


def verdicts(base: dict, head: dict, **limits: object) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for change in compare.compare_files(base, head, compare.Limits(**limits))[0]:
        found.setdefault(change.kind, []).append(change.verdict)
    return found


OURS = row("sfm_fast cpu", 1, 1)


@pytest.mark.parametrize(
    ("head", "limits", "kind", "verdict"),
    [
        ([OURS, row()], {}, "ratio", "unchanged"),
        ([{**OURS, "peak_bytes": 1010}, row()], {}, "bytes", "unchanged"),
        ([{**OURS, "peak_bytes": 1011}, row()], {}, "bytes", "regression"),
        ([{**OURS, "peak_bytes": 1011}, row()], {"tolerance": 0.02}, "bytes", "unchanged"),
        ([{**OURS, "peak_bytes": 900}, row()], {}, "bytes", "improved"),
        ([{**OURS, "flops": 6000}, row()], {}, "flops", "regression"),
        ([{**OURS, "flops": 0}, row()], {}, "flops", "regression"),  # eager formulas count as nothing
        ([{**OURS, "flops": None}, row()], {}, "flops", "regression"),
        ([{**OURS, "peak_bytes": 0}, row()], {}, "bytes", "regression"),
        ([OURS, row(low=3.0, high=3.41)], {}, "ratio", "regression"),  # 3.42 is 3.8 less 10 %
        ([OURS, row(low=3.0, high=3.43)], {}, "ratio", "unchanged"),
        ([OURS, row(low=3.0, high=3.41)], {"time_tolerance": 0.2}, "ratio", "unchanged"),
        ([OURS, row(low=4.7, high=4.9)], {}, "ratio", "improved"),
        ([{**OURS, "status": "out of memory"}, row()], {}, "rows", "regression"),
        ([{**OURS, "status": "wrong result: off by 1"}, row()], {}, "rows", "regression"),
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
    nothing = result({**OURS, "flops": 0}, row())
    for base, head in ((result(), nothing), (nothing, result())):
        changes, _ = compare.compare_files(base, head, compare.Limits(tolerance=10))
        (change,) = (each for each in changes if each.kind == "flops")
        assert change.verdict == "regression"
        assert "nothing was counted" in change.note
    for kind in ("bytes", "flops", "instructions"):
        assert compare.judge(kind, "x", 0, 0, 0.01).verdict == "unchanged"
    assert compare.judge("kernels", "spills", 3, 0, 0.01).verdict == "improved"


def test_other_environments_compare_no_times():
    slower = result({**OURS, "peak_bytes": 2000}, row(low=1.0, high=1.1), threads=8)
    changes, notes = compare.compare_files(result(), slower, compare.Limits())
    assert "threads 2 and 8" in notes[0]
    assert [c.verdict for c in changes if c.kind == "bytes"] == ["regression"]
    assert not [c for c in changes if c.kind == "ratio"]
    changes, notes = compare.compare_files(
        result(), {**slower, "environment": {**ENVIRONMENT, "gpu": "H"}}, compare.Limits()
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
        verdicts(result(), result() | {"preset": "small"})


def test_files_on_the_command_line(tmp_path, capsys):
    base, head, out, page = (tmp_path / name for name in ("base.json", "head.json", "out.json", "page.md"))
    base.write_text(json.dumps(result()))
    head.write_text(json.dumps(result({**OURS, "peak_bytes": 1500}, row())))
    assert command(base, base) == 0
    assert "0 regression" not in capsys.readouterr().out
    assert command(base, head, "--json", out, "--markdown", page) == 1
    assert "| bytes: losses: pair 300x384, sfm_fast cpu, both |" in page.read_text()
    written = json.loads(out.read_text())
    assert (written["regressions"], written["inconclusive"]) == (1, 0)
    assert written["rows"][0]["verdict"] == "regression"
    assert written["rows"][0]["change"] == pytest.approx(0.5)
    assert command(base, head, "--only", "flops,times") == 0


def test_bad_input_ends_before_any_work(tmp_path, monkeypatch, capsys):
    good, other, broken = (tmp_path / name for name in ("good.json", "other.json", "broken.json"))
    good.write_text(json.dumps(result()))
    other.write_text('{"rows": []}')
    broken.write_text("{")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for words, wanted in (
        ([], "two result files, or --base"),
        ([good], "got 1"),
        ([good, tmp_path / "none.json"], "can't be read"),
        ([good, other], "key 'format'"),
        ([good, broken], "no JSON"),
        ([good, good, "--base", "main"], "not both"),
        ([good, good, "--tolerance", "-0.1"], "--tolerance must be"),
        ([good, good, "--time-tolerance", "nan"], "--time-tolerance must be"),
        ([good, good, "--only", "bytes,hours"], "--only: 'hours' is none of"),
        ([good, good, "--markdown", tmp_path / "no" / "where.md"], "no such folder"),
        (["--base", "main"], "needs a git checkout"),
        (["--base", "main", "--threads", "0"], "--threads must be"),
    ):
        assert command(*words) == 2, words
        assert wanted in capsys.readouterr().err
    git(checkout, "init", "--quiet")
    monkeypatch.chdir(checkout)
    assert command("--base", "main") == 2
    assert "something else" in capsys.readouterr().err


def test_kernel_tables():
    one = {
        "kernel": "k",
        "arch": "sm_90",
        "registers": 64,
        "spills": 0,
        "shared": 1024,
        "loads128": 8,
        "tensor_core": 4,
    }
    base = {"versions": {"triton": "1", "nvcc": "2"}, "triton": [one], "cuda": []}

    def judged(changed: dict, versions: dict | None = None) -> dict[str, str]:
        head = {**base, "triton": [{**one, **changed}], "versions": versions or base["versions"]}
        found = quantities.compare_kernels(base, head, compare.Limits())
        return {change.quantity.split()[-1]: change.verdict for change in found}

    assert set(judged({}).values()) == {"unchanged"}
    assert judged({"registers": 66})["registers"] == "unchanged"
    for changed in ({"registers": 67}, {"spills": 1}, {"shared": 2048}, {"loads128": 4}, {"tensor_core": 0}):
        (field,) = changed
        assert judged(changed)[field] == "regression", field
    assert judged({"registers": 99}, {"triton": "9", "nvcc": "2"}) == {"memory": "not compared", "spills": "unchanged"}


def test_quantities_that_one_side_lacks():
    base, head = {"a": 1.0, "b": "AttributeError: too old", "c": 5.0}, {"a": "ValueError: broken", "b": 2.0}
    found = {change.quantity: change.verdict for change in compare.judge_all("bytes", base, head, compare.Limits())}
    assert found == {"a": "regression", "b": "only in head", "c": "regression"}
    found = {c.quantity: c.verdict for c in compare.judge_all("bytes", base, head, compare.Limits(allow_missing=True))}
    assert found == {"a": "regression", "b": "only in head", "c": "only in base"}


class FakeClient:
    """A worker of which every call takes ``seconds``; ``fails``: it can't make the case."""

    def __init__(self, seconds: float = 1e-3, value: float = 1.0, fails: bool = False) -> None:
        self.seconds, self.value, self.fails, self.starts = seconds, value, fails, 0

    def stop(self) -> None:
        self.starts += 1

    def ask(self, do: str, **request: object) -> dict:
        if do == "prepare":
            if self.fails:
                raise compare_client.WorkerError("AttributeError: not there")
            torch.save([torch.full((3,), self.value)], request["path"])
            return {"repeats": 4}
        return {"seconds": self.seconds} if do == "sample" else {}


@pytest.mark.parametrize(
    ("base", "head", "verdict"),
    [
        ({}, {}, "unchanged"),
        ({}, {"seconds": 1.05e-3}, "unchanged"),
        ({}, {"seconds": 1.3e-3}, "regression"),
        ({}, {"seconds": 0.5e-3}, "improved"),
        ({}, {"value": 1.01}, "results differ"),
        ({}, {"fails": True}, "regression"),
        ({"fails": True}, {}, "only in head"),
        ({"fails": True}, {"fails": True}, "not compared"),
    ],
)
def test_verdicts_on_times(base, head, verdict, tmp_path):
    base, head = FakeClient(**base), FakeClient(**head)
    change = compare_times._compare(compare_times.Pair(base, head, tmp_path), "a case float32", 0.1)
    assert change.verdict == verdict
    if change.verdict == "regression" and not head.fails:
        assert head.starts == base.starts >= 1  # seen again by fresh processes
        assert change.change == pytest.approx(0.3)


def test_a_worker_that_dies_is_told_from_one_that_refuses(tmp_path):
    client = compare_client.Client(tmp_path, device="cpu", threads=1)  # no sfm_fast in there
    with client, pytest.raises(compare_client.WorkerError, match=r"its process ended with code 1: .*sfm_fast"):
        client.ask("forget")
    with compare_client.Client(ROOT, device="cpu", threads=1) as client:
        with pytest.raises(compare_client.WorkerError, match="KeyError"):
            client.ask("bytes", case="none such")
        assert client.ask("bytes", case="pair cosine 300x384 float32")["bytes"] > 300 * 384 * 4


# --- commits ------------------------------------------------------------------------------------------------------------


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    done = subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def commit(folder: Path, file: str, old: str, new: str) -> None:
    """Replace ``old`` in a file, and commit that on the first commit."""
    git(folder, "checkout", "--quiet", "--force", "--detach", "base")
    text = (folder / file).read_text()
    assert text.count(old) == 1, f"{file}: the test no longer knows this file"
    (folder / file).write_text(text.replace(old, new))
    git(folder, "commit", "--quiet", "--all", "--message", "changed")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A repository with the sources as they are here."""
    folder = tmp_path_factory.mktemp("checkout") / "repository"
    folder.mkdir()
    leave = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for name in ("sfm_fast", "kernels", "csrc", "benchmarks", "tests/static"):
        shutil.copytree(ROOT / name, folder / name, ignore=leave)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "base")
    git(folder, "tag", "base")
    yield folder
    assert git(folder, "worktree", "list").count("\n") == 0
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


# Two thirds of the pair matrix's weights are computed twice: some 30 % more work for the whole kernel.
WEIGHTS = "    block_weights(problem, mine, i0, i1, j0, j1, cosine);\n"
TWICE = "    block_weights(problem, mine, i0, i0 + (i1 - i0) * 2 / 3, j0, j1, cosine);\n"


@pytest.mark.soak
def test_a_slowed_kernel(checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    commit(checkout, "csrc/cpu/pair_alignment.cpp", WEIGHTS, TWICE + WEIGHTS)
    out = checkout.parent / "slowed.json"
    code = command("--base", "base", "--head", "HEAD", "--only", "instructions", "--json", out)
    rows = {row["quantity"]: row for row in json.loads(out.read_text())["rows"] if row["kind"] == "instructions"}
    if why := quantities.why_no_instructions():
        assert code == 0
        assert rows["all"]["note"] == why
    else:
        assert code == 1
        slower = {name for name, row in rows.items() if row["verdict"] == "regression"}
        assert slower == {name for name in worker.INSTRUCTIONS if name.startswith("pair cosine")}
        assert all(0.1 < rows[name]["change"] < 0.6 for name in slower)
    # And times: caught, or said to be undecided; the builds are still there.
    said = []
    base, head = compare_build.build_all(
        checkout,
        [compare_build.resolve(checkout, "base", "--base"), compare_build.resolve(checkout, "HEAD", "--head")],
        said.append,
    )
    assert said == []
    (change,) = compare_times.compare_times(
        base.folder,
        head.folder,
        ["pair cosine 300x384 float32"],
        device="cpu",
        threads=1,
        tolerance=0.1,
        say=said.append,
    )
    assert change.verdict in ("regression", "inconclusive")
    assert change.change > 0.05


@pytest.mark.soak
def test_an_extra_matrix_of_all_pairs(checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    commit(
        checkout,
        "sfm_fast/ops/pair_alignment.py",
        "        need_gradient = ctx.needs_input_grad[1]\n",
        "        need_gradient = ctx.needs_input_grad[1]\n"
        "        extra = centers.new_empty(centers.shape[0], centers.shape[0])  # noqa: F841\n",
    )
    assert command("--base", "HEAD~1", "--only", "bytes") == 1
    out, err = capsys.readouterr()
    caught = [line for line in out.splitlines() if "| regression" in line.replace("  ", "")]
    assert "bytes: pair cosine 300x384 float32" in out.splitlines()[2]
    assert "regression" in out.splitlines()[2]
    assert caught
    assert "building working tree" in err


@pytest.mark.slow
def test_nothing_changed(checkout, monkeypatch, capsys):
    """A comment: every number is the same, the C++ library isn't compiled again."""
    monkeypatch.chdir(checkout)
    git(checkout, "checkout", "--quiet", "--force", "--detach", "base")
    assert command("--base", "base") == 2
    assert "nothing to compare" in capsys.readouterr().err
    (checkout / "sfm_fast" / "version.py").open("a").write("# a comment\n")
    (checkout / "sfm_fast" / "new_file.py").write_text('"""Not tracked yet."""\n')
    monkeypatch.setenv("CXX", "c++")
    before = git(checkout, "status", "--porcelain")
    out = checkout.parent / "same.json"
    assert command("--base", "base", "--only", "bytes,flops,kernels", "--json", out) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["verdict"] for row in rows} == {"unchanged"}
    assert {row["kind"] for row in rows} == {"bytes", "flops", "kernels", "library"}
    assert len([row for row in rows if row["kind"] == "bytes"]) == len(worker.BYTES) + len(worker.STEPS)
    assert git(checkout, "status", "--porcelain") == before
    assert len(list((checkout / "build" / "compare").glob("libraries-*"))) <= 2
    head = compare_build.resolve(checkout, None, "--head")
    (built,) = compare_build.build_all(checkout, [head], print)
    assert (built.folder / "sfm_fast" / "new_file.py").exists()


@pytest.mark.slow
def test_what_can_not_be_built_says_why(checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    commit(checkout, "setup.py", "STABLE_ABI = [", "raise SystemExit('planted')\nSTABLE_ABI = [")
    assert command("--base", "HEAD", "--head", "base", "--only", "bytes") == 2
    err = capsys.readouterr().err
    assert "can't be built" in err
    assert "planted" in err
    assert command("--base", "nowhere") == 2
    assert "'nowhere': no such commit" in capsys.readouterr().err


def test_two_comparisons_at_once_are_refused(checkout):
    from sfm_fast.files import locked_folder

    (checkout / "build").mkdir(exist_ok=True)
    with locked_folder(checkout / "build" / "compare"), pytest.raises(InputError, match="in use"):
        compare_build.build_all(checkout, [compare_build.resolve(checkout, "base", "--base")], print)
