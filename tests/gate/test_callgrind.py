"""Instruction counts: the profile is read right, and a count repeats."""

from __future__ import annotations

import shutil

import pytest

from sfm_fast import InputError
from sfm_fast.gate import callgrind
from sfm_fast.gate.callgrind import count_instructions, instructions
from sfm_fast.gate.gate import Gate
from sfm_fast.ops.library import problems

PROFILE = """# callgrind format
version: 1
positions: instr line
events: Dw Ir

ob=(1) /usr/lib/python3.11
fl=(1) a.c
fn=(1) main
0x10 5 1 100
+2 +1 0 7
cfn=(2) kernel
cob=(2) /there/sfm_fast/_C.abi3.so
calls=3 0x50 1
+4 +1 9 5000
* * 0 3
ob=(2)
fn=(2)
0x50 1 4 900
-3 -1 1 50
fi=(2) other.h
+1 * 8
fe=(1)
ob=(1)
fn=(3) later
7 7 0 1

totals: 14 1061
"""


def test_self_cost_by_library_leaves_calls_out():
    found = instructions(PROFILE.splitlines())
    assert found == {"/usr/lib/python3.11": 100 + 7 + 3 + 1, "/there/sfm_fast/_C.abi3.so": 900 + 50}
    assert sum(found.values()) == 1061  # the profile's own total


def test_names_without_compression():
    lines = ["events: Ir", "ob=/a/x.so", "fn=f", "1 10", "calls=1 5", "1 99", "+1 2", "ob=/a/y.so", "* 5"]
    assert instructions(lines) == {"/a/x.so": 12, "/a/y.so": 5}


@pytest.mark.parametrize("name", ["_C", "sfm_fast/_C", "_C.abi3.so", "/there/sfm_fast/_C.abi3.so"])
def test_a_library_is_named_by_the_end_of_its_path(name):
    assert callgrind._chosen({"/there/sfm_fast/_C.abi3.so": 3, "/there/lib_C.so": 5}, name) == 3


def test_a_library_that_ran_nothing_or_has_a_namesake_is_refused():
    with pytest.raises(InputError, match=r"'_D' ran no instruction: /a/_C.so"):
        callgrind._chosen({"/a/_C.so": 3}, "_D")
    with pytest.raises(InputError, match=r"names several libraries that ran: /a/_C.so, /b/_C.so"):
        callgrind._chosen({"/a/_C.so": 3, "/b/_C.so": 4}, "_C")
    assert callgrind._chosen({"/a/_C.so": 3, "/b/_C.so": 4}, "b/_C") == 4


def test_bad_source_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(callgrind.subprocess, "run", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(InputError, match="setup: not Python source"):
        count_instructions("import (", {"a": "1"})
    with pytest.raises(InputError, match="twice: not Python source"):
        count_instructions("", {"twice": "1 +"})
    with pytest.raises(InputError, match="at least one statement"):
        count_instructions("", {})


@pytest.mark.parametrize(
    ("missing", "message"), [("valgrind", "apt install valgrind"), ("cc gcc clang", "apt install gcc")]
)
def test_what_is_missing_is_named(monkeypatch, missing, message):
    monkeypatch.delenv("CC", raising=False)
    found = {name: f"/usr/bin/{name}" for name in ("valgrind", "cc", "gcc", "clang") if name not in missing.split()}
    monkeypatch.setattr(callgrind.shutil, "which", found.get)
    with pytest.raises(InputError, match=message):
        count_instructions("", {"a": "1"})


needs_valgrind = pytest.mark.skipif(
    not (shutil.which("valgrind") and shutil.which("cc")), reason="needs valgrind and a C compiler"
)


@needs_valgrind
def test_statements_are_counted_apart_after_one_run_to_warm_up(tmp_path):
    (tmp_path / "helper_module.py").write_text("def work(n):\n    return sum(range(n))\n")
    setup = "from helper_module import work\ncalls = []"
    statements = {"small": "calls.append(0); work(2000)", "large": "work(20000)", "state": "assert len(calls) == 2"}
    counts = count_instructions(setup, statements, pythonpath=[str(tmp_path)])
    assert list(counts) == list(statements)
    assert 5 < counts["large"] / counts["small"] < 11
    with pytest.raises(InputError, match="ZeroDivisionError"):
        count_instructions("", {"wrong": "1 / 0"})


SETUP = """
import torch, sfm_fast
torch.set_num_threads(1)
torch.manual_seed(0)

def make(classes):
    centers, features = torch.randn(classes, 256), torch.randn(classes, 256, requires_grad=True)

    def step():
        features.grad = None
        sfm_fast.flow_alignment_loss(features, centers, alignment="global", backend="cpu").backward()

    return step

plain, more = make(200), make(260)
"""


@needs_valgrind
@pytest.mark.slow
@pytest.mark.skipif("cpu" in problems, reason="the C++ library is not built here")
@pytest.mark.soak
def test_an_op_counts_the_same_every_time_and_more_rows_count_more():
    statements = {"plain": "plain()", "again": "plain()", "more": "more()"}
    first = count_instructions(SETUP, statements, library="sfm_fast/_C")
    other = Gate().instructions(SETUP, "plain()", library="sfm_fast/_C")
    assert abs(first["again"] / first["plain"] - 1) <= 1e-3
    assert abs(other / first["plain"] - 1) <= 1e-3
    assert first["more"] / first["plain"] == pytest.approx(1.3, abs=0.03)
