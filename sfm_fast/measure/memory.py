"""How much memory there is, and whether an error says that there is too little."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# How torch and the libraries under it say it: oneDNN can't make a primitive, and a thread's stack finds no place.
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
    """Bytes that a run may plan with on ``device``: nine tenths of what is free on a GPU, half of what is available on the host."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return unused * 9 // 10  # the allocator's blocks don't fit each other perfectly
    facts = Path("/proc/meminfo")
    if not facts.exists():
        return 4 * 10**9
    lines = dict(line.split(":", 1) for line in facts.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 // 2


def peak_memory(function: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Most bytes allocated at once during ``function()`` beyond what was allocated before it.

    On a GPU the caching allocator's count; on a CPU the running sum of torch's allocator events as its profiler
    records them, which sees every tensor and the workspaces that ops take from torch (not a library's own malloc).
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The profiler's library greets on stderr at every start; errors of the measured function are raised all the same.
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
    """Bytes of tensors that are there now: the caching allocator's count on a GPU, the storages that Python can reach on a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    gc.collect()
    storages: dict[int, int] = {}
    for value in gc.get_objects():
        # type() and not isinstance(): what only pretends to be a tensor (weak proxies, fake tensors) has no memory
        if (
            type(value) in (torch.Tensor, torch.nn.Parameter)
            and value.device.type == "cpu"
            and value.layout == torch.strided
        ):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
