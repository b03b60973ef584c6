"""`sfm-fast distill`: optimise synthetic images against class statistics (SFM) or real images (LGM)."""

from __future__ import annotations

import argparse

from ..distill.config import PAPER, STATES, DistillConfig, Every, Execution
from ..distill.methods import DECLARED
from ..distill.run_folder import check_run_folder
from ..errors import InputError
from ..files import check_unlocked
from ..units import parse_bytes
from . import common

NAME = "distill"
SUMMARY = "Distil one or a few synthetic images per class."
EXAMPLE = "sfm-fast distill --data embedded --ipc 1 --steps 1000 --out runs/sfm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_data_arguments(parser)
    common.add_backbone_arguments(parser, several=True)
    parser.add_argument(
        "--stats",
        nargs="+",
        metavar="FILE",
        help="class statistics written by `sfm-fast stats`, with several backbones those of each (default: computed from --data first)",
    )
    add_method_arguments(parser)
    add_execution_arguments(parser)
    parser.add_argument(
        "--out", metavar="FOLDER", default="run", help="folder for the images, log, checkpoint and result"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out bit for bit; needs the same options as before, except that --steps may be larger and that "
        "--micro-batch and --state may differ, which changes the result only by rounding",
    )
    existing.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    common.add_options(parser, Every)


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the method and of the synthetic images."""
    parser.add_argument(
        "--paper",
        action="store_true",
        help="the papers' settings instead of this package's, which are more accurate: "
        + ", ".join(f"{name.replace('_', '-')} {_word(value)}" for name, value in PAPER.items())
        + "; options that you give take precedence",
    )
    common.add_options(parser, DistillConfig)


def _word(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def method_config(args: argparse.Namespace) -> DistillConfig:
    """The configuration from the options of `add_method_arguments`."""
    return common.made(args, DistillConfig, DistillConfig.paper if args.paper else None)


def add_execution_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for how a step uses memory and devices."""
    parser.add_argument(
        "--micro-batch",
        metavar="N",
        default="auto",
        help="number of images whose activations are in memory at a time; it changes the result only by rounding. auto: as many as are "
        "predicted to fit, halved if memory still runs out",
    )
    parser.add_argument(
        "--memory-budget",
        metavar="AMOUNT",
        help="memory that --micro-batch auto may use, such as 8GB, for weights, images and activations, without Python, torch and the "
        "CUDA context (default: nine tenths of the free memory on a GPU, half of the available memory on a CPU)",
    )
    parser.add_argument(
        "--state",
        choices=STATES,
        default="device",
        help="where the images and Adam's moments are stored; host: in host memory, copied to the device block by block",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="run the backbone through torch.compile: a slower start, but faster steps",
    )
    parser.add_argument(
        "--grad-checkpointing",
        action="store_true",
        help="use activation checkpointing in the backbone: less memory, but one more forward pass",
    )


def check(args: argparse.Namespace) -> None:
    """Raise ``InputError`` for what is wrong before any work is done."""
    common.check_machine(args)
    execution(args), common.made(args, Every)
    config = method_config(args)
    check_run_folder(args.out, resume=args.resume, overwrite=args.overwrite)
    check_unlocked(args.out)
    if uses_statistics(args, config):
        common.check_inputs(*args.stats)
        names = [one.name for one in common.asked(args)]
        if len(args.stats) != len(names):
            raise InputError(f"--stats must be a file for each of {', '.join(names)}, got {len(args.stats)}")
    if args.data is not None or not uses_statistics(args, config):
        common.check_data(args, "train")
    common.check_backbones(args)


def uses_statistics(args: argparse.Namespace, config: DistillConfig) -> bool:
    """Whether the run is made from the file --stats, which some methods don't need."""
    return args.stats is not None and not DECLARED[config.method].needs_images


def execution(args: argparse.Namespace) -> Execution:
    """The settings from the options of `add_execution_arguments`."""
    return Execution(
        args.micro_batch if args.micro_batch == "auto" else whole_number("--micro-batch", args.micro_batch),
        None if args.memory_budget is None else parse_bytes(args.memory_budget),
        args.state,
    )


def whole_number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{name} must be 'auto' or a whole number, got {text!r}") from None
