"""`sfm-fast eval`: test accuracy of classifiers trained on synthetic images, and of references on real images."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..distill.run_folder import RESULT
from ..errors import InputError
from ..evaluation.config import MODES, REFERENCES, USUAL, ProbeConfig
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
    common.add_backbone_arguments(parser, several=True)
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


def check(args: argparse.Namespace) -> None:
    """Raise ``InputError`` for what is wrong before any work is done."""
    common.check_machine(args)
    common.made(args, ProbeConfig)
    if args.ipc < 1:
        raise InputError(f"--ipc must be at least 1, got {args.ipc}")
    modes, references = named(args)
    if not modes:
        raise InputError(f"--mode must name one or more of {', '.join(MODES)}, got none")
    if not args.runs and not references:
        raise InputError("nothing to evaluate: give at least one RUN or --references")
    common.check_inputs(*map(synthetic_of, args.runs), args.classifier or None)
    names = [one.name for one in common.asked(args)]
    if not args.runs and len(names) > 1:
        for name in names:
            if Path(name).exists():
                raise InputError(f"--backbone: if {name!r} is a RUN, write: sfm-fast eval {name} --backbone ...")
    if args.classifier and len(names) > 1:
        raise InputError(
            f"--classifier must be left out with several --backbone, since it is for the features of one, got {args.classifier}"
        )
    common.check_data(args, args.test_split)
    common.check_backbones(args)


def named(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The names of --mode and of --references, each once."""
    return (
        common.check_names("--mode", args.mode, MODES, "sfm-fast eval RUN"),
        common.check_names("--references", args.references, REFERENCES, "sfm-fast eval RUN"),
    )


def synthetic_of(run: str) -> str:
    """The file of synthetic images in the output folder of a run, or ``run`` itself."""
    return str(Path(run, RESULT)) if Path(run).is_dir() else run
