"""Packages whose public names load the file that has them at their first use: importing one costs nothing that isn't used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazy(package: str, files: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of ``package``; ``files`` maps its modules to their public names.

    As in ``lazy(__name__, {"evaluator": "Evaluator", "modes": "MODES ProbeConfig"})``. A type checker reads the imports that stand
    beside it under ``TYPE_CHECKING``; a test compares the two.
    """
    places = {name: file for file, names in files.items() for name in names.split()}

    def load(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{places[name]}"), name)
        setattr(sys.modules[package], name, value)  # later uses are as quick as of any other name
        return value

    return load, lambda: sorted(places), sorted(places)
