"""The performance gate on this project's own kernels: it catches one slowed by 1.3 and one C x C matrix more, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sfm_fast.gate.gate import Gate
from sfm_fast.measure import tracker
from sfm_fast.ops import backends

# Nested runs forget what they imported, which torch's libraries of operators don't survive: so all of it now.
with tracker.Tracker():
    torch.ones(2, 2) @ torch.ones(2, 2)
Gate().allocated(lambda: torch.ones(2))

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.skipif(
    backends.explain(torch.empty(1, 1)).backend != "cpu", reason="needs the C++ kernels, with no GPU's in their place"
)
needs_valgrind = pytest.mark.skipif(
    not (shutil.which("valgrind") and shutil.which("cc")), reason="needs valgrind and a C compiler"
)

# The pairs of 0.55 of the classes are 0.3 of all pairs: the compiled operation does 1.3 times the work, in no more memory.
KERNELS = """
import torch
from sfm_fast import flow_alignment_loss

torch.set_num_threads(1)
torch.manual_seed(0)
centers, features = torch.randn(CLASSES, 256), torch.randn(CLASSES, 256)

def step(count=CLASSES):
    leaf = features[:count].detach().requires_grad_()
    loss = flow_alignment_loss(leaf, centers[:count], alignment="pair", backend="cpu")
    return torch.autograd.grad(loss, leaf)

def slowed():
    step(round(0.55 * CLASSES))
    return step()

def fattened():
    pairs = torch.empty(CLASSES, CLASSES)
    return step()
"""
TESTS = """
import pytest
from kernels_under_test import CALL, step

def test_bytes(performance_gate):
    performance_gate.unchanged("bytes", performance_gate.allocated(CALL, device="cpu"), unit="bytes")

def test_time(performance_gate):
    performance_gate.ratio(CALL, step, at_most=1.15, seconds=20, device="cpu")

@pytest.mark.counted
def test_instructions(performance_gate):
    count = performance_gate.instructions("from kernels_under_test import CALL", "CALL()", library="sfm_fast/_C")
    performance_gate.unchanged("instructions", count)
"""


def gated(pytester: pytest.Pytester, call: str, classes: int, which: str, *options: str) -> dict[str, str]:
    """The verdict of each test ``which`` (pytest's -k) with the function ``call`` in the kernel's place."""
    kernels = KERNELS.replace("CLASSES", str(classes)) + f"\nCALL = {call}\n"
    pytester.makepyfile(test_kernels=TESTS, kernels_under_test=kernels)
    pytester.makeini("[pytest]\nmarkers = counted: by callgrind\npythonpath = .")
    arguments = ["--gate-json=out.json", "--gate-inconclusive=pass", "-k", which, "-p", "no:cacheprovider", *options]
    result = pytester.runpytest_inprocess(*arguments)
    measured = json.loads(Path(pytester.path / "out.json").read_text())["measurements"]
    verdicts = {one["test"].split("::test_")[1]: one["verdict"] for one in measured}
    # What the gate says is what the run does.
    assert result.ret == (1 if "failed" in verdicts.values() else 0)
    return verdicts


@pytest.fixture(autouse=True)
def _no_bytecode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' file changes more often than once a second, which a cached .pyc wouldn't see."""
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")


@pytest.mark.slow
def test_nothing_changed(pytester):
    which = "bytes or time"
    assert gated(pytester, "step", 300, which, "--gate-update")["bytes"] == "updated"
    verdicts = gated(pytester, "step", 300, which)
    assert verdicts["bytes"] == "passed"
    assert verdicts["time"] != "failed"


@pytest.mark.slow
def test_a_slowed_kernel_is_timed(pytester):
    """Caught, or on a very busy machine said to be undecided; never passed. The memory is the same."""
    which = "bytes or time"
    gated(pytester, "step", 300, which, "--gate-update")
    verdicts = gated(pytester, "slowed", 300, which)
    assert verdicts["bytes"] == "passed"
    assert verdicts["time"] in ("failed", "inconclusive")
    measured = json.loads((pytester.path / "out.json").read_text())["measurements"]
    (ratio,) = (one for one in measured if one["what"] == "time ratio")
    assert ratio["measured"] > 1.05


@needs_valgrind
@pytest.mark.soak
def test_a_slowed_kernel_is_counted(pytester):
    """Of instructions, exactly: unchanged passes, 1.3 times the work fails."""
    assert gated(pytester, "step", 60, "instructions", "--gate-update") == {"instructions": "updated"}
    assert gated(pytester, "step", 60, "instructions") == {"instructions": "passed"}
    assert gated(pytester, "slowed", 60, "instructions") == {"instructions": "failed"}
    (grown,) = json.loads((pytester.path / "out.json").read_text())["measurements"]
    assert 1.1 < grown["measured"] / grown["limit"] < 1.6


def test_an_extra_matrix_of_all_pairs(pytester):
    gated(pytester, "step", 300, "bytes", "--gate-update")
    assert gated(pytester, "step", 300, "bytes") == {"bytes": "passed"}
    assert gated(pytester, "fattened", 300, "bytes") == {"bytes": "failed"}
    (grown,) = json.loads((pytester.path / "out.json").read_text())["measurements"]
    assert grown["measured"] - grown["limit"] == 4 * 300 * 300
