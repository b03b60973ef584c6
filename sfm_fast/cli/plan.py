"""`sfm-fast plan`: predict the peak memory and operations of a step, for SFM and LGM."""

from __future__ import annotations

import argparse

from ..distill.methods import DECLARED
from ..errors import InputError
from ..units import parse_bytes
from . import common, distill

NAME = "plan"
SUMMARY = "Predict a step's peak memory and recommend a micro-batch size, without a GPU, weights or data."
EXAMPLE = (
    "sfm-fast plan --backbone vit_base_patch14_dinov2 --image-size 224 --num-classes 1000 --lgm-views 3 --memory 8GB"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_arguments(parser, several=True)
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="bf16", help="numeric precision of the backbone"
    )
    parser.add_argument("--num-classes", type=int, metavar="C", default=1000, help="number of classes")
    parser.add_argument(
        "--channels",
        type=int,
        choices=(1, 3),
        help="channels of the synthetic images (default: those of the backbone's input)",
    )
    parser.add_argument(
        "--memory",
        metavar="AMOUNT",
        default="7.2GB",
        help="memory available for tensors, which the recommended micro-batch must fit: a GPU's memory less about 0.6 GB for the CUDA context and fragmentation",
    )
    common.add_list(parser, "--micro-batch", int, metavar="N", help="also show these micro-batch sizes")
    parser.add_argument(
        "--lgm-views",
        type=int,
        metavar="A",
        default=10,
        help="augmented views per image for LGM (10 in its paper, 3 on ImageNet-1k)",
    )
    parser.add_argument(
        "--grad-checkpointing", action="store_true", help="use activation checkpointing in the backbone, for all rows"
    )
    distill.add_method_arguments(parser)


def check(args: argparse.Namespace) -> None:
    """Raise ``InputError`` for what is wrong before any work is done."""
    if args.method == "lgm":
        methods = ", ".join(name for name in DECLARED if name != "lgm")
        raise InputError(f"--method must be one of {methods}, got lgm: the rows of LGM are always shown")
    for name, least in (("num_classes", 2), ("lgm_views", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    parse_bytes(args.memory)
    common.asked(args)
    distill.method_config(args)
