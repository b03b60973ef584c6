"""Compiled GPU kernels against the committed table: no spills, tensor cores in use, wide loads, registers, shared memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from sfm_fast.kernels import pair_alignment

sys.path.insert(0, str(Path(__file__).parent))
import compile_cuda
import table

COMMITTED = json.loads(table.TABLE.read_text())


def test_triton_kernels_are_no_worse():
    same = table.versions()["triton"] == COMMITTED["versions"]["triton"]
    problems = table.worse(table.triton_rows(), COMMITTED["triton"], same)
    if pair_alignment.OLD:  # there pairs are without tensor cores, and both precisions one kernel
        problems = [problem for problem in problems if "for sm_100" not in problem or "spills" in problem]
    assert problems == []


def test_cuda_kernels_are_no_worse():
    if compile_cuda.find_nvcc() is None:
        pytest.skip("needs nvcc")
    same = table.versions()["nvcc"] == COMMITTED["versions"]["nvcc"]
    assert table.worse(table.cuda_rows(), COMMITTED["cuda"], same) == []


@pytest.mark.parametrize("source", ["triton", "cuda"])
def test_what_the_table_promises(source):
    rows = COMMITTED[source]
    assert {row["arch"] for row in rows} >= {"sm_80", "sm_90", "sm_100"}
    assert not [row for row in rows if row["spills"]]
    products = [row for row in rows if row["kernel"].startswith(("pair_tiles", "pair_gradient", "weights", "gradient"))]
    assert len(products) >= 12
    assert not [row for row in products if not row["tensor_core"] or not row["loads128"]]


@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize(
    "arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx1100"]
)
def test_products_have_the_columns_that_the_oldest_triton_wants(monkeypatch, arch, high):
    monkeypatch.setattr(pair_alignment, "architecture", lambda device: arch)
    chosen = pair_alignment.plan(torch.device("cuda"), high)
    assert min(chosen.weights_k, chosen.gradient_k) >= 16


@pytest.mark.parametrize("arch", ["sm_100", "sm_103"])
def test_an_old_triton_has_no_tensor_cores_of_blackwell(monkeypatch, arch):
    monkeypatch.setattr(pair_alignment, "architecture", lambda device: arch)
    for old, wanted in ((True, "ieee"), (False, "tf32")):
        monkeypatch.setattr(pair_alignment, "OLD", old)
        assert pair_alignment.plan(torch.device("cuda"), False).precision == wanted


def test_a_worse_kernel_is_noticed():
    row = {
        "kernel": "k",
        "arch": "sm_90",
        "registers": 64,
        "spills": 0,
        "shared": 1024,
        "loads128": 8,
        "tensor_core": 4,
    }
    assert table.worse([row], [row], True) == []
    for change, wanted in (
        ({"spills": 3}, "spills"),
        ({"registers": 80}, "registers 64 -> 80"),
        ({"shared": 2048}, "shared"),
        ({"loads128": 4}, "loads128"),
        ({"tensor_core": 0}, "tensor_core"),
        ({"kernel": "other"}, "not in the table"),
    ):
        assert any(wanted in problem for problem in table.worse([row | change], [row], True)), change
    # Another compiler: registers may move, tensor cores may not go away.
    assert table.worse([row | {"registers": 80}], [row], False) == []
    assert table.worse([row | {"tensor_core": 0}], [row], False)
