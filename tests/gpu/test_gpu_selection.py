"""The quick set of the GPU tests leaves nothing out but precisions, and nothing that fills a card is in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from gpu_selection import longest_first

FOLDER = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def chosen():
    """Names of the tests of test_gpu.py: {"all": .., "quick": .., "alone": ..}."""

    def names(*options):
        words = [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-q",
            "-p",
            "no:cacheprovider",
            *options,
            "gpu/test_gpu.py",
            "gpu/test_gpu_images.py",
        ]
        done = subprocess.run(words, capture_output=True, text=True, cwd=FOLDER)
        return {line for line in done.stdout.splitlines() if "::" in line}

    return {"all": names(), "quick": names("-m", "gpu_quick"), "alone": names("-m", "gpu_alone")}


def test_every_kernel_and_case_is_in_the_quick_set(chosen):
    everything = {re.sub(r"torch\.(b?float16)", "torch.float32", name) for name in chosen["all"] - chosen["alone"]}
    assert len(everything) > 300
    assert everything <= chosen["quick"]


def test_the_quick_set_is_small_and_has_some_bfloat16(chosen):
    assert len(chosen["quick"]) < len(chosen["all"]) / 2
    low = {name for name in chosen["quick"] if "torch.bfloat16" in name}
    assert {re.search(r"::(\w+)", name)[1] for name in low} == {
        re.search(r"::(\w+)", name)[1] for name in chosen["all"] if "torch.bfloat16" in name
    }
    assert not [name for name in chosen["quick"] if "torch.float16" in name]


def test_what_fills_a_card_runs_alone(chosen):
    assert not chosen["alone"] & chosen["quick"]
    large = {name for name in chosen["all"] if "two_to_the_31" in name or "imagenet_21k" in name}
    assert len(large) >= 9
    assert chosen["alone"] == large


def test_compilers_come_first():
    items = [SimpleNamespace(name=name) for name in ("test_a", "test_compile", "test_b", "test_compiled_images")]
    longest_first(items)
    assert [item.name for item in items] == ["test_compile", "test_compiled_images", "test_a", "test_b"]
