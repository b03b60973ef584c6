"""Runs `sfm-fast demo`."""

from __future__ import annotations

import argparse
import functools
from dataclasses import asdict
from pathlib import Path

from ...backbones.load import load_backbone
from ...demo.page import cost_note, cost_table
from ...demo.run import SHOWN, run_demo, told
from ...evaluation.modes import ProbeConfig
from ...report.tables import accuracy_table
from ..demo import config
from . import common


def run(args: argparse.Namespace) -> None:
    common.set_threads(args)
    shown = run_demo(
        args.out,
        lambda: common.say_precision(args, load_backbone(device=args.device, precision=args.precision)),
        config(args),
        ProbeConfig(seeds=args.seeds),
        rounds=args.rounds,
        batch_size=args.batch_size,
        progress=not args.quiet,
        say=functools.partial(common.say, args),
    )
    common.finish(
        args,
        asdict(shown),
        "",
        accuracy_table(shown.rows),
        "On CPUs rows are computed at the same time, each with its share of the threads, so a fit alone takes less time.",
        "",
        cost_table(shown.costs),
        cost_note(shown.costs),
        "",
        *told(shown.rows, shown.costs),
        "",
        f"{shown.seconds:.0f} s in total; see {Path(shown.page).resolve()} and {Path(args.out) / list(SHOWN)[-1] / 'images'}",
    )
