"""What is paid once a process: importing the package, and the first call of each loss and of the image path, each in a fresh process.

sfm-fast bench --suite startup
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import torch

from sfm_fast.benchmarks.harness import Row
from sfm_fast.testing.perf import Timing, summary

SUITE = "startup"
ROUNDS = 3
# Each prints the seconds of its own part: torch's import is everybody's, and stands apart.
PARTS = {
    "import torch": ("", "import torch"),
    "import sfm_fast, after torch": ("import torch", "import sfm_fast"),
    "first loss, forward + backward": (
        "import torch, sfm_fast; c = torch.randn(100, 384, device=DEVICE); x = torch.randn(100, 384, device=DEVICE, requires_grad=True)",
        "sfm_fast.flow_alignment_loss(x, c).backward(); torch.cuda.synchronize() if c.is_cuda else None",
    ),
    "second loss": (
        "import torch, sfm_fast; c = torch.randn(100, 384, device=DEVICE); x = torch.randn(100, 384, device=DEVICE, requires_grad=True);"
        "sfm_fast.flow_alignment_loss(x, c).backward(); torch.cuda.synchronize() if c.is_cuda else None",
        "sfm_fast.flow_alignment_loss(x, c).backward(); torch.cuda.synchronize() if c.is_cuda else None",
    ),
    "first pair loss": (
        "import torch, sfm_fast; c = torch.randn(100, 384, device=DEVICE); x = torch.randn(100, 384, device=DEVICE, requires_grad=True)",
        "sfm_fast.flow_alignment_loss(x, c, alignment='pair').backward(); torch.cuda.synchronize() if c.is_cuda else None",
    ),
    "first eager loss, without this package": (
        "import torch; c = torch.randn(100, 384, device=DEVICE); x = torch.randn(100, 384, device=DEVICE, requires_grad=True)",
        "(1 - torch.nn.functional.cosine_similarity((c - c.mean(0)).flatten(), (x - x.mean(0)).flatten(), dim=0)).backward();"
        "torch.cuda.synchronize() if c.is_cuda else None",
    ),
}


def _seconds(before: str, timed: str, device: torch.device) -> float:
    code = f"DEVICE = {str(device)!r}\n{before}\nimport time; began = time.perf_counter()\n{timed}\nprint(time.perf_counter() - began)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["failed without a word"])[-1])
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def rows(preset: str, device: torch.device, only: str = "") -> Iterator[list[Row]]:
    """One row for each part; the same whatever the preset."""
    for name, (before, timed) in PARTS.items():
        if only not in name:
            continue
        row: Row = {"suite": SUITE, "case": name, "contender": "sfm_fast" if "sfm_fast" in timed else "torch"}
        try:
            timing: Timing = summary([_seconds(before, timed, device) for _ in range(ROUNDS)])
        except RuntimeError as error:
            yield [row | {"mode": "once", "status": f"failed: {error}"}]
            continue
        yield [row | {"mode": "once", "status": "ok", **timing.__dict__}]
