"""`sfm-fast demo`: distil, evaluate and measure on the embedded data, and write a report as an HTML page."""

from __future__ import annotations

import argparse

from ..distill.config import DistillConfig
from ..errors import InputError
from ..evaluation.config import ProbeConfig
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
    parser.add_argument("--steps", type=int, default=600, help="number of SFM steps")
    parser.add_argument(
        "--seeds", type=int, default=3, help="number of probes trained for each row of the accuracy table"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=6,
        help="timed steps of each method, taken in turn, for the comparison with LGM; with fewer than 6 the ratios have no interval",
    )
    common.add_machine_arguments(parser)


def check(args: argparse.Namespace) -> None:
    """Raise ``InputError`` for what is wrong before any work is done."""
    common.check_machine(args)
    config(args), ProbeConfig(seeds=args.seeds)
    if args.rounds < 1:
        raise InputError(f"--rounds must be at least 1, got {args.rounds}")


def config(args: argparse.Namespace) -> DistillConfig:
    """The configuration of the demo's runs."""
    return DistillConfig(steps=args.steps)
