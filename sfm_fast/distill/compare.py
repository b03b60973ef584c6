"""Step time and peak memory of distillation methods on the same backbone and data, measured side by side in one run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..data.backbones import Backbone
from ..data.sources import ImageSource
from ..statistics import ClassStatistics
from ..testing.perf import interleaved, peak_memory
from .config import DistillConfig
from .prepare import make_distiller

ALL_METHODS = (("sfm", ""), ("lgm", "closed-form"), ("lgm", "frozen"), ("lgm", "stock"))


def compare_methods(
    config: DistillConfig,
    backbone: Backbone,
    source: ImageSource,
    statistics: ClassStatistics,
    *,
    methods: Sequence[tuple[str, str]] = ALL_METHODS,
    rounds: int = 5,
) -> list[dict[str, Any]]:
    """One row a (method, LGM variant): seconds a step (median, p20, p80 of interleaved steps) and peak bytes of a step.

    All levels of the pyramid are live, as in most of a run. Memory is the delta over what exists before the step: the
    images, Adam's state, the backbone and the cached data are not in it, so nothing of a method's own cost is hidden.
    """
    full = 2**16  # more growths than any pyramid has levels
    distillers = {}
    for method, variant in methods:
        own = replace(
            config,
            method=method,
            views=config.views if method == "sfm" else None,
            lgm_variant=variant or config.lgm_variant,
            grow_every=1,
            steps=full,
        )
        distiller = make_distiller(own, backbone, source, statistics)
        while not distiller.images.fully_grown:
            distiller.images.grow()
        distillers[(method, variant)] = distiller

    def step(key: tuple[str, str]) -> None:
        # "stock" leaves the backbone requiring grad; every other method runs with it frozen.
        backbone.model.requires_grad_(key[1] == "stock")
        distillers[key].step()

    names = {f"{method} {variant}".strip(): (method, variant) for method, variant in methods}
    timings = interleaved(
        {name: functools.partial(step, key) for name, key in names.items()}, rounds=rounds, device=backbone.device
    )
    rows = []
    for name, key in names.items():
        peak = peak_memory(functools.partial(step, key), backbone.device)
        timing = timings[name]
        rows.append(
            {
                "method": key[0],
                "variant": key[1],
                "views": distillers[key].objective.views,
                "peak_bytes": peak,
                "step_seconds": timing.median,
                "step_seconds_p20": timing.p20,
                "step_seconds_p80": timing.p80,
                "rounds": timing.rounds,
            }
        )
    backbone.model.requires_grad_(False)
    return rows
