"""`sfm-fast eval`: test accuracy of classifiers trained on synthetic images, and of references on real images."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from ..errors import InputError
from ..evaluation.evaluator import MODES, REFERENCES, Evaluator, ProbeConfig
from ..evaluation.heads import Classifier
from ..evaluation.modes import check_classifier
from ..evaluation.references import USUAL, TooFewImagesError
from ..evaluation.rows import LeftOut, Row
from ..features.cache import FeatureCache
from ..report.tables import accuracy_table
from ..synthetic import SyntheticSet
from . import common

NAME = "eval"
SUMMARY = "Train classifiers on synthetic images and test them on the real test set."
EXAMPLE = "sfm-fast eval runs/sfm --data embedded --mode probe,inherit,kd --eval-backbone fashion_cnn"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="output folders of `sfm-fast distill`, or their synthetic.safetensors"
    )
    common.add_list(
        parser,
        "--mode",
        metavar="NAME",
        default="probe",
        help="one or more of: 'probe', which trains a linear classifier on the images; 'inherit', which reuses the classifier trained "
        "on all real images and the distilling backbone, and fits a linear projector from the evaluating to the distilling backbone's "
        "features on the images; 'kd', which trains a probe with that classifier as teacher",
    )
    common.add_list(
        parser,
        "--references",
        metavar="NAME",
        default=",".join(USUAL),
        help=f"one or more of {', '.join(REFERENCES)}; '' for none. full: all real images; random-real: real images drawn at random for each "
        "seed; nearest-real: the real images nearest to their class's centre; neighbour-real: the real images nearest to the synthetic "
        "ones; class-means: mean features of the real images instead of images (k-means centres for several images per class, then called cluster-means)",
    )
    parser.add_argument("--ipc", type=int, default=1, help="images per class of the references if no RUN is given")
    common.add_data_arguments(parser)
    parser.add_argument("--test-split", default="test", help="split to test on")
    common.add_backbone_arguments(parser)
    common.add_evaluating_backbone_arguments(parser, "evaluate on this backbone")
    parser.add_argument(
        "--classifier",
        metavar="FILE",
        help="file written by `sfm-fast classifier` on --backbone, for the modes inherit and kd (default: a classifier is trained first and not saved)",
    )
    parser.add_argument(
        "--cache", metavar="FOLDER", help="folder in which computed features of data sets are stored and reused"
    )
    common.add_options(parser, ProbeConfig)


def run(args: argparse.Namespace) -> None:
    common.set_threads(args)
    config = common.made(args, ProbeConfig)
    if args.ipc < 1:
        raise InputError(f"--ipc must be at least 1, got {args.ipc}")
    modes = common.check_names("--mode", args.mode, MODES, "sfm-fast eval RUN")
    names = common.check_names("--references", args.references, REFERENCES, "sfm-fast eval RUN")
    if not modes:
        raise InputError(f"--mode must name one or more of {', '.join(MODES)}, got none")
    if not args.runs and not names:
        raise InputError("nothing to evaluate: give at least one RUN or --references")
    sets = {path: SyntheticSet.load(path) for path in args.runs}
    classifier = Classifier.load(args.classifier) if args.classifier else None
    cache = FeatureCache(args.cache)
    distilling = common.open_backbone(args)
    evaluating = common.open_evaluating_backbone(args) or distilling
    test = common.open_data(args, args.test_split)
    trains = classifier is None and modes != ["probe"]
    train = common.open_data(args, "train") if names or trains else None
    if classifier is not None:
        check_classifier(classifier, distilling, test.class_names, f"--classifier {args.classifier}")
    elif trains and train is not None:
        common.say(args, f"no --classifier: training one on {distilling.name}'s features of {train.name}")
    evaluator = Evaluator(
        evaluating,
        test,
        train,
        distilling=distilling,
        classifier=classifier,
        modes=modes,
        config=config,
        cache=cache,
        batch_size=args.batch_size,
        progress=not args.quiet,
    )
    for path, synthetic in sets.items():
        evaluator.check_synthetic(synthetic, path, "--backbone")
    rows, left_out = _rows(args, evaluator, sets, names)
    if not rows:
        raise InputError("nothing to evaluate: " + "; ".join(f"{one['images']}: {one['reason']}" for one in left_out))
    seeds = f"{config.seeds} seed" + "s" * (config.seeds > 1)
    common.say(args, f"distilled on {distilling.name}, tested on {evaluating.name}: {test.name}, {seeds}")
    if evaluator.same and "inherit" in modes:
        common.say(
            args,
            "mode inherit on the distilling backbone uses the full-data classifier unchanged, so it doesn't test the images: choose another --eval-backbone",
        )
    common.finish(
        args,
        {
            "rows": rows,
            "left_out": left_out,
            "data": test.name,
            "distilling_backbone": distilling.describe(),
            "backbone": evaluating.describe(),
            "classifier": None if modes == ["probe"] else evaluator.classifier.metadata,
        },
        accuracy_table(rows),
    )


def _rows(
    args: argparse.Namespace, evaluator: Evaluator, sets: Mapping[str, SyntheticSet], names: list[str]
) -> tuple[list[Row], list[LeftOut]]:
    """Rows of the references, then of the runs (each after its neighbour-real reference); and the references left out, with reasons."""
    rows: list[Row] = []
    left_out: list[LeftOut] = []

    def skip(name: str, ipc: int, reason: str) -> None:
        left_out.append({"images": name, "ipc": ipc, "reason": reason})
        common.say(args, f"{name} left out: {reason}")

    def add(name: str, ipc: int, size: int, path: str = "", like: SyntheticSet | None = None) -> None:
        try:
            results = evaluator.reference(name, ipc, size, like=like)
        except TooFewImagesError as error:
            return skip(name, ipc, str(error))
        if not results:
            skip(name, ipc, "it consists of features instead of images, so only mode probe can use it")
        rows.extend({**row, "run": path} if path else row for row in results)

    shapes = sorted({(len(s.labels) // len(s.class_names), s.images.shape[-1]) for s in sets.values()}) or [
        (args.ipc, evaluator.distilling.image_size)
    ]
    if "full" in names:
        add("full", *shapes[0])
    for name in names:
        if name == "neighbour-real" and not sets:
            skip(name, args.ipc, "give a RUN whose nearest real images are wanted")
        if name not in ("full", "neighbour-real"):
            for ipc, size in shapes:
                add(name, ipc, size)
    for path, synthetic in sets.items():
        if "neighbour-real" in names:
            ipc = len(synthetic.labels) // len(synthetic.class_names)
            add("neighbour-real", ipc, synthetic.images.shape[-1], str(path), synthetic)
        rows += [{**row, "run": str(path)} for row in evaluator.evaluate_synthetic(synthetic)]
    return rows, left_out
