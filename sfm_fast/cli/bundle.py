"""`sfm-fast bundle`: put a run, a classifier and a projector into one file that classifies photos."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict

from ..backbones.record import check_storable
from ..bundle.bundle import DTYPES, Bundle, check_parts
from ..bundle.format import check_bundle_file
from ..checks import check_class_names
from ..data.datasets import open_dataset
from ..errors import InputError
from ..evaluation.heads import Classifier
from ..evaluation.projector import ProjectorFit
from ..report.tables import text_table
from ..synthetic import SyntheticSet
from . import common

NAME = "bundle"
SUMMARY = "Put the synthetic images, a classifier and a projector into one file that classifies photos without the training data."
EXAMPLE = "sfm-fast bundle runs/sfm --classifier classifier.safetensors --out fashion.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_folder", metavar="RUN", help="output folder of `sfm-fast distill`, or its synthetic.safetensors"
    )
    parser.add_argument(
        "--classifier", metavar="FILE", required=True, help="output of `sfm-fast classifier` on the distilling backbone"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        required=True,
        help="file to write, such as mine.safetensors; an existing bundle is replaced",
    )
    common.add_backbone_arguments(parser)
    common.add_evaluating_backbone_arguments(parser, "backbone that will compute the features of photos")
    common.add_options(parser, ProjectorFit, solver="--projector")
    parser.add_argument(
        "--test-data",
        metavar="SPEC",
        help="data set to measure the bundle's accuracy on, which is stored in the bundle; takes the same names as --data of `sfm-fast classifier`",
    )
    parser.add_argument("--test-split", default="test", help="split of --test-data")
    common.add_reading_arguments(parser)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="data type of the stored weights")
    parser.add_argument(
        "--folded",
        action="store_true",
        help="store the product of classifier and projector as one matrix, and leave the images out",
    )
    parser.add_argument(
        "--with-backbone",
        action="store_true",
        help="also store the weights of the backbone that computes the photos' features (requires --precision fp32)",
    )


def run(args: argparse.Namespace) -> None:
    common.set_threads(args)
    target = check_bundle_file(args.out, "--out")
    if args.json and os.path.realpath(args.json) == str(target):
        raise InputError(f"--json {args.json}: is the same file as --out; choose another one")
    fit = common.made(args, ProjectorFit)
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
        check_class_names(test.class_names, classifier.class_names, test.name, "the bundle's")
    psi = common.open_evaluating_backbone(args)
    if args.with_backbone:
        check_storable(psi or phi)
    bundle = Bundle.create(synthetic, classifier, phi, psi, batch_size=args.batch_size, **asdict(fit))
    bundle = bundle.as_stored(
        dtype=args.dtype, folded=args.folded
    )  # the accuracy must be measured with the weights as stored
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
