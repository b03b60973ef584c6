"""`sfm-fast bundle`: put a run, a classifier and a projector into one folder that classifies photos."""

from __future__ import annotations

import argparse

from ..bundle import DTYPES, VIEWS, Bundle
from ..bundle_folder import check_bundle_folder
from ..bundle_parts import check_parts
from ..data.backbones import Backbone, load_backbone
from ..data.weights import check_storable
from ..distill.export import SyntheticSet
from ..errors import InputError
from ..probe.heads import Classifier
from ..probe.inherit import SOLVERS
from ..report.tables import text_table
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
    parser.add_argument("--views", type=int, default=VIEWS, help="flips and crops of every image it is fitted on")
    parser.add_argument("--seed", type=int, default=0, help="of these crops")
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
    check_bundle_folder(args.out, "--out")
    if args.views < 1:
        raise InputError(f"--views must be at least 1, got {args.views}")
    synthetic = SyntheticSet.load(args.run_folder)
    classifier = Classifier.load(args.classifier)
    phi = common.open_backbone(args)
    check_parts(synthetic, classifier, phi)
    psi = _evaluating(args)
    if args.with_backbone:
        check_storable(psi or phi)
    bundle = Bundle.create(
        synthetic,
        classifier,
        phi,
        psi,
        solver=args.projector,
        views=args.views,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    bundle.save(args.out, dtype=args.dtype, folded=args.folded, with_backbone=args.with_backbone)
    sizes = bundle.size_report()
    common.say(
        args,
        text_table(["", "bytes", ""], ([row["what"], f"{row['bytes']:,}", row["detail"]] for row in sizes)),
        f"{len(bundle.class_names)} classes, photos through {bundle.psi['name']} -> {args.out}",
    )
    common.write_result(
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
    )


def _evaluating(args: argparse.Namespace) -> Backbone | None:
    """psi, where any option names another than phi."""
    if not (args.eval_backbone or args.eval_checkpoint or args.eval_image_size):
        return None
    named = args.eval_backbone is not None
    return load_backbone(
        args.eval_backbone if named else args.backbone,
        args.eval_checkpoint if named or args.eval_checkpoint else args.checkpoint,
        device=args.device,
        image_size=args.eval_image_size or (None if named else args.image_size),
        precision=args.precision,
    )
