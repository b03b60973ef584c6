"""Three ways to fit a classifier to features of a few images: a probe, an inherited classifier, a probe with a teacher."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbones.backbone import Backbone
from ..backbones.record import check_recorded
from ..checks import check_class_names
from ..errors import InputError
from .classifier import accuracy
from .config import MODES as MODES
from .config import ProbeConfig as ProbeConfig
from .heads import Classifier, LinearMap, Projector
from .linear import train_linear
from .projector import fit_projector


@dataclass
class Features:
    """Training features of one seed: on the evaluating backbone (V, N, Dpsi), on the distilling one (V, N, Dphi), labels (N,).

    ``distilling`` is None if both backbones are the same, or no mode needs it. ``projector``: features on both backbones for fitting
    the projector, if they differ from the others.
    """

    evaluating: Tensor
    distilling: Tensor | None
    labels: Tensor
    projector: tuple[Tensor, Tensor] | None = None


@dataclass
class Fit:
    """One seed's classifier, ``head`` after ``projector`` (None: on the evaluating backbone's own features); solver and time of the fit."""

    head: LinearMap
    projector: Projector | None
    solver: str | None
    seconds: float

    @property
    def parameters(self) -> int:
        """Number of parameters for prediction, besides the backbone's."""
        return self.head.parameters + (0 if self.projector is None else self.projector.parameters)

    @property
    def parameters_folded(self) -> int:
        """The same with head and projector as one map."""
        inputs = self.head.in_features if self.projector is None else self.projector.in_features
        return self.head.out_features * (inputs + 1)

    def score(self, features: Tensor, labels: Tensor) -> tuple[float, float]:
        """Top-1 and top-5 accuracy on features (N, Dpsi) of the evaluating backbone."""
        inner = features if self.projector is None else self.projector(features)
        return accuracy(self.head, inner, labels, 1), accuracy(self.head, inner, labels, 5)


def fit(
    mode: str, features: Features, num_classes: int, classifier: LinearMap | None, config: ProbeConfig, seed: int
) -> Fit:
    """Fit in ``mode``; "inherit" and "kd" need the ``classifier`` on the distilling backbone's features.

    Mode "inherit" without distilling features means that both backbones are the same, so the classifier is used unchanged.
    """
    if mode == "inherit":
        assert classifier is not None
        if features.distilling is None:
            return Fit(classifier, None, None, 0.0)
        started = time.perf_counter()
        inputs, targets = features.projector or (features.evaluating, features.distilling)
        projector = fit_projector(inputs, targets, solver=config.projector, epochs=config.epochs, seed=seed)
        return Fit(classifier, projector, config.projector, time.perf_counter() - started)
    views = min(
        config.views, config.epochs
    )  # no more views than epochs, since an epoch uses at least one view of each image
    inputs, teacher = features.evaluating[:views], None
    if mode == "kd":
        assert classifier is not None
        taught = features.evaluating if features.distilling is None else features.distilling
        teacher = classifier(taught[:views])
    started = time.perf_counter()
    weight, bias = train_linear(
        inputs,
        features.labels,
        num_classes,
        teacher=teacher,
        temperature=config.temperature,
        alpha=config.alpha,
        epochs=config.epochs,
        seed=seed,
    )
    return Fit(LinearMap(weight, bias), None, "adam", time.perf_counter() - started)


@dataclass
class Scored:
    """A `Fit` and its accuracies."""

    fit: Fit
    top1: float
    top5: float


def summary(scored: list[Scored]) -> dict[str, object]:
    """The part of a row that the seeds determine: mean and standard deviation of accuracies, time of a fit, number of parameters and bytes."""
    first = scored[0].fit
    row: dict[str, object] = {}
    for name in ("top1", "top5"):
        values = [getattr(one, name) for one in scored]
        row[f"{name}_mean"] = statistics.fmean(values)
        row[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    row |= {
        "solver": first.solver,
        "fit_seconds": round(statistics.fmean(one.fit.seconds for one in scored), 4),
        "parameters": first.parameters,
        "parameters_folded": first.parameters_folded,
        "bytes_fp32": first.parameters * torch.float32.itemsize,
        "bytes_bf16": first.parameters * torch.bfloat16.itemsize,
    }
    if first.solver == "ridge":
        row["penalties"] = [one.fit.projector.metadata["penalty"] for one in scored if one.fit.projector is not None]
    return row


def check_classifier(
    classifier: Classifier, phi: Backbone, class_names: list[str], argument: str = "classifier"
) -> None:
    """Raise ``InputError`` unless ``classifier`` is for features of ``phi``, the distilling backbone, and for ``class_names``."""
    made_with = classifier.metadata.get("backbone") or {}
    check_recorded(made_with, phi, f"{argument}: trained on features of", "the distilling backbone")
    if classifier.in_features != phi.num_features:
        raise InputError(
            f"{argument}: takes {classifier.in_features} features, but the distilling backbone {phi.name!r} gives {phi.num_features}"
        )
    check_class_names(classifier.class_names, class_names, argument, "the test set's")
