"""`sfm-fast stats`: compute the class statistics of a data set's features on a backbone."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..files import check_free_space, check_output_file
from . import common

NAME = "stats"
SUMMARY = "Compute the class centres of a data set's features, in one pass over the images."
EXAMPLE = "sfm-fast stats --data embedded --out stats.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_data_arguments(parser)
    parser.add_argument("--split", default="train", help="split to read")
    common.add_backbone_arguments(parser)
    parser.add_argument(
        "--clusters",
        type=int,
        default=0,
        metavar="K",
        help="number of k-means centres to compute per class, besides its mean",
    )
    parser.add_argument(
        "--covariance",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also compute the pooled within-class covariance, which `distill` needs for other centres than means: 4 D^2 more bytes in the file for D features "
        "(2.4 MB for 768), and 2 D^2 operations per image, little beside the backbone's (default: yes)",
    )
    parser.add_argument("--out", metavar="FILE", default="stats.safetensors", help="file to write")


def check(args: argparse.Namespace) -> None:
    """Raise ``InputError`` for what is wrong before any work is done."""
    common.check_machine(args)
    check_output_file(args.out, "--out")
    check_free_space(Path(args.out).parent, 1 << 20)
    common.check_data(args, args.split)
    common.check_backbones(args)
