"""What several commands open: data sets and backbones."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from ...arguments import check_names as check_names
from ...arguments import finish as finish
from ...arguments import made as made
from ...arguments import say as say
from ...arguments import use_threads
from ...backbones.backbone import Backbone
from ...backbones.load import load_backbone
from ...backbones.precision import Chosen
from ...data.datasets import open_dataset
from ...data.layout import NoSplitError
from ...data.sources import ImageSource
from ...data.spec import HoldOut
from ...errors import InputError
from ..common import Asked, asked, evaluating_of
from ..common import data_of as data_of

_TEST_IMAGES = (
    "add a folder test beside train, name another split with --test-split, or hold out a share of the training images with "
    "--hold-out 0.1 in all commands"
)


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


def open_test(args: argparse.Namespace, name: str, num_classes: int | None) -> ImageSource:
    """The split --test-split of the data set ``name``, as `open_named`; the error for one without it says how to get test images."""
    try:
        return open_named(args, name, args.test_split, num_classes)
    except NoSplitError as error:
        raise InputError(f"{error}; {_TEST_IMAGES}") from error


def say_no_test(args: argparse.Namespace, source: ImageSource) -> None:
    """Print a line if ``source``, of the split to distil from, is of a data set without images to test on later."""
    if source.no_test:
        say(args, f"no test images for `sfm-fast eval` yet: {source.no_test}; {_TEST_IMAGES}")


def open_backbone(args: argparse.Namespace, kept: Chosen | None = None, **options: Any) -> Backbone:
    """The backbone of --backbone, of which there is one; ``kept`` and ``options`` as of `_open`."""
    (one,) = asked(args)
    return _open(args, kept, one, **options)


def open_backbones(args: argparse.Namespace, kept: Sequence[Chosen | None] = (), **options: Any) -> list[Backbone]:
    """The backbones of --backbone, of which there may be several; ``kept`` of each (default: none), and ``options``, as of `_open`."""
    wanted = asked(args)
    chosen = kept or [None] * len(wanted)
    return [_open(args, its, one, **options) for its, one in zip(chosen, wanted, strict=True)]


def open_evaluating_backbone(args: argparse.Namespace, kept: Chosen | None = None) -> Backbone | None:
    """The backbone of `evaluating_of`; None without its options. ``kept`` as of `_open`."""
    evaluating = evaluating_of(args)
    return None if evaluating is None else _open(args, kept, evaluating)


def _open(
    args: argparse.Namespace,
    kept: Chosen | None,
    wanted: Asked,
    **options: Any,
) -> Backbone:
    """The backbone ``wanted``; prints what preparing it left alone, and what --precision auto chose: ``kept``, if another input decides it.

    ``options`` are passed to `load_backbone`.
    """
    chosen = kept if args.precision == "auto" else None
    backbone = load_backbone(
        wanted.name,
        wanted.checkpoint,
        weights=wanted.weights,
        device=args.device,
        image_size=wanted.image_size,
        precision=args.precision if chosen is None else chosen.precision,
        prepare=args.prepare,
        **options,
    )
    if chosen is not None:
        backbone = replace(backbone, why_precision=chosen.why)
    say_precision(args, backbone)
    if backbone.preparation is not None and backbone.preparation.left:
        say(args, f"{wanted.name} prepared: {backbone.preparation}")
    return backbone


def say_precision(args: argparse.Namespace, backbone: Backbone) -> Backbone:
    """Print what --precision auto chose for ``backbone``, and why; returns ``backbone``."""
    if backbone.why_precision:
        say(args, f"{backbone.name} runs in {backbone.precision}, because {backbone.why_precision}")
    return backbone
