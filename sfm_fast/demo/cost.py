"""Measures step time and peak memory of distillation methods on the same backbone and data, interleaved in one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypedDict

from ..backbones.backbone import Backbone
from ..data.sources import ImageSource
from ..distill.build import make_distiller
from ..distill.config import DistillConfig, Execution
from ..distill.objectives import LGM_VARIANTS
from ..features.statistics import ClassStatistics
from ..measure.memory import peak_memory
from ..measure.timing import interleaved


class Cost(TypedDict):
    """Cost of a step of one configuration: seconds (median, 20th and 80th percentile) and peak bytes."""

    name: str
    method: str
    variant: str
    ipc: int
    views: int
    peak_bytes: int
    step_seconds: float
    step_seconds_p20: float
    step_seconds_p80: float
    rounds: int


def sfm_and_lgm(config: DistillConfig) -> dict[str, DistillConfig]:
    """``config`` for SFM and for the three variants of LGM, with LGM's own number of views; SFM first."""
    forms = {
        f"LGM {variant}": replace(config, method="lgm", level="class", lgm_variant=variant, views=None)
        for variant in LGM_VARIANTS
    }
    return {"SFM": config, **forms}


def compare_methods(
    configs: Mapping[str, DistillConfig],
    backbone: Backbone,
    source: ImageSource,
    statistics: ClassStatistics,
    *,
    rounds: int = 5,
) -> list[Cost]:
    """One row per configuration: seconds per step (median, p20, p80 of interleaved steps) and peak bytes of a step.

    All levels of the pyramid are live, as in most of a run. Memory is counted beyond what exists before the step, so it doesn't
    include the images, Adam's state, the backbone and the cached data, which all methods have.
    """
    steps = {}
    for name, config in configs.items():
        one_shot = Execution(statistics.num_classes * config.ipc)  # as the papers run their steps
        distiller = make_distiller(config, backbone, source, statistics, execution=one_shot)
        distiller.grow_fully()
        steps[name] = distiller.step
    timings = interleaved(steps, rounds=rounds, device=backbone.device)
    rows: list[Cost] = []
    for name, config in configs.items():
        timing = timings[name]
        rows.append(
            {
                "name": name,
                "method": config.method,
                "variant": config.lgm_variant if config.method == "lgm" else "",
                "ipc": config.ipc,
                "views": config.views_per_step,
                "peak_bytes": peak_memory(steps[name], backbone.device),
                "step_seconds": timing.median,
                "step_seconds_p20": timing.p20,
                "step_seconds_p80": timing.p80,
                "rounds": timing.rounds,
            }
        )
    return rows
