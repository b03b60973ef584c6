"""The rows of derivation.json: distances of LGM's gradient to the flow on given features, drawn and predicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Required, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from sfm_fast.reference.gradient_matching import linear_gradient

from ..machine import Environment
from . import bound as flow_bound
from .bound import Moments

LGM_SIGMA = 0.01  # the standard deviation of LGM's classifier
LGM_IMAGES = 10  # real images per class in LGM's batch at ipc 1: one for each view of a synthetic image
SIGMAS = tuple(10 ** (k / 2) for k in range(-10, 1))
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)


@dataclass(frozen=True)
class Series:
    """One line of a panel: how a gradient is drawn. ``centred``: the common mean of the features is subtracted first."""

    name: str
    sigma: float = 0.0
    stratified: bool = False
    centred: bool = False


BATCHES = (
    Series("balanced batch, W = 0", stratified=True),
    Series("random batch, W = 0"),
    Series("random batch, drawn W (LGM)", sigma=LGM_SIGMA),
    Series("LGM, common mean subtracted", sigma=LGM_SIGMA, centred=True),
)


class Features:
    """Balanced features (N, D) float64 with labels, their moments and their flow's gradient."""

    def __init__(self, z: Tensor, labels: Tensor, classes: int) -> None:
        self.z, self.labels, self.classes = z.double(), labels, classes
        self.centers = flow_bound.class_centers(self.z, labels, classes)
        self.moments: Moments = flow_bound.moments(self.z, labels, classes)
        self.flow = flow_bound.flow_gradient(self.centers)
        self.members = torch.stack([(labels == c).nonzero().flatten() for c in range(classes)])

    def centred(self) -> Features:
        return Features(self.z - self.z.mean(0), self.labels, self.classes)

    def spread(self, scale: float) -> Features:
        """The features with their distance from the class mean multiplied by ``scale``."""
        means = self.centers[self.labels]
        return Features(means + scale * (self.z - means), self.labels, self.classes)

    def draw(self, n: int, series: Series, generator: torch.Generator) -> Tensor:
        """LGM's gradient (C*D + C,) for a new W on a new batch of n images, drawn without replacement."""
        weight = torch.randn(self.classes, self.z.shape[1], dtype=torch.float64, generator=generator)
        if n == len(self.z):
            z, labels = self.z, self.labels
        else:
            if series.stratified:
                order = torch.rand(self.members.shape, generator=generator).argsort(1)[:, : n // self.classes]
                chosen = self.members.gather(1, order).flatten()
            else:
                chosen = torch.randperm(len(self.z), generator=generator)[:n]
            z, labels = self.z[chosen], self.labels[chosen]
        return linear_gradient(z, labels, series.sigma * weight, weight.new_zeros(self.classes))

    def predicted(self, n: int, series: Series) -> float:
        """Relative distance (root mean square) to the flow at first order in sigma; exact in n."""
        batch = flow_bound.batch_distance(self.moments, n, stratified=series.stratified)
        return math.hypot(flow_bound.weights_first_order(self.moments, series.sigma), batch)

    def bound(self, n: int, series: Series) -> float:
        if series.stratified:  # drawn only at W = 0, where the exact distance is known
            return self.predicted(n, series)
        return flow_bound.batch_bound(self.z, self.moments, n, series.sigma)


class Point(TypedDict, total=False):
    """One point of a line: the distances and cosines of draws to the flow, and the predictions. sigma or scale: its position."""

    series: Required[str]
    n: Required[int]
    sigma: float
    scale: float
    distance_rms: Required[float]
    distance_p10: Required[float]
    distance_median: Required[float]
    distance_p90: Required[float]
    distance_of_mean: Required[float]
    cosine_p10: Required[float]
    cosine_median: Required[float]
    cosine_p90: Required[float]
    predicted: Required[float]
    bound: Required[float]
    cosine_predicted: Required[float]
    cosine_bound: Required[float]


class Measured(TypedDict):
    """All numbers of one backbone. panels: "weights" along sigma, "batch" along n, "spread" along the distance from the class mean."""

    backbone: Mapping[str, Any]  # as `Backbone.describe` gives it
    moments: Mapping[str, Any]
    draws: int
    seed: int
    environment: Environment
    augmentation: Mapping[str, Any]  # of `augmentation`
    panels: dict[str, list[Point]]


class Result(TypedDict):
    """The content of derivation.json."""

    data: str
    backbones: dict[str, Measured]


def summary(draw: Callable[[], Tensor], flow: Tensor, draws: int) -> dict[str, float]:
    """Relative distance and cosine to ``flow`` of ``draws`` gradients: medians, 10th and 90th percentiles."""
    distances, cosines, total = [], [], torch.zeros_like(flow)
    for _ in range(draws):
        gradient = draw()
        distances.append((gradient - flow).norm() / flow.norm())
        cosines.append(F.cosine_similarity(gradient, flow, dim=0))
        total += gradient
    numbers = {"distance_rms": torch.stack(distances).square().mean().sqrt().item()}
    for name, values in (("distance", distances), ("cosine", cosines)):
        for quantile, label in ((0.1, "p10"), (0.5, "median"), (0.9, "p90")):
            numbers[f"{name}_{label}"] = torch.stack(values).quantile(quantile).item()
    # Errors of a single draw against the error of their mean: g(W) is an unbiased estimate of the flow.
    numbers["distance_of_mean"] = ((total / draws - flow).norm() / flow.norm()).item()
    return numbers


def row(features: Features, n: int, series: Series, draws: int, seed: int, **x: float) -> Point:
    """One point of a line; points of the same n have the same draws of W and batches, so that lines are smooth."""
    generator = torch.Generator().manual_seed(seed)
    predicted, bound = features.predicted(n, series), features.bound(n, series)
    return _point(
        series.name,
        n,
        summary(lambda: features.draw(n, series, generator), features.flow, draws),
        predicted,
        bound,
        **x,
    )


def _point(name: str, n: int, measured: dict[str, float], predicted: float, bound: float, **x: float) -> Point:
    cosines = {"cosine_predicted": flow_bound.usual_cosine(predicted), "cosine_bound": flow_bound.least_cosine(bound)}
    return {"series": name, "n": n, **x, **measured, "predicted": predicted, "bound": bound, **cosines}  # type: ignore[typeddict-item]


def batch_sizes(images: int, classes: int) -> Iterator[int]:
    """1, 3, 10, 30, … images per class, and all."""
    each = images // classes
    yield from (classes * size for k in range(10) for size in (10**k, 3 * 10**k) if size < each)
    yield images


def panels(features: Features, draws: int, seed: int) -> dict[str, list[Point]]:
    """Rows of the three panels: "weights" along sigma, "batch" along n, "spread" along the distance from the class mean."""
    everything, some = len(features.z), min(LGM_IMAGES * features.classes, len(features.z))
    centred = features.centred()
    weights = [
        row(part, everything, Series(name, sigma=sigma, centred=part is centred), draws, seed, sigma=sigma)
        for name, part in (("features as they are", features), ("common mean subtracted", centred))
        for sigma in SIGMAS
    ]
    batch = [
        row(centred if series.centred else features, n, series, draws, seed)
        for series in BATCHES
        for n in batch_sizes(everything, features.classes)
    ]
    spread = []
    for scale in SCALES:
        changed = features.spread(scale)
        changed_centred = changed.centred()
        for series in BATCHES:
            part = changed_centred if series.centred else changed
            spread.append(row(part, some, series, draws, seed, scale=scale))
    return {"weights": weights, "batch": batch, "spread": spread}


def augmentation(features: Features, views: Features, draws: int, seed: int) -> Mapping[str, Any]:
    """The effect of augmenting the real images: a bias of the flow, and LGM's gradient on augmented batches.

    ``views`` are features of one augmented view of each image, in the same order.
    """
    generator = torch.Generator().manual_seed(seed)
    size, lgm = features.flow.norm(), BATCHES[2]
    n = min(LGM_IMAGES * features.classes, len(features.z))
    bias = ((views.flow - features.flow).norm() / size).item()
    change = Features(views.z - features.z, features.labels, features.classes).moments
    ratio = (views.flow.norm() / size).item()
    shift = (views.centers - features.centers).mean(0).norm().item()
    predicted, bound = (math.hypot(bias, ratio * distance(n, lgm)) for distance in (views.predicted, views.bound))
    return {
        "images": len(views.z),
        "bias": bias,
        # The distance by chance with this many images, without any bias.
        "bias_noise": math.sqrt((features.classes - 1) / len(views.z) * change.within / features.moments.between),
        "bias_cosine": F.cosine_similarity(views.flow, features.flow, dim=0).item(),
        "common_shift": shift,
        "moments": asdict(views.moments),
        "lgm": _point(
            "LGM, augmented", n, summary(lambda: views.draw(n, lgm, generator), features.flow, draws), predicted, bound
        ),
    }
