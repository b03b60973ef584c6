"""Facts about the machine a benchmark runs on: hardware and versions, measured ceilings, a limit on memory."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import sfm_fast
from sfm_fast.testing.perf import interleaved


def environment(device: torch.device | str | None = None) -> dict[str, Any]:
    """Hardware, versions, threads and commit, as they go into every result file. ``gpu`` is named where ``device`` is one."""
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    commit = _git("rev-parse", "--short", "HEAD")
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": kind,
        "gpu": torch.cuda.get_device_name(device) if kind == "cuda" else None,
        "cuda": torch.version.cuda if kind == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "sfm_fast": sfm_fast.__version__,
        "commit": commit,
        # Results and their tables don't change what was measured.
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!*.md")) if commit else None,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _git(*words: str) -> str | None:
    """What git says in this checkout; None where the package was installed without one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=root)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def copy_bandwidth(device: torch.device, elements: int = 1 << 26) -> float:
    """Bytes a second that a large float32 copy moves, read and written: the ceiling of memory-bound work."""
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source).zero_()  # touched once, so that fresh pages aren't part of the measurement
    seconds = interleaved({"copy": lambda: target.copy_(source)}, rounds=11, warmup=2, device=device)["copy"].median
    return 2 * 4 * elements / seconds


def matmul_rate(device: torch.device, size: int = 2048, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations a second of a large matrix product: the ceiling of compute-bound work."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = interleaved({"mm": lambda: torch.mm(a, b, out=out)}, rounds=11, warmup=2, device=device)["mm"].median
    return 2 * size**3 / seconds


def ceilings(device: torch.device) -> dict[str, float]:
    """Both rates, measured now: beside every case and not once a run, for a shared machine has slow moments."""
    return {"copy_bandwidth": copy_bandwidth(device), "matmul_rate": matmul_rate(device)}


@contextlib.contextmanager
def memory_limit(device: torch.device, reserve: float = 0.15) -> Iterator[None]:
    """Let allocations fail, instead of the whole machine, once a CPU run would take all but ``reserve`` of what is free."""
    if device.type != "cpu" or not Path("/proc/meminfo").exists():
        yield
        return
    import resource

    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(facts["MemAvailable"].split()[0]) * 1024
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(virtual + (1 - reserve) * available), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
