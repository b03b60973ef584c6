"""The C++ build under the address and undefined-behaviour sanitizers, every operation on ragged shapes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXERCISE = """
import sys, torch
torch.set_num_threads(2)
torch.ops.load_library(sys.argv[1])
ops = torch.ops.sfm_fast
for classes, dim in ((2, 1), (3, 5), (17, 33), (70, 100), (300, 129)):
    items = classes + 7
    labels = torch.cat([torch.arange(classes), torch.arange(7) % classes])
    ordered, order = labels.sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(classes + 1))
    centers, shift = torch.randn(classes, dim), torch.randn(dim)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for features, segments in ((torch.randn(items, dim), (order, offsets)), (torch.randn(classes, dim), (None, None))):
            features = features.to(dtype)
            means = ops.class_means(features, *segments, shift)
            ops.class_means_backward(means, *segments, len(features), dtype)
            for kind in range(5):
                _, rows, columns = ops.flow_alignment(features, *segments, centers, shift, kind, 1e-8, 0.5)
                ops.flow_alignment_backward(torch.tensor(1.0), features, *segments, centers, shift, rows, columns)
    groups = torch.arange(classes) // 2
    ops.pair_alignment(centers, means, None, 0, classes, 1e-8, True, False)
    ops.pair_alignment(centers, means, groups, classes // 3, classes - 1, 1e-8, True, False)
    ops.pair_alignment(centers, means, groups, 1, 1, 1e-8, True, False)
for bad in ((order[:-1], offsets), (order + 1, offsets), (order, offsets.flip(0)), (order, None)):
    try:
        ops.class_means(torch.randn(items, dim), *bad, shift)
    except RuntimeError:
        continue
    raise AssertionError("bad segments were taken")
print("all operations ran")
"""


@pytest.mark.slow
def test_address_and_undefined_behaviour(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    # libstdc++ beside it: the sanitizer looks for __cxa_throw before Python has loaded any C++.
    runtimes = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(runtime).exists() for runtime in runtimes):
        pytest.skip("needs libasan")
    torch_folder = Path(torch.__file__).parent
    library = tmp_path / "libsanitized.so"
    sources = [str(ROOT / "csrc" / "ops.cpp"), *map(str, sorted((ROOT / "csrc" / "cpu").glob("*.cpp")))]
    flags = [
        "-std=c++20", "-O1", "-g", "-shared", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-fno-math-errno",
        "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
        "-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-DTORCH_STABLE_ONLY",
        f"-I{torch_folder / 'include'}", f"-I{sysconfig.get_paths()['include']}",
        f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    subprocess.run([compiler, *sources, *flags, "-o", str(library)], check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",  # Python itself leaks at exit
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    for isa in ("avx512", "avx2", "base"):
        done = subprocess.run(
            [sys.executable, "-c", EXERCISE, str(library)],
            capture_output=True,
            text=True,
            env={**environment, "SFM_FAST_CPU_ISA": isa},
        )
        assert done.returncode == 0, done.stderr[:3000]
        assert "all operations ran" in done.stdout
