"""Runs `sfm-fast eval`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from ...errors import InputError
from ...evaluation.evaluator import Evaluator, ProbeConfig
from ...evaluation.heads import Classifier
from ...evaluation.modes import check_classifier
from ...evaluation.references import TooFewImagesError
from ...evaluation.rows import LeftOut, Row
from ...features.cache import FeatureCache
from ...report.tables import accuracy_table
from ...synthetic import SyntheticSet
from ..evaluate import named
from . import common


def run(args: argparse.Namespace) -> None:
    common.set_threads(args)
    config = common.made(args, ProbeConfig)
    modes, names = named(args)
    sets = {path: SyntheticSet.load(path) for path in args.runs}
    classifier = Classifier.load(args.classifier) if args.classifier else None
    cache = FeatureCache(args.cache)
    test = common.open_test(args, common.data_of(args), args.num_classes)
    trains = classifier is None and modes != ["probe"]
    train = common.open_data(args, "train") if names or trains else None
    all_distilling = common.open_backbones(args)
    evaluating = common.open_evaluating_backbone(args)
    if classifier is not None:
        check_classifier(classifier, all_distilling[0], test.class_names, f"--classifier {args.classifier}")
    seeds = f"{config.seeds} seed" + "s" * (config.seeds > 1)
    rows: list[Row] = []
    left_out: list[LeftOut] = []
    evaluations = []
    evaluators = [
        Evaluator(
            evaluating or distilling,
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
        for distilling in all_distilling
    ]
    for evaluator in evaluators:
        for path, synthetic in sets.items():
            evaluator.check_synthetic(synthetic, path, "--backbone")
    for evaluator in evaluators:
        distilling, backbone = evaluator.distilling, evaluator.backbone
        if classifier is None and trains and train is not None:
            common.say(args, f"no --classifier: training one on {distilling.name}'s features of {train.name}")
        found = _rows(args, evaluator, sets, names)
        rows, left_out = rows + found[0], left_out + found[1]
        common.say(args, f"distilled on {distilling.name}, tested on {backbone.name}: {test.name}, {seeds}")
        if evaluator.same and "inherit" in modes:
            common.say(
                args,
                "mode inherit on the distilling backbone uses the full-data classifier unchanged, so it doesn't test the images: choose another --eval-backbone",
            )
        evaluations.append(
            {
                "distilling_backbone": distilling.describe(),
                "backbone": backbone.describe(),
                "classifier": None if modes == ["probe"] or not found[0] else evaluator.classifier.metadata,
            }
        )
    if not rows:
        raise InputError("nothing to evaluate: " + "; ".join(f"{one['images']}: {one['reason']}" for one in left_out))
    common.finish(
        args,
        # The first evaluation's records stand beside the rows too, since there is usually one.
        {"rows": rows, "left_out": left_out, "data": test.name, **evaluations[0], "evaluations": evaluations},
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
