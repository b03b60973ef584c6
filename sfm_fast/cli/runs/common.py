"""What several commands open: data sets and backbones."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from ...arguments import check_names as check_names
from ...arguments import finish as finish
from ...arguments import made as made
from ...arguments import say as say
from ...arguments import use_threads
from ...backbones.backbone import Backbone
from ...backbones.load import load_backbone
from ...data.datasets import open_dataset
from ...data.sources import ImageSource
from ...data.spec import HoldOut
from ..common import data_of, evaluating_of


def set_threads(args: argparse.Namespace) -> None:
    """Apply --threads."""
    use_threads(args.threads)


def open_data(args: argparse.Namespace, split: str) -> ImageSource:
    """The data set of --data; otherwise like `open_named`."""
    return open_named(args, data_of(args), split, args.num_classes)


def open_named(args: argparse.Namespace, name: str, split: str, num_classes: int | None) -> ImageSource:
    """The data set ``name``; prints which images of a folder or archive are used and which are left out."""
    source = open_dataset(
        name,
        split,
        root=args.data_root,
        num_classes=num_classes,
        workers=args.workers,
        **asdict(made(args, HoldOut)),
    )
    if source.told:
        say(args, source.told)
    return source


def say_no_test(args: argparse.Namespace, source: ImageSource) -> None:
    """Print a line if ``source``, of the split to distil from, is of a data set without images to test on later."""
    if source.no_test:
        say(
            args,
            f"no test images for `sfm-fast eval` yet: {source.no_test}; add a folder test beside train, name another split with "
            "--test-split there, or hold out a share of the training images with --hold-out 0.1 in all commands",
        )


def open_backbone(args: argparse.Namespace, **options: Any) -> Backbone:
    """The backbone of --backbone and --checkpoint; ``options`` are passed to `load_backbone`."""
    backbone = load_backbone(
        args.backbone,
        args.checkpoint,
        weights=args.weights,
        device=args.device,
        image_size=args.image_size,
        precision=args.precision,
        prepare=args.prepare,
        **options,
    )
    if backbone.preparation is not None and backbone.preparation.left:
        say(args, f"{backbone.name} prepared: {backbone.preparation}")
    return backbone


def open_evaluating_backbone(args: argparse.Namespace) -> Backbone | None:
    """The backbone of `evaluating_of`; None without its options."""
    evaluating = evaluating_of(args)
    if evaluating is None:
        return None
    name, checkpoint, weights, size = evaluating
    return load_backbone(
        name,
        checkpoint,
        weights=weights,
        device=args.device,
        image_size=size,
        precision=args.precision,
        prepare=args.prepare,
    )
