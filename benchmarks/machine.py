"""Facts about the machine a benchmark runs on: hardware and versions, measured ceilings, a limit on memory."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import torch

import sfm_fast
from sfm_fast.measure.memory import free_memory
from sfm_fast.measure.timing import samples, summary

COPY_BYTES = 1 << 31  # of a copy on a GPU: two orders of magnitude more than its L2 cache
GPU_SIDE = 8192  # of a matrix product that uses every unit of a GPU


class Environment(TypedDict, total=False):
    """The machine and the versions that a result was made with; results of earlier versions have fewer keys."""

    cpu: str
    cores: int | None
    threads: int
    memory_bytes: int
    device: str
    gpu: str | None
    cuda: str | None
    python: str
    torch: str
    triton: str | None
    sfm_fast: str
    commit: str | None
    dirty: bool | None


def environment(device: torch.device | str | None = None) -> Environment:
    """Hardware, versions, threads and commit for every result file; ``gpu`` only if ``device`` is one."""
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    commit = _git("rev-parse", "--short", "HEAD") or os.environ.get("SFM_FAST_COMMIT") or None
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!*.md")
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
        "dirty": None if changes is None else bool(changes),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _git(*words: str) -> str | None:
    """Git's output in this checkout; None if the package isn't in a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=root)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def copy_bandwidth(device: torch.device, elements: int | None = None) -> float:
    """Bytes per second, read and written, of a large float32 copy: the ceiling of memory-bound work."""
    if elements is None:
        elements = 1 << 26 if device.type == "cpu" else min(COPY_BYTES, free_memory(device) // 4) // 4
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source).zero_()  # written once, so that allocating pages isn't part of the measurement
    return 2 * 4 * elements / _seconds(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, size: int = 2048, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations per second of a large matrix product: the ceiling of compute-bound work."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _seconds(lambda: torch.mm(a, b, out=out), device)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median time of some calls: by the host's clock on a CPU, between events on a GPU."""
    return summary(samples({"call": call}, rounds=11, warmup=2, device=device, events=True)["call"]).median


def ceilings(device: torch.device) -> dict[str, float]:
    """Rates measured now: for every case and not once per run, since a shared machine is sometimes slower.

    copy_bandwidth, matmul_rate (float32 without TF32); on a GPU also tf32_rate and bf16_rate, of its tensor cores.
    """
    if device.type == "cpu":
        return {"copy_bandwidth": copy_bandwidth(device), "matmul_rate": matmul_rate(device)}
    rates = {"copy_bandwidth": copy_bandwidth(device)}
    for name, precision in (("matmul_rate", "ieee"), ("tf32_rate", "tf32")):
        with float32_products(precision):
            rates[name] = matmul_rate(device, GPU_SIDE)
    return rates | {"bf16_rate": matmul_rate(device, GPU_SIDE, torch.bfloat16)}


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Compute float32 matrix products on GPUs as "ieee" or "tf32"; the process's own setting is restored at the end."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def card_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's memory that this process has or can still allocate; None on a CPU."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)


@contextlib.contextmanager
def memory_limit(device: torch.device, reserve: float = 0.15) -> Iterator[None]:
    """Let allocations fail before a CPU run takes more than the free memory minus the fraction ``reserve``."""
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
