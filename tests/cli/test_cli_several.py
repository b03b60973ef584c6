"""Several backbones on the command line: distill, resume, eval and plan."""

from __future__ import annotations

import contextlib
import json

import pytest

from sfm_fast.cli.main import main

FAST = ("--data", "embedded", "--quiet", "--batch-size", "512")
TWO = ("--backbone", "fashion_vit", "fashion_cnn")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    command = [
        "distill",
        *FAST,
        *TWO,
        "--method",
        "sfm-anchored",
        "--ipc",
        "2",
        "--micro-batch",
        "6",
        "--grow-every",
        "1",
    ]
    assert main([*command, "--steps", "2", "--out", str(folder / "run")]) == 0
    assert main([*command, "--steps", "3", "--resume", "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_a_run_says_which_backbones_it_is_for(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 3
    assert len(summary["provenance"]["backbone"]) == len(summary["provenance"]["centers"]) == 2


def test_eval_evaluates_on_each(run, tmp_path):
    options = [
        "--seeds",
        "1",
        "--epochs",
        "2",
        "--views",
        "2",
        "--references",
        "nearest-real",
        "--json",
        str(tmp_path / "rows.json"),
    ]
    assert main(["eval", str(run), *FAST, *TWO, *options]) == 0
    result = json.loads((tmp_path / "rows.json").read_text())
    rows = [(row["images"], row["distilled_on"], row["backbone"]) for row in result["rows"]]
    assert rows == [
        ("nearest-real", "fashion_vit", "fashion_vit"),
        ("sfm", "fashion_vit", "fashion_vit"),
        ("nearest-real", "fashion_cnn", "fashion_cnn"),
        ("sfm", "fashion_cnn", "fashion_cnn"),
    ]
    assert [one["backbone"]["name"] for one in result["evaluations"]] == ["fashion_vit", "fashion_cnn"]
    assert main(["eval", str(run), *FAST, *TWO[:2], "--eval-backbone", "fashion_cnn", *options]) == 0
    (_, row) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (row["distilled_on"], row["backbone"]) == ("fashion_vit", "fashion_cnn")


def test_statistics_are_given_in_the_order_of_the_backbones(tmp_path, capsys):
    files = []
    for name in TWO[1:]:
        files.append(str(tmp_path / f"{name}.safetensors"))
        assert main(["stats", *FAST, "--backbone", name, "--covariance", "--out", files[-1]]) == 0
    command = ["distill", "--quiet", *TWO, "--method", "sfm-decoupled", "--steps", "1", "--out", str(tmp_path / "run")]
    assert main([*command, "--stats", *files]) == 0
    for stats, said in (
        (files[::-1], "has 256 features, but backbone 'fashion_vit' gives 192"),
        (files[:1], "--stats must be a file for each of fashion_vit, fashion_cnn, got 1"),
    ):
        assert main([*command, "--overwrite", "--stats", *stats]) == 1
        assert said in capsys.readouterr().err


def test_plan_sums_operations_but_not_memory(tmp_path):
    rows = []
    for some in (TWO, TWO[:2], ("--backbone", "fashion_cnn")):
        path = tmp_path / "plan.json"
        assert main(["plan", *some, "--num-classes", "10", "--method", "sfm-anchored", "--json", str(path)]) == 0
        rows.append(json.loads(path.read_text())["rows"][0])
    both, *alone = rows
    weights = [one["by_category"]["parameters"] for one in rows]
    assert weights[0] == sum(weights[1:])
    assert both["flops_per_step"] == pytest.approx(sum(one["flops_per_step"] for one in alone), rel=1e-3)
    beyond = [one["peak_bytes"] - its for one, its in zip(rows, weights, strict=True)]
    assert beyond[0] < 1.1 * max(beyond[1:])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--backbone", "fashion_vit", "fashion_vit"],
            "--backbone must name each backbone once, got fashion_vit twice",
        ),
        (
            [*TWO, "--checkpoint", "a.pth"],
            "--checkpoint must have one for each of the 2 backbones fashion_vit, fashion_cnn, got 1",
        ),
        ([*TWO, "--checkpoint", "none", "a.pth"], "checkpoint a.pth: no such file"),
        ([*TWO, "--image-size", "1", "2", "3"], "--image-size must have one, or one for each of the 2 backbones"),
        ([*TWO, "--image-size", "auto", "x"], "invalid image_size value: 'x'"),
        ([*TWO, "--weights", "random"], "must be 'pretrained', got 'random'"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(options, said, tmp_path, capsys):
    with pytest.raises(SystemExit) if "invalid" in said else contextlib.nullcontext():
        assert main(["distill", "--data", "embedded", *options, "--out", str(tmp_path / "run")]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_eval_says_what_is_wrong(run, capsys):
    for options, said in (
        (["eval", *TWO, str(run)], f"write: sfm-fast eval {run} --backbone"),
        (
            ["eval", str(run), *TWO, "--classifier", "pyproject.toml"],
            "--classifier must be left out with several --backbone",
        ),
        (["eval", str(run), *TWO, "--eval-image-size", "28"], "--eval-backbone must name the model of"),
    ):
        assert main(options) == 1
        assert said in capsys.readouterr().err
