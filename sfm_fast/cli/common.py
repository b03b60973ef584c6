"""Options that several commands share, and the checks of them that need neither torch nor timm."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from ..arguments import add_list as add_list
from ..arguments import add_options as add_options
from ..arguments import check_names as check_names
from ..arguments import check_threads
from ..arguments import given_options as given_options
from ..arguments import made as made
from ..backbones.names import DEFAULT, PRECISIONS, SHIPPED, WEIGHTS
from ..backbones.names import check_weights as check_weights
from ..data import spec
from ..errors import InputError
from ..files import check_input_file


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """--data, --data-root, --num-classes, --workers, --hold-out and --hold-out-seed."""
    # --data has no default here: some commands must know whether it was given.
    parser.add_argument("--data", metavar="SPEC", help=f"{spec.HELP} (default: {spec.EMBEDDED})".replace("%", "%%"))
    add_reading_arguments(parser)
    parser.add_argument(
        "--num-classes", type=int, metavar="C", help="number of classes, for data sets that don't state it"
    )
    add_options(parser, spec.HoldOut)


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """--data-root and --workers: how a data set is read."""
    parser.add_argument("--data-root", metavar="FOLDER", help="folder of the files of timm's data sets")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="number of processes that decode images (default: one per core, at most 8)",
    )


NO_FILE = "none"  # in a list of files


class Asked(NamedTuple):
    """A backbone as asked for on a command line."""

    name: str
    checkpoint: str | None
    weights: str
    image_size: int | None


def image_size(text: str) -> int | None:
    """The value of --image-size; argparse shows the function's name."""
    return None if text == "auto" else int(text)


def add_model_arguments(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """--backbone, --image-size and --no-prepare: the architecture, or those of ``several`` backbones, of which `asked` makes a list."""
    more = "; several: the images are made for all of them, by the sum of their losses" if several else ""
    number: dict[str, Any] = {"nargs": "+"} if several else {}
    parser.add_argument(
        "--backbone",
        metavar="NAME",
        default=DEFAULT,
        help=f"{' or '.join(SHIPPED)} (shipped), or any timm model{more}",
        **number,
    )
    more = (
        "; with several backbones one for all of them, or one for each, of which auto is the default" if several else ""
    )
    parser.add_argument(
        "--image-size",
        type=image_size if several else int,
        metavar="PX",
        help=f"input size in pixels, for models that accept other sizes than their default{more}",
        **number,
    )
    parser.add_argument(
        "--no-prepare",
        dest="prepare",
        action="store_false",
        help="run the backbone as loaded, instead of with its batch norms and other constants folded into its weights",
    )


def add_backbone_arguments(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """--checkpoint, --weights and the options of `add_model_arguments` and `add_machine_arguments`."""
    add_model_arguments(parser, several=several)
    number: dict[str, Any] = {"nargs": "+"} if several else {}
    more = f"; with several backbones one for each, {NO_FILE} for one without" if several else ""
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help=f"local file of weights, .safetensors or .pth (default: timm's pretrained weights){more}",
        **number,
    )
    more = "; with several backbones one for all of them, or one for each" if several else ""
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default=WEIGHTS[0],
        help=f"random: timm's initial weights instead of pretrained ones, to try a model without a download{more}",
        **number,
    )
    add_machine_arguments(parser)


