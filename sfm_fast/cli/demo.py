"""`sfm-fast demo`: the whole road on the embedded data, with a page at its end."""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import replace
from pathlib import Path

import torch

from ..backbones.load import load_backbone
from ..data.datasets import EMBEDDED, open_dataset
from ..demo.cost import compare_methods, sfm_and_lgm
from ..demo.page import cost_table, pixel_class_means, write_page
from ..distill.build import make_distiller
from ..distill.config import DistillConfig
from ..distill.progress import iterate_log
from ..distill.run_folder import LOG, RESULT
from ..errors import InputError
from ..evaluation.evaluator import Evaluator, ProbeConfig
from ..features.compute import class_statistics
from ..files import locked_folder, write_json
from ..report.tables import accuracy_table
from ..synthetic import SyntheticSet
from ..version import __version__
from . import common

NAME = "demo"
SUMMARY = "Distil the embedded data set, evaluate it, measure LGM beside it, and write one HTML page."
EXAMPLE = "sfm-fast demo --out demo"
STARTED = "demo.json"  # marks a folder as a demo's, which another demo may replace
METHODS_SHOWN = ("sfm", "sfm-decoupled")  # the last one's pictures stand on the page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        default="demo",
        help="folder for everything the demo makes; an earlier demo there is replaced",
    )
    parser.add_argument("--steps", type=int, default=1200, help="SFM steps")
    parser.add_argument(
        "--lr", type=float, default=0.02, help="Adam's step size (larger than the default 0.002: the run is short)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="probes trained for every row")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved steps for the comparison with LGM")
    common.add_machine_arguments(parser)


def run(args: argparse.Namespace) -> None:
    common.set_threads(args)
    began, progress = time.perf_counter(), not args.quiet
    config = DistillConfig(steps=args.steps, lr=args.lr, grow_every=max(1, args.steps // 15))
    probe = ProbeConfig(seeds=args.seeds)
    if args.rounds < 1:
        raise InputError(f"--rounds must be at least 1, got {args.rounds}")
    if Path(args.out).is_dir() and any(Path(args.out).iterdir()) and not (Path(args.out) / STARTED).exists():
        raise InputError(f"--out {args.out}: holds other files; choose an empty or a new folder")
    with locked_folder(args.out) as out:
        write_json(out / STARTED, {"sfm_fast": __version__})
        backbone = load_backbone(device=args.device, precision=args.precision)
        train, test = open_dataset(EMBEDDED, "train"), open_dataset(EMBEDDED, "test")

        common.say(args, f"1/4 statistics: {len(train)} images of {len(train.class_names)} classes, once")
        statistics = class_statistics(train, backbone, batch_size=args.batch_size, progress=progress)
        statistics.save(out / "stats.safetensors")

        common.say(
            args, f"2/4 distillation: {config.steps} steps each of SFM as in the paper, and of its decoupled variant"
        )
        summaries = {}
        for method in METHODS_SHOWN:
            distiller = make_distiller(replace(config, method=method), backbone, train, statistics)
            summaries[method] = distiller.run(out / method, overwrite=True, progress=progress)

        common.say(args, "3/4 evaluation: linear probes, beside the references")
        evaluator = Evaluator(backbone, test, train, config=probe, batch_size=args.batch_size, progress=progress)
        sets = [SyntheticSet.load(out / method / RESULT) for method in METHODS_SHOWN]
        size = sets[0].images.shape[-1]
        accuracy = [
            evaluator.full(),
            evaluator.random_real(1, size),
            evaluator.nearest_real(1, size),
            *(evaluator.probe_synthetic(synthetic) for synthetic in sets),
        ]

        common.say(args, "4/4 cost: steps of SFM and LGM in turn")
        costs = compare_methods(sfm_and_lgm(config), backbone, train, statistics, rounds=args.rounds)

        seconds = time.perf_counter() - began
        facts = {
            "sfm_fast": __version__,
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {backbone.device}",
            "data": f"{EMBEDDED}: {len(train)} training and {len(test)} test images of Fashion-MNIST",
            "backbone": f"{backbone.name} ({backbone.fingerprint})",
            "the whole demo": f"{seconds:.0f} s",
        }
        page = out / "report.html"
        means = pixel_class_means(train, backbone.transform(train.channels))
        nearest, _ = evaluator.nearest_images(1, size)
        write_page(
            page,
            synthetic=sets[-1],
            nearest=nearest,
            means=means,
            log=iterate_log(out / METHODS_SHOWN[-1] / LOG),
            accuracy=accuracy,
            costs=costs,
            facts=facts,
        )
        result = {
            "rows": accuracy,
            "costs": costs,
            "distillation": summaries,
            "seconds": seconds,
            "facts": facts,
            "page": str(page),
        }
        write_json(out / "result.json", result)
    common.finish(
        args,
        result,
        "",
        accuracy_table(accuracy),
        "",
        cost_table(costs),
        "",
        f"{seconds:.0f} s in all; look at {page.resolve()}, and at {Path(args.out) / METHODS_SHOWN[-1] / 'images'}",
    )
