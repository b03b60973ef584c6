"""Measures step time and peak memory of distillation methods on the same backbone and data, interleaved in one run."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from typing import TypedDict

from ..backbones.backbone import Backbone
from ..data.sources import ImageSource
from ..distill.build import make_distiller
from ..distill.config import DistillConfig, Execution
from ..distill.objectives import LGM_VARIANTS
from ..features.statistics import ClassStatistics
from ..measure.memory import peak_memory
from ..measure.timing import ratio, samples, summary


class Cost(TypedDict):
    """Cost of a step of one configuration: seconds (median, 20th and 80th percentile) and peak bytes.

    time_ratio: its time over that of the first configuration, the median over rounds, with the sign-test interval (95 %), which is
    None if there are too few rounds for one.
    """

    name: str
    method: str
    variant: str
    ipc: int
    views: int
    peak_bytes: int
    step_seconds: float
    step_seconds_p20: float
    step_seconds_p80: float
    time_ratio: float
    time_ratio_low: float | None
    time_ratio_high: float | None
    rounds: int


def sfm_and_lgm(config: DistillConfig) -> dict[str, DistillConfig]:
    """``config`` for SFM and for the three variants of LGM, with LGM's own number of views; SFM first."""
    forms = {
        f"LGM {variant}": DistillConfig.paper(method="lgm", ipc=config.ipc, size=config.size, lgm_variant=variant)
        for variant in LGM_VARIANTS
    }
    return {"SFM": config, **forms}


def compare_methods(
    configs: Mapping[str, DistillConfig],
    backbone: Backbone,
    source: ImageSource,
    statistics: ClassStatistics,
    *,
    rounds: int = 6,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Cost]:
    """One row per configuration: seconds per step (median, p20, p80 of interleaved steps) and peak bytes of a step.

    All levels of the pyramid are live, as in most of a run. Memory is counted beyond what exists before the step, so it doesn't
    include the images, Adam's state, the backbone and the cached data, which all methods have. It is a count of bytes, the same in
    every run, and so has no interval. ``tell`` is called with what is measured now.
    """

    def steps_of(config: DistillConfig) -> Callable[[], object]:
        one_shot = Execution(statistics.num_classes * config.ipc)  # as the papers run their steps
        distiller = make_distiller(config, backbone, source, statistics, execution=one_shot)
        distiller.grow_fully()
        return distiller.step

    steps, peaks = {}, {}
    for name, config in configs.items():
        tell(f"memory of {name}")
        steps_of(config)()  # warms up libraries, some of which keep a workspace
        # The peak is of the first step of a new run: a later one releases tensors of the step before, whose sizes torch's profiler
        # doesn't know, because they were allocated before it started.
        steps[name] = steps_of(config)
        gc.collect()
        peaks[name] = peak_memory(steps[name], backbone.device)

    done = 0

    def counted(step: Callable[[], object]) -> Callable[[], object]:
        def call() -> None:
            nonlocal done
            tell(f"timed step {done + 1} of {rounds * len(steps)}")
            step()
            done += 1

        return call

    seconds = samples(
        {name: counted(step) for name, step in steps.items()}, rounds=rounds, warmup=0, device=backbone.device
    )
    base = next(iter(seconds.values()), [])
    rows: list[Cost] = []
    for name, config in configs.items():
        timing, over = summary(seconds[name]), ratio(seconds[name], base)
        sure = math.isfinite(over.high)
        rows.append(
            {
                "name": name,
                "method": config.method,
                "variant": config.lgm_variant if config.method == "lgm" else "",
                "ipc": config.ipc,
                "views": config.views_per_step,
                "peak_bytes": peaks[name],
                "step_seconds": timing.median,
                "step_seconds_p20": timing.p20,
                "step_seconds_p80": timing.p80,
                "time_ratio": over.median,
                "time_ratio_low": over.low if sure else None,
                "time_ratio_high": over.high if sure else None,
                "rounds": timing.rounds,
            }
        )
    return rows
