"""`sfm-fast eval`: linear probes on synthetic images, beside the references."""

from __future__ import annotations

import argparse

from ..data.backbones import Backbone, load_backbone
from ..distill.export import SyntheticSet
from ..errors import InputError
from ..probe.evaluate import REFERENCES, Evaluator, ProbeConfig
from ..report.tables import accuracy_table
from . import common

NAME = "eval"
SUMMARY = "Train linear probes on synthetic images and test them on the real test set."
EXAMPLE = "sfm-fast eval runs/sfm --data embedded --seeds 3"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = ProbeConfig()
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="folders of `sfm-fast distill`, or their synthetic.safetensors"
    )
    parser.add_argument(
        "--mode", choices=("probe",), default="probe", help="how the images are used: train a linear classifier"
    )
    parser.add_argument(
        "--references", metavar="NAMES", default=",".join(REFERENCES), help="comma-separated; '' for none"
    )
    parser.add_argument("--ipc", type=int, default=1, help="images per class of the references, where no RUN is given")
    common.add_data_arguments(parser)
    parser.add_argument("--test-split", default="test", help="split to test on")
    common.add_backbone_arguments(parser)
    parser.add_argument(
        "--eval-backbone", metavar="NAME", help="evaluate on another backbone than the one that distilled (--backbone)"
    )
    parser.add_argument("--eval-checkpoint", metavar="FILE", help="local weights of --eval-backbone")
    parser.add_argument("--seeds", type=int, default=default.seeds, help="probes trained for every row")
    parser.add_argument("--epochs", type=int, default=default.epochs, help="most epochs of a probe")
    parser.add_argument("--views", type=int, default=default.views, help="augmented views cached for every image")
    parser.add_argument(
        "--min-area", type=float, default=default.min_area, help="smallest random crop, as a part of the image"
    )


def run(args: argparse.Namespace) -> None:
    common.set_threads(args)
    config = ProbeConfig(seeds=args.seeds, epochs=args.epochs, views=args.views, min_area=args.min_area)
    if args.ipc < 1:
        raise InputError(f"--ipc must be at least 1, got {args.ipc}")
    references = [name for name in args.references.split(",") if name]
    for name in references:
        if name not in REFERENCES:
            raise InputError(f"--references: {name!r} is none of {', '.join(REFERENCES)}")
    if not args.runs and not references:
        raise InputError("nothing to evaluate: give runs, or --references")
    sets = {path: SyntheticSet.load(path) for path in args.runs}
    distilling = common.open_backbone(args)
    for path, synthetic in sets.items():
        made_with = synthetic.metadata.get("backbone", {})
        if made_with.get("fingerprint", distilling.fingerprint) != distilling.fingerprint:
            raise InputError(
                f"{path}: distilled on {made_with.get('name')!r} ({made_with['fingerprint']}), --backbone is {distilling.name!r} "
                f"({distilling.fingerprint}); name the distilling one there, and another to test on as --eval-backbone"
            )
    evaluating: Backbone = distilling
    if args.eval_backbone or args.eval_checkpoint:
        evaluating = load_backbone(
            args.eval_backbone or args.backbone, args.eval_checkpoint, device=args.device, precision=args.precision
        )
    test = common.open_data(args, args.test_split)
    train = common.open_data(args, "train") if references else None
    for path, synthetic in sets.items():
        if synthetic.class_names != test.class_names:
            raise InputError(
                f"{path}: its {len(synthetic.class_names)} classes are not the test set's {len(test.class_names)} "
                f"(they differ in {sorted(set(synthetic.class_names) ^ set(test.class_names))[:6] or 'order'})"
            )
    evaluator = Evaluator(
        evaluating, test, train, selector=distilling, config=config, batch_size=args.batch_size, progress=not args.quiet
    )

    rows = []
    shapes = sorted({(len(s.labels) // len(s.class_names), s.images.shape[-1]) for s in sets.values()}) or [
        (args.ipc, distilling.image_size)
    ]
    if "full" in references:
        rows.append(evaluator.full())
    for ipc, size in shapes:
        if "random-real" in references:
            rows.append(evaluator.random_real(ipc, size))
        if "nearest-real" in references:
            rows.append(evaluator.nearest_real(ipc, size))
    for path, synthetic in sets.items():
        rows.append(evaluator.probe_synthetic(synthetic) | {"run": str(path)})
    common.say(args, accuracy_table(rows))
    common.write_result(
        args,
        {
            "rows": rows,
            "data": test.name,
            "distilling_backbone": distilling.describe(),
            "backbone": evaluating.describe(),
        },
    )
