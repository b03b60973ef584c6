"""`sfm-fast distill`: synthetic images from class statistics (SFM) or real images (LGM)."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..distill.build import make_distiller
from ..distill.config import RECOMMENDED, STATES, DistillConfig, Execution
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
        "--stats", metavar="FILE", help="class statistics made by `sfm-fast stats` (default: computed first)"
    )
    add_method_arguments(parser)
    add_execution_arguments(parser)
    parser.add_argument("--out", metavar="FOLDER", default="run", help="folder for images, log, checkpoint and result")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out bit for bit: give the same options again; --steps may grow, and another --micro-batch or "
        "--state gives the same up to rounding",
    )
    existing.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    common.add_options(parser, Every)


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the method and its images."""
    parser.add_argument(
        "--recommended",
        action="store_true",
        help="what did best in this project's tables, instead of the papers' settings: "
        + ", ".join(f"{name} {value}" for name, value in RECOMMENDED.items())
        + ", and level cluster for more than one image a class; options that are given stay as they are",
    )
    common.add_options(parser, DistillConfig)


def method_config(args: argparse.Namespace) -> DistillConfig:
    """The configuration that options of `add_method_arguments` give."""
    if args.recommended:
        return DistillConfig.recommended(**common.given_options(args, DistillConfig))
    return common.made(args, DistillConfig)


def add_execution_arguments(parser: argparse.ArgumentParser) -> None:
    """How a step uses the machine."""
    parser.add_argument(
        "--micro-batch",
        metavar="N",
        default="auto",
        help="images whose activations exist at once; the result is the same up to rounding. auto: the most that are predicted to fit; "
        "halved when memory runs out all the same",
    )
    parser.add_argument(
        "--memory-budget",
        metavar="AMOUNT",
        help="for auto, such as 8GB: weights, images, activations, but not Python, torch or the CUDA context themselves "
        "(default: nine tenths of what is free on a GPU, half of what is available on a CPU)",
    )
    parser.add_argument(
        "--state",
        choices=STATES,
        default="device",
        help="where the images and Adam's moments lie; host: in the computer's memory, copied block by block",
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile of the backbone: slow to start, faster steps"
    )
    parser.add_argument(
        "--grad-checkpointing",
        action="store_true",
        help="activation checkpointing in the backbone: less memory, one more forward",
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
    statistics = ClassStatistics.load(args.stats) if args.stats is not None and config.method != "lgm" else None
    # With statistics the data set itself isn't needed, but where both are named they must belong together.
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
