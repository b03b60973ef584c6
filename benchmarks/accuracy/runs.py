"""The content of the accuracy table, and the jobs that make it: runs to distil, which store their images in files, and sets of images to evaluate."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sfm_fast.backbones.backbone import Backbone
from sfm_fast.backbones.efficientnet_lite import load_efficientnet_lite0
from sfm_fast.backbones.load import load_backbone
from sfm_fast.data.datasets import open_dataset
from sfm_fast.data.sources import ImageSource
from sfm_fast.demo.cost import Cost
from sfm_fast.distill.build import make_distiller
from sfm_fast.distill.config import DistillConfig, Execution
from sfm_fast.evaluation.classifier import train_on_source
from sfm_fast.evaluation.evaluator import Evaluator, ProbeConfig
from sfm_fast.evaluation.heads import Classifier
from sfm_fast.features.cache import FeatureCache
from sfm_fast.features.compute import class_statistics
from sfm_fast.features.statistics import ClassStatistics
from sfm_fast.files import load_tensors, save_tensors

from .tables import LONG, OURS, Row

BACKBONES = ("fashion_vit", "fashion_cnn", "tf_efficientnet_lite0")
REFERENCES = ("full", "class-means", "random-real", "nearest-real", "neighbour-real")
LR = 0.02
MEMORY = 2_000_000_000  # bytes a process may use for a step
# Steps of every run except those of equal time, by images per class and distilling backbone: as many as LGM takes in an hour.
STEPS: dict[int, dict[str, int]] = {
    1: {"fashion_vit": 400, "fashion_cnn": 400, "tf_efficientnet_lite0": 150},
    10: {"fashion_vit": 60, "fashion_cnn": 60, "tf_efficientnet_lite0": 30},
}
# What `--recommended` changes besides method and level; LGM with the same changes shows their part of the gain.
VIEWS: Mapping[str, Any] = {"noise": False, "min_area": 0.3, "average_last": 0.25}


@dataclass(frozen=True)
class Run:
    """A way to distil. ``equal_time``: the name of a run; this one takes as many steps as fit into that run's time."""

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    equal_time: str | None = None


RUNS: dict[int, tuple[Run, ...]] = {
    1: (
        Run("lgm", "lgm"),
        Run("lgm, equal time", "lgm", equal_time=OURS),
        Run("lgm, views as recommended", "lgm", VIEWS),
        Run("sfm", "sfm"),
        Run("sfm-decoupled", "sfm-decoupled"),
        Run(LONG, "sfm-decoupled", VIEWS, equal_time="lgm"),
        Run(OURS, "sfm-decoupled", VIEWS),
    ),
    10: (
        Run("lgm", "lgm"),
        Run("lgm, equal time", "lgm", equal_time=OURS),
        Run("sfm", "sfm"),
        Run("sfm-decoupled", "sfm-decoupled"),
        Run("sfm-decoupled, cluster level", "sfm-decoupled", {"level": "cluster"}),
        Run(OURS, "sfm-decoupled", {"level": "cluster", **VIEWS}),
    ),
}


# They take minutes per seed on this backbone, a quarter of an hour in total, so they need --everything.
SLOW_RUNS = frozenset(
    ("tf_efficientnet_lite0", ipc, label) for ipc, label in ((10, "lgm"), (1, "lgm, views as recommended"), (1, LONG))
)


