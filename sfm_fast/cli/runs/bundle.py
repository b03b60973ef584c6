"""Runs `sfm-fast bundle`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ...backbones.precision import Chosen
from ...backbones.record import check_storable
from ...bundle.bundle import Bundle, check_parts
from ...checks import check_class_names
from ...evaluation.heads import Classifier
from ...evaluation.projector import ProjectorFit
from ...report.tables import text_table
from ...synthetic import SyntheticSet
from . import common


def run(args: argparse.Namespace) -> None:
    common.set_threads(args)
    fit = common.made(args, ProjectorFit)
    synthetic = SyntheticSet.load(args.run_folder)
    classifier = Classifier.load(args.classifier)
    test = None
    if args.test_data is not None:
        test = common.open_test(args, args.test_data, len(classifier.class_names))
        check_class_names(test.class_names, classifier.class_names, test.name, "the bundle's")
    kept = Chosen("fp32", "its weights are stored") if args.with_backbone else None
    phi = common.open_backbone(args, kept)
    check_parts(synthetic, classifier, phi)
    psi = common.open_evaluating_backbone(args, kept)
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
