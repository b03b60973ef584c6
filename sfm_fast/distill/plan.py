"""Chooses a micro-batch that fits, and compares the predicted cost of a step of SFM with that of LGM."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import TypedDict

from .. import units
from ..backbones.backbone import Backbone
from ..errors import InputError
from ..measure.memory import free_memory
from .config import DistillConfig, Execution
from .predict import Prediction, predict_step


def largest_micro_batch(peak: Callable[[int], int], count: int, budget: int) -> int:
    """The largest micro-batch of ``count`` images whose ``peak(micro_batch)`` is within ``budget`` bytes; at least 1.

    ``count`` if all images fit, because then no forward runs twice; otherwise at most half of them, in micro-batches of about equal size.
    """
    if peak(count) <= budget:
        return count
    # The peak grows almost linearly, so two small sizes predict the one that fits; each further guess narrows the interval.
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
    """Predicted cost of one way of running a step: bytes, floating-point operations, and whether it fits the given memory."""

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
    config: DistillConfig, backbones: Sequence[Backbone], classes: int, channels: int, execution: Execution
) -> int:
    """The largest micro-batch that fits the budget of ``execution`` with all levels live. Raises ``InputError`` if one image doesn't fit."""
    budget, count = execution.memory_budget, classes * config.ipc

    def peak(micro_batch: int) -> int:
        return predict_step(
            config,
            backbones,
            classes,
            channels,
            micro_batch,
            host_state=execution.state == "host",
            # A budget includes the weights; the free memory was measured after the model was loaded.
            count_parameters=budget is not None,
        ).peak_bytes

    try:
        chosen = largest_micro_batch(peak, count, free_memory(backbones[0].device) if budget is None else budget)
    except InputError:
        raise
    except Exception as error:  # the model can't run on fake tensors; there may still be enough memory
        names = ", ".join(repr(one.name) for one in backbones)
        warnings.warn(
            f"the memory of {names} can't be predicted ({type(error).__name__}): all images go into one "
            "micro-batch, which is halved when memory runs out; --micro-batch sets its size",
            RuntimeWarning,
            stacklevel=3,
        )
        return count
    if budget is not None and chosen == 1 and peak(1) > budget:
        raise InputError(
            f"memory_budget of {units.memory(budget)} is too small: a step is predicted to take {units.memory(peak(1))} with one image at a time"
        )
    return chosen


def plan(
    config: DistillConfig,
    backbone: Backbone | Sequence[Backbone],
    classes: int,
    channels: int,
    *,
    memory: int,
    micro_batches: Sequence[int] = (),
    lgm_views: int = 10,
) -> list[PlanRow]:
    """One row for each way of running a step: SFM in one shot, in the largest micro-batches that fit ``memory`` bytes (state on the device
    and on the host) and in ``micro_batches``; then LGM's three variants, and "closed-form" also in the recommended micro-batches.
    ``recommended`` marks the fastest row of SFM that fits.
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
        prediction = predict(configured, micro_batch or count, host)
        return {
            "method": "lgm" if configured.method == "lgm" else "sfm",
            "variant": variant,
            "micro_batch": micro_batch,
            "views": configured.views_per_step,
            "peak_bytes": prediction.peak_bytes,
            "by_category": prediction.by_category,
            "flops_per_step": prediction.flops,
            "host_bytes": prediction.host_bytes,
            "fits": prediction.peak_bytes <= memory,
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
        # Micro-batches below 8 images use a GPU poorly; keeping the state on the host is better then.
        roomy = [candidate for candidate in fitting if (candidate["micro_batch"] or count) >= min(8, count)] or fitting
        roomy[0]["recommended"] = True
    for variant in ("closed-form", "frozen", "stock"):
        lgm = DistillConfig.paper(
            method="lgm",
            ipc=config.ipc,
            size=config.size,
            parametrization=config.parametrization,
            lgm_variant=variant,
            views=lgm_views,
        )
        rows.append(row(lgm, variant, None))
        if variant == "closed-form" and fitting and roomy and roomy[0]["micro_batch"]:
            # LGM's public code has no micro-batches, but this package's step runs LGM with them.
            rows.append(row(lgm, f"{variant}, micro-batched", roomy[0]["micro_batch"]))
    return rows
