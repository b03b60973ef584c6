"""Runs `sfm-fast plan`."""

from __future__ import annotations

import argparse

import torch

from ... import units
from ...backbones.load import shape_of_backbone
from ...backbones.shipped import DEFAULT
from ...distill.config import DistillConfig
from ...distill.members import image_size
from ...distill.plan import PlanRow, plan
from ...report.tables import plan_table
from ...units import parse_bytes
from ...version import __version__
from .. import distill
from ..common import asked
from . import common


def run(args: argparse.Namespace) -> None:
    memory = parse_bytes(args.memory)
    config = distill.method_config(args)
    backbones = [
        shape_of_backbone(
            one.name,
            image_size=one.image_size,
            precision=args.precision,
            grad_checkpointing=args.grad_checkpointing,
            prepare=args.prepare,
        )
        for one in asked(args)
    ]
    channels = min(args.channels or 3, *(one.in_channels for one in backbones))
    rows = plan(
        config,
        backbones,
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
        "backbone": backbones[0].name,
        "input_size": backbones[0].input_size,
        "backbones": [{"name": one.name, "input_size": one.input_size} for one in backbones],
        "precision": args.precision,
        "classes": args.num_classes,
        "images": args.num_classes * config.ipc,
        "memory_bytes": memory,
    }
    common.finish(
        args,
        result,
        f"{' and '.join(f'{one.name} at {one.input_size} px' for one in backbones)}, {args.precision}; "
        f"{args.num_classes} classes x {config.ipc} per class of {image_size(config, backbones)} px; one step of {config.method} with all levels live",
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
    backbones = asked(args)
    if [one.name for one in backbones] != [DEFAULT]:
        words.append(f"--backbone {' '.join(one.name for one in backbones)}")
    sizes = [one.image_size for one in backbones]
    if any(sizes):
        words.append(f"--image-size {' '.join('auto' if size is None else str(size) for size in sizes)}")
    chosen_ones = config.to_dict()
    # What follows from method and images per class isn't repeated.
    usual = DistillConfig(method=config.method, ipc=config.ipc).to_dict() | {
        name: getattr(DistillConfig, name) for name in ("method", "ipc")
    }
    for name, value in chosen_ones.items():
        option = name.replace("_", "-")
        if value != usual[name]:
            words.append(f"--{'' if value else 'no-'}{option}" if isinstance(value, bool) else f"--{option} {value}")
    if args.grad_checkpointing:
        words.append("--grad-checkpointing")
    if not args.prepare:
        words.append("--no-prepare")
    if chosen["micro_batch"]:
        words.append(f"--micro-batch {chosen['micro_batch']}")
    if chosen["host_bytes"]:
        words.append("--state host")
    return [f"for {args.memory}: {' '.join(words)} --data …"]
