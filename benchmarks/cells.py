"""How all long tables are made: named cells, run one after the other or in several processes, each saved when it is done."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)
Value = TypeVar("Value")


@dataclass(frozen=True)
class Cell(Generic[Name, Value]):
    """A piece of work, and the name under which its result is stored; the name must have all that the result depends on."""

    name: Name
    work: Callable[[], Value]


Runner = Callable[[Iterable[Cell[Name, Value]]], Iterable[tuple[Name, Value]]]


def in_turn(cells: Iterable[Cell[Name, Value]]) -> Iterator[tuple[Name, Value]]:
    """Run the cells one after the other in this process."""
    for cell in cells:
        yield cell.name, cell.work()


def in_parallel(jobs: int, threads: int, what: str) -> Runner[Any, Any]:
    """Run cells in ``jobs`` processes of ``threads`` threads each, yielding results as they come; ``what`` starts each progress line."""

    def run(cells: Iterable[Cell[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        waiting, started = list(cells), time.perf_counter()
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
            names = {pool.submit(cell.work): cell.name for cell in waiting}
            try:
                for done, future in enumerate(as_completed(names), 1):
                    yield names[future], future.result()
                    print(f"{what}: {done} of {len(waiting)}, {time.perf_counter() - started:.0f} s", flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    return run


def fill(
    kept: dict[Name, Value],
    cells: Iterable[Cell[Name, Value]],
    save: Callable[[], None],
    *,
    again: bool = False,
    run: Runner[Name, Value] = in_turn,
) -> Iterator[tuple[Name, Value]]:
    """Run every cell without a result in ``kept`` (``again``: every cell); yields each result once it is in ``kept`` and saved.

    A result replaces the old one or is appended. ``save`` writes ``kept`` atomically, so that an interrupted table can continue.
    """
    todo = (cell for cell in cells if again or cell.name not in kept)
    for name, value in run(todo):
        kept[name] = value
        save()
        yield name, value
