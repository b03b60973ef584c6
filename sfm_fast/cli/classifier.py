"""`sfm-fast classifier`: train a linear classifier on the features of all real images."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..evaluation.classifier import WEIGHT_DECAYS, train_on_source
from ..evaluation.heads import Classifier
from ..features.cache import FeatureCache
from ..files import check_free_space, check_output_file
from . import common

NAME = "classifier"
SUMMARY = "Train a linear classifier on the features of a whole data set, for the evaluation modes `inherit` and `kd`."
EXAMPLE = "sfm-fast classifier --data embedded --out classifier.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_data_arguments(parser)
    parser.add_argument("--split", default="train", help="split to train on")
    parser.add_argument("--test-split", default="test", help="split to test on; '' for no test")
    common.add_backbone_arguments(parser)
    common.add_list(
        parser,
        "--weight-decay",
        float,
        metavar="X",
        default=",".join(f"{decay:g}" for decay in WEIGHT_DECAYS),
        help="candidate l2 penalties on standardised features; the best one on the validation images is used",
    )
    parser.add_argument(
        "--validation",
        type=float,
        metavar="PART",
        default=0.1,
        help="fraction of each class held out to choose the weight decay",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random validation split")
    parser.add_argument("--cache", metavar="FOLDER", help="folder in which computed features are stored and reused")
    parser.add_argument("--out", metavar="FILE", default="classifier.safetensors", help="file to write")


def run(args: argparse.Namespace) -> None:
    common.set_threads(args)
    check_output_file(args.out, "--out")
    if Path(args.out).exists():
        Classifier.load(args.out)  # only a classifier may be replaced
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
    metadata = classifier.metadata
    scores = [
        f"{name} {100 * metadata[key]:.1f} %"
        for name, key in (("train", "train_top1"), ("validation", "validation_top1"), ("test", "test_top1"))
        if metadata[key] is not None
    ]
    common.finish(
        args,
        {"out": args.out, "parameters": classifier.parameters, "bytes": classifier.nbytes()}
        | {"class_names": classifier.class_names}
        | metadata,
        f"{metadata['images']} images of {classifier.out_features} classes: weight decay {metadata['weight_decay']:g}, top-1 {', '.join(scores)}",
        f"features {metadata['feature_seconds']:.1f} s, training {metadata['seconds']:.1f} s ({metadata['iterations']} L-BFGS steps in the last fit, on all images)"
        + (", not converged" if metadata["converged"] is False else ""),
        f"{classifier.parameters} parameters, {classifier.nbytes()} bytes -> {args.out}",
    )
