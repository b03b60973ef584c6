"""Runs the demo on the embedded data: statistics, distillation, evaluation, cost, and a page of the results."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
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
from ..features.cache import FeatureCache
from ..features.compute import class_statistics
from ..files import locked_folder, write_json
from ..synthetic import SyntheticSet
from ..version import __version__
from .cost import Cost, compare_methods, sfm_and_lgm
from .page import pixel_class_means, write_page
from .progress import Pulse, Together

STARTED = "demo.json"  # marks a folder as a demo's, which another demo may replace
# The runs by their folders; the page shows the images of the last one.
SHOWN: Mapping[str, Callable[[DistillConfig], DistillConfig]] = {
    "paper": lambda config: DistillConfig.paper(steps=config.steps, seed=config.seed),
    "sfm": lambda config: config,
}


def told(rows: list[Row], costs: list[Cost]) -> list[str]:
    """What the numbers mean, in sentences: how the last row, of the default settings, compares with real images, and a step with LGM's."""
    ours, by_name = rows[-1], {row["images"]: row for row in rows}
    percent = {name: f"{100 * row['top1_mean']:.1f} %" for name, row in {**by_name, "ours": ours}.items()}
    whole, random, closed = (
        by_name["full"],
        by_name["random-real"],
        next(c for c in costs if c["variant"] == "closed-form"),
    )
    return [
        f"A linear classifier trained on {ours['ipc']} distilled image(s) per class is right about {percent['ours']} of the test images. Trained on as many "
        f"random real images: {percent['random-real']}; on the real ones nearest to their class's centre: {percent['nearest-real']}; on all {whole['ipc']} per class: {percent['full']}."
        f" The distilled images are {100 * (ours['top1_mean'] - random['top1_mean']):.0f} points better than random ones.",
        f"A step of SFM takes 1/{closed['step_seconds'] / costs[0]['step_seconds']:.0f} of the time and 1/{closed['peak_bytes'] / costs[0]['peak_bytes']:.0f} of the memory of a step of "
        "LGM, the earlier method, in its fastest form.",
        "More images per class, other networks, and your own data: README.md.",
    ]


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
    rounds: int = 6,
    batch_size: int = 256,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Shown:
    """Run the demo in ``folder``, which is locked; an earlier demo in it is replaced, other files are an error.

    ``backbone`` loads the backbone; ``say`` is called with a line before each of the four parts, and with ``progress`` with another
    one every few seconds. On CPUs the two distillations run at the same time, and so do the rows of the evaluation (see `Together`).
    """
    if Path(folder).is_dir() and any(Path(folder).iterdir()) and not (Path(folder) / STARTED).exists():
        raise InputError(f"--out {folder}: holds other files; choose an empty or a new folder")
    with locked_folder(folder) as out, Pulse(say, progress) as pulse:
        write_json(out / STARTED, {"sfm_fast": __version__})
        pulse.state["loading"] = "the backbone"
        model = backbone()
        train, test = open_dataset(EMBEDDED, "train"), open_dataset(EMBEDDED, "test")
        together = Together(model.device)

        pulse.part(f"1/4 statistics: {len(train)} images of {len(train.class_names)} classes, in one pass")
        pulse.state["features"] = "of the training images"
        cache = FeatureCache(None)  # the references of the evaluation are made of the same features
        known = cache.features(train, model, batch_size=batch_size, progress=False)
        statistics = class_statistics(train, model, known=known, covariance=True, batch_size=batch_size)
        statistics.save(out / "stats.safetensors")

        pulse.part(f"2/4 distillation: {config.steps} steps of SFM as in the paper, and with this package's defaults")

        def distil(name: str) -> dict[str, Any]:
            def on_step(step: int) -> None:
                together.check()
                pulse.state[name] = f"step {step} of {config.steps}"

            distiller = make_distiller(SHOWN[name](config), model, train, statistics)
            return distiller.run(out / name, overwrite=True, progress=False, on_step=on_step)

        summaries = together.run({name: functools.partial(distil, name) for name in SHOWN})

        pulse.part("3/4 evaluation: linear probes on synthetic images and on the references")
        evaluator = Evaluator(model, test, train, config=probe, cache=cache, batch_size=batch_size, progress=False)
        pulse.state["features"] = "of the test images"
        evaluator.test_features  # noqa: B018 (computed once, before the rows that run at the same time)
        pulse.state.clear()
        sets = [SyntheticSet.load(out / name / RESULT) for name in SHOWN]
        size = sets[0].images.shape[-1]
        probes: dict[str, Callable[[], Row]] = {
            "full": evaluator.full,
            "random-real": functools.partial(evaluator.random_real, 1, size),
            "nearest-real": functools.partial(evaluator.nearest_real, 1, size),
            **{
                name: functools.partial(evaluator.probe_synthetic, synthetic)
                for name, synthetic in zip(SHOWN, sets, strict=True)
            },
        }

        def row(name: str) -> Row:
            together.check()
            pulse.state[name] = ""
            result = probes[name]()
            pulse.state[name] = "done"
            return result

        accuracy = list(together.run({name: functools.partial(row, name) for name in probes}).values())

        pulse.part("4/4 cost: steps of SFM and LGM in turn")
        tell = functools.partial(pulse.state.__setitem__, "")
        costs = compare_methods(sfm_and_lgm(config), model, train, statistics, rounds=rounds, tell=tell)

        seconds = pulse.seconds
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
            log=iterate_log(out / list(SHOWN)[-1] / LOG),
            accuracy=accuracy,
            costs=costs,
            facts=facts,
        )
        shown = Shown(accuracy, costs, summaries, seconds, facts, str(page))
        write_json(out / "result.json", asdict(shown))
    return shown
