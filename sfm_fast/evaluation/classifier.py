"""Trains the linear classifier on all real data, which inheritance reuses."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..backbones.backbone import Backbone
from ..checks import check_class_names, check_features, check_labels
from ..data.sources import ImageSource
from ..errors import InputError
from ..features.cache import FeatureCache
from ..version import __version__
from .config import WEIGHT_DECAYS as WEIGHT_DECAYS
from .heads import Classifier, LinearMap
from .linear import top_k_accuracy
from .softmax import Fit, Standardiser, fit_lbfgs, residual


class Tried(TypedDict):
    """Results of one weight decay on the validation rows."""

    weight_decay: float
    top1: float
    cross_entropy: float
    iterations: int
    converged: bool | None


def train_classifier(
    features: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    *,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    validation: float = 0.1,
    seed: int = 0,
    search_rows: int = 100_000,
    tolerance: float = 1e-4,
    max_iterations: int = 500,
) -> Classifier:
    """Softmax regression: the minimum of mean cross-entropy + weight_decay / 2 * |weight|², the bias unpenalised.

    Features are standardised internally, so the penalty doesn't depend on their scale; the result takes raw features. Constant features,
    and those whose spread is beyond float32's range, get weight 0. The weight decay is the one with the highest accuracy on a stratified
    validation split, and among equal ones with the lowest cross-entropy; then the classifier is fitted to all rows. Decays are tried from
    strong to weak, until two in a row are worse than the best in both measures. Every fit is full-batch L-BFGS to convergence.

    Args:
        features: (N, D) of any float dtype; they are copied once as float32.
        labels: (N,) int64, every class at least once.
        weight_decays: candidates, all positive.
        validation: fraction of each class held out to choose the weight decay: at least one row, but never all rows of a class. 0 means
            no validation and is only allowed with a single weight decay.
        seed: of the split.
        search_rows: most training rows used while choosing; a random subset if there are more. The last fit uses all rows. On a small
            subset the chosen decay tends to be too strong.
        tolerance, max_iterations: see `fit_lbfgs`.

    Returns:
        Classifier on the features' device. Its metadata: solver, weight_decay, train_top1, validation_top1 (None without validation),
        test_top1 (None here), search (a row for each weight decay tried: top1, cross_entropy, iterations, converged), iterations and
        converged of the last fit, images, seed, seconds, sfm_fast.

    Raises ``InputError`` for a class without rows, a row that isn't finite, features whose scale is beyond a float32 classifier, too
    few rows for validation, or an argument out of its range.
    """
    started = time.perf_counter()
    decays = _check(weight_decays, validation, seed, search_rows, tolerance, max_iterations)
    if isinstance(features, Tensor) and (features.ndim != 2 or not features.numel()):
        raise InputError(f"features must be (rows, features), at least one of each, got {tuple(features.shape)}")
    check_features("features", features, features.shape[1] if isinstance(features, Tensor) else 0, "features")
    counts = check_labels("labels", labels, len(features), len(class_names)).tolist()
    if len(class_names) < 2:
        raise InputError(f"class_names must name at least 2 classes, got {len(class_names)}")
    if 0 in counts:
        empty = counts.index(0)
        raise InputError(
            f"class {empty} ({class_names[empty]!r}) has no rows in labels; every class needs at least one"
        )
    training, held = stratified_split(labels.cpu(), validation, seed)
    if len(decays) > 1 and not len(held):
        raise InputError(
            f"weight_decays must be a single value if no class has two rows, one of which could be held out, got {len(decays)}"
        )
    features, labels = features.detach(), labels.to(features.device)
    standardise = Standardiser.of(features)
    classes, order = len(class_names), torch.cat((training, held)).to(features.device)
    held_features, held_labels = features[order[len(training) :]], labels[order[len(training) :]]
    searched = min(len(training), search_rows)
    search: list[tuple[Fit, Tried]] = []
    # Training rows come first, so that a fit to some of them, or to all rows, uses a slice of this one copy.
    x, y = torch.cat([standardise(features[rows]) for rows in order.split(8192)]), labels[order]
    fit_decay = functools.partial(fit_lbfgs, tolerance=tolerance, max_iterations=max_iterations)
    start = None
    for decay in decays if len(held) else ():  # from strong to weak: each fit starts from the last one's result
        start = fit_decay(x[:searched], y[:searched], classes, decay, start=start)
        search.append((start, _validate(decay, start, standardise, held_features, held_labels)))
        if _past_the_best([row for _, row in search]):
            break
    start, chosen = min(search, key=lambda pair: _rank(pair[1]), default=(None, None))
    decay = decays[0] if chosen is None else chosen["weight_decay"]
    fit = fit_decay(x, y, classes, decay, start=start)
    classifier = Classifier(*standardise.fold(fit.weight, fit.bias), class_names=list(class_names))
    if not (classifier.weight.isfinite().all() and classifier.bias.isfinite().all()):
        raise InputError(
            f"the classifier's weights are beyond float32's range: rescale the features, or change the weight decay {decay:g}"
        )
    classifier.metadata = {
        "solver": "lbfgs",
        "weight_decay": decay,
        "train_top1": accuracy(classifier, features, labels),
        "validation_top1": None if chosen is None else chosen["top1"],
        "test_top1": None,
        "search": [tried for _, tried in search],
        "iterations": fit.iterations,
        "converged": fit.converged,
        "images": len(features),
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 3),
        "sfm_fast": __version__,
    }
    return classifier


def train_on_source(
    train: ImageSource,
    backbone: Backbone,
    *,
    test: ImageSource | None = None,
    cache: FeatureCache | None = None,
    batch_size: int = 256,
    progress: bool = True,
    **options: Any,
) -> Classifier:
    """`train_classifier` (which gets ``options``) on a data set's features; adds backbone, data and the accuracy on ``test`` to the metadata.

    ``feature_seconds`` in it is the time for computing features, ``seconds`` that of the fit; ``cache`` stores the features.
    """
    if test is not None:
        check_class_names(test.class_names, train.class_names, f"test {test.name}", f"{train.name}'s")
    _check(**((train_classifier.__kwdefaults__ or {}) | options))  # before the features are computed
    cache = cache or FeatureCache(None)
    started = time.perf_counter()
    features, labels = cache.features(train, backbone, batch_size=batch_size, progress=progress)
    seconds = time.perf_counter() - started
    classifier = train_classifier(features, labels, train.class_names, **options)
    if test is not None:
        started = time.perf_counter()
        test_features, test_labels = cache.features(test, backbone, batch_size=batch_size, progress=progress)
        seconds += time.perf_counter() - started
        classifier.metadata["test_top1"] = accuracy(classifier, test_features, test_labels)
    classifier.metadata |= {
        "backbone": backbone.describe(),
        "data": train.name,
        "test_data": None if test is None else test.name,
        "feature_seconds": round(seconds, 3),
    }
    return classifier


def accuracy(head: LinearMap, features: Tensor, labels: Tensor, k: int = 1) -> float:
    """Fraction of rows of features (N, D) whose label (N,) is among the head's k largest logits, computed in blocks."""
    size = max(1, (1 << 24) // head.out_features)
    right = [
        top_k_accuracy(head(block.float()), targets, k) * len(block)
        for block, targets in zip(features.split(size), labels.split(size), strict=True)
    ]
    return sum(right) / len(features)


def stratified_split(labels: Tensor, validation: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of training and of validation rows, each in random order: labels (N,) int64 on the CPU.

    Of a class of n rows, round(validation * n) are for validation, but at least one and never all; none of a class with one row.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[torch.argsort(labels[order], stable=True)]
    counts = torch.bincount(labels)
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]  # index of a row within its class
    held_of_class = (validation * counts).round().clamp(min=1).minimum(counts - 1) if validation else 0 * counts
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[by_class] = place < held_of_class[labels[by_class]]
    return order[~held[order]], order[held[order]]


def _validate(decay: float, fit: Fit, standardise: Standardiser, features: Tensor, labels: Tensor) -> Tried:
    head = LinearMap(*standardise.fold(fit.weight, fit.bias))
    size, loss = max(1, (1 << 24) // head.out_features), 0.0
    for block, targets in zip(features.split(size), labels.split(size), strict=True):
        loss += float(residual(head(block.float()).T.contiguous(), targets)[0].sum(dtype=torch.float64))
    return {
        "weight_decay": decay,
        "top1": accuracy(head, features, labels),
        "cross_entropy": loss / len(features),
        "iterations": fit.iterations,
        "converged": fit.converged,
    }


def _rank(row: Tried) -> tuple[float, float]:
    """Sorting key whose minimum is the best row."""
    return -row["top1"], row["cross_entropy"]


def _past_the_best(rows: list[Tried]) -> bool:
    """Whether the last two decays are worse than the best in both measures: weaker ones take longer and overfit more."""
    best = min(rows, key=_rank)
    return len(rows) > 2 and all(
        row["top1"] < best["top1"] and row["cross_entropy"] > best["cross_entropy"] for row in rows[-2:]
    )


def _check(
    weight_decays: Sequence[float],
    validation: float,
    seed: int,
    search_rows: int,
    tolerance: float,
    max_iterations: int,
) -> list[float]:
    """The weight decays from strong to weak; raises ``InputError`` for an argument out of its range."""
    decays = sorted({float(decay) for decay in weight_decays}, reverse=True)
    if not decays or not all(0 < decay < math.inf for decay in decays):
        raise InputError(f"weight_decays must be one or more positive numbers, got {list(weight_decays)}")
    if not 0 <= validation < 1:
        raise InputError(f"validation must be in [0, 1), got {validation}")
    if validation == 0 and len(decays) > 1:
        raise InputError(f"weight_decays must be a single value if validation is 0, got {len(decays)}")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must be in [0, 2**63), got {seed}")
    if not 0 < tolerance < math.inf:
        raise InputError(f"tolerance must be positive, got {tolerance}")
    for name, value in {"search_rows": search_rows, "max_iterations": max_iterations}.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    return decays
