"""A test that breaks its process's CUDA context must not fail those after it. Without a GPU: what breaks is a global."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lost_context import CODE, LostContext, synchronize

CONFTEST = """
from lost_context import LostContext
import state

def pytest_configure(config):
    config.pluginmanager.register(LostContext(state.synchronize))
"""
STATE = """
broken = False

def synchronize():
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nCompile with ...")
"""
TESTS = """
import state

def test_1_right():
    pass

def test_2_merely_wrong():
    assert False, "merely wrong"

def test_3_illegal_access():
    state.broken = True
    state.synchronize()

def test_4_right():
    state.synchronize()

def test_5_right():
    state.synchronize()
"""


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    for name, text in (("conftest.py", CONFTEST), ("state.py", STATE), ("test_it.py", TESTS)):
        (folder / name).write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), str(folder)])
    words = [
        "-m",
        "pytest",
        "-q",
        "-rfE",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(folder),
        *options,
    ]
    return subprocess.run([sys.executable, *words, str(folder)], capture_output=True, text=True, env=environment)


def test_a_worker_ends_and_another_goes_on(tmp_path):
    done = run(tmp_path, "-n", "1")
    text = done.stdout + done.stderr
    assert done.returncode == 1
    assert "merely wrong" in text
    assert "CUDA error: an illegal memory access was encountered" in text  # the failed test's own report
    assert text.count("the CUDA context of this process is lost after test_it.py::test_3_illegal_access") == 1
    assert "test_4_right" not in text
    assert "3 passed" in text


def test_alone_the_run_ends_and_says_why(tmp_path):
    done = run(tmp_path, "-p", "no:xdist")
    assert done.returncode == CODE
    assert "the CUDA context of this process is lost after test_it.py::test_3_illegal_access: CUDA error" in done.stdout
    assert "2 failed, 1 passed" in done.stdout


def broken():
    raise RuntimeError("CUDA error: misaligned address\nmore")


def test_only_a_lost_context_ends_anything(capfd):
    left = []
    LostContext(lambda: None, left.append, worker=True).check("test_x")
    LostContext(lambda: None, left.append, worker=False).check("test_x")
    assert left == []
    LostContext(broken, left.append, worker=True).check("test_x")
    assert left == [CODE]
    line = "the CUDA context of this process is lost after test_x: CUDA error: misaligned address; another worker takes its place"
    assert capfd.readouterr().err == line + "\n"
    with pytest.raises(pytest.exit.Exception, match="lost after test_x: CUDA error: misaligned address"):
        LostContext(broken, left.append, worker=False).check("test_x")


def test_a_process_that_never_used_a_gpu_has_nothing_to_lose():
    synchronize()
