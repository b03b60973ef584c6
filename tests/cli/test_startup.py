"""What the command line imports: nothing heavy for help, usage errors and mistakes that can be found without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from sfm_fast.cli import main
from sfm_fast.cli.threads import CHOSEN, SPINNING, bound_spinning
from sfm_fast.files import locked_folder

HEAVY = ("torch", "timm", "numpy")
# Runs command lines one after the other in one process; prints each one's exit code and the heavy modules imported by then.
CALLS = """
import contextlib, io, json, sys
if {blocked!r}:
    sys.modules.update(dict.fromkeys({blocked!r}))  # their import raises ModuleNotFoundError
from sfm_fast.cli import entry
done = []
for words in {lines!r}:
    sys.argv = ["sfm-fast", *words]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = entry()
        except SystemExit as stop:
            code = stop.code
    done.append((code, said.getvalue(), [name for name in {heavy!r} if sys.modules.get(name)]))
print(json.dumps(done))
"""
COMMANDS = ("demo", "stats", "distill", "classifier", "eval", "bundle", "classify", "plan", "bench", "info")


def calls(cwd, *lines: list[str], blocked: tuple[str, ...] = ()) -> list[tuple[int, str, list[str]]]:
    """Of each command line: exit code, what it printed, and the heavy modules imported until its end."""
    code = CALLS.format(blocked=blocked, lines=lines, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=cwd)
    return [(code, said, imported) for code, said, imported in json.loads(done.stdout)]


def test_help_and_version_import_nothing_heavy(tmp_path):
    lines = [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS), ["bench", "compare", "--help"]]
    for words, (code, said, imported) in zip(lines, calls(tmp_path, *lines), strict=True):
        assert (words, code, imported) == (words, 0, [])
        assert said


def test_waiting_threads_sleep_soon_unless_the_user_decides():
    nothing: dict[str, str] = {}
    bound_spinning(nothing)
    assert nothing == SPINNING
    for name in CHOSEN:
        chosen = {name: "active"}
        bound_spinning(chosen)
        assert chosen == {name: "active"}


def test_how_threads_wait_is_decided_before_torch_is_loaded(tmp_path):
    code = """
import builtins, os
from sfm_fast.cli import entry
load = builtins.__import__
def watched(name, *rest):
    if name == "torch":
        print("torch is loaded with", os.environ.get("GOMP_SPINCOUNT"))
        raise SystemExit
    return load(name, *rest)
builtins.__import__ = watched
entry()
"""
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    words = [sys.executable, "-c", code, "info"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.strip() == f"torch is loaded with {SPINNING['GOMP_SPINCOUNT']}"


def test_every_command_is_in_the_list():
    assert {module.NAME for module in main.COMMANDS} == set(COMMANDS)


def test_usage_errors_import_nothing_heavy(tmp_path):
    lines = [
        [],
        ["distil"],
        ["stats", "--nosuch"],
        ["distill", "--method", "nosuch"],
        ["stats", "--precision", "fp8"],
        ["bundle", "run", "--classifier", "c", "--out", "o", "--dtype", "int8"],
        ["stats", "--clusters", "two"],
    ]
    for words, (code, said, imported) in zip(lines, calls(tmp_path, *lines), strict=True):
        assert (words, code, imported) == (words, 2, [])
        assert "error:" in said


MISTAKES = {
    "folder of stats": (["stats", "--data", "nosuch"], "is no existing folder"),
    "folder of distill": (["distill", "--data", "nosuch"], "is no existing folder"),
    "folder of classifier": (["classifier", "--data", "nosuch"], "is no existing folder"),
    "folder of eval": (["eval", "--references", "full", "--data", "nosuch"], "is no existing folder"),
    "checkpoint": (["stats", "--checkpoint", "nosuch.safetensors"], "no such file"),
    "statistics": (["distill", "--stats", "nosuch.safetensors"], "no such file"),
    "classifier": (["eval", "--references", "full", "--classifier", "nosuch.safetensors"], "no such file"),
    "run": (["eval", "nosuch"], "no such file"),
    "run of bundle": (["bundle", "nosuch", "--classifier", "c", "--out", "o"], "nosuch: no such file"),
    "bundle": (["classify", "nosuch", "photo.jpg"], "nosuch: no bundle here"),
    "memory": (["plan", "--memory", "much"], "an amount of memory must be"),
    "weights": (["stats", "--weights", "random"], "weights of 'fashion_vit' must be 'pretrained'"),
    "folder of the output": (["stats", "--out", "nosuch/stats.safetensors"], "no such folder"),
    "output in use": (["distill", "--out", "used"], "used"),
}


def test_mistakes_are_found_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "letter.txt").write_text("not a run")
    lines = [words for words, _ in MISTAKES.values()]
    for name, (code, said, imported) in zip(MISTAKES, calls(tmp_path, *lines), strict=True):
        assert (name, code) == (name, 1), said
        assert MISTAKES[name][1] in said
        assert (name, imported) == (name, [])
        assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("package", ["torch", "timm"])
def test_without_a_package_help_works_and_a_command_names_the_extra(package, tmp_path):
    shown, ran = calls(tmp_path, ["stats", "--help"], ["stats", "--quiet"], blocked=(package,))
    assert shown[0] == 0
    assert ran[0] == 1
    assert package in ran[1]
    assert "pip install 'sfm_fast[distill]'" in ran[1]


def test_a_run_in_use_is_found_before_anything_heavy_is_imported(tmp_path):
    with locked_folder(tmp_path / "used"):
        ((code, said, imported),) = calls(tmp_path, ["distill", "--out", "used"])
    assert (code, imported) == (1, [])
    assert "used: in use by another run" in said
