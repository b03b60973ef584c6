"""Costs once per process: importing the package, and the first call of each loss and of the image path, each in a new process.

sfm-fast bench --suite startup
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Mapping

import torch

from sfm_fast.measure.timing import Ratio, ratio, summary

from ..cells import Cell
from ..registry import Cells, Options, suite
from ..rows import Row

SUITE = "startup"
ROUNDS = 6  # fewer have no interval
_PACKAGE = __name__.rpartition(".suites.")[0]
_LOSS = (
    "import torch, sfm_fast\n"
    f"from {_PACKAGE}.baselines import flow_alignment as baseline\n"
    "c = torch.randn(100, 384, device=DEVICE); x = torch.randn(100, 384, device=DEVICE, requires_grad=True)\n"
    "def run(loss):\n    loss(x, c).backward()\n    torch.cuda.synchronize() if c.is_cuda else None\n"
)
_IMAGES = (
    "import torch, sfm_fast\n"
    f"from {_PACKAGE}.baselines import images as baseline\n"
    f"from {_PACKAGE}.shapes import ImageShape\n"
    "levels, views = ImageShape(10, 64, 56).inputs(torch.device(DEVICE))\n"
    "levels = [level.requires_grad_() for level in levels]\n"
    "def run(path):\n    path(levels, 64, views).sum().backward()\n    torch.cuda.synchronize() if levels[0].is_cuda else None\n"
)
_OURS = "sfm_fast"
_PAIR = "run(lambda x, c: sfm_fast.flow_alignment_loss(x, c, alignment='pair'))"
# Case -> contender -> (code before, timed code), each in its own process.
CASES: dict[str, dict[str, tuple[str, str]]] = {
    "import": {_OURS: ("", "import torch, sfm_fast"), "torch alone": ("", "import torch")},
    "first global loss 100x384": {
        _OURS: (_LOSS, "run(sfm_fast.flow_alignment_loss)"),
        "eager": (_LOSS, "run(baseline.paper_global)"),
    },
    "second global loss 100x384": {
        _OURS: (_LOSS + "run(sfm_fast.flow_alignment_loss)\n", "run(sfm_fast.flow_alignment_loss)"),
        "eager": (_LOSS + "run(baseline.paper_global)\n", "run(baseline.paper_global)"),
    },
    "first pair loss 100x384": {
        _OURS: (_LOSS, _PAIR),
        "Gram matrices": (
            _LOSS + "real = baseline.gram_constants(c)\n",
            "run(lambda x, c: baseline.gram_pair(x, real))",
        ),
    },
    "first images 10x3x64 to 56": {
        _OURS: (_IMAGES, "run(sfm_fast.render_augment)"),
        "operation by operation": (_IMAGES, "run(baseline.render_augment)"),
    },
}


def _seconds(before: str, timed: str, device: torch.device) -> float:
    """Seconds of ``timed`` in a new process; raises ``RuntimeError`` with the last line of its output if it fails."""
    code = f"DEVICE = {str(device)!r}\n{before}\nimport time; began = time.perf_counter()\n{timed}\nprint(time.perf_counter() - began)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["failed without a word"])[-1][:120])
    return float(done.stdout.strip().splitlines()[-1])


def case_rows(case: str, contenders: Mapping[str, tuple[str, str]], device: torch.device, rounds: int) -> list[Row]:
    """One row for each contender; processes take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name, (before, timed) in contenders.items():
            if name not in failed:
                try:
                    seconds[name].append(_seconds(before, timed, device))
                except RuntimeError as error:
                    failed[name] = f"failed: {error}"
    base, rows = seconds[next(iter(contenders))], []
    for name, taken in seconds.items():
        row = Row(SUITE, case, name, "once", failed.get(name, "ok"), ours=name == _OURS)
        if row.measured:
            row.take(summary(taken))
            if taken is base:
                row.ratio = Ratio(1.0, 1.0, 1.0)
            elif len(base) == len(taken):
                row.ratio = ratio(taken, base)
        rows.append(row)
    return rows


@suite(SUITE, "Start-up", "torch alone, and the baselines' own first calls", presets=("laptop", "small"))
def cells(preset: str, device: torch.device, options: Options) -> Cells:
    """The same cases for every preset except "small": the first two, once."""
    small = preset == "small"
    for case, contenders in list(CASES.items())[: 2 if small else None]:
        yield Cell(case, functools.partial(case_rows, case, contenders, device, rounds=1 if small else ROUNDS))
