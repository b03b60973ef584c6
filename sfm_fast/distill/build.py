"""Builds a Distiller from configuration, backbone and data: checks or computes the statistics and makes the objective."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from torch import Tensor

from ..backbones.backbone import Backbone
from ..backbones.record import check_recorded
from ..checks import check_class_names, told_differences
from ..data.sources import ImageSource
from ..errors import InputError
from ..features.compute import class_statistics
from ..features.statistics import ClassStatistics
from .config import DistillConfig, Execution
from .distiller import Distiller
from .members import Member, backbones_of, image_size
from .objectives import METHODS, Given
from .start import RealStart

Statistics: TypeAlias = str | os.PathLike[str] | ClassStatistics


def make_distiller(
    config: DistillConfig,
    backbone: Backbone | Sequence[Backbone],
    source: ImageSource | None = None,
    statistics: Statistics | Sequence[Statistics] | None = None,
    *,
    batch_size: int = 256,
    progress: bool = True,
    execution: Execution = Execution(),
) -> Distiller:
    """A `Distiller` that runs ``config`` with the memory settings of ``execution``.

    ``config.init`` "auto" becomes "real", a start from images of ``source``, or "noise" without one, or if it can only be read once.

    SFM needs ``statistics`` (a file or an object; None: computed here from ``source``); LGM needs only ``source``.

    With several backbones, one set of images is made for all of them, by the sum of their losses. ``statistics`` then has those of each
    backbone, in order. Losses that aren't free of the features' scale, the squared errors, are divided by the backbone's mean within-class
    variance, so that statistics need a covariance.

    Raises ``InputError`` if a needed input is missing, or if the statistics come from another backbone or data set.
    """
    backbones, kind = backbones_of(backbone), METHODS[config.method]
    if config.init == "auto":
        config = replace(config, init="noise" if source is None or source.once else "real")
    if kind.trains_backbone(config):
        backbones = tuple(one.unprepared() for one in backbones)
    channels = min(one.in_channels for one in backbones)
    if kind.needs_images:
        names = [] if source is None else source.class_names
        channels = channels if source is None else min(source.channels, channels)
        members = [
            Member(one, kind.build(config, Given(one, len(names), channels, source=source))) for one in backbones
        ]
        assert source is not None  # else building an objective would have failed
        start = _start(config, backbones, source, [None] * len(backbones), channels)
        return Distiller(config, members, names, channels, {"data": _told(source)}, execution, start)
    known = [
        _statistics(given, one, source, config, batch_size, progress, several=len(backbones) > 1)
        for given, one in zip(_of_each(statistics, backbones), backbones, strict=True)
    ]
    names = _class_names(known[0])
    for other in known[1:]:
        check_class_names(_class_names(other), names, other.where, f"{known[0].where}'s")
    channels = min(channels, *(int(one.provenance.get("channels", 3)) for one in known))
    members, digests, matched = [], [], []
    for one, its in zip(backbones, known, strict=True):
        means, centers = (part.to(one.device) for part in (_centers(its, config), targets(its, config)))
        mean = its.centers.mean(0).to(one.device)
        objective = kind.build(config, Given(one, len(names), channels, centers, mean, source))
        scaled = len(backbones) > 1 and not kind.scale_free(config)
        members.append(Member(one, objective, 1 / _variance(its) if scaled else 1.0))
        digests.append(_digest(means))
        matched.append(means)
    start = _start(config, backbones, source, matched, channels)
    # Of the means, because the covariance may differ in its last bits between computations of the same statistics.
    return Distiller(
        config,
        members,
        names,
        channels,
        {"centers": digests} | ({} if start is None else {"start": _told(start.source)}),
        execution,
        start,
    )


def _start(
    config: DistillConfig,
    backbones: Sequence[Backbone],
    source: ImageSource | None,
    centers: Sequence[Tensor | None],
    channels: int,
) -> RealStart | None:
    """What chooses the images that the run starts from; None for noise. Raises ``InputError`` if real ones are wanted and there are none."""
    if config.init == "noise":
        return None
    if source is None:
        raise InputError("init must be 'noise' without a data set, whose images a run with init 'real' starts from")
    size = image_size(config, backbones)
    return RealStart(source, backbones, centers, config.ipc, channels, size, config.seed)


def _class_names(statistics: ClassStatistics) -> list[str]:
    return statistics.class_names or [str(c) for c in range(statistics.num_classes)]


def _of_each(
    statistics: Statistics | Sequence[Statistics] | None, backbones: Sequence[Backbone]
) -> Sequence[Statistics | None]:
    """The statistics of each backbone, None where they are to be computed."""
    if statistics is None:
        return [None] * len(backbones)
    given = [statistics] if isinstance(statistics, (str, os.PathLike, ClassStatistics)) else list(statistics)
    if len(given) != len(backbones):
        raise InputError(
            f"statistics must be one for each of the {len(backbones)} backbones, in order, got {len(given)}"
        )
    return given


def _statistics(
    given: Statistics | None,
    backbone: Backbone,
    source: ImageSource | None,
    config: DistillConfig,
    batch_size: int,
    progress: bool,
    several: bool,
) -> ClassStatistics:
    """The statistics that are ``given``, checked, or computed from ``source``; ``several``: for the sum of the losses of several backbones."""
    if given is not None:
        statistics = given if isinstance(given, ClassStatistics) else ClassStatistics.load(given)
        check_made_with(statistics, backbone)
        if source is not None:
            check_made_of(statistics, source)
        return statistics
    if source is None:
        raise InputError(f"method {config.method} needs class statistics, or the data set to compute them from")
    return class_statistics(
        source,
        backbone,
        clusters=config.ipc if config.level == "cluster" else 0,
        covariance=config.centers != "means" or (several and not METHODS[config.method].scale_free(config)),
        batch_size=batch_size,
        progress=progress,
    )


def _variance(statistics: ClassStatistics) -> float:
    """The mean within-class variance, in squared feature units."""
    covariance = statistics.within_covariance
    if covariance is None:
        raise InputError(
            f"{statistics.where}: without a covariance, by which squared errors of several backbones are brought to one scale: "
            "compute it with `sfm-fast stats --covariance`, or choose method sfm-anchored"
        )
    variance = float(covariance.diagonal().mean())
    if not variance > 0:
        raise InputError(f"{statistics.where}: no class has two different features, so squared errors have no scale")
    return variance


def targets(statistics: ClassStatistics, config: DistillConfig) -> Tensor:
    """What the synthetic class means of ``config`` are compared with: (C, D), or (C, ipc, D) at cluster level, float64."""
    centers = _centers(statistics, config)
    if config.centers == "means":
        return centers
    if config.centers == "regression":
        given = {
            name: getattr(config, name) for name in ("shrinkage", "proximity") if getattr(config, name) is not None
        }
        return statistics.regression_centers(centers, **given).to(centers.device)
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
