"""`sfm-fast bundle`: put a run, a classifier and a projector into one folder that classifies photos."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..backbones.record import check_storable
from ..bundle.bundle import VIEWS, Bundle
from ..bundle.folder import check_bundle_folder
from ..bundle.parts import DTYPES, check_parts, check_test_set
from ..data.datasets import open_dataset
from ..errors import InputError
from ..evaluation.heads import Classifier
from ..evaluation.projector import SOLVERS
from ..report.tables import text_table
from ..synthetic import SyntheticSet
from . import common

NAME = "bundle"
SUMMARY = (
    "Put synthetic images, classifier and projector into one folder that classifies photos without the training data."
)
EXAMPLE = "sfm-fast bundle runs/sfm --classifier classifier.safetensors --out bundles/fashion"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="folder of `sfm-fast distill`, or its synthetic.safetensors")
    parser.add_argument(
        "--classifier", metavar="FILE", required=True, help="of `sfm-fast classifier`, on the backbone that distilled"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", required=True, help="folder to write; a bundle that lies there is replaced"
    )
    common.add_backbone_arguments(parser)
    parser.add_argument(
        "--eval-backbone", metavar="NAME", help="backbone that photos will go through (default: --backbone)"
    )
    parser.add_argument("--eval-checkpoint", metavar="FILE", help="local weights of --eval-backbone")
    parser.add_argument("--eval-image-size", type=int, metavar="PX", help="input side of --eval-backbone")
    parser.add_argument("--projector", choices=SOLVERS, default="ridge", help="how the projector is fitted")
    parser.add_argument(
        "--views",
        type=int,
        default=VIEWS,
        help="augmented views of every image that the projector is fitted on",
    )
    parser.add_argument(
        "--min-area", type=float, default=0.08, help="smallest crop of these views, as a part of the image"
    )
    parser.add_argument(
        "--blends",
        action="store_true",
        help="fit it on blends of two images too, in half of the views",
    )
    parser.add_argument("--seed", type=int, default=0, help="of these views")
    parser.add_argument(
        "--test-data",
        metavar="SPEC",
        help="measure the bundle's accuracy on this data set, and store it; as --data of `sfm-fast classifier`",
    )
    parser.add_argument("--test-split", default="test", help="split of --test-data")
    parser.add_argument("--data-root", metavar="FOLDER", help="where timm's data sets keep their files")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that decode images (default: one a core, at most 8)"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of the stored weights")
    parser.add_argument(
        "--folded", action="store_true", help="store classifier and projector as one matrix, and no images"
    )
    parser.add_argument(
        "--with-backbone",
        action="store_true",
        help="store the weights of the photos' backbone too (wants --precision fp32)",
    )


def run(args: argparse.Namespace) -> None:
    common.set_threads(args)
    place = check_bundle_folder(args.out, "--out")
    if args.json and args.json != "-" and Path(os.path.realpath(args.json)).is_relative_to(place):
        raise InputError(f"--json {args.json}: lies in --out, which holds nothing but the bundle; choose another place")
    if args.views < 1:
        raise InputError(f"--views must be at least 1, got {args.views}")
    if not 0 < args.min_area <= 1:
        raise InputError(f"--min-area must be in (0, 1], got {args.min_area}")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed must be in [0, 2**63), got {args.seed}")
    synthetic = SyntheticSet.load(args.run_folder)
    classifier = Classifier.load(args.classifier)
    phi = common.open_backbone(args)
    check_parts(synthetic, classifier, phi)
    test = None
    if args.test_data is not None:
        count = len(classifier.class_names)
        test = open_dataset(
            args.test_data, args.test_split, root=args.data_root, num_classes=count, workers=args.workers
        )
        if test.told:
            common.say(args, test.told)
        check_test_set(test, classifier.class_names)
    psi = common.open_evaluating_backbone(args)
    if args.with_backbone:
        check_storable(psi or phi)
    bundle = Bundle.create(
        synthetic,
        classifier,
        phi,
        psi,
        solver=args.projector,
        views=args.views,
        min_area=args.min_area,
        blends=args.blends,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    bundle = bundle.as_stored(dtype=args.dtype, folded=args.folded)  # so that the accuracy is that of the files
    if test is not None:
        bundle.evaluate(test, batch_size=args.batch_size, progress=not args.quiet)
    bundle.save(args.out, dtype=args.dtype, folded=args.folded, with_backbone=args.with_backbone)
    sizes = bundle.size_report()
    common.finish(
        args,
        {
            "out": args.out,
            "sizes": sizes,
            "class_names": bundle.class_names,
            "distilling_backbone": bundle.phi,
            "evaluating_backbone": bundle.psi,
            "made": bundle.made,
            "accuracy": bundle.accuracy,
            "dtype": args.dtype,
            "folded": args.folded,
            "with_backbone": args.with_backbone,
        },
        text_table(["part", "bytes", "what"], ([row["what"], f"{row['bytes']:,}", row["detail"]] for row in sizes)),
        bundle.accuracy_text(),
        f"{len(bundle.class_names)} classes, photos through {bundle.psi['name']} -> {args.out}",
    )