def add_evaluating_backbone_arguments(parser: argparse.ArgumentParser, purpose: str) -> None:
    """--eval-backbone and what belongs to it; `open_evaluating_backbone` reads them."""
    parser.add_argument("--eval-backbone", metavar="NAME", help=f"{purpose} (default: the distilling one, --backbone)")
    parser.add_argument("--eval-checkpoint", metavar="FILE", help="local file of weights for --eval-backbone")
    parser.add_argument("--eval-weights", choices=WEIGHTS, help="like --weights, for --eval-backbone")
    parser.add_argument("--eval-image-size", type=int, metavar="PX", help="input size of --eval-backbone in pixels")


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """--device, --precision, --threads, --batch-size and --quiet."""
    parser.add_argument("--device", default="auto", help="torch device: auto, cpu, cuda, cuda:1, …")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="numeric precision of the backbone; auto is bf16 on GPUs that support it, and on CPUs with instructions for it (AMX or "
        "AVX512-BF16) if the model is a transformer at least as wide as ViT-S, else fp32 (distill: that of --stats, or of the run that is resumed)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="number of CPU threads (default: torch's choice)")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", default=256, help="images per batch when computing features"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def check_machine(args: argparse.Namespace) -> None:
    """Check --batch-size, --workers and --threads."""
    if args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {args.batch_size}")
    if getattr(args, "workers", None) is not None and args.workers < 0:
        raise InputError(f"--workers must be at least 0, got {args.workers}")
    check_threads(args.threads)


def check_data(args: argparse.Namespace, *splits: str) -> None:
    """Check that there is a data set by the name --data, and the options of `add_data_arguments`."""
    held = made(args, spec.HoldOut)
    for split in splits:
        spec.check_spec(data_of(args), split, args.data_root, held)


def data_of(args: argparse.Namespace) -> str:
    """The name of the data set."""
    return spec.EMBEDDED if args.data is None else str(args.data)


def check_backbones(args: argparse.Namespace) -> None:
    """Check the weights of --backbone, and of the evaluating backbone if the command has one."""
    wanted = asked(args)
    if hasattr(args, "eval_backbone") and (evaluating := evaluating_of(args)) is not None:
        wanted = [*wanted, evaluating]
    for one in wanted:
        check_weights(one.name, one.checkpoint, one.weights)


def asked(args: argparse.Namespace) -> list[Asked]:
    """The backbones of --backbone, with their --checkpoint, --weights and --image-size. Raises ``InputError`` if there aren't as many of these."""

    def listed(value: Any) -> list[Any]:
        return value if isinstance(value, list) else [value]

    names = listed(args.backbone)
    count = len(names)

    def of_each(option: str, usual: Any, one_for_all: bool) -> list[Any]:
        given = listed(usual if getattr(args, option, None) is None else getattr(args, option))
        if len(given) == 1 and (one_for_all or given == [usual]):
            return given * count
        if len(given) != count:
            one = "one, or " if one_for_all else ""
            raise InputError(
                f"--{option.replace('_', '-')} must have {one}one for each of the {count} backbones {', '.join(names)}, got {len(given)}"
            )
        return list(given)

    files = [None if file == NO_FILE else file for file in of_each("checkpoint", NO_FILE, False)]
    kinds, sizes = of_each("weights", WEIGHTS[0], True), of_each("image_size", None, True)
    found = [Asked(*one) for one in zip(names, files, kinds, sizes, strict=True)]
    for one in found:
        if found.count(one) > 1:
            raise InputError(f"--backbone must name each backbone once, got {one.name} twice")
    return found


def evaluating_of(args: argparse.Namespace) -> Asked | None:
    """The evaluating backbone; None if none of its options is given.

    Without --eval-backbone the model is --backbone, with its options unless --eval-checkpoint, --eval-weights or --eval-image-size
    replaces them.
    """
    name, checkpoint, weights, size = args.eval_backbone, args.eval_checkpoint, args.eval_weights, args.eval_image_size
    if (name, checkpoint, weights, size) == (None, None, None, None):
        return None
    if name is None:
        of, *others = asked(args)
        if others:
            raise InputError(
                "--eval-backbone must name the model of --eval-checkpoint, --eval-weights and --eval-image-size if there are several --backbone"
            )
        name, size = of.name, of.image_size if size is None else size
        if checkpoint is None and weights is None:
            checkpoint, weights = of.checkpoint, of.weights
    return Asked(name, checkpoint, weights or WEIGHTS[0], size)


def check_inputs(*paths: str | None) -> None:
    """Check that every file that is given exists."""
    for path in paths:
        if path is not None:
            check_input_file(path)
