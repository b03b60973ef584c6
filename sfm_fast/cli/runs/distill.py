"""Runs `sfm-fast distill`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...backbones.load import PRECISIONS
from ...backbones.precision import Chosen
from ...data.spec import EMBEDDED
from ...distill.build import make_distiller
from ...distill.run import Every
from ...distill.run_folder import precision_of_run
from ...errors import InputError
from ...features.statistics import ClassStatistics
from ..common import asked
from ..distill import execution, method_config, uses_statistics
from . import common


def run(args: argparse.Namespace) -> None:
    common.set_threads(args)
    config = method_config(args)
    every = common.made(args, Every)
    statistics = [ClassStatistics.load(file) for file in args.stats] if uses_statistics(args, config) else None
    # With statistics the data set itself is only needed to start from its images, which must be those that the statistics come from.
    made_of = {} if statistics is None else statistics[0].provenance
    whole = statistics is None or args.data is not None or (_is_embedded(made_of) and config.init != "noise")
    source = common.open_data(args, str(made_of.get("split", "train"))) if whole else None
    if source is None and config.init != "noise":
        if config.init == "real":
            raise InputError(
                "--data must name the data set of --stats, from whose images a run with --init real starts"
            )
        common.say(
            args,
            "starts from noise; name the data set of --stats with --data to start from real images, which is more accurate",
        )
    if source is not None:
        common.say_no_test(args, source)
    kept = [_kept_precision(args, place, statistics) for place in range(len(asked(args)))]
    backbones = common.open_backbones(args, kept, compile=args.compile, grad_checkpointing=args.grad_checkpointing)
    distiller = make_distiller(
        config,
        backbones,
        source,
        statistics,
        batch_size=args.batch_size,
        progress=not args.quiet,
        execution=execution(args),
    )
    summary: dict[str, Any] = distiller.run(
        args.out,
        resume=args.resume,
        overwrite=args.overwrite,
        progress=not args.quiet,
        **asdict(every),
    )
    step = summary["median_step_seconds"]
    common.finish(
        args,
        summary,
        f"{config.method}: {summary['steps_this_run']} steps in {summary['seconds_this_run']:.1f} s"
        + (f" ({step * 1e3:.1f} ms a step), loss {summary['last_loss']:.4f}" if step else "")
        + f" -> {Path(args.out) / 'synthetic.safetensors'} and {Path(args.out) / 'images'}",
    )


def _kept_precision(args: argparse.Namespace, place: int, statistics: list[ClassStatistics] | None) -> Chosen | None:
    """What --precision auto means for backbone number ``place`` if the run to resume, or else its statistics, record it; None if neither does."""
    recorded: list[Chosen] = []
    if args.resume and (precision := precision_of_run(args.out, place)) is not None:
        recorded.append(Chosen(precision, f"the run in {args.out} began so"))
    made_with = {} if statistics is None else statistics[place].provenance.get("backbone", {})
    if (precision := made_with.get("precision")) is not None:
        recorded.append(Chosen(precision, f"the statistics in {args.stats[place]} were computed so"))
    return next((one for one in recorded if one.precision in PRECISIONS and one.precision != "auto"), None)


def _is_embedded(made_of: Mapping[str, Any]) -> bool:
    """Whether statistics are of the data set that is used if --data names none."""
    return str(made_of.get("data", "")).split("/")[0] == EMBEDDED
