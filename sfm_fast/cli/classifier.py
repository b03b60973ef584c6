"""`sfm-fast classifier`: the linear classifier of all real images."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..evaluation.classifier import WEIGHT_DECAYS, train_on_source
from ..evaluation.heads import Classifier
from ..features.cache import FeatureCache
from ..files import check_free_space, check_output_file
from . import common

NAME = "classifier"
SUMMARY = "Train a linear classifier on the features of a whole data set: what `inherit` evaluation reuses."
EXAMPLE = "sfm-fast classifier --data embedded --out classifier.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_data_arguments(parser)
    parser.add_argument("--split", default="train", help="split to train on")
    parser.add_argument("--test-split", default="test", help="split to test on; '' for none")
    common.add_backbone_arguments(parser)
    common.add_list(
        parser,
        "--weight-decay",
        float,
        metavar="X",
        default=",".join(f"{decay:g}" for decay in WEIGHT_DECAYS),
        help="l2 penalties on standardised features, to choose from on the validation rows",
    )
    parser.add_argument(
        "--validation", type=float, metavar="PART", default=0.1, help="part of each class that chooses the weight decay"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the validation split")
    parser.add_argument("--cache", metavar="FOLDER", help="keep features here, and take them from here")
    parser.add_argument("--out", metavar="FILE", default="classifier.safetensors", help="file to write")


def run(args: argparse.Namespace) -> None:
    common.set_threads(args)
    check_output_file(args.out, "--out")
    if Path(args.out).exists():
        Classifier.load(args.out)  # replaces a classifier, and nothing else
    cache = FeatureCache(args.cache)
    backbone = common.open_backbone(args)
    train = common.open_data(args, args.split)
    test = common.open_data(args, args.test_split) if args.test_split else None
    check_free_space(Path(args.out).parent, 4 * len(train.class_names) * (backbone.num_features + 1) + (1 << 20))
    classifier = train_on_source(
        train,
        backbone,
        test=test,
        cache=cache,
        batch_size=args.batch_size,
        progress=not args.quiet,
        weight_decays=args.weight_decay,
        validation=args.validation,
        seed=args.seed,
    )
    classifier.save(args.out)
    found = classifier.metadata
    scores = [
        f"{name} {100 * found[key]:.1f} %"
        for name, key in (("train", "train_top1"), ("validation", "validation_top1"), ("test", "test_top1"))
        if found[key] is not None
    ]
    common.finish(
        args,
        {"out": args.out, "parameters": classifier.parameters, "bytes": classifier.nbytes()}
        | {"class_names": classifier.class_names}
        | found,
        f"{found['images']} images of {classifier.out_features} classes: weight decay {found['weight_decay']:g}, top-1 {', '.join(scores)}",
        f"features {found['feature_seconds']:.1f} s, training {found['seconds']:.1f} s ({found['iterations']} L-BFGS steps in the last fit, on all images)"
        + (", not converged" if found["converged"] is False else ""),
        f"{classifier.parameters} parameters, {classifier.nbytes()} bytes -> {args.out}",
    )
