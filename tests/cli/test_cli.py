"""The commands from a user's side: what they write, print and return; and every mistake as one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests_data import write_image_folder

from sfm_fast.cli import main as cli
from sfm_fast.files import load_tensors

SMALL_DISTIL = ["distill", "--steps", "6", "--grow-every", "2", "--quiet"]
SMALL_EVAL = ["--seeds", "2", "--epochs", "20", "--views", "3", "--quiet"]


def call(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.main(list(map(str, argv)))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    import timm

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), path)
    return str(path)


def test_the_road_on_an_image_folder_with_a_timm_backbone(tmp_path, capsys, checkpoint):
    data = [
        "--data",
        str(write_image_folder(tmp_path / "images")),
        "--backbone",
        "test_vit",
        "--checkpoint",
        checkpoint,
        "--image-size",
        "160",
    ]
    stats, run, result = tmp_path / "s.safetensors", tmp_path / "run", tmp_path / "eval.json"
    assert call(capsys, "stats", *data, "--out", stats, "--clusters", "2", "--quiet")[0] == 0
    tensors, metadata = load_tensors(stats)
    assert tensors["centers"].shape == (2, 64)
    assert tensors["cluster_centers"].shape == (2, 2, 64)
    assert metadata["class_names"] == ["cat", "dog"]
    assert metadata["provenance"]["backbone"]["name"] == "test_vit"
    assert call(capsys, *SMALL_DISTIL, *data, "--stats", stats, "--out", run)[0] == 0
    images = load_tensors(run / "synthetic.safetensors")[0]["images"]
    assert images.shape == (2, 3, round(160 * 8 / 7), round(160 * 8 / 7))
    code, out, _ = call(capsys, "eval", run, *data, *SMALL_EVAL, "--json", result)
    assert code == 0
    rows = json.loads(result.read_text())["rows"]
    assert [row["images"] for row in rows] == ["full", "random-real", "nearest-real", "sfm"]
    assert all(0 <= row["top1_mean"] <= 1 and row["mode"] == "probe" for row in rows)
    assert out.count("\n|") >= 5
    code, out, _ = call(
        capsys, "eval", run, *data, *SMALL_EVAL, "--references", "", "--eval-backbone", "fashion_vit", "--json", "-"
    )
    assert code == 0
    assert json.loads(out)["rows"][0]["backbone"] == "fashion_vit"


def test_lgm_and_json_on_stdout(tmp_path, capsys):
    code, out, err = call(
        capsys, *SMALL_DISTIL, "--method", "lgm", "--views", "2", "--out", tmp_path / "run", "--json", "-"
    )
    assert code == 0
    assert json.loads(out)["config"]["method"] == "lgm"
    assert "lgm: 6 steps" in err


@pytest.mark.soak
def test_demo_writes_a_page_that_needs_nothing_else(tmp_path, capsys):
    """Of the demo in the folder that SFM_FAST_DEMO names, where one has been made already (.ci/run), else of a short one."""
    made = Path(os.environ.get("SFM_FAST_DEMO") or tmp_path / "demo")
    if made.parent == tmp_path:
        made.mkdir()
        (made / "demo.json").write_text("{}")  # an earlier one, which it replaces
        assert call(capsys, "demo", "--steps", "15", "--seeds", "1", "--rounds", "1", "--quiet", "--out", made)[0] == 0
    page = (made / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 30
    assert "<svg" in page
    for outside in ("http://", "https://", "<script", "<link"):
        assert outside not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
            "http://creativecommons.org", ""
        ).replace("https://matplotlib.org", "")
    result = json.loads((made / "result.json").read_text())
    assert [row["images"] for row in result["rows"]] == ["full", "random-real", "nearest-real", "sfm", "sfm"]
    assert [row.get("method") for row in result["rows"][-2:]] == ["sfm", "sfm-anchored"]
    assert result["costs"][0]["method"] == "sfm-anchored"
    assert "LGM stock" in {row["name"] for row in result["costs"]}


def test_info_names_the_versions(capsys):
    code, out, _ = call(capsys, "info", "--json", "-")
    assert code == 0
    assert (
        json.loads(out)["versions"]["torch"] == torch.__version__.split("+")[0] or json.loads(out)["versions"]["torch"]
    )


@pytest.mark.parametrize("command", ["stats", "distill", "eval", "demo", "info"])
def test_help_has_defaults_and_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"sfm-fast {command}" in out[out.index("example:") :]
    assert "--json" in out
    assert command == "info" or "(default: " in out


BAD = {
    "unknown backbone": (["stats", "--backbone", "resnet_x"], "backbone must be"),
    "unknown data": (["stats", "--data", "nothing/here"], "is no existing folder"),
    "no such stats": (["distill", "--stats", "none.safetensors"], "no such file"),
    "bad ipc": (["distill", "--ipc", "0"], "ipc must be at least 1"),
    "bad lr": (["distill", "--lr", "-1"], "lr must be positive"),
    "bad device": (["stats", "--device", "gpu"], "can't be used"),
    "bad batch": (["stats", "--batch-size", "0"], "--batch-size"),
    "bad threads": (["stats", "--threads", "0"], "--threads"),
    "no out folder": (["stats", "--out", "none/x.safetensors"], "no such folder"),
    "no json folder": (["stats", "--json", "none/x.json"], "no such folder none"),
    "empty out": (["distill", "--out", ""], "must have a name"),
    "bad workers": (["stats", "--workers", "-1"], "--workers"),
    "bad eval ipc": (["eval", "--ipc", "0"], "--ipc"),
    "bad rounds": (["demo", "--rounds", "0"], "--rounds"),
    "huge ipc": (["distill", "--ipc", "1000000000000"], "ipc must be at most"),
    "huge lr": (["distill", "--lr", "1e38"], "lr must be"),
    "device without values": (["stats", "--device", "meta"], "must hold values"),
    "no run": (["eval", "none"], "no such file"),
    "bad reference": (["eval", "--references", "best-real"], "is none of"),
    "nothing to do": (["eval", "--references", ""], "nothing to evaluate"),
    "resume nothing": (["distill", "--steps", "3", "--resume", "--out", "empty", "--quiet"], "nothing to resume"),
    "clusters": (["stats", "--clusters", "-1", "--quiet"], "clusters must be at least 0"),
    "too many clusters": (["stats", "--clusters", "601", "--quiet"], "too few for 601"),
    "ipc beyond the data": (["eval", "--references", "nearest-real", "--ipc", "601", "--quiet"], "fewer than ipc=601"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_line(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, message = BAD[name]
    code, _, err = call(capsys, *argv)
    assert code == 1
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_one_class_and_empty_class(tmp_path, capsys):
    one = write_image_folder(tmp_path / "one", classes=("cat",))
    code, _, err = call(capsys, "stats", "--data", one, "--out", tmp_path / "s", "--quiet")
    assert code == 1
    assert "at least 2" in err


def test_statistics_of_another_backbone_are_refused(tmp_path, capsys, checkpoint):
    data = write_image_folder(tmp_path / "images")
    assert call(capsys, "stats", "--data", data, "--out", tmp_path / "s", "--quiet")[0] == 0
    code, _, err = call(
        capsys,
        *SMALL_DISTIL,
        "--stats",
        tmp_path / "s",
        "--backbone",
        "test_vit",
        "--checkpoint",
        checkpoint,
        "--out",
        tmp_path / "run",
    )
    assert code == 1
    assert "192 features" in err
    assert not (tmp_path / "run").exists()


def test_other_classes_are_refused(tmp_path, capsys):
    assert call(capsys, *SMALL_DISTIL, "--out", tmp_path / "run")[0] == 0
    code, _, err = call(capsys, "eval", tmp_path / "run", "--data", write_image_folder(tmp_path / "images"), "--quiet")
    assert code == 1
    assert "not the test set's 2" in err


def test_a_bad_command_line_is_exit_code_two():
    done = subprocess.run([sys.executable, "-m", "sfm_fast", "distil"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "invalid choice" in done.stderr


def test_a_run_of_another_backbone_is_not_evaluated_by_mistake(tmp_path, capsys, checkpoint):
    data = ["--data", str(write_image_folder(tmp_path / "images"))]
    model = ["--backbone", "test_vit", "--checkpoint", checkpoint]
    assert call(capsys, *SMALL_DISTIL, *data, *model, "--out", tmp_path / "run")[0] == 0
    code, _, err = call(capsys, "eval", tmp_path / "run", *data, *SMALL_EVAL)
    assert code == 1
    assert "distilled on 'test_vit'" in err


def test_other_files_are_not_replaced(tmp_path, capsys):
    precious = tmp_path / "precious.txt"
    precious.write_text("precious")
    code, _, err = call(capsys, "stats", "--out", precious, "--quiet")
    assert code == 1
    assert "not a safetensors file" in err
    assert precious.read_text() == "precious"
    code, _, err = call(capsys, "demo", "--out", tmp_path, "--quiet")
    assert code == 1
    assert "holds other files" in err
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_json_to_a_pipe_leaves_the_pipe(tmp_path):
    import os
    import stat

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "sfm_fast", "info", "--json", str(pipe)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    assert json.loads(pipe.read_text())["versions"]
    assert process.wait() == 0
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_reader_that_goes_away_is_no_traceback():
    command = f"{sys.executable} -m sfm_fast info | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr


LISTS = {
    "spaces": (["--references", "full", "class-means"], ["full", "class-means"]),
    "commas": (["--references", "full,class-means"], ["full", "class-means"]),
    "both, and again": (["--references", "full,", "class-means", "--references=full"], ["full", "class-means"]),
    "none": (["--references", ""], []),
    "default": ([], ["full", "random-real", "nearest-real"]),
}


@pytest.mark.parametrize("form", LISTS)
def test_lists_by_commas_and_by_spaces(form):
    given, wanted = LISTS[form]
    args = cli.parser().parse_args(["eval", "run", *given])
    assert (args.runs, list(dict.fromkeys(args.references))) == (["run"], wanted)


def test_every_list_option_takes_both():
    for option, command, values in (
        ("--mode", "eval", ["probe", "kd"]),
        ("--suite", "bench", ["losses", "step"]),
        ("--only", "bench compare", ["bytes", "times"]),
        ("--weight-decay", "classifier", [0.1, 0.01]),
        ("--micro-batch", "plan", [1, 2]),
    ):
        for given in ([option, *map(str, values)], [option, ",".join(map(str, values))]):
            args = cli.parser().parse_args([*command.split(), *given])
            assert getattr(args, option[2:].replace("-", "_")) == values


def test_a_run_swallowed_by_a_list_is_told_how_to_be_written(capsys):
    code, _, err = call(capsys, "eval", "--references", "full", "runs/sfm")
    assert code == 1
    assert "'runs/sfm' is none of full" in err
    assert "if it is a RUN, write: sfm-fast eval RUN --references ..." in err
    code, _, err = call(capsys, "eval", "--mode", "", "runs/sfm")
    assert code == 1
    assert "--mode" in err
