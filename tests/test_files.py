"""Files are whole or absent; folders have one owner."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch
from tests_data import write_image_folder

from sfm_fast import InputError, files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        files.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    monkeypatch.setattr(
        files.shutil, "disk_usage", lambda folder: os.terminal_size((0, 0)) and type("Usage", (), {"free": 3})()
    )
    with pytest.raises(InputError, match=r"are free on this disk"):
        files.write_text(path, "longer than three bytes")
    assert path.read_text() == "old"


def test_disk_that_fills_while_writing(tmp_path):
    def full(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="disk is full"):
        files.write_atomically(tmp_path / "a.txt", full)
    assert os.listdir(tmp_path) == []


def test_tensors_and_metadata_come_back(tmp_path):
    path, tensors = tmp_path / "t.safetensors", {"x": torch.randn(3, 4)[:, ::2], "y": torch.arange(3)}
    files.save_tensors(path, tensors, {"n": 3, "names": ["a", "ü"]})
    loaded, metadata = files.load_tensors(path)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert metadata == {"n": 3, "names": ["a", "ü"]}


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_a_folder_has_one_owner(tmp_path):
    code = f"from sfm_fast.files import locked_folder\nwith locked_folder({str(tmp_path)!r}): print('in', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    with (
        pytest.raises(InputError, match=f"in use by another run \\(process {other.pid}\\)"),
        files.locked_folder(tmp_path),
    ):
        pass
    other.kill()
    other.wait()
    with files.locked_folder(tmp_path):  # a killed owner leaves nothing in the way
        pass


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(InputError, match="must be a folder, got a file"), files.locked_folder(tmp_path / "f"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_warns(number, tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", failing(number))
    with (
        pytest.warns(RuntimeWarning, match=r"doesn't support locks .* would not be noticed"),
        files.locked_folder(tmp_path) as place,
    ):
        assert place == tmp_path


@pytest.mark.parametrize(
    ("number", "message"), [(errno.EAGAIN, "in use by another run"), (errno.EACCES, "in use"), (errno.EIO, "can't be")]
)
def test_other_failures_of_a_lock_stop_it(number, message, tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", failing(number))
    with pytest.raises(InputError, match=message), files.locked_folder(tmp_path):
        pass


def failing(number):
    def flock(handle, how):
        raise OSError(number, os.strerror(number))

    return flock


def test_equal_contents_are_equal_files(tmp_path):
    names = [f"name {i}" for i in range(20)]
    for order in (names, names[::-1]):
        files.save_tensors(tmp_path / order[0], {"x": torch.ones(3)}, {name: {"é": [1, "\udce4"]} for name in order})
    one, other = (files.load_tensors(tmp_path / names[i]) for i in (0, -1))
    assert (tmp_path / names[0]).read_bytes() == (tmp_path / names[-1]).read_bytes()
    assert one[1] == other[1] == {name: {"é": [1, "\udce4"]} for name in names}


def test_no_home_folder_is_one_line(monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it does without HOME and without a passwd entry
    with pytest.raises(InputError, match=r"^--out ~/x: the home folder for '~' isn't known"):
        files.expand("~/x", "--out")
    assert str(files.expand("x", "--out")) == "x"


SAME = """
import sys
from sfm_fast.cli.main import main
for argv in (
    ["stats", "--data", "images", "--out", "stats"],
    ["distill", "--data", "images", "--stats", "stats", "--steps", "3", "--size", "8", "--out", "run", "--average-last", "1"],
    ["classifier", "--data", "images", "--validation", "0", "--weight-decay", "0.1", "--out", "classifier"],
    ["bundle", "run", "--classifier", "classifier", "--out", "bundle.safetensors", "--eval-backbone", "fashion_cnn", "--views", "2"],
):
    assert main([*argv, "--quiet", "--threads", "1"]) == 0
"""


def test_the_same_run_in_two_processes_is_the_same_files(tmp_path):
    found = []
    for place in (tmp_path / "one", tmp_path / "other"):
        place.mkdir()
        write_image_folder(place / "images", per_class=2)
        subprocess.run([sys.executable, "-c", SAME], cwd=place, check=True, stdout=subprocess.DEVNULL)
        results = [
            *place.glob("*/**/*.safetensors"),
            *place.glob("run/**/*.png"),
            place / "stats",
            place / "classifier",
        ]
        found.append({str(path.relative_to(place)): path.read_bytes() for path in results})
    assert len(found[0]) >= 7
    assert [name for name in found[0] if found[0][name] != found[1].get(name)] == []


def test_an_error_is_one_line_whatever_it_quotes():
    assert str(InputError("a\nb:\r\n   c\n")) == "a b: c"
    assert str(InputError(ValueError("x\ny"))) == "x y"
