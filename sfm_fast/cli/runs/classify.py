"""Runs `sfm-fast classify`."""

from __future__ import annotations

import argparse

from ...bundle.bundle import Bundle
from . import common


def run(args: argparse.Namespace) -> None:
    common.set_threads(args)
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
