"""One run, followed: its images after more and more steps, how accurate a probe on them is, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from sfm_fast.backbones.backbone import Backbone
from sfm_fast.data.sources import ImageSource
from sfm_fast.distill.build import make_distiller
from sfm_fast.distill.config import DistillConfig, Execution
from sfm_fast.features.statistics import ClassStatistics
from sfm_fast.files import load_tensors, save_tensors

MEMORY = 2_000_000_000  # bytes a process may use for a step
FIRST = 25  # steps before the first look; each further one is at twice as many
SETTLED = 100  # steps before which accuracies are too noisy to compare
RISE = 0.002  # of a validation probe's accuracy; less is no rise

Images = tuple[Tensor, Tensor]  # and their labels
Look = Callable[[Images], tuple[float, float]]  # accuracy of a probe on validation and on test images


class Point(TypedDict):
    """A look at a run: steps, seconds and images that went forward through a backbone so far, and a probe's accuracy."""

    steps: int
    seconds: float
    images: int
    validation: float
    test: float


def follow(
    path: Path,
    config: DistillConfig,
    backbones: Sequence[Backbone],
    train: ImageSource,
    statistics: Sequence[ClassStatistics] | None,
    look: Look,
    *,
    converged: bool,
) -> list[Point]:
    """The points of a run: read from ``path``, or made and stored there with the images of each.

    converged: stop once the validation accuracy no longer rises from one point to the next, instead of after all steps.
    """
    if not path.exists():
        # The same gradient up to rounding; several processes share the memory, and LGM's one-shot step takes up to 7 GB.
        distiller = make_distiller(config, backbones, train, statistics, execution=Execution(memory_budget=MEMORY))
        forward = _forward(config, distiller.labels.numel(), len(distiller.class_names)) * len(backbones)
        points: list[Point] = []
        tensors, seconds, due = {"labels": distiller.labels.cpu()}, 0.0, FIRST
        while not points or not (distiller.steps_done >= config.steps or (converged and has_converged(points))):
            started = time.perf_counter()
            while distiller.steps_done < min(due, config.steps):
                distiller.step()
            seconds += time.perf_counter() - started
            made = distiller.result()
            validation, test = look((made.images, made.labels))
            steps, due = distiller.steps_done, 2 * due
            points.append(
                {"steps": steps, "seconds": seconds, "images": steps * forward, "validation": validation, "test": test}
            )
            tensors[str(steps)] = made.images
        save_tensors(path, tensors, {"config": config.to_dict(), "points": points})
    found: list[Point] = load_tensors(path)[1]["points"]
    return found


def path_of(work: Path, name: str) -> Path:
    """The file of the run of that name."""
    words = "".join(letter if letter.isalnum() else "-" for letter in name)
    return work / "images" / f"{words}.safetensors"


def images_at(path: Path, steps: int) -> Images:
    """The images and labels that `follow` stored after so many steps."""
    tensors, _ = load_tensors(path)
    return tensors[str(steps)], tensors["labels"]


def has_converged(points: Sequence[Point]) -> bool:
    """Whether the last point is no better than the best one before, by a validation probe."""
    before = [point["validation"] for point in points[:-1] if point["steps"] >= SETTLED]
    return bool(before) and points[-1]["validation"] < max(before) + RISE


def best(points: Sequence[Point]) -> Point:
    """The point with the highest validation accuracy."""
    return max(points, key=lambda point: point["validation"])


def _forward(config: DistillConfig, images: int, classes: int) -> int:
    """Images that go forward through a backbone in a step, at least: synthetic views, and LGM's real images."""
    views = config.views_per_step
    return images * views + (config.ipc * views * classes if config.method == "lgm" else 0)


def distilled(
    path: Path, config: DistillConfig, model: Backbone, train: ImageSource, centers: ClassStatistics | None
) -> Images:
    """Images and labels of a run: read from ``path``, or distilled and stored there."""
    if not path.exists() or DistillConfig.from_dict(load_tensors(path)[1]["config"]) != config:
        distiller = make_distiller(config, model, train, centers, execution=Execution(memory_budget=MEMORY))
        while distiller.steps_done < config.steps:
            distiller.step()
        made = distiller.result()
        # As asked for: what "auto" became is recorded in runs, but a file must be found again.
        save_tensors(path, {"images": made.images, "labels": made.labels}, {"config": config.to_dict()})
    tensors, _ = load_tensors(path)
    return tensors["images"], tensors["labels"]


def told(points: Sequence[Point]) -> dict[str, Any]:
    """Of a finished run, for its rows."""
    last = points[-1]
    return {"steps": last["steps"], "seconds": last["seconds"], "images": last["images"], "points": list(points)}
