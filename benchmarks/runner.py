"""Runs a preset's suites and stores the result: one JSON file per preset, written after every case."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from sfm_fast.errors import InputError

from .cells import Cell, fill
from .machine import environment
from .presets import PRESETS
from .registry import Options, Suite, suites
from .rows import SIGN_TEST, Result, Row

Key = tuple[str, str]  # suite and case, which is measured as a whole


def run(
    preset: str,
    device: torch.device,
    save: Callable[[Result], None],
    *,
    chosen: Sequence[str] = (),
    only: str = "",
    options: Options = Options(),
    before: Result | None = None,
    again: bool = True,
) -> Iterator[tuple[list[Row], Result]]:
    """Yield each case's rows and the whole result so far, once ``save`` has written it.

    chosen: some of the preset's suites (default: all). only: cases whose name contains this. before: a result whose other rows
    are kept; with ``again`` false all its rows are kept, and only missing cases are measured.
    """
    todo = _choose(preset, chosen, options.predict)
    if PRESETS[preset].gpu and device.type == "cpu" and not options.predict:
        raise InputError(
            f"preset {preset}: wants a GPU, as a step would take minutes on a CPU; give --predict, or --device cuda"
        )
    machine = environment(device)
    if before is not None:
        _check_same(before, Result(preset, machine))
    result = Result(preset, machine)
    kept: dict[Key, list[Row]] = {}
    for row in before.rows if before is not None else ():
        kept.setdefault((row.suite, row.case), []).append(row)

    def stamped(work: Callable[[], list[Row]]) -> list[Row]:
        return [replace(row, commit=machine["commit"]) for row in work()]

    def cells() -> Iterator[Cell[Key, list[Row]]]:
        for one in todo:
            for cell in one.cells(preset, device, options):
                if only in cell.name:
                    yield Cell((one.name, cell.name), functools.partial(stamped, cell.work))

    def put() -> None:
        result.rows = in_order(kept)
        save(result)

    for _, rows in fill(kept, cells(), put, again=again):
        yield rows, result


def in_order(kept: dict[Key, list[Row]]) -> list[Row]:
    """All rows, with suites in order of appearance and new cases at the end of their suite."""
    return [
        row
        for suite in dict.fromkeys(suite for suite, _ in kept)
        for key in kept
        if key[0] == suite
        for row in kept[key]
    ]


def _check_same(before: Result, now: Result) -> None:
    if before.interval != SIGN_TEST:
        raise InputError(
            f"the result's other rows have {before.interval} intervals, this run's are by the sign test: give another --out"
        )
    for name in ("cpu", "gpu", "torch", "threads"):
        mine, old = now.environment.get(name), before.environment.get(name)
        if mine != old:
            raise InputError(
                f"the result's other rows were measured with {name} {old}, this run has {mine}: give another --out"
            )


def _choose(preset: str, chosen: Sequence[str], predict: bool) -> list[Suite]:
    if preset not in PRESETS:
        raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    offered = {name: one for name, one in suites().items() if preset in one.presets and (one.predicts or not predict)}
    unknown = [name for name in chosen if name not in offered]
    if unknown or not offered:
        wanted = f"preset {preset}{' with --predict' if predict else ''} has {', '.join(offered) or 'none'}"
        raise InputError(f"suite: {wanted}; got {', '.join(unknown) or 'none'}")
    return [offered[name] for name in chosen or offered]
