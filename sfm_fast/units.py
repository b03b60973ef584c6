"""Parses amounts of memory, and formats memory, times and ratios for people."""

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
        raise InputError(
            f"an amount of memory must be a number with a unit such as 8GB, 750M or 6GiB, got {text!r}"
        ) from None
    factor = 1024 ** ("kmgt".index(unit) + 1) if binary and unit else _UNITS[unit]
    if number * factor < 1:
        raise InputError(f"an amount of memory must be positive, got {text!r}")
    return int(number * factor)


def digits(value: float) -> str:
    """At least three significant digits, without decimals from 100 on: 0.0123, 1.23, 12.3, 123, 1234."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, without the unit."""
    return digits(seconds * 1e3)


def duration(seconds: float) -> str:
    """Seconds with a suitable unit: µs, ms or s."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{digits(seconds / scale)} {unit}"
    return f"{digits(seconds / 1e-6)} µs"


def memory(count: float, places: int | None = None) -> str:
    """Bytes in decimal units: B, kB, MB or GB. ``places``: number of decimals; None: two for GB, else one."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= scale:
            decimals = places if places is not None else 2 if unit == "GB" else 1
            return f"{count / scale:.{decimals}f} {unit}"
    return f"{count:.0f} B"


def megabytes(count: float) -> str:
    """Bytes as decimal megabytes, for table columns with a single unit."""
    return f"{count / 1e6:.1f} MB"


def times(value: float, low: float | None = None, high: float | None = None) -> str:
    """A factor with its interval: 3.1x (2.9–3.3); two decimals below 2, one below 100."""
    places = 2 if value < 2 else 1 if value < 100 else 0
    interval = "" if low is None or high is None else f" ({low:.{places}f}–{high:.{places}f})"
    return f"{value:.{places}f}x{interval}"


def percent(change: float) -> str:
    """A relative change with its sign: +1.1 %."""
    return f"{100 * change:+.1f} %"
