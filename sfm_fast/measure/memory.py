"""Free, peak and used memory, and recognising out-of-memory errors."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Texts of out-of-memory errors from torch and its libraries; oneDNN can't create a primitive, and threads can't get a stack.
_SAID = (
    "allocate memory",
    "not enough memory",
    "bad_alloc",
    "out of memory",
    "ALLOC_FAILED",
    "could not create a primitive",
    "could not create a memory",
    "Resource temporarily unavailable",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, CUDA or Python ran out of memory."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in str(error) for words in _SAID)


def free_memory(device: torch.device) -> int:
    """Bytes that a run may use on ``device``: nine tenths of the free memory on a GPU, half of the available memory on the host."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return unused * 9 // 10  # allow for the allocator's fragmentation
    facts = Path("/proc/meminfo")
    if not facts.exists():
        return 4 * 10**9
    lines = dict(line.split(":", 1) for line in facts.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 // 2


def peak_memory(function: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Peak bytes allocated during ``function()`` beyond what was allocated before it.

    On a GPU from the caching allocator's statistics; on a CPU the running sum of torch's allocator events from its profiler,
    which include all tensors and the workspaces that operations allocate through torch (but no library's own malloc).
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The profiler's library prints to stderr at every start; errors of the measured function are still raised.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    current = peak = 0
    for _, change in changes:
        current += change
        peak = max(peak, current)
    return peak


def living_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes of tensors that exist now: the caching allocator's count on a GPU, the storages of Python's tensors on a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    gc.collect()
    storages: dict[int, int] = {}
    for value in gc.get_objects():
        # type() instead of isinstance(), because weak proxies and fake tensors have no memory
        if (
            type(value) in (torch.Tensor, torch.nn.Parameter)
            and value.device.type == "cpu"
            and value.layout == torch.strided
        ):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
