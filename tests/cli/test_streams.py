"""Nothing that goes wrong with stdout or stderr stops a command or loses a file, and every name can be shown."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import warnings

import pytest
from tests_data import write_image_folder

from sfm_fast.bundle.bundle import Bundle
from sfm_fast.cli import main as cli
from sfm_fast.cli.streams import STAND_INS
from sfm_fast.files import load_tensors

STATS = ["stats", "--quiet"]
NAMES = ("", "stats", "demo", "distill", "classifier", "eval", "bundle", "classify", "plan", "bench", "info")
FULL = "/dev/full"


def stdout(monkeypatch, name: str, **options) -> io.TextIOBase:
    stream = open(name, "w", **options)  # noqa: SIM115 (the monkeypatch holds it)
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


@pytest.fixture
def data(tmp_path):
    return ["--data", str(write_image_folder(tmp_path / "images"))]


def test_a_full_disk_under_stdout_loses_no_result(tmp_path, data, monkeypatch, capsys):
    stdout(monkeypatch, FULL)
    found = tmp_path / "r.json"
    assert cli.main([*STATS, *data, "--out", str(tmp_path / "s"), "--json", str(found)]) == 1
    assert capsys.readouterr().err == "sfm-fast: stdout can't be written (No space left on device)\n"
    assert json.loads(found.read_text())["class_names"] == ["cat", "dog"]
    assert load_tensors(tmp_path / "s")[0]["counts"].sum() > 0


def test_json_on_a_full_stdout_is_exit_code_one(tmp_path, data, monkeypatch):
    stdout(monkeypatch, FULL)
    assert cli.main([*STATS, *data, "--out", str(tmp_path / "s"), "--json", "-"]) == 1
    assert (tmp_path / "s").is_file()


def test_a_reader_that_has_gone_ends_it_only_when_all_is_written(tmp_path, data, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w"))
    found = tmp_path / "r.json"
    code = cli.main([*STATS, *data, "--out", str(tmp_path / "s"), "--json", str(found)])
    assert code == 128 + signal.SIGPIPE
    assert found.is_file()
    assert capsys.readouterr().err == ""


def test_a_mistake_stays_one_where_stdout_is_full(monkeypatch):
    stdout(monkeypatch, FULL)
    assert cli.main([*STATS, "--data", "nothing/here"]) == 1
    with pytest.raises(SystemExit) as stop:
        cli.main(["stats", "--no-such-option"])
    assert stop.value.code == 2


@pytest.mark.parametrize("number", [1, 2])
def test_progress_goes_on_without_stdout_or_stderr(number, tmp_path, data, monkeypatch):
    monkeypatch.setattr(sys, {1: "stdout", 2: "stderr"}[number], None)
    code = cli.main(["distill", *data, "--steps", "2", "--out", str(tmp_path / "run")])
    assert code == {1: 1, 2: 0}[number]
    assert (tmp_path / "run" / "synthetic.safetensors").is_file()


def test_a_full_disk_under_stderr_stops_no_run(tmp_path, data, monkeypatch):
    stream = open(FULL, "w", buffering=1)  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", stream)
    assert cli.main(["distill", *data, "--steps", "2", "--out", str(tmp_path / "run")]) == 0


def test_a_process_started_without_streams_keeps_its_files_apart(tmp_path, data):
    command = [sys.executable, "-m", "sfm_fast", *STATS, *data, "--out", str(tmp_path / "s")]
    done = subprocess.run(["bash", "-c", '"$@" >&- 2>&- <&-', "bash", *command])
    assert done.returncode == 1
    assert load_tensors(tmp_path / "s")[0]["counts"].sum() > 0


@pytest.mark.parametrize("command", NAMES)
def test_help_in_ascii(command, tmp_path, monkeypatch):
    stream = stdout(monkeypatch, tmp_path / "out", encoding="ascii")
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert stream.errors == "strict"  # as it was
    assert "sfm-fast" in (tmp_path / "out").read_text(encoding="ascii")


def test_stand_ins_are_readable(tmp_path, monkeypatch):
    shown = tmp_path / "out"
    stdout(monkeypatch, shown, encoding="ascii")
    monkeypatch.setattr(
        "sfm_fast.cli.runs.info.run", lambda args: print("1 ± 2 → x²", "".join(STAND_INS), "Käfer \udce4 \U0001f600")
    )
    assert cli.main(["info"]) == 0
    text = shown.read_text(encoding="ascii")
    assert text.startswith("1 +/- 2 -> x2 ...x->")
    assert text.endswith("K\\xe4fer \\udce4 \\U0001f600\n")


def test_everything_printed_beyond_ascii_has_a_stand_in():
    from pathlib import Path

    import sfm_fast

    folder = Path(sfm_fast.__file__).parent
    texts = "".join(path.read_text(encoding="utf-8") for path in folder.glob("**/*.py"))
    assert {c for c in texts if ord(c) > 127} <= STAND_INS.keys() | {"ö"}  # of names of authors


def test_a_warning_is_one_line(monkeypatch, capsys):
    def warn(args):
        print(warnings.formatwarning(UserWarning("this\n  and that"), UserWarning, "x.py", 1), end="")

    monkeypatch.setattr("sfm_fast.cli.runs.info.run", warn)
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out == "sfm-fast: warning: this and that\n"


def test_names_that_are_no_text_survive_every_command(tmp_path, capsys):
    odd = os.fsdecode(b"K\xe4fer")
    folder = tmp_path / odd
    folder.mkdir()
    data = ["--data", str(write_image_folder(folder / "images", classes=("cat", odd)))]
    stats, run, classifier, bundle = (str(folder / name) for name in ("s", "run", "c", "b"))
    photo = str(next((folder / "images" / "test" / odd).iterdir()))
    for argv in (
        ["stats", *data, "--out", stats],
        ["distill", *data, "--stats", stats, "--steps", "2", "--out", run],
        ["classifier", *data, "--out", classifier, "--cache", str(folder / "cache")],
        ["eval", run, *data, "--seeds", "1", "--epochs", "2", "--mode", "probe,inherit", "--classifier", classifier],
        ["bundle", run, "--classifier", classifier, "--out", bundle, "--test-data", data[1]],
        ["classify", bundle, photo],
    ):
        found = folder / f"{argv[0]}.json"
        code = cli.main([*argv, "--quiet", "--json", str(found)])
        assert code == 0, capsys.readouterr().err
        json.loads(found.read_text(encoding="ascii"))
    capsys.readouterr()
    assert cli.main(["classify", bundle, photo, "--quiet", "--json", "-"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["rows"][0]["classes"]]
    assert sorted(names) == ["K\udce4fer", "cat"]
    assert sorted(Bundle.load(bundle).class_names) == sorted(names)
    assert odd in Bundle.load(bundle).readme()
