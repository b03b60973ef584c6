"""Lists on the command lines of the benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sfm_fast.errors import InputError

Name = TypeVar("Name", str, int)


def add_list(parser: argparse.ArgumentParser, option: str, kind: Callable[[str], Any] = str, **more: Any) -> None:
    """An option with a list of ``kind``, by commas or by spaces."""

    class Listed(argparse.Action):
        def __call__(
            self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
        ) -> None:
            setattr(namespace, self.dest, [one for part in values for one in part])

    def values(text: str) -> list[Any]:
        return [kind(word) for word in text.replace(",", " ").split()]

    values.__name__ = kind.__name__  # argparse's message says it
    parser.add_argument(option, nargs="+", type=values, action=Listed, **more)


def check_names(option: str, names: Sequence[Name], known: Sequence[Name]) -> list[Name]:
    """Each name (or number) once, in the order given. Raises ``InputError`` for an unknown one."""
    for name in names:
        if name not in known:
            raise InputError(f"{option}: {name!r} is none of {', '.join(map(str, known))}")
    return list(dict.fromkeys(names))
