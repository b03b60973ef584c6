"""The suites: each module of benchmarks/suites that `presets.SUITES` names registers one, and all other modules look them up here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from . import presets
from .cells import Cell
from .rows import Row


@dataclass(frozen=True)
class Options:
    """The command line's options for every suite. predict: run nothing, count memory and operations. compile: torch.compile of backbones."""

    predict: bool = False
    compile: bool = False


Cells = Iterator[Cell[str, list[Row]]]
Make = Callable[[str, torch.device, Options], Cells]


@dataclass(frozen=True)
class Suite:
    """``title`` is above its tables; ``beside``: its baselines. ``presets``: those that run it. ``cells``: its cases at one preset."""

    name: str
    title: str
    beside: str
    presets: tuple[str, ...]
    cells: Make
    predicts: bool = False


_SUITES: dict[str, Suite] = {}


def suite(
    name: str, title: str, beside: str, *, presets: Iterable[str], predicts: bool = False
) -> Callable[[Make], Make]:
    """Register the decorated function: (preset, device, options) -> cells named as its rows' cases. ``predicts``: it supports --predict."""

    def register(make: Make) -> Make:
        _SUITES[name] = Suite(name, title, beside, tuple(presets), make, predicts)
        return make

    return register


def suites() -> dict[str, Suite]:
    """All suites by name, in the order in which they run and are shown."""
    for name in presets.SUITES:
        importlib.import_module(f".suites.{name}", __package__)
    return {name: _SUITES[name] for name in presets.SUITES}
