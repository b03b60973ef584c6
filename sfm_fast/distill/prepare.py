"""From options, backbone and data to a Distiller: statistics checked or computed, objective chosen."""

from __future__ import annotations

import hashlib
import os

from torch import Tensor

from ..data.backbones import Backbone
from ..data.sources import ImageSource
from ..errors import InputError
from ..probe.features import class_statistics
from ..statistics import ClassStatistics
from .config import DistillConfig, Execution
from .methods import DecoupledFlowMatching, FlowMatching, GradientMatching, Objective
from .run import Distiller


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
    """Build the run that ``config`` describes, on the machine as ``execution`` says.

    SFM needs ``statistics`` (a file, an object, or computed here from ``source``); LGM needs ``source`` alone.
    Raises ``InputError`` where statistics and backbone don't belong together, or what is needed is missing.
    """
    if config.method == "lgm":
        if source is None:
            raise InputError("method lgm matches gradients on real images: give the data set")
        channels = min(source.channels, backbone.in_channels)
        size = config.size or backbone.image_size
        objective: Objective = GradientMatching(
            backbone,
            source,
            len(source.class_names),
            config.ipc,
            size,
            channels,
            views=config.views_per_step,
            variant=config.lgm_variant,
            augmentation=config.augmentation,
            seed=config.seed,
        )
        return Distiller(config, backbone, objective, source.class_names, channels, {"data": source.name}, execution)

    if isinstance(statistics, (str, os.PathLike)):
        statistics = load_statistics(statistics, backbone)
    elif statistics is None:
        if source is None:
            raise InputError(
                f"method {config.method} needs class statistics: give them, or the data set to compute them from"
            )
        clusters = config.ipc if config.level == "cluster" else 0
        statistics = class_statistics(source, backbone, clusters=clusters, batch_size=batch_size, progress=progress)
    if statistics.dim != backbone.num_features:
        raise InputError(
            f"statistics have {statistics.dim} features, backbone {backbone.name!r} gives {backbone.num_features}"
        )
    centers = (_cluster_centers(statistics, config.ipc) if config.level == "cluster" else statistics.centers).to(
        backbone.device
    )
    if config.method == "sfm":
        objective = FlowMatching(centers, views=config.views_per_step, alignment=config.alignment, metric=config.metric)
    else:
        objective = DecoupledFlowMatching(centers, views=config.views_per_step, alpha=config.alpha)
    names = statistics.class_names or [str(c) for c in range(statistics.num_classes)]
    channels = min(int(statistics.provenance.get("channels", 3)), backbone.in_channels)
    return Distiller(config, backbone, objective, names, channels, {"centers": _digest(centers)}, execution)


def _cluster_centers(statistics: ClassStatistics, ipc: int) -> Tensor:
    centers = statistics.cluster_centers
    if centers is None or centers.shape[1] != ipc:
        raise InputError(
            f"level 'cluster' with ipc {ipc} needs as many k-means centres a class, the statistics hold {statistics.clusters}: "
            f"make them with `sfm-fast stats --clusters {ipc}`"
        )
    return centers


def load_statistics(path: str | os.PathLike[str], backbone: Backbone) -> ClassStatistics:
    """Read statistics and check that this very backbone made them."""
    statistics = ClassStatistics.load(path)
    made_with = statistics.provenance.get("backbone", {})
    if statistics.dim != backbone.num_features:
        raise InputError(
            f"{path}: has {statistics.dim} features, backbone {backbone.name!r} gives {backbone.num_features}"
        )
    for key in ("fingerprint", "input_size", "resize"):
        now = backbone.describe()[key]
        if made_with.get(key, now) != now:
            raise InputError(
                f"{path}: made with {made_with.get('name')!r}, {key} {made_with[key]}; {backbone.name!r} has {now}"
            )
    return statistics


def _digest(centers: Tensor) -> str:
    return hashlib.sha256(centers.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
