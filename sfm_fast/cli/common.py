"""Options that several commands share, and what they open: data sets and backbones."""

from __future__ import annotations

import argparse

from ..arguments import add_list as add_list
from ..arguments import add_options as add_options
from ..arguments import check_names as check_names
from ..arguments import finish as finish
from ..arguments import given_options as given_options
from ..arguments import made as made
from ..arguments import say as say
from ..arguments import use_threads as use_threads
from ..backbones.backbone import Backbone
from ..backbones.load import PRECISIONS, load_backbone
from ..backbones.shipped import DEFAULT, SHIPPED
from ..data import datasets
from ..data.sources import ImageSource
from ..errors import InputError


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """--data, --data-root, --num-classes and --workers."""
    # --data has no default here: some commands must know whether it was given.
    parser.add_argument(
        "--data", metavar="SPEC", help=f"{datasets.HELP} (default: {datasets.EMBEDDED})".replace("%", "%%")
    )
    add_reading_arguments(parser)
    parser.add_argument(
        "--num-classes", type=int, metavar="C", help="number of classes, for data sets that don't state it"
    )


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """--data-root and --workers: how a data set is read."""
    parser.add_argument("--data-root", metavar="FOLDER", help="folder of the files of timm's data sets")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="number of processes that decode images (default: one per core, at most 8)",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--backbone and --image-size: the architecture."""
    parser.add_argument(
        "--backbone", metavar="NAME", default=DEFAULT, help=f"{' or '.join(SHIPPED)} (shipped), or any timm model"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="input size in pixels, for models that accept other sizes than their default",
    )


def add_backbone_arguments(parser: argparse.ArgumentParser) -> None:
    """--checkpoint and the options of `add_model_arguments` and `add_machine_arguments`."""
    add_model_arguments(parser)
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="local file of weights, .safetensors or .pth (default: timm's pretrained weights)",
    )
    add_machine_arguments(parser)


def add_evaluating_backbone_arguments(parser: argparse.ArgumentParser, purpose: str) -> None:
    """--eval-backbone and what belongs to it; `open_evaluating_backbone` reads them."""
    parser.add_argument("--eval-backbone", metavar="NAME", help=f"{purpose} (default: the distilling one, --backbone)")
    parser.add_argument("--eval-checkpoint", metavar="FILE", help="local file of weights for --eval-backbone")
    parser.add_argument("--eval-image-size", type=int, metavar="PX", help="input size of --eval-backbone in pixels")


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """--device, --precision, --threads, --batch-size and --quiet."""
    parser.add_argument("--device", default="auto", help="torch device: auto, cpu, cuda, cuda:1, …")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="numeric precision of the backbone; auto is bf16 on GPUs that support it, else fp32",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="number of CPU threads (default: torch's choice)")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", default=256, help="images per batch when computing features"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def set_threads(args: argparse.Namespace) -> None:
    """Apply --threads, and check --batch-size and --workers, before any work is done."""
    if args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {args.batch_size}")
    if getattr(args, "workers", None) is not None and args.workers < 0:
        raise InputError(f"--workers must be at least 0, got {args.workers}")
    use_threads(args.threads)


def open_data(args: argparse.Namespace, split: str, channels: int | None = None) -> ImageSource:
    """The data set of --data; prints which images of a folder or archive are used and which are left out."""
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
    """The backbone of --backbone and --checkpoint; ``options`` are passed to `load_backbone`."""
    return load_backbone(
        args.backbone,
        args.checkpoint,
        device=args.device,
        image_size=args.image_size,
        precision=args.precision,
        **options,
    )


def open_evaluating_backbone(args: argparse.Namespace) -> Backbone | None:
    """The backbone of --eval-backbone, --eval-checkpoint and --eval-image-size; None if none of them is given.

    Without --eval-backbone the model is --backbone, with --image-size and --checkpoint unless --eval-image-size or --eval-checkpoint replaces them.
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
