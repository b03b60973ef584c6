"""Amounts of memory and of time, as people write and read them."""

from __future__ import annotations

import math
import re

from .errors import InputError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


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
