"""Which micro-batch fits, and a table of what a step takes: SFM's ways of running it beside LGM's."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypedDict

from .. import units
from ..backbones.backbone import Backbone
from ..errors import InputError
from ..measure.memory import free_memory
from .config import DistillConfig, Execution
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


class PlanRow(TypedDict):
    """One way of running a step, predicted: bytes, floating-point operations, and whether it fits the memory asked for."""

    method: str
    variant: str
    micro_batch: int | None
    views: int
    peak_bytes: int
    by_category: dict[str, int]
    flops_per_step: int
    host_bytes: int
    fits: bool
    recommended: bool


def choose_micro_batch(
    config: DistillConfig, backbone: Backbone, classes: int, channels: int, execution: Execution
) -> int:
    """The largest micro-batch that fits the budget of ``execution`` with all levels live. Raises ``InputError`` where one image doesn't."""
    budget, count = execution.memory_budget, classes * config.ipc

    def peak(micro_batch: int) -> int:
        return predict_step(
            config,
            backbone,
            classes,
            channels,
            micro_batch,
            host_state=execution.state == "host",
            # Where the free memory was counted the model was there already; a budget is meant for everything.
            count_parameters=budget is not None,
        ).peak_bytes

    try:
        chosen = largest_micro_batch(peak, count, free_memory(backbone.device) if budget is None else budget)
    except InputError:
        raise
    except Exception as error:  # of a model that can't run without values; memory may be plenty all the same
        warnings.warn(
            f"the memory of {backbone.name!r} can't be predicted ({type(error).__name__}): all images go into one "
            "micro-batch, which is halved when memory runs out; --micro-batch chooses another",
            RuntimeWarning,
            stacklevel=3,
        )
        return count
    if budget is not None and chosen == 1 and peak(1) > budget:
        raise InputError(
            f"memory_budget of {units.memory(budget)} is too small: one image at a time is predicted to take {units.memory(peak(1))}"
        )
    return chosen


def plan(
    config: DistillConfig,
    backbone: Backbone,
    classes: int,
    channels: int,
    *,
    memory: int,
    micro_batches: Sequence[int] = (),
    lgm_views: int = 10,
) -> list[PlanRow]:
    """One row a way of running a step: SFM in one shot, in micro-batches that fit ``memory`` bytes (with the state on the device and on
    the host) and of the sizes asked for, then LGM's three forms, one of them in the same micro-batches. ``recommended`` marks the fastest that fits.
    """
    for size in micro_batches:
        if size < 1:
            raise InputError(f"--micro-batch must be at least 1, got {size}")
    count = classes * config.ipc
    rows: list[PlanRow] = []

    @functools.cache
    def predict(configured: DistillConfig, micro_batch: int, host: bool) -> Prediction:
        return predict_step(configured, backbone, classes, channels, micro_batch, host_state=host)

    def row(configured: DistillConfig, variant: str, micro_batch: int | None, host: bool = False) -> PlanRow:
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
