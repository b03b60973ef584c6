"""Options several commands share, and the two ways a result leaves a command."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ..backbones.backbone import Backbone
from ..backbones.load import PRECISIONS, load_backbone
from ..backbones.shipped import DEFAULT, SHIPPED
from ..data import datasets
from ..data.sources import ImageSource
from ..errors import InputError
from ..files import write_json
from ..options import options_of

Name = TypeVar("Name", str, int)
Made = TypeVar("Made")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """--data and what belongs to it."""
    # No default here: a command must see whether it was given.
    parser.add_argument(
        "--data", metavar="SPEC", help=f"{datasets.HELP} (default: {datasets.EMBEDDED})".replace("%", "%%")
    )
    parser.add_argument("--data-root", metavar="FOLDER", help="where timm's data sets keep their files")
    parser.add_argument(
        "--num-classes", type=int, metavar="C", help="number of classes, where the data set doesn't say"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that decode images (default: one a core, at most 8)"
    )


def add_backbone_arguments(parser: argparse.ArgumentParser) -> None:
    """--backbone and what belongs to it."""
    parser.add_argument(
        "--backbone", metavar="NAME", default=DEFAULT, help=f"{' or '.join(SHIPPED)} (shipped), or any timm model"
    )
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="local weights, .safetensors or .pth (default: timm's pretrained ones)"
    )
    parser.add_argument(
        "--image-size", type=int, metavar="PX", help="input side, for models that take another than their default"
    )
    add_machine_arguments(parser)


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """--device, --precision, --threads, --batch-size and --quiet."""
    parser.add_argument("--device", default="auto", help="torch device: auto, cpu, cuda, cuda:1, …")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="of the backbone; auto is bf16 on GPUs that have it, else fp32",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", default=256, help="images a batch when computing features"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


class Listed(argparse.Action):
    """Values by commas, by spaces, or by giving the option again; the first one given replaces the default."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        earlier = getattr(namespace, self.dest)
        given = [value for one in values for value in one]
        setattr(namespace, self.dest, given if earlier is self.default else earlier + given)


def add_list_argument(
    parser: argparse.ArgumentParser, option: str, kind: Callable[[str], Any] = str, **options: Any
) -> None:
    """An option with a list of ``kind`` by commas or spaces, '' for none; its default is such a text, or None."""

    def values(text: str) -> list[Any]:
        return [kind(word) for word in text.replace(",", " ").split()]

    values.__name__ = kind.__name__  # argparse's message says it
    parser.add_argument(option, nargs="+", type=values, action=Listed, **options)


def check_names(option: str, names: Sequence[Name], known: Sequence[Name], before: str = "") -> list[Name]:
    """Each name (or number) once, in the order given; raises ``InputError`` for an unknown one.

    ``before``: what stands on the command line before ``option``, for the message where the list has swallowed it.
    """
    for name in names:
        if name not in known:
            swallowed = before and ("/" in str(name) or os.path.lexists(str(name)))
            hint = f"; where it is a {before.split()[-1]}, write: {before} {option} ..." if swallowed else ""
            raise InputError(f"{option}: {name!r} is none of {', '.join(map(str, known))}{hint}")
    return list(dict.fromkeys(names))


def add_options(parser: argparse.ArgumentParser, kind: type, names: Sequence[str] = (), **flags: str) -> None:
    """An option for each field (or each of ``names``) of a dataclass of `sfm_fast.options`; None where it isn't given.

    ``flags``: fields that are called otherwise on the command line. `given_options` reads them.
    """
    for name, one in options_of(kind).items():
        if names and name not in names:
            continue
        default = getattr(kind, name)
        usual = one.usual or (f"{default:g}" if isinstance(default, float) else str(default))
        flag = flags.get(name, f"--{name.replace('_', '-')}")
        if isinstance(default, bool):
            usual = "yes" if default else "no"
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, dest=name, action=action, default=None, help=f"{one.help} (default: {usual})")
            continue
        parser.add_argument(
            flag,
            dest=name,
            type=str if one.choices else int if one.least is not None else float,
            choices=one.choices or None,
            metavar=one.metavar,
            help=f"{one.help} (default: {usual})".replace("%", "%%"),
        )


def given_options(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """Those fields of the dataclass ``kind`` that the command line gives."""
    values = ((name, getattr(args, name, None)) for name in options_of(kind))
    return {name: value for name, value in values if value is not None}


def made(args: argparse.Namespace, kind: type[Made], **more: Any) -> Made:
    """The dataclass ``kind`` of the options given, and of ``more``; what is wrong is told by the option's name on the command line."""
    try:
        return kind(**given_options(args, kind), **more)
    except InputError as error:
        name, _, rest = str(error).partition(" ")
        if name not in options_of(kind):
            raise
        raise InputError(f"--{name.replace('_', '-')} {rest}") from error


def set_threads(args: argparse.Namespace) -> None:
    """Apply --threads; checks --batch-size too, both before any work."""
    if args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {args.batch_size}")
    if getattr(args, "workers", None) is not None and args.workers < 0:
        raise InputError(f"--workers must be at least 0, got {args.workers}")
    if args.threads is not None:
        if args.threads < 1:
            raise InputError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)


def open_data(args: argparse.Namespace, split: str, channels: int | None = None) -> ImageSource:
    """The data set of --data; says what was found in a folder or archive, and what was left out."""
    source = datasets.open_dataset(
        datasets.EMBEDDED if args.data is None else args.data,
        split,
        root=args.data_root,
        channels=channels,
        num_classes=args.num_classes,
        workers=args.workers,
    )
    if source.told:
        say(args, source.told)
    return source


def open_backbone(args: argparse.Namespace, **options: bool) -> Backbone:
    """The backbone of --backbone and --checkpoint; ``options`` as of `load_backbone`."""
    return load_backbone(
        args.backbone,
        args.checkpoint,
        device=args.device,
        image_size=args.image_size,
        precision=args.precision,
        **options,
    )


def open_evaluating_backbone(args: argparse.Namespace) -> Backbone | None:
    """The backbone of --eval-backbone, --eval-checkpoint and --eval-image-size; None where none of them is given.

    Without --eval-backbone it is --backbone's model: at --image-size, and with --checkpoint's weights, unless others are given.
    """
    if args.eval_backbone is None and args.eval_checkpoint is None and args.eval_image_size is None:
        return None
    own = args.eval_backbone is None
    checkpoint, size = args.eval_checkpoint, args.eval_image_size
    return load_backbone(
        args.backbone if own else args.eval_backbone,
        args.checkpoint if own and checkpoint is None else checkpoint,
        device=args.device,
        image_size=args.image_size if own and size is None else size,
        precision=args.precision,
    )


def say(args: argparse.Namespace, *lines: str) -> None:
    """Print for people: to stderr where stdout carries JSON."""
    print(*lines, sep="\n", file=sys.stderr if args.json == "-" else sys.stdout, flush=True)


def finish(args: argparse.Namespace, result: dict[str, Any], *lines: str) -> None:
    """Write ``result`` where --json says, then print ``lines``: where the first fails, they are shown all the same."""
    try:
        write_result(args, result)
    finally:
        say(args, *lines)


def write_result(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write ``result`` where --json says, if it was given."""
    if args.json == "-":
        print(json.dumps(result, indent=2, allow_nan=False), flush=True)
    elif args.json:
        write_json(args.json, result)
