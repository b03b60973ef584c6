"""Runs `sfm-fast classifier`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...evaluation.classifier import train_on_source
from ...evaluation.heads import Classifier
from ...features.cache import FeatureCache
from ...files import check_free_space
from . import common


def run(args: argparse.Namespace) -> None:
    common.set_threads(args)
    if Path(args.out).exists():
        Classifier.load(args.out)  # only a classifier may be replaced
    cache = FeatureCache(args.cache)
    train = common.open_data(args, args.split)
    test = common.open_test(args, common.data_of(args), args.num_classes) if args.test_split else None
    backbone = common.open_backbone(args)
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
