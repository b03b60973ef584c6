"""Runs the demo on the embedded data: statistics, distillation, evaluation, cost, and a page of the results."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..backbones.backbone import Backbone
from ..data.datasets import EMBEDDED, open_dataset
from ..distill.build import make_distiller
from ..distill.config import DistillConfig
from ..distill.progress import iterate_log
from ..distill.run_folder import LOG, RESULT
from ..errors import InputError
from ..evaluation.evaluator import Evaluator, ProbeConfig
from ..evaluation.rows import Row
from ..features.compute import class_statistics
from ..files import locked_folder, write_json
from ..synthetic import SyntheticSet
from ..version import __version__
from .cost import Cost, compare_methods, sfm_and_lgm
from .page import pixel_class_means, write_page

STARTED = "demo.json"  # marks a folder as a demo's, which another demo may replace
METHODS_SHOWN = ("sfm", "sfm-decoupled")  # the page shows the images of the last one


@dataclass(frozen=True)
class Shown:
    """Results of a demo: rows of the evaluation and of the cost, summaries of the runs, and the path of the page."""

    rows: list[Row]
    costs: list[Cost]
    distillation: dict[str, Any]
    seconds: float
    facts: dict[str, str]
    page: str


def run_demo(
    folder: str,
    backbone: Callable[[], Backbone],
    config: DistillConfig,
    probe: ProbeConfig,
    *,
    rounds: int = 5,
    batch_size: int = 256,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Shown:
    """Run the demo in ``folder``, which is locked; an earlier demo in it is replaced, other files are an error.

    ``backbone`` loads the backbone; ``say`` is called with a line before each of the four parts.
    """
    if Path(folder).is_dir() and any(Path(folder).iterdir()) and not (Path(folder) / STARTED).exists():
        raise InputError(f"--out {folder}: holds other files; choose an empty or a new folder")
    began = time.perf_counter()
    with locked_folder(folder) as out:
        write_json(out / STARTED, {"sfm_fast": __version__})
        model = backbone()
        train, test = open_dataset(EMBEDDED, "train"), open_dataset(EMBEDDED, "test")

        say(f"1/4 statistics: {len(train)} images of {len(train.class_names)} classes, in one pass")
        statistics = class_statistics(train, model, batch_size=batch_size, progress=progress)
        statistics.save(out / "stats.safetensors")

        say(f"2/4 distillation: {config.steps} steps of SFM as in the paper, and of its decoupled variant")
        summaries = {}
        for method in METHODS_SHOWN:
            distiller = make_distiller(replace(config, method=method), model, train, statistics)
            summaries[method] = distiller.run(out / method, overwrite=True, progress=progress)

        say("3/4 evaluation: linear probes on synthetic images and on the references")
        evaluator = Evaluator(model, test, train, config=probe, batch_size=batch_size, progress=progress)
        sets = [SyntheticSet.load(out / method / RESULT) for method in METHODS_SHOWN]
        size = sets[0].images.shape[-1]
        accuracy = [
            evaluator.full(),
            evaluator.random_real(1, size),
            evaluator.nearest_real(1, size),
            *(evaluator.probe_synthetic(synthetic) for synthetic in sets),
        ]

        say("4/4 cost: steps of SFM and LGM in turn")
        costs = compare_methods(sfm_and_lgm(config), model, train, statistics, rounds=rounds)

        seconds = time.perf_counter() - began
        facts = {
            "sfm_fast": __version__,
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {model.device}",
            "data": f"{EMBEDDED}: {len(train)} training and {len(test)} test images of Fashion-MNIST",
            "backbone": f"{model.name} ({model.fingerprint})",
            "the whole demo": f"{seconds:.0f} s",
        }
        page = out / "report.html"
        means = pixel_class_means(train, model.transform(train.channels))
        nearest, _ = evaluator.sets.nearest_images(1, size)
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
        shown = Shown(accuracy, costs, summaries, seconds, facts, str(page))
        write_json(out / "result.json", asdict(shown))
    return shown
