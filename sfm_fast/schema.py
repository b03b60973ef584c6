"""Checks the types of values from a file's JSON, so that code that reads them later can rely on them."""

from __future__ import annotations

import math
import os
from typing import Any

from .errors import InputError

# The entries of `Backbone.describe`, all optional because files of earlier versions and other tools have fewer.
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
    """``value`` if it matches ``spec``; else raises ``InputError`` naming the file ``path``, the damaged ``what`` and the first mismatch.

    spec: a type (float includes integers; NaN, infinity and integers beyond 64 bits never match); None; [spec], a list of matching
    values; {key: spec}, a dictionary that may have further keys ("key?" may be missing); {str: spec}, a dictionary of matching values
    with any keys; a tuple of alternatives; or a predicate.
    """
    if problem := _problem(value, spec, ""):
        raise InputError(f"{path}: damaged {what} ({problem})")
    return value


def _problem(value: Any, spec: Any, where: str) -> str:
    """The first mismatch of ``value``, whose position is ``where``; "" if it matches."""
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
    return next((problem for part in parts if (problem := _problem(*part))), "")


def _is(value: Any, spec: Any) -> bool:
    if spec is None:
        return value is None
    if isinstance(spec, list | dict):  # the value is no list or dictionary
        return False
    if not isinstance(spec, type):
        return bool(spec(value))
    if type(value) is int and spec in (int, float):  # False for bool
        return -(2**63) <= value < 2**64
    return type(value) is spec and (not isinstance(value, float) or math.isfinite(value))
