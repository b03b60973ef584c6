"""`sfm-fast classifier`: train a linear classifier on the features of all real images."""

from __future__ import annotations

import argparse

from ..evaluation.config import WEIGHT_DECAYS
from ..files import check_output_file
from . import common

NAME = "classifier"
SUMMARY = "Train a linear classifier on the features of a whole data set, for the evaluation modes `inherit` and `kd`."
EXAMPLE = "sfm-fast classifier --data embedded --out classifier.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_data_arguments(parser)
    parser.add_argument("--split", default="train", help="split to train on")
    parser.add_argument("--test-split", default="test", help="split to test on; '' for no test")
    common.add_backbone_arguments(parser)
    common.add_list(
        parser,
        "--weight-decay",
        float,
        metavar="X",
        default=",".join(f"{decay:g}" for decay in WEIGHT_DECAYS),
        help="candidate l2 penalties on standardised features; the best one on the validation images is used",
    )
    parser.add_argument(
        "--validation",
        type=float,
        metavar="PART",
        default=0.1,
        help="fraction of each class held out to choose the weight decay",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random validation split")
    parser.add_argument("--cache", metavar="FOLDER", help="folder in which computed features are stored and reused")
    parser.add_argument("--out", metavar="FILE", default="classifier.safetensors", help="file to write")


def check(args: argparse.Namespace) -> None:
    """Raise ``InputError`` for what is wrong before any work is done."""
    common.check_machine(args)
    check_output_file(args.out, "--out")
    common.check_data(args, args.split, *([args.test_split] if args.test_split else []))
    common.check_backbones(args)
