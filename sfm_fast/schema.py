"""What a value that comes from a file's JSON must look like, so that code that reads it later can rely on its type."""

from __future__ import annotations

import math
import os
from typing import Any

from .errors import InputError

# What `Backbone.describe` writes, as far as it is read; files of earlier versions, and of other tools, say less.
BACKBONE = {
    "name?": str,
    "fingerprint?": str,
    "num_features?": int,
    "input_size?": int,
    "resize?": int,
    "mean?": [float],
    "std?": [float],
    "precision?": str,
}
NAMES = [str]


def check(path: str | os.PathLike[str], value: Any, spec: Any, what: str = "file") -> Any:
    """``value`` itself, or ``InputError`` naming the file ``path``, a damaged ``what``, and the first place that isn't as ``spec`` has it.

    spec: a type (float takes whole numbers too, nothing takes NaN, infinity or a whole number beyond 64 bits); None; [spec], a list of
    such; {key: spec}, a table that may have further keys ("key?" may be missing); {str: spec}, a table of such under any keys; a tuple of
    specs, one of them; or a function that says whether the value is right.
    """
    if problem := _problem(value, spec, ""):
        raise InputError(f"{path}: damaged {what} ({problem})")
    return value


def _problem(value: Any, spec: Any, where: str) -> str:
    """What is wrong with ``value``, which stands at ``where``; "" where nothing is."""
    if isinstance(spec, tuple):
        problems = [_problem(value, one, where) for one in spec]
        return "" if "" in problems else problems[0]
    parts: list[tuple[Any, Any, str]]
    if isinstance(spec, list) and isinstance(value, list):
        parts = [(item, spec[0], f"{where}[{place}]") for place, item in enumerate(value)]
    elif isinstance(spec, dict) and isinstance(value, dict):
        if str in spec:
            wanted = dict.fromkeys(value, spec[str])
        else:
            wanted = {key.removesuffix("?"): one for key, one in spec.items() if key[-1] != "?" or key[:-1] in value}
        if missing := next((key for key in wanted if key not in value), None):
            return f"{where or 'it'} has no {missing}"
        parts = [(value[key], one, f"{where}{': ' if where else ''}{str(key)[:60]}") for key, one in wanted.items()]
    else:
        return "" if _is(value, spec) else f"{where or 'it'} is {repr(value)[:60]}"
    return next((found for part in parts if (found := _problem(*part))), "")


def _is(value: Any, spec: Any) -> bool:
    if spec is None:
        return value is None
    if isinstance(spec, list | dict):  # which the value is none of
        return False
    if not isinstance(spec, type):
        return bool(spec(value))
    if type(value) is int and spec in (int, float):  # a bool is none
        return -(2**63) <= value < 2**64
    return type(value) is spec and (not isinstance(value, float) or math.isfinite(value))
