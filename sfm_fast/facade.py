"""Packages whose public names are loaded at their first use, so that importing a package doesn't import unused modules."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazy(package: str, files: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of ``package``; ``files`` maps its modules to their public names.

    Example: ``lazy(__name__, {"evaluator": "Evaluator", "modes": "MODES ProbeConfig"})``. Type checkers read the same imports under
    ``TYPE_CHECKING``; a test compares the two.
    """
    places = {name: file for file, names in files.items() for name in names.split()}

    def load(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{places[name]}"), name)
        setattr(sys.modules[package], name, value)  # later uses don't come here
        return value

    return load, lambda: sorted(places), sorted(places)
