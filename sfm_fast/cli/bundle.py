"""`sfm-fast bundle`: put a run, a classifier and a projector into one file that classifies photos."""

from __future__ import annotations

import argparse
import os

from ..bundle.place import DTYPES, check_bundle_file
from ..data.spec import HoldOut, check_spec
from ..errors import InputError
from ..evaluation.config import ProjectorFit
from . import common
from .evaluate import synthetic_of

NAME = "bundle"
SUMMARY = "Put the synthetic images, a classifier and a projector into one file that classifies photos without the training data."
EXAMPLE = "sfm-fast bundle runs/sfm --classifier classifier.safetensors --out fashion.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_folder", metavar="RUN", help="output folder of `sfm-fast distill`, or its synthetic.safetensors"
    )
    parser.add_argument(
        "--classifier", metavar="FILE", required=True, help="output of `sfm-fast classifier` on the distilling backbone"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        required=True,
        help="file to write, such as mine.safetensors; an existing bundle is replaced",
    )
    common.add_backbone_arguments(parser)
    common.add_evaluating_backbone_arguments(parser, "backbone that will compute the features of photos")
    common.add_options(parser, ProjectorFit, solver="--projector")
    parser.add_argument(
        "--test-data",
        metavar="SPEC",
        help="data set to measure the bundle's accuracy on, which is stored in the bundle; takes the same names as --data of `sfm-fast classifier`",
    )
    parser.add_argument("--test-split", default="test", help="split of --test-data")
    common.add_options(parser, HoldOut)
    common.add_reading_arguments(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="data type of the stored weights")
    parser.add_argument(
        "--folded",
        action="store_true",
        help="store the product of classifier and projector as one matrix, and leave the images out",
    )
    parser.add_argument(
        "--with-backbone",
        action="store_true",
        help="also store the weights of the backbone that computes the photos' features, which needs --precision fp32 or auto",
    )


def check(args: argparse.Namespace) -> None:
    """Raise ``InputError`` for what is wrong before any work is done."""
    common.check_machine(args)
    target = check_bundle_file(args.out, "--out")
    if args.json and os.path.realpath(args.json) == str(target):
        raise InputError(f"--json {args.json}: is the same file as --out; choose another one")
    held = common.made(args, HoldOut)
    common.made(args, ProjectorFit)
    common.check_inputs(synthetic_of(args.run_folder), args.classifier)
    if args.test_data is not None:
        check_spec(args.test_data, args.test_split, args.data_root, held)
    common.check_backbones(args)
