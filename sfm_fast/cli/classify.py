"""`sfm-fast classify`: predict the classes of photos with a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..bundle.place import check_bundle_there
from ..errors import InputError
from . import common

NAME = "classify"
SUMMARY = "Print the most probable classes of photos, as predicted by a bundle from `sfm-fast bundle`."
EXAMPLE = "sfm-fast classify fashion.safetensors photo.jpg"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="file written by `sfm-fast bundle`")
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="image files")
    parser.add_argument("--top", type=int, metavar="K", default=5, help="number of classes to print for each photo")
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="local file of weights for the bundle's backbone, if the bundle doesn't contain them",
    )
    common.add_machine_arguments(parser)


def check(args: argparse.Namespace) -> None:
    """Raise ``InputError`` for what is wrong before any work is done."""
    common.check_machine(args)
    if args.top < 1:
        raise InputError(f"--top must be at least 1, got {args.top}")
    check_bundle_there(Path(args.bundle))
    for photo in args.photos:
        if not Path(photo).exists():
            raise InputError(f"{photo}: no such file")
    if args.checkpoint is not None:
        common.check_weights(args.bundle, args.checkpoint)
