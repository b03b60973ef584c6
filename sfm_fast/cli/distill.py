"""`sfm-fast distill`: optimise synthetic images against class statistics (SFM) or real images (LGM)."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..distill.build import make_distiller
from ..distill.config import RECOMMENDED, STATES, DistillConfig, Execution
from ..distill.objectives import METHODS
from ..distill.run import Every
from ..distill.run_folder import check_run_folder
from ..errors import InputError
from ..features.statistics import ClassStatistics
from ..units import parse_bytes
from . import common

NAME = "distill"
SUMMARY = "Distil one or a few synthetic images per class."
EXAMPLE = "sfm-fast distill --data embedded --ipc 1 --steps 1000 --out runs/sfm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_data_arguments(parser)
    common.add_backbone_arguments(parser)
    parser.add_argument(
        "--stats",
        metavar="FILE",
        help="class statistics written by `sfm-fast stats` (default: computed from --data first)",
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
        "--recommended",
        action="store_true",
        help="use the settings with the best accuracy in this project's experiments instead of the papers': "
        + ", ".join(f"{name} {value}" for name, value in RECOMMENDED.items())
        + ", and level cluster for more than one image per class; options that you give take precedence",
    )
    common.add_options(parser, DistillConfig)


def method_config(args: argparse.Namespace) -> DistillConfig:
    """The configuration from the options of `add_method_arguments`."""
    if args.recommended:
        return DistillConfig.recommended(**common.given_options(args, DistillConfig))
    return common.made(args, DistillConfig)


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


def run(args: argparse.Namespace) -> None:
    common.set_threads(args)
    execution = Execution(
        args.micro_batch if args.micro_batch == "auto" else whole_number("--micro-batch", args.micro_batch),
        None if args.memory_budget is None else parse_bytes(args.memory_budget),
        args.state,
    )
    config = method_config(args)
    every = common.made(args, Every)
    check_run_folder(args.out, resume=args.resume, overwrite=args.overwrite)
    backbone = common.open_backbone(args, compile=args.compile, grad_checkpointing=args.grad_checkpointing)
    statistics = (
        ClassStatistics.load(args.stats) if args.stats is not None and not METHODS[config.method].needs_images else None
    )
    # With statistics the data set itself isn't needed, but if both are given, the statistics must come from that data set.
    split = "train" if statistics is None else str(statistics.provenance.get("split", "train"))
    source = common.open_data(args, split) if statistics is None or args.data is not None else None
    distiller = make_distiller(
        config,
        backbone,
        source,
        statistics,
        batch_size=args.batch_size,
        progress=not args.quiet,
        execution=execution,
    )
    summary: dict[str, Any] = distiller.run(
        args.out,
        resume=args.resume,
        overwrite=args.overwrite,
        progress=not args.quiet,
        **asdict(every),
    )
    step = summary["median_step_seconds"]
    common.finish(
        args,
        summary,
        f"{config.method}: {summary['steps_this_run']} steps in {summary['seconds_this_run']:.1f} s"
        + (f" ({step * 1e3:.1f} ms a step), loss {summary['last_loss']:.4f}" if step else "")
        + f" -> {Path(args.out) / 'synthetic.safetensors'} and {Path(args.out) / 'images'}",
    )


def whole_number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{name} must be 'auto' or a whole number, got {text!r}") from None
