"""LGM's gradient against the flow on real features: along the classifier's scale, the batch, the spread within classes.

    python -m benchmarks.derivation --data fashion-mnist --out benchmarks/results/cpu --figure docs/figures/derivation.svg
    python -m benchmarks.derivation --data embedded --draws 10 --out runs/derivation

docs/derivation.md explains the figures. ``derivation.json`` has all numbers; backbones in it that aren't measured anew stay.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sfm_fast.arguments import add_list
from sfm_fast.backbones.backbone import Backbone
from sfm_fast.backbones.load import load_backbone
from sfm_fast.backbones.shipped import SHIPPED
from sfm_fast.data.datasets import open_dataset
from sfm_fast.data.sources import ImageSource
from sfm_fast.data.transforms import ImageTransform
from sfm_fast.errors import InputError
from sfm_fast.features.cache import FeatureCache
from sfm_fast.features.compute import view_features
from sfm_fast.files import check_output_file, write_json
from sfm_fast.views import Augmentation

from ..cells import Cell, fill
from ..machine import environment
from .figure import findings_table, write_figure
from .rows import Features, Measured, Result, augmentation, panels

LITE0 = "tf_efficientnet_lite0"
LITE0_MODULE = "sfm_fast.backbones.efficientnet_lite"
AUGMENTED = 20_000  # maximum number of images whose augmented views are measured


def augmented_features(source: ImageSource, backbone: Backbone, seed: int) -> Tensor:
    """Features (N, D) of one augmented view of every image, as LGM augments real images."""
    size = backbone.image_size
    transform = ImageTransform(size, size, min(source.channels, backbone.in_channels))
    return torch.cat(
        [
            view_features(backbone, images, 1, Augmentation(), seed=(seed << 32) + index)[0].cpu()
            for index, (images, _) in enumerate(source.batches(256, transform))
        ]
    )


class FirstOfEachClass(ImageSource):
    """The first ``each`` images of every class of a source, in its order."""

    random_access = False

    def __init__(self, source: ImageSource, each: int) -> None:
        self.source, self.each = source, each
        self.name, self.channels = f"{source.name}, first {each} of a class", source.channels
        self.class_names = source.class_names

    def __len__(self) -> int:
        return 0  # not known before a pass: a class may have fewer

    def batches(self, batch_size: int, transform: ImageTransform) -> Iterator[tuple[Tensor, Tensor]]:
        seen = torch.zeros(len(self.class_names), dtype=torch.int64)
        for images, labels in self.source.batches(batch_size, transform):
            one_hot = F.one_hot(labels, len(seen))
            rank = (one_hot.cumsum(0) + seen).gather(1, labels.unsqueeze(1)).flatten()
            seen += one_hot.sum(0)
            if (rank <= self.each).any():
                yield images[rank <= self.each], labels[rank <= self.each]


def balanced(labels: Tensor, classes: int, most: int | None = None) -> Tensor:
    """Rows of the first images of every class, equally many: as many as the smallest class has, at most ``most``."""
    each = int(torch.bincount(labels, minlength=classes).min())
    each = each if most is None else min(each, most)
    if each < 2:
        raise InputError(f"every class must have at least 2 images to measure with, got {each} of the smallest")
    return torch.cat([(labels == c).nonzero()[:each, 0] for c in range(classes)]).sort().values


def measure(backbone: Backbone, source: ImageSource, cache: FeatureCache, draws: int, seed: int) -> Measured:
    """Measure all numbers on one backbone."""
    z, labels = (tensor.cpu() for tensor in cache.features(source, backbone))
    classes = len(source.class_names)
    rows, some = balanced(labels, classes), balanced(labels, classes, AUGMENTED // classes)
    features, unchanged = (Features(z[part], labels[part], classes) for part in (rows, some))
    augmented = augmented_features(FirstOfEachClass(source, len(some) // classes), backbone, seed)
    views = Features(augmented, labels[some], classes)
    return {
        "backbone": backbone.describe(),
        "moments": asdict(features.moments),
        "draws": draws,
        "seed": seed,
        "environment": environment("cpu"),
        "augmentation": augmentation(unchanged, views, draws, seed),
        "panels": panels(features, draws, seed),
    }


def available() -> list[str]:
    """Backbones that can be measured here without a download."""
    names = [name for name, file in SHIPPED.items() if file.exists()]
    return names + ([LITE0] if importlib.util.find_spec(LITE0_MODULE) else [])


def open_backbone(name: str) -> Backbone:
    if name != LITE0:
        return load_backbone(name)
    backbone: Backbone = importlib.import_module(LITE0_MODULE).load_efficientnet_lite0()
    return backbone


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--out", required=True, help="folder of derivation.json")
    parser.add_argument("--figure", help="the picture, .svg or .png (default: OUT/derivation.svg)")
    add_list(parser, "--backbones", help="default: all that are here: " + ", ".join(available()))
    parser.add_argument("--images", type=int, help="at most so many images, equally many of every class")
    parser.add_argument("--cache", help="folder of features that are computed once")
    parser.add_argument("--draws", type=int, default=100, help="of classifiers and batches, for each point")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--plot-only", action="store_true", help="measure nothing: figure and table of OUT/derivation.json"
    )
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.draws < 2:
        raise InputError(f"--draws must be at least 2, got {args.draws}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path, figure = out / "derivation.json", Path(args.figure or out / "derivation.svg")
    if figure.suffix not in (".svg", ".png"):
        raise InputError(f"--figure must end in .svg or .png, got {figure}")
    figure.parent.mkdir(parents=True, exist_ok=True)
    check_output_file(figure, "--figure")
    result: Result | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if args.plot_only and result is None:
        raise InputError(f"{path}: no such file, and --plot-only measures nothing")
    if not args.plot_only:
        source, cache = open_dataset(args.data, "train"), FeatureCache(args.cache)
        if args.images:
            source = FirstOfEachClass(source, args.images // len(source.class_names))
        kept = result["backbones"] if result and result["data"] == args.data else {}
        result = {"data": args.data, "backbones": kept}

        def work(name: str) -> Measured:
            return measure(open_backbone(name), source, cache, args.draws, args.seed)

        cells = [Cell(name, functools.partial(work, name)) for name in args.backbones or available()]
        for _ in fill(kept, cells, lambda: write_json(path, result), again=True):
            pass
    assert result is not None
    write_figure(result, figure)
    print(findings_table(result))


if __name__ == "__main__":
    main()
