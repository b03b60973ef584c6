"""Times of two builds: both alive at once, two samples of each in turn, the base's two against each other as the control.

Whether that is slower is decided by `sfm_fast.gate.paired`. Where memory comes to lie can make a process some per cent faster for
as long as it lives: every few rounds both make their tensors anew, and each look but the first has fresh processes.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from sfm_fast.gate import paired

from .compare import (
    DIFFERS,
    IMPROVED,
    INCONCLUSIVE,
    NOT_COMPARED,
    ONLY_HEAD,
    REGRESSION,
    UNCHANGED,
    Change,
)
from .compare_client import Client, WorkerError

SECONDS = 60.0  # after which a case isn't looked at again
ROUNDS_A_PLACE = 6  # with the tensors where they are
SPARE = 4 << 20  # bytes
AGREEMENT = {"float32": 1e-3, "bfloat16": 1e-2}


class Pair:
    """Workers of base and head that measure one case after the other."""

    def __init__(self, base: Client, head: Client, folder: Path) -> None:
        self.clients, self.folder = {"base": base, "head": head}, folder
        self.seconds: dict[str, list[float]] = {}
        self.order = random.Random(0)

    def prepare(self, case: str) -> int:
        """Calls a sample has. Both trees make the case; what they get is kept for `off`."""
        repeats: list[int] = []
        # Whichever comes first may get the better memory.
        for name in self.order.sample(list(self.clients), 2):
            self.clients[name].ask("forget")
            spare = self.order.randrange(SPARE)
            answer = self.clients[name].ask("prepare", case=case, path=str(self.folder / name), spare=spare)
            repeats.append(int(answer["repeats"]))
        return min(repeats)

    def failures(self, case: str) -> dict[str, str]:
        """Which of "base" and "head" can't do the case, and why."""
        found = {}
        for name, client in self.clients.items():
            try:
                client.ask("prepare", case=case, path=str(self.folder / name))
            except WorkerError as error:
                found[name] = str(error)
        return found

    def off(self) -> float:
        """How far head's result or gradients are from base's, relative."""
        base, head = (torch.load(self.folder / name, weights_only=True) for name in self.clients)
        if [value.shape for value in base] != [value.shape for value in head]:
            return float("inf")
        return max(float((b - a).norm() / a.norm().clamp_min(1e-30)) for a, b in zip(base, head, strict=True))

    def rounds(self, case: str) -> Callable[[int], list[paired.Round]]:
        """``measure`` of `paired.compare`."""
        repeats = self.prepare(case)
        self.seconds = {"base": [], "head": []}

        def measure(count: int) -> list[paired.Round]:
            nonlocal repeats
            if self.seconds["base"]:
                for client in self.clients.values():
                    client.stop()
                repeats = self.prepare(case)
            found = []
            for turn in range(count):
                if turn % ROUNDS_A_PLACE == ROUNDS_A_PLACE - 1:
                    repeats = self.prepare(case)
                # Each build twice: one that ran more often than the other would find warmer caches.
                names = ["base", "head"] * 2
                self.order.shuffle(names)
                times: dict[str, list[float]] = {"base": [], "head": []}
                for name in names:
                    answer = self.clients[name].ask("sample", case=case, repeats=repeats)
                    times[name].append(float(answer["seconds"]))
                base, head = min(times["base"]), min(times["head"])
                found.append((head, base, base * times["base"][1] / times["base"][0]))
                self.seconds["base"].append(base)
                self.seconds["head"].append(head)
            return found

        return measure


def compare_times(
    base: Path,
    head: Path,
    cases: Sequence[str],
    *,
    device: str,
    threads: int,
    tolerance: float,
    say: Callable[[str], None],
) -> list[Change]:
    """Every case of `worker.CASES` named, of the builds in two folders; slower by more than ``tolerance`` is a regression."""
    with ExitStack() as stack:
        before, after = (stack.enter_context(Client(tree, device=device, threads=threads)) for tree in (base, head))
        pair = Pair(before, after, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        found = []
        for case in cases:
            change = _compare(pair, case, tolerance)
            say(f"times: {case}: {change.verdict}{f' ({change.note})' if change.note else ''}")
            found.append(change)
        return found


def _compare(pair: Pair, case: str, tolerance: float) -> Change:
    try:
        measure = pair.rounds(case)
        off = pair.off()
        if not off <= AGREEMENT[case.split()[-1]]:
            return Change("times", case, None, None, DIFFERS, note=f"off by {off:.0e}, so no time is compared")
        found = paired.compare(measure, 1 + tolerance, seconds=SECONDS)
    except WorkerError as error:
        failures = pair.failures(case)
        verdict = {
            (): INCONCLUSIVE,  # something passing
            ("base",): ONLY_HEAD,
            ("head",): REGRESSION,
            ("base", "head"): NOT_COMPARED,
        }[tuple(failures)]
        note = "; ".join(f"{name}: {why}" for name, why in failures.items()) or str(error)
        return Change("times", case, None, None, verdict, note=note)
    if found.verdict == paired.FAILED:
        verdict = REGRESSION
    elif found.verdict != paired.PASSED:
        verdict = INCONCLUSIVE
    else:
        verdict = IMPROVED if found.ratio.high < 1 / (1 + tolerance) else UNCHANGED
    seconds = {name: statistics.median(values) for name, values in pair.seconds.items()}
    change = found.ratio.median - 1
    return Change("times", case, seconds["base"], seconds["head"], verdict, change, tolerance, found.reason)
