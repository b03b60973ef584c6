"""Some of the suites in pytest-benchmark, with its statistics, storage and histograms: `pytest benchmarks --benchmark-enable`.

The baselines run in turn with the benchmark; their ratios to it and the suite's own rows are in ``extra_info``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch

from sfm_fast.measure.timing import interleaved, ratio

from .harness import Plan
from .presets import IMAGE_SHAPES, LOSS_SHAPES, STEPS
from .rows import Row
from .shapes import ImageShape, LossShape
from .steps.contenders import Setting, open_backbone, ways_of
from .suites import images, losses, step

Calls = Mapping[str, Callable[[], Any]]


def run(benchmark: Any, rows: Sequence[Row], calls: Calls) -> None:
    """Benchmark the first of ``calls`` with the others in turn. Raises ``AssertionError`` if a row has a wrong result."""
    assert not [row for row in rows if row.status.startswith("wrong")]
    own, *others = calls
    between: dict[str, list[float]] = {name: [] for name in others}

    def setup() -> None:
        for name in others:
            between[name].append(interleaved({name: calls[name]}, rounds=1, warmup=0)[name].median)

    benchmark.pedantic(calls[own], setup=setup, rounds=15, warmup_rounds=1)
    benchmark.extra_info["rows"] = [row.to_json() for row in rows]
    if benchmark.stats is not None:  # None if pytest-benchmark is disabled
        seconds = benchmark.stats.stats.data
        ratios = {name: asdict(ratio(taken[-len(seconds) :], seconds)) for name, taken in between.items()}
        benchmark.extra_info["ratio_to_this"] = ratios


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("shape", LOSS_SHAPES["small"], ids=lambda shape: shape.name)
def test_flow_alignment(benchmark: Any, shape: LossShape) -> None:
    features, centers, labels = shape.inputs(_device())
    every = losses.losses(shape, centers)
    checked = losses.contenders(shape, every, features.requires_grad_(), centers, labels)
    run(benchmark, losses.shape_rows(shape, _device()), {one.name: one.call for one in checked if not one.verdict})


@pytest.mark.parametrize("shape", IMAGE_SHAPES["small"], ids=lambda shape: shape.name)
def test_render_augment(benchmark: Any, shape: ImageShape) -> None:
    levels, views = shape.inputs(_device())
    leaves, grad = [level.requires_grad_() for level in levels], images.output_gradient(shape, _device())
    every = images.paths(shape, _device())
    calls = {name: images.both(entry.path, leaves, views, grad) for name, entry in every.items()}
    run(benchmark, images.shape_rows(shape, _device()), calls)


def test_step(benchmark: Any) -> None:
    shape, device = STEPS["laptop"], torch.device("cpu")
    rows = step.rows(shape, device, modes=("step",), plan=Plan(1.0))
    setting = Setting(shape, open_backbone(shape, device))
    run(benchmark, rows, {way.name: way.make(setting, way).step for way in ways_of(shape)})