def slug_of(data: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", data)


@dataclass(frozen=True)
class Table:
    """Settings of one table; a job's file is valid as long as the settings it depends on are the same."""

    data: str
    work: Path
    backbones: tuple[str, ...] = BACKBONES
    ipcs: tuple[int, ...] = (1, 10)
    seeds: int = 3
    steps: int | None = None
    epochs: int = 1000

    @property
    def slug(self) -> str:
        """The data's name as a part of file names."""
        return slug_of(self.data)

    def steps_of(self, phi: str, ipc: int) -> int:
        return self.steps or STEPS[ipc][phi]


def config_of(table: Table, run: Run, phi: str, ipc: int, seed: int, costs: Mapping[str, Cost]) -> DistillConfig:
    """``costs``: rows of `compare_methods` on this backbone and ipc, by label."""
    steps = table.steps_of(phi, ipc)
    if run.equal_time is not None:
        steps = max(1, round(steps * costs[run.equal_time]["step_seconds"] / costs[run.label]["step_seconds"]))
    return DistillConfig.paper(
        method=run.method, ipc=ipc, steps=steps, lr=LR, grow_every=max(1, steps // 15), seed=seed, **run.options
    )


# The following is cached for the lifetime of a worker.


@functools.cache
def backbone(name: str) -> Backbone:
    return load_efficientnet_lite0() if name == "tf_efficientnet_lite0" else load_backbone(name)


@functools.cache
def source(data: str, split: str) -> ImageSource:
    return open_dataset(data, split)


@functools.cache
def features(work: Path) -> FeatureCache:
    return FeatureCache(work / "features")


@functools.cache
def statistics(table: Table, phi: str, clusters: int) -> ClassStatistics:
    """Class statistics, computed once by `prepare` and then read from its file."""
    path = table.work / f"statistics-{table.slug}-{backbone(phi).fingerprint}-{clusters}.safetensors"
    if not path.exists():
        train = source(table.data, "train")
        known = features(table.work).features(train, backbone(phi), progress=False)
        class_statistics(train, backbone(phi), clusters=clusters, known=known).save(path)
    return ClassStatistics.load(path)


@functools.cache
def classifier(table: Table, phi: str) -> Classifier:
    path = table.work / f"classifier-{table.slug}-{backbone(phi).fingerprint}.safetensors"
    if not path.exists():
        train, test = (source(table.data, split) for split in ("train", "test"))
        train_on_source(train, backbone(phi), test=test, cache=features(table.work), progress=False).save(path)
    return Classifier.load(path)


def probe_config(table: Table, ipc: int) -> ProbeConfig:
    """The probe's settings, with fewer views for ten images per class, which would otherwise take too long."""
    views = 30 if ipc > 1 else 100
    return ProbeConfig(seeds=table.seeds, epochs=table.epochs, views=min(views, table.epochs))


@functools.cache
def evaluator(table: Table, phi: str, psi: str, ipc: int) -> Evaluator:
    return Evaluator(
        backbone(psi),
        source(table.data, "test"),
        source(table.data, "train"),
        distilling=backbone(phi),
        classifier=classifier(table, phi),
        config=probe_config(table, ipc),
        cache=features(table.work),
        progress=False,
    )


def prepare(table: Table, phi: str) -> None:
    """Compute features, statistics and classifier of a backbone."""
    for split in ("train", "test"):
        features(table.work).features(source(table.data, split), backbone(phi), progress=False)
    for clusters in (0, *(ipc for ipc in table.ipcs if ipc > 1)):
        statistics(table, phi, clusters)
    classifier(table, phi)


Images = tuple[Tensor, Tensor]  # and their labels


def distil(table: Table, phi: str, config: DistillConfig) -> Images:
    """`distilled` for the table; the file's name has everything that its images depend on."""
    key = _digest([backbone(phi).fingerprint, table.data, config.to_dict()])
    path = table.work / "images" / f"{phi}-{config.method}-{config.ipc}-{config.seed}-{key[:16]}.safetensors"
    clusters = config.ipc if config.level == "cluster" else 0
    centers = None if config.method == "lgm" else statistics(table, phi, clusters)
    return distilled(path, config, backbone(phi), source(table.data, "train"), centers)


def keep_images(table: Table, phi: str, config: DistillConfig) -> None:
    """Distil, and store the images in the file from which `distil` reads them."""
    distil(table, phi, config)


def distilled(
    path: Path, config: DistillConfig, model: Backbone, train: ImageSource, centers: ClassStatistics | None
) -> Images:
    """Images and labels of a run: read from ``path``, or distilled and stored there."""
    if not path.exists() or DistillConfig.from_dict(load_tensors(path)[1]["config"]) != config:
        # The same gradient up to rounding; several processes share the memory, and LGM's one-shot step takes up to 7 GB.
        distiller = make_distiller(config, model, train, centers, execution=Execution(memory_budget=MEMORY))
        while distiller.steps_done < config.steps:
            distiller.step()
        made = distiller.result()
        save_tensors(path, {"images": made.images, "labels": made.labels}, {"config": config.to_dict()})
    tensors, _ = load_tensors(path)
    return tensors["images"], tensors["labels"]


@dataclass(frozen=True)
class Job:
    """Images of one kind to evaluate: a way to distil on ``phi``, or a reference, evaluated on ``psi`` in ``modes``."""

    phi: str
    psi: str
    ipc: int
    modes: tuple[str, ...]
    configs: tuple[DistillConfig, ...] = ()
    label: str = ""
    reference: str | None = None


def jobs(table: Table, runs: Mapping[tuple[str, int], Mapping[str, tuple[DistillConfig, ...]]]) -> Iterator[Job]:
    """All jobs. ``runs``: for each distilling backbone and ipc, the configurations of every label, one per seed."""
    modes = ("probe", "inherit", "kd")
    for phi in table.backbones:
        for psi in table.backbones:
            own = ("probe", "inherit") if phi == psi else ("inherit",)
            yield Job(phi, psi, 0, own, label="full", reference="full")
            for ipc in table.ipcs:
                made = runs[phi, ipc]
                for name in REFERENCES[1:]:
                    if name == "class-means":
                        if phi == psi:
                            yield Job(phi, psi, ipc, ("probe",), label=name, reference=name)
                    else:
                        last = list(made.values())[-1] if name == "neighbour-real" else ()
                        yield Job(phi, psi, ipc, modes, last, name, name)
                for label, configs in made.items():
                    yield Job(phi, psi, ipc, modes, configs, label)


def name_of(table: Table, job: Job) -> str:
    """A job's name, with a digest of all that its rows depend on."""
    prints = [backbone(name).fingerprint for name in (job.phi, job.psi)]
    key = _digest([table.data, asdict(probe_config(table, job.ipc)), *prints, asdict(job)])
    return f"{job.label}, {job.ipc} a class, {job.phi} to {job.psi}: {key[:20]}"


def _digest(key: list[Any]) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def evaluate(table: Table, job: Job) -> list[Row]:
    """The rows of a job."""
    judge = evaluator(table, job.phi, job.psi, max(1, job.ipc))
    made = [distil(table, job.phi, config) for config in job.configs]
    if job.reference == "neighbour-real":
        size = backbone(job.phi).image_size
        pairs = [judge.sets.neighbour_images(*one, size) for one in made]
        rows = judge.evaluate(job.label, [i for i, _ in pairs], [n for _, n in pairs], modes=job.modes)
    elif job.reference is not None:
        rows = judge.reference(job.reference, max(1, job.ipc), modes=job.modes)
    else:
        method = job.configs[0].method.split("-")[0]
        rows = judge.evaluate(method, [i for i, _ in made], [n for _, n in made], modes=job.modes)
    steps = job.configs[0].steps if job.configs and job.reference is None else None
    return [
        row
        | {
            "label": row["images"] if job.reference == "class-means" else job.label,
            "distilled_on": job.phi,
            "steps": steps,
            "ipc": job.ipc or row["ipc"],
        }
        for row in rows
    ]
