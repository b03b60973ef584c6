"""What every benchmark shares: facts about the machine, its measured ceilings, and a limit on memory."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import sfm_fast
from sfm_fast.distill.memory import is_out_of_memory as is_out_of_memory
from sfm_fast.testing.perf import captured, interleaved


def environment() -> dict[str, Any]:
    """Hardware, versions, threads and commit, as they go into every result file."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sfm_fast": sfm_fast.__version__,
        "commit": _commit(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def copy_bandwidth(device: torch.device, elements: int = 1 << 26) -> float:
    """Bytes a second that a large float32 copy moves, read and written: the ceiling of memory-bound work."""
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source).zero_()  # touched once, so that fresh pages aren't part of the measurement
    seconds = interleaved({"copy": lambda: target.copy_(source)}, rounds=11, warmup=2, device=device)["copy"].median
    return 2 * 4 * elements / seconds


def matmul_rate(device: torch.device, size: int = 2048) -> float:
    """Floating-point operations a second of a large float32 matrix product: the ceiling of compute-bound work."""
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    out = torch.empty_like(a)
    seconds = interleaved({"mm": lambda: torch.mm(a, b, out=out)}, rounds=11, warmup=2, device=device)["mm"].median
    return 2 * size**3 / seconds


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


def graph_microseconds(function: Callable[[], object], replays: int = 200) -> float:
    """Device time of one call under a CUDA graph, in microseconds: the median over events around single replays."""
    graph, _ = captured(function)
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")  # larger than any L2 cache
    times = []
    for _ in range(replays):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2]
