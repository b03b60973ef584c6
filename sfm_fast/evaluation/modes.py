"""Three ways from features of a few images to a predictor: a probe, an inherited classifier, a distilled classifier."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..backbones.backbone import Backbone
from ..backbones.record import check_recorded
from ..checks import check_class_names
from ..errors import InputError
from ..options import check_options, option
from ..views import AREA
from .classifier import accuracy
from .heads import Classifier, LinearMap, Projector
from .linear import ALPHA, TEMPERATURE, check_distillation, train_linear
from .projector import SOLVERS, fit_projector

MODES = ("probe", "inherit", "kd")


@dataclass(frozen=True)
class ProbeConfig:
    """seeds: fits of every row, each with its own views and start. views: cached views an image (epochs cycle through them).

    min_area: smallest crop as a fraction of the image. projector: the solver of mode inherit. blends: whether it is fitted on blends of
    two images too, in half of the views; False: on views of single images alone, as in the paper. temperature, alpha: of mode kd.
    """

    seeds: int = option(3, "fits of every row", least=1)
    epochs: int = option(1000, "most epochs of a fit with Adam, which takes at most 20 000 steps", least=1)
    views: int = option(200, "augmented views cached for every image", least=1)
    min_area: float = option(AREA[0], "smallest random crop, as a part of the image", within="(0, 1]")
    projector: str = option("ridge", "how mode inherit fits its projector", choices=SOLVERS)
    blends: bool = option(False, "fit it on blends of two images too, in half of the views")
    temperature: float = option(TEMPERATURE, "softens the teacher's probabilities in mode kd")
    alpha: float = option(ALPHA, "the teacher's part in the loss of mode kd")

    def __post_init__(self) -> None:
        check_options(self)
        check_distillation(self.temperature, self.alpha)

    def settings(self, mode: str) -> dict[str, object]:
        """Those that play a part in ``mode``."""
        unused = {
            "probe": ("projector", "blends", "temperature", "alpha"),
            "inherit": ("temperature", "alpha") + (("epochs",) if self.projector == "ridge" else ()),
            "kd": ("projector", "blends"),
        }[mode]
        return {name: value for name, value in asdict(self).items() if name not in unused}


@dataclass
class Features:
    """Training features of one seed: on the evaluating backbone (V, N, Dpsi), on the distilling one (V, N, Dphi), labels (N,).

    ``distilling`` is None where both are one backbone, or no mode needs it. ``projector``: what the projector is fitted on, features
    on both as far as they are other ones.
    """

    evaluating: Tensor
    distilling: Tensor | None
    labels: Tensor
    projector: tuple[Tensor, Tensor] | None = None


@dataclass
class Fit:
    """One seed's predictor: projector (None: straight on the evaluating backbone's features), then head; and how it was fitted."""

    head: LinearMap
    projector: Projector | None
    solver: str | None
    seconds: float

    @property
    def parameters(self) -> int:
        """What must be stored to predict, beside the backbone."""
        return self.head.parameters + (0 if self.projector is None else self.projector.parameters)

    @property
    def parameters_folded(self) -> int:
        """The same of head and projector as one map."""
        inputs = self.head.in_features if self.projector is None else self.projector.in_features
        return self.head.out_features * (inputs + 1)

    def score(self, features: Tensor, labels: Tensor) -> tuple[float, float]:
        """Top-1 and top-5 accuracy on features (N, Dpsi) of the evaluating backbone."""
        inner = features if self.projector is None else self.projector(features)
        return accuracy(self.head, inner, labels, 1), accuracy(self.head, inner, labels, 5)


def fit(
    mode: str, features: Features, num_classes: int, classifier: LinearMap | None, config: ProbeConfig, seed: int
) -> Fit:
    """Fit in ``mode``; "inherit" and "kd" take the ``classifier`` of the distilling backbone's features.

    Inherited without distilling features, the classifier is taken as it is: both backbones are one.
    """
    if mode == "inherit":
        assert classifier is not None
        if features.distilling is None:
            return Fit(classifier, None, None, 0.0)
        started = time.perf_counter()
        inputs, targets = features.projector or (features.evaluating, features.distilling)
        projector = fit_projector(inputs, targets, solver=config.projector, epochs=config.epochs, seed=seed)
        return Fit(classifier, projector, config.projector, time.perf_counter() - started)
    views = min(config.views, config.epochs)  # an epoch sees one view of an image, at least
    inputs, teacher = features.evaluating[:views], None
    if mode == "kd":
        assert classifier is not None
        known = features.evaluating if features.distilling is None else features.distilling
        teacher = classifier(known[:views])
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
    """What a row says of its seeds: accuracies, mean ± standard deviation, time of a fit, and what must be stored to predict."""
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
    """Raise ``InputError`` unless ``classifier`` takes features of ``phi``, the distilling backbone, and tells ``class_names``."""
    made_with = classifier.metadata.get("backbone") or {}
    check_recorded(made_with, phi, f"{argument}: trained on features of", "the distilling backbone")
    if classifier.in_features != phi.num_features:
        raise InputError(
            f"{argument}: takes {classifier.in_features} features, the distilling backbone {phi.name!r} gives {phi.num_features}"
        )
    check_class_names(classifier.class_names, class_names, argument, "the test set's")
