"""Held-out training images, by which settings are chosen: every sixth one judges, and images are made from the others."""

from __future__ import annotations

import functools
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfm_fast.data.sources import ArraySource
from sfm_fast.distill.build import make_distiller
from sfm_fast.distill.config import DistillConfig, Execution
from sfm_fast.evaluation.evaluator import ProbeConfig
from sfm_fast.evaluation.modes import Features, fit
from sfm_fast.features.compute import view_features
from sfm_fast.features.statistics import ClassStatistics
from sfm_fast.views import Augmentation

from . import places
from .trajectory import MEMORY

EVERY = 6  # of the training images, every sixth is held out
DRAWS = 3  # evaluations of each set of images; a single one has a standard deviation of 0.6 points


class Place(NamedTuple):
    """The data set by name, the folder of features and finished cells, the backbones, all of which judge images, and the epochs of a probe."""

    data: str
    work: Path
    backbones: tuple[str, ...]
    epochs: int

    def tag(self, phi: str) -> str:
        """What the result of a cell on a backbone depends on, besides its options."""
        return f"{self.data} {phi} {' '.join(places.backbone(name).fingerprint for name in phi.split())}, of {' '.join(self.backbones)}, {self.epochs} epochs, {DRAWS} draws"

    @property
    def slug(self) -> str:
        """The data's name as a part of file names."""
        return places.slug_of(self.data)

    def judge(self, ipc: int = 1) -> ProbeConfig:
        """The probe's settings for so many images per class."""
        return ProbeConfig(seeds=1, views=100 if ipc == 1 else 30, epochs=self.epochs)


class Data(NamedTuple):
    """Statistics of the images that targets are made of, and the features and labels of those that judge them."""

    statistics: ClassStatistics
    features: Tensor
    labels: Tensor


@functools.cache
def kept(name: str) -> ArraySource:
    """The training images that aren't held out."""
    source = places.source(name, "train")
    assert isinstance(source, ArraySource)
    rows = torch.arange(len(source))
    return source.subset(rows[rows % EVERY != 0].tolist(), f"{source.name}, five sixths")


@functools.cache
def known(place: Place, phi: str, clusters: int) -> ClassStatistics:
    """Statistics of the kept images, with k-means centres; computed once and read from its file by other processes."""
    path = place.work / f"held-out-{place.slug}-{places.backbone(phi).fingerprint}-{clusters}.safetensors"
    if not path.exists():
        features, labels = places.features(place.work).features(
            places.source(place.data, "train"), places.backbone(phi), progress=False
        )
        rows = torch.arange(len(labels)) % EVERY != 0
        made = ClassStatistics(int(labels.max()) + 1, features.shape[1], clusters=clusters, covariance=True)
        made.update(features[rows], labels[rows])
        made.provenance = {"channels": places.source(place.data, "train").channels}
        made.save(path)
    return ClassStatistics.load(path)


@functools.cache
def data(place: Place, phi: str) -> Data:
    """The statistics of the kept images, and the images that judge."""
    features, labels = places.features(place.work).features(
        places.source(place.data, "train"), places.backbone(phi), progress=False
    )
    held = torch.arange(len(labels)) % EVERY == 0
    return Data(known(place, phi, 0), features[held], labels[held])


def probe(of: Data, views: Tensor, labels: Tensor, seed: int, config: ProbeConfig) -> float:
    """Top-1 in percent of a linear probe trained on features (views, N, D)."""
    fitted = fit("probe", Features(views.float(), None, labels), of.statistics.num_classes, None, config, seed)
    return 100 * fitted.score(of.features, of.labels)[0]


def judged(place: Place, made_for: tuple[str, ...], config: DistillConfig) -> dict[str, Any]:
    """Distil for the backbones ``made_for``, and probe on all: on these by `DRAWS` probes, each with views of its own, on others by one."""
    models = [places.backbone(name) for name in made_for]
    its = [known(place, name, config.ipc if config.level == "cluster" else 0) for name in made_for]
    source = None if config.init == "noise" else kept(place.data)
    distiller = make_distiller(config, models, source, its, execution=Execution(memory_budget=MEMORY))
    started = time.perf_counter()
    while distiller.steps_done < config.steps:
        distiller.step()
    seconds = time.perf_counter() - started
    made, judge = distiller.result(), place.judge(config.ipc)
    augmentation = Augmentation(min_area=judge.min_area, noise=False)
    top1 = {}
    for name in place.backbones:
        scores = []
        for seed in range(config.seed * DRAWS, config.seed * DRAWS + (DRAWS if name in made_for else 1)):
            views = view_features(places.backbone(name), made.images, judge.views, augmentation, seed=seed)
            scores.append(probe(data(place, name), views, made.labels, seed, judge))
        top1[name] = statistics.fmean(scores)
    return {"config": distiller.config.to_dict(), "lr": distiller.schedule.lr, "seconds": seconds, "top1": top1}
