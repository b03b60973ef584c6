"""`sfm-fast plan`: predict the peak memory and operations of a step, for SFM and LGM."""

from __future__ import annotations

import argparse

import torch

from .. import units
from ..backbones.load import shape_of_backbone
from ..backbones.shipped import DEFAULT
from ..distill.config import DistillConfig
from ..distill.plan import PlanRow, plan
from ..errors import InputError
from ..report.tables import plan_table
from ..units import parse_bytes
from ..version import __version__
from . import common, distill

NAME = "plan"
SUMMARY = "Predict a step's peak memory and recommend a micro-batch size, without a GPU, weights or data."
EXAMPLE = (
    "sfm-fast plan --backbone vit_base_patch14_dinov2 --image-size 224 --num-classes 1000 --lgm-views 3 --memory 8GB"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_arguments(parser)
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


def run(args: argparse.Namespace) -> None:
    if args.method == "lgm":
        raise InputError("--method must be sfm or sfm-decoupled, got lgm: the rows of LGM are always shown")
    for name in ("num_classes", "lgm_views"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    memory = parse_bytes(args.memory)
    config = distill.method_config(args)
    backbone = shape_of_backbone(
        args.backbone,
        image_size=args.image_size,
        precision=args.precision,
        grad_checkpointing=args.grad_checkpointing,
    )
    channels = min(args.channels or 3, backbone.in_channels)
    rows = plan(
        config,
        backbone,
        args.num_classes,
        channels,
        memory=memory,
        micro_batches=args.micro_batch or [],
        lgm_views=args.lgm_views,
    )
    result = {
        "rows": rows,
        "sfm_fast": __version__,
        "torch": torch.__version__,
        "backbone": backbone.name,
        "input_size": backbone.input_size,
        "precision": args.precision,
        "classes": args.num_classes,
        "images": args.num_classes * config.ipc,
        "memory_bytes": memory,
    }
    common.finish(
        args,
        result,
        f"{backbone.name} at {backbone.input_size} px, {args.precision}; {args.num_classes} classes x {config.ipc} per class "
        f"of {config.size or backbone.image_size} px; one step of {config.method} with all levels live",
        "",
        plan_table(rows),
        "",
        *advice(rows, args, config),
    )


def advice(rows: list[PlanRow], args: argparse.Namespace, config: DistillConfig) -> list[str]:
    """The recommended command line, or why nothing fits."""
    chosen = next((row for row in rows if row["recommended"]), None)
    if chosen is None:
        weights, memory = rows[0]["by_category"]["parameters"], parse_bytes(args.memory)
        if weights >= memory:
            return [f"nothing fits into {args.memory}: the weights alone take {units.memory(weights)}"]
        further = "a smaller --image-size or another backbone"
        return [
            f"nothing fits into {args.memory}: try {further if args.grad_checkpointing else '--grad-checkpointing, ' + further}"
        ]
    words = ["sfm-fast distill", f"--precision {args.precision}"]
    usual = {"backbone": DEFAULT, "image_size": None, **DistillConfig().to_dict()}
    chosen_ones = {"backbone": args.backbone, "image_size": args.image_size, **config.to_dict()}
    for name, value in chosen_ones.items():
        option = name.replace("_", "-")
        if value != usual[name]:
            words.append(f"--{'' if value else 'no-'}{option}" if isinstance(value, bool) else f"--{option} {value}")
    if args.grad_checkpointing:
        words.append("--grad-checkpointing")
    if chosen["micro_batch"]:
        words.append(f"--micro-batch {chosen['micro_batch']}")
    if chosen["host_bytes"]:
        words.append("--state host")
    return [f"for {args.memory}: {' '.join(words)} --data …"]
