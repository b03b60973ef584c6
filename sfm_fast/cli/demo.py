"""`sfm-fast demo`: distil, evaluate and measure on the embedded data, and write a report as an HTML page."""

from __future__ import annotations

import argparse
import functools
from dataclasses import asdict
from pathlib import Path

from ..backbones.load import load_backbone
from ..demo.page import cost_table
from ..demo.run import METHODS_SHOWN, run_demo
from ..distill.config import DistillConfig
from ..errors import InputError
from ..evaluation.modes import ProbeConfig
from ..report.tables import accuracy_table
from . import common

NAME = "demo"
SUMMARY = "Distil the embedded data set, evaluate it, measure LGM beside it, and write one HTML page."
EXAMPLE = "sfm-fast demo --out demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        default="demo",
        help="folder for all output; an earlier demo in it is replaced",
    )
    parser.add_argument("--steps", type=int, default=1200, help="number of SFM steps")
    parser.add_argument(
        "--lr",
        type=float,
        default=0.02,
        help="Adam's learning rate (larger than the 0.002 of `sfm-fast distill`, because the run is short)",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="number of probes trained for each row of the accuracy table"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="timed steps of each method, taken in turn, for the comparison with LGM"
    )
    common.add_machine_arguments(parser)


def run(args: argparse.Namespace) -> None:
    common.set_threads(args)
    config = DistillConfig(steps=args.steps, lr=args.lr, grow_every=max(1, args.steps // 15))
    if args.rounds < 1:
        raise InputError(f"--rounds must be at least 1, got {args.rounds}")
    shown = run_demo(
        args.out,
        functools.partial(load_backbone, device=args.device, precision=args.precision),
        config,
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
        "",
        cost_table(shown.costs),
        "",
        f"{shown.seconds:.0f} s in total; see {Path(shown.page).resolve()} and {Path(args.out) / METHODS_SHOWN[-1] / 'images'}",
    )
