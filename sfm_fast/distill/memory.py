"""How much memory there is, and whether an error says that there is too little."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch

from ..errors import InputError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


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


def parse_bytes(text: str | int) -> int:
    """ "8GB", "750M", "1.5e9" or a number of bytes; powers of 1000, or of 1024 with an i ("8GiB")."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?)(i?)b?\s*", str(text).lower())
    try:
        if match is None:
            raise ValueError
        number, unit, binary = float(match[1]), match[2], match[3]
        if not math.isfinite(number):
            raise ValueError
    except ValueError:
        raise InputError(f"wanted an amount of memory such as 8GB, 750M or 6GiB, got {text!r}") from None
    factor = 1024 ** ("kmgt".index(unit) + 1) if binary and unit else _UNITS[unit]
    if number * factor < 1:
        raise InputError(f"an amount of memory must be positive, got {text!r}")
    return int(number * factor)
