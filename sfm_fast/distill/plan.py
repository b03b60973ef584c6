"""Which micro-batch fits, and a table of what a step takes: SFM's ways of running it beside LGM's."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..backbones.backbone import Backbone
from ..errors import InputError
from .config import DistillConfig
from .predict import Prediction, predict_step


def largest_micro_batch(peak: Callable[[int], int], count: int, budget: int) -> int:
    """The most of ``count`` images a micro-batch for which ``peak(micro_batch)`` stays within ``budget`` bytes; at least 1.

    All images in one where they fit: then no forward runs twice. Else at most half of them, in micro-batches of about equal size.
    """
    if peak(count) <= budget:
        return count
    # The peak grows nearly linearly: two small cases say where the budget ends; what is found there closes in on it.
    most = (count + 1) // 2
    known = {size: peak(size) for size in {min(4, most), min(32, most)}}
    while True:
        fits = max((size for size, taken in known.items() if taken <= budget), default=0)
        fails = min((size for size, taken in known.items() if taken > budget), default=most + 1)
        if fails - fits <= 1 or len(known) > 12:
            return math.ceil(count / math.ceil(count / max(fits, 1)))
        low, high = min(known), max(known)
        slope = max((known[high] - known[low]) / max(high - low, 1), 1.0)
        nearest = min(known, key=lambda size: abs(known[size] - budget))
        guess = int(nearest + (budget - known[nearest]) / slope)
        guess = min(max(guess, fits + 1), fails - 1)
        known[guess] = peak(guess)


def plan_rows(
    config: DistillConfig,
    backbone: Backbone,
    classes: int,
    channels: int,
    *,
    memory: int,
    micro_batches: Sequence[int] = (),
    lgm_views: int = 10,
) -> list[dict[str, Any]]:
    """One row a way of running a step: SFM in one shot, in micro-batches that fit ``memory`` bytes (with the state on the device and on
    the host) and of the sizes asked for, then LGM's three forms, one of them in the same micro-batches. ``recommended`` marks the fastest that fits.
    """
    for size in micro_batches:
        if size < 1:
            raise InputError(f"--micro-batch must be at least 1, got {size}")
    count, rows = classes * config.ipc, []

    @functools.cache
    def predict(configured: DistillConfig, micro_batch: int, host: bool) -> Prediction:
        return predict_step(configured, backbone, classes, channels, micro_batch, host_state=host)

    def row(configured: DistillConfig, variant: str, micro_batch: int | None, host: bool = False) -> dict[str, Any]:
        found = predict(configured, micro_batch or count, host)
        return {
            "method": "lgm" if configured.method == "lgm" else "sfm",
            "variant": variant,
            "micro_batch": micro_batch,
            "views": configured.views_per_step,
            "peak_bytes": found.peak_bytes,
            "by_category": found.by_category,
            "flops_per_step": found.flops,
            "host_bytes": found.host_bytes,
            "fits": found.peak_bytes <= memory,
            "recommended": False,
        }

    rows.append(row(config, "one-shot", None))
    for host in (False, True):

        def peak(size: int, host: bool = host) -> int:
            return predict(config, size, host).peak_bytes

        largest = largest_micro_batch(peak, count, memory)
        if largest < count or host:
            parts = "micro-batched" if largest < count else "one-shot"
            rows.append(row(config, f"{parts}, state on host" if host else parts, largest, host))
    for size in micro_batches:
        rows.append(row(config, "micro-batched", min(size, count)))
    fitting = [candidate for candidate in rows if candidate["fits"]]
    if fitting:
        # A GPU is poorly used by a handful of images: then rather bring the state from the host.
        roomy = [candidate for candidate in fitting if (candidate["micro_batch"] or count) >= min(8, count)] or fitting
        roomy[0]["recommended"] = True
    for variant in ("closed-form", "frozen", "stock"):
        lgm = replace(config, method="lgm", level="class", average_last=0.0, lgm_variant=variant, views=lgm_views)
        rows.append(row(lgm, variant, None))
        if variant == "closed-form" and fitting and roomy and roomy[0]["micro_batch"]:
            # Not what LGM's code does, but what this package's step does for it.
            rows.append(row(lgm, f"{variant}, micro-batched", roomy[0]["micro_batch"]))
    return rows
