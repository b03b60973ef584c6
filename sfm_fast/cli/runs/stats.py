"""Runs `sfm-fast stats`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ...features.compute import class_statistics
from ...features.statistics import ClassStatistics
from . import common


def run(args: argparse.Namespace) -> None:
    common.set_threads(args)
    if Path(args.out).exists():
        ClassStatistics.load(args.out)  # only a file of statistics may be replaced
    source = common.open_data(args, args.split)
    common.say_no_test(args, source)
    backbone = common.open_backbone(args)
    started = time.perf_counter()
    statistics = class_statistics(
        source,
        backbone,
        clusters=args.clusters,
        covariance=args.covariance,
        batch_size=args.batch_size,
        progress=not args.quiet,
    )
    statistics.provenance["split"] = args.split
    seconds = time.perf_counter() - started
    statistics.save(args.out)
    counts = statistics.counts
    common.finish(
        args,
        {
            "out": args.out,
            "seconds": seconds,
            "counts": counts.tolist(),
            "class_names": source.class_names,
            "read": source.told,
            "provenance": statistics.provenance,
        },
        f"{int(counts.sum())} images of {len(counts)} classes ({int(counts.min())} to {int(counts.max())} per class) in {seconds:.1f} s, "
        f"{int(counts.sum()) / seconds:.0f} images/s -> {args.out}",
    )
