"""Where the accuracy benchmarks work: data, backbones, features, statistics and classifiers, each computed once and kept in a folder."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from sfm_fast.backbones.backbone import Backbone
from sfm_fast.backbones.efficientnet_lite import load_efficientnet_lite0
from sfm_fast.backbones.load import load_backbone
from sfm_fast.data.datasets import open_dataset
from sfm_fast.data.sources import ImageSource
from sfm_fast.evaluation.classifier import train_on_source
from sfm_fast.evaluation.evaluator import Evaluator, ProbeConfig
from sfm_fast.evaluation.heads import Classifier
from sfm_fast.features.cache import FeatureCache
from sfm_fast.features.compute import class_statistics
from sfm_fast.features.statistics import ClassStatistics

from .content import BACKBONES


def slug_of(data: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", data)


@dataclass(frozen=True)
class Table:
    """Settings of one table; a job's file is valid as long as the settings it depends on are the same."""

    data: str
    work: Path
    backbones: tuple[str, ...] = BACKBONES
    ipcs: tuple[int, ...] = (1, 10, 50)
    seeds: int = 3
    epochs: int = 1000

    @property
    def slug(self) -> str:
        """The data's name as a part of file names."""
        return slug_of(self.data)


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
    path = table.work / f"moments-{table.slug}-{backbone(phi).fingerprint}-{clusters}.safetensors"
    if not path.exists():
        train = source(table.data, "train")
        known = features(table.work).features(train, backbone(phi), progress=False)
        class_statistics(train, backbone(phi), clusters=clusters, covariance=True, known=known).save(path)
    return ClassStatistics.load(path)


@functools.cache
def classifier(table: Table, phi: str) -> Classifier:
    path = table.work / f"classifier-{table.slug}-{backbone(phi).fingerprint}.safetensors"
    if not path.exists():
        train, test = (source(table.data, split) for split in ("train", "test"))
        train_on_source(train, backbone(phi), test=test, cache=features(table.work), progress=False).save(path)
    return Classifier.load(path)


def probe_config(table: Table, ipc: int, seeds: int | None = None) -> ProbeConfig:
    """The probe's settings, with fewer views for more images per class, which would otherwise take too long."""
    views = {1: 100, 10: 30}.get(ipc, 10)
    return ProbeConfig(seeds=seeds or table.seeds, epochs=table.epochs, views=min(views, table.epochs))


@functools.cache
def evaluator(table: Table, phi: str, psi: str, ipc: int, seeds: int) -> Evaluator:
    return Evaluator(
        backbone(psi),
        source(table.data, "test"),
        source(table.data, "train"),
        distilling=backbone(phi),
        classifier=classifier(table, phi),
        config=probe_config(table, ipc, seeds),
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
