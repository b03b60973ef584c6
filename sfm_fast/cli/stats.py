"""`sfm-fast stats`: compute the class statistics of a data set's features on a backbone."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ..features.compute import class_statistics
from ..features.statistics import ClassStatistics
from ..files import check_free_space, check_output_file
from . import common

NAME = "stats"
SUMMARY = "Compute the class centres of a data set's features, in one pass over the images."
EXAMPLE = "sfm-fast stats --data embedded --out stats.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_data_arguments(parser)
    parser.add_argument("--split", default="train", help="split to read")
    common.add_backbone_arguments(parser)
    parser.add_argument(
        "--clusters",
        type=int,
        default=0,
        metavar="K",
        help="number of k-means centres to compute per class, besides its mean",
    )
    parser.add_argument("--out", metavar="FILE", default="stats.safetensors", help="file to write")


def run(args: argparse.Namespace) -> None:
    common.set_threads(args)
    check_output_file(args.out, "--out")
    if Path(args.out).exists():
        ClassStatistics.load(args.out)  # only a file of statistics may be replaced
    check_free_space(Path(args.out).parent, 1 << 20)
    backbone = common.open_backbone(args)
    source = common.open_data(args, args.split)
    started = time.perf_counter()
    statistics = class_statistics(
        source, backbone, clusters=args.clusters, batch_size=args.batch_size, progress=not args.quiet
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
