"""`sfm-fast classify`: predict the classes of photos with a bundle."""

from __future__ import annotations

import argparse

from ..bundle.bundle import Bundle
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


def run(args: argparse.Namespace) -> None:
    common.set_threads(args)
    if args.top < 1:
        raise InputError(f"--top must be at least 1, got {args.top}")
    bundle = Bundle.load(args.bundle, checkpoint=args.checkpoint, device=args.device, precision=args.precision)
    predictions = bundle.classify(args.photos, top=args.top, batch_size=args.batch_size)
    lines = [
        f"{photo}: " + ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in classes)
        for photo, classes in zip(args.photos, predictions, strict=True)
    ]
    rows = [
        {"photo": photo, "classes": [{"name": name, "probability": value} for name, value in classes]}
        for photo, classes in zip(args.photos, predictions, strict=True)
    ]
    common.finish(args, {"rows": rows, "bundle": args.bundle, "backbone": bundle.psi}, *lines)
