"""References to compare distilled images with: real images of each class chosen by their features, and class means of features."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import philox
from ..errors import InputError
from ..features.nearest import closest_pairs
from ..features.statistics import ClassStatistics
from .config import REFERENCES as REFERENCES
from .config import USUAL as USUAL
from .linear import check_range


class TooFewImagesError(InputError):
    """A reference needs more real images of a class than there are."""


def random_indices(labels: Tensor, class_names: list[str], count: int, seed: int) -> Tensor:
    """Indices (C * count,) of ``count`` random images of every class, ordered by class: labels (N,) int64 on the CPU."""
    _check_count(count)
    score = philox.uniform(torch.arange(len(labels)), 1, seed=seed, stream=philox.Stream.PROBE, step=1)[:, 0]
    return lowest_per_class(score, labels, len(class_names), count, class_names)


def nearest_indices(features: Tensor, labels: Tensor, class_names: list[str], count: int) -> Tensor:
    """Indices (C * count,) of each class's images nearest (Euclidean) to its mean, nearest first: features (N, D), labels (N,)."""
    _check_count(count)
    check_range("features", features)
    seen = ClassStatistics(len(class_names), features.shape[1], class_names=class_names, device=features.device)
    seen.update(features, labels)
    distance = (features.double() - seen.centers[labels]).norm(dim=1).cpu()
    return lowest_per_class(distance, labels.cpu(), len(class_names), count, class_names)


def neighbour_indices(queries: Tensor, query_labels: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Indices (M,) of the real image nearest (Euclidean) to each query of its own class: queries (M, D), features (N, D).

    Images are distinct within a class if it has enough: the closest pair is matched first, then the closest of the rest.
    Raises ``InputError`` if a query's class has no images, or if features aren't finite in float32.
    """
    check_range("queries", queries)
    check_range("features", features)
    nearest = torch.full((len(queries),), -1)
    for label in query_labels.unique().tolist():
        asking, rows = ((part == label).nonzero().flatten() for part in (query_labels.to(labels.device), labels))
        if not len(rows):
            raise TooFewImagesError(f"class {label} has no real images")
        pairs = closest_pairs(torch.cdist(queries[asking].double(), features[rows].double()))
        nearest[asking.cpu()] = rows.cpu()[pairs]
    return nearest


def labelled_means(features: Tensor, labels: Tensor, class_names: list[str], count: int) -> tuple[Tensor, Tensor]:
    """Class means (C, D) and their labels (C,), or with ``count`` > 1 that many k-means centres of each class: (C * count, D).

    The best result that matching class means could reach, if every feature vector were the features of some image.
    """
    _check_count(count)
    check_range("features", features)
    counts = torch.bincount(labels, minlength=len(class_names))
    if int(counts.min()) < count:
        label = int(counts.argmin())
        raise TooFewImagesError(
            f"class {label} ({class_names[label]!r}) has {int(counts[label])} images, fewer than ipc={count}"
        )
    clusters = count if count > 1 else 0
    seen = ClassStatistics(
        len(class_names), features.shape[1], clusters=clusters, class_names=class_names, device=features.device
    )
    seen.update(features, labels)
    centers = seen.centers if seen.cluster_centers is None else seen.cluster_centers.flatten(0, 1)
    return centers.to(features), torch.arange(len(class_names), device=features.device).repeat_interleave(count)


def lowest_per_class(score: Tensor, labels: Tensor, num_classes: int, count: int, class_names: list[str]) -> Tensor:
    """Indices (num_classes * count,) of the ``count`` lowest scores of every class, ordered by class and score."""
    _check_count(count)
    chosen = []
    for label in range(num_classes):
        rows = (labels == label).nonzero().flatten()
        if len(rows) < count:
            raise TooFewImagesError(
                f"class {label} ({class_names[label]!r}) has {len(rows)} images, fewer than ipc={count}"
            )
        chosen.append(rows[torch.argsort(score[rows], stable=True)[:count]])
    return torch.cat(chosen)


def _check_count(count: int) -> None:
    if count < 1:
        raise InputError(f"ipc must be at least 1, got {count}")
