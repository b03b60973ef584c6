"""Builds a Distiller from configuration, backbone and data: checks or computes the statistics and makes the objective."""

from __future__ import annotations

import hashlib
import os
import warnings

from torch import Tensor

from ..backbones.backbone import Backbone
from ..backbones.record import check_recorded
from ..checks import told_differences
from ..data.sources import ImageSource
from ..errors import InputError
from ..features.compute import class_statistics
from ..features.statistics import ClassStatistics
from .config import DistillConfig, Execution
from .distiller import Distiller
from .objectives import METHODS, Given


def make_distiller(
    config: DistillConfig,
    backbone: Backbone,
    source: ImageSource | None = None,
    statistics: str | os.PathLike[str] | ClassStatistics | None = None,
    *,
    batch_size: int = 256,
    progress: bool = True,
    execution: Execution = Execution(),
) -> Distiller:
    """A `Distiller` that runs ``config`` with the memory settings of ``execution``.

    SFM needs ``statistics`` (a file or an object; None: computed here from ``source``); LGM needs only ``source``.
    Raises ``InputError`` if a needed input is missing, or if the statistics come from another backbone or data set.
    """
    kind = METHODS[config.method]
    if kind.trains_backbone(config):
        backbone = backbone.unprepared()
    if kind.needs_images:
        names = [] if source is None else source.class_names
        channels = backbone.in_channels if source is None else min(source.channels, backbone.in_channels)
        objective = kind.build(config, Given(backbone, len(names), channels, source=source))
        assert source is not None  # else building the objective would have failed
        return Distiller(config, backbone, objective, names, channels, {"data": _told(source)}, execution)
    if statistics is not None:
        if not isinstance(statistics, ClassStatistics):
            statistics = ClassStatistics.load(statistics)
        check_made_with(statistics, backbone)
        if source is not None:
            check_made_of(statistics, source)
    else:
        if source is None:
            raise InputError(f"method {config.method} needs class statistics, or the data set to compute them from")
        clusters = config.ipc if config.level == "cluster" else 0
        statistics = class_statistics(
            source,
            backbone,
            clusters=clusters,
            covariance=config.centers == "discriminant",
            batch_size=batch_size,
            progress=progress,
        )
    means, centers = (one.to(backbone.device) for one in (_centers(statistics, config), targets(statistics, config)))
    mean = statistics.centers.mean(0).to(backbone.device)
    names = statistics.class_names or [str(c) for c in range(statistics.num_classes)]
    channels = min(int(statistics.provenance.get("channels", 3)), backbone.in_channels)
    objective = kind.build(config, Given(backbone, len(names), channels, centers, mean, source))
    # Of the means, because the covariance may differ in its last bits between computations of the same statistics.
    return Distiller(config, backbone, objective, names, channels, {"centers": _digest(means)}, execution)


def targets(statistics: ClassStatistics, config: DistillConfig) -> Tensor:
    """What the synthetic class means of ``config`` are compared with: (C, D), or (C, ipc, D) at cluster level, float64."""
    centers = _centers(statistics, config)
    if config.centers == "means":
        return centers
    discriminant = statistics.discriminant_centers(
        shrinkage="auto" if config.shrinkage is None else config.shrinkage,
        scale="auto" if config.center_scale is None else config.center_scale,
    )
    if config.level == "class":
        return discriminant
    return centers + (discriminant - statistics.centers).unsqueeze(1).to(centers.device)


def _centers(statistics: ClassStatistics, config: DistillConfig) -> Tensor:
    return _cluster_centers(statistics, config.ipc) if config.level == "cluster" else statistics.centers


def _cluster_centers(statistics: ClassStatistics, ipc: int) -> Tensor:
    centers = statistics.cluster_centers
    if centers is None or centers.shape[1] != ipc:
        raise InputError(
            f"level 'cluster' with ipc {ipc} needs {ipc} k-means centres per class, but the statistics hold {statistics.clusters}: "
            f"compute them with `sfm-fast stats --clusters {ipc}`"
        )
    return centers


def check_made_with(statistics: ClassStatistics, backbone: Backbone) -> None:
    """Raise ``InputError`` if the statistics record another backbone, other weights or another input size than ``backbone``'s."""
    if statistics.dim != backbone.num_features:
        raise InputError(
            f"{statistics.where}: has {statistics.dim} features, but backbone {backbone.name!r} gives {backbone.num_features}"
        )
    made_with = statistics.provenance.get("backbone", {})
    check_recorded(made_with, backbone, f"{statistics.where}: made with", "the backbone")
    precision = made_with.get("precision", backbone.precision)
    if precision != backbone.precision:
        warnings.warn(
            f"{statistics.where}: computed in {precision}, but the backbone runs in {backbone.precision}, so features differ a little; recompute them",
            RuntimeWarning,
            stacklevel=3,
        )
    prepared = made_with.get("prepared", backbone.prepared)
    if prepared != backbone.prepared:
        how = {True: "prepared", False: "as loaded (--no-prepare)"}
        raise InputError(
            f"{statistics.where}: computed with the backbone {how[bool(prepared)]}, but here it runs {how[bool(backbone.prepared)]}; "
            "recompute them, or run it in the same way"
        )


def check_made_of(statistics: ClassStatistics, source: ImageSource) -> None:
    """Raise ``InputError`` if the statistics record another data set than ``source``."""
    made_of = statistics.provenance
    names, known = statistics.class_names or source.class_names, len(source)
    if names != source.class_names:
        raise InputError(
            f"{statistics.where}: made of {made_of.get('data')!r} with {len(names)} classes, {source.name} has {len(source.class_names)} "
            f"({told_differences(names, source.class_names)}); recompute them"
        )
    if known and made_of.get("images", known) != known:
        raise InputError(
            f"{statistics.where}: made of {made_of['images']} images, {source.name} has {known}; recompute them"
        )
    here = source.fingerprint()
    if here and (made_of.get("fingerprint") or here) != here:
        raise InputError(
            f"{statistics.where}: made of {made_of.get('data')!r}, {source.name} holds other images of the same classes; recompute them"
        )


def _told(source: ImageSource) -> str:
    """Description of a data set that a resumed run compares: by its contents, independent of its location."""
    return f"{len(source)} images of {len(source.class_names)} classes, {source.fingerprint() or source.name}"


def _digest(centers: Tensor) -> str:
    return hashlib.sha256(centers.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
