"""How well a linear probe trained on a few images does on the real test set, beside honest references."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.backbones import Backbone
from ..data.sources import ImageSource, ImageTransform
from ..distill.export import SyntheticSet
from ..errors import InputError
from ..reference import philox
from ..reference.augment import Augmentation
from ..statistics import ClassStatistics
from .features import dataset_features, view_features
from .linear import top_k_accuracy, train_linear

REFERENCES = ("full", "random-real", "nearest-real")


@dataclass(frozen=True)
class ProbeConfig:
    """seeds: probes trained, each with its own views and start. views: cached views an image (epochs cycle through them).

    min_area: smallest crop as a fraction of the image.
    """

    seeds: int = 3
    epochs: int = 1000
    views: int = 200
    min_area: float = 0.08

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "views"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.min_area <= 1:
            raise InputError(f"min_area must be in (0, 1], got {self.min_area}")


class Evaluator:
    """Evaluates sets of images on one backbone; test and train features are computed once and kept.

    Args:
        backbone: the evaluating backbone.
        test: real test images. train: real training images, needed only for the references.
        selector: backbone whose features choose the nearest real images (default: ``backbone``); give the distilling one.
    """

    def __init__(
        self,
        backbone: Backbone,
        test: ImageSource,
        train: ImageSource | None = None,
        *,
        selector: Backbone | None = None,
        config: ProbeConfig = ProbeConfig(),
        batch_size: int = 256,
        progress: bool = True,
    ) -> None:
        self.backbone, self.test, self.train, self.selector = backbone, test, train, selector or backbone
        self.config, self.batch_size, self.progress = config, batch_size, progress
        self.num_classes = len(test.class_names)
        if train is not None and train.class_names != test.class_names:
            raise InputError(
                f"train has the classes {train.class_names[:5]}…, test {test.class_names[:5]}…; they must agree"
            )
        self.test_features, self.test_labels = self._features(test, backbone)
        self._train: dict[int, tuple[Tensor, Tensor]] = {}

    def _features(self, source: ImageSource, backbone: Backbone) -> tuple[Tensor, Tensor]:
        return dataset_features(source, backbone, batch_size=self.batch_size, progress=self.progress)

    def train_features(self, backbone: Backbone) -> tuple[Tensor, Tensor]:
        """Features and labels of the real training images on ``backbone``, computed at the first call."""
        if self.train is None:
            raise InputError("references need the real training images: give train")
        if id(backbone) not in self._train:
            self._train[id(backbone)] = self._features(self.train, backbone)
        return self._train[id(backbone)]

    def probe(self, name: str, images: Tensor | list[Tensor], labels: Tensor | list[Tensor]) -> dict[str, Any]:
        """One row: images (N, channels, H, W) in 0..1 with labels (N,); a list holds one set per seed."""
        per_seed = images if isinstance(images, list) else [images] * self.config.seeds
        per_seed_labels = labels if isinstance(labels, list) else [labels] * self.config.seeds
        augmentation = Augmentation(min_area=self.config.min_area, noise=False)
        started, scores = time.perf_counter(), []
        for seed, (some, their_labels) in enumerate(zip(per_seed, per_seed_labels, strict=True)):
            views = min(self.config.views, self.config.epochs)
            features = view_features(self.backbone, some, views, augmentation, seed=seed, batch_size=self.batch_size)
            scores.append(self._score(features, their_labels.to(features.device), seed))
        return self._row(name, len(per_seed_labels[0]) // self.num_classes, scores, time.perf_counter() - started)

    def probe_synthetic(self, synthetic: SyntheticSet) -> dict[str, Any]:
        """The row of a distilled set: ``images`` is "sfm" or "lgm", ``method`` says which kind of it."""
        method = synthetic.metadata.get("config", {}).get("method", "synthetic")
        return self.probe(method.split("-")[0], synthetic.images, synthetic.labels) | {"method": method}

    def full(self) -> dict[str, Any]:
        """The row of a probe trained on the centre views of all real training images."""
        started = time.perf_counter()
        features, labels = self.train_features(self.backbone)
        scores = [self._score(features.unsqueeze(0), labels, seed) for seed in range(self.config.seeds)]
        return self._row("full", len(labels) // self.num_classes, scores, time.perf_counter() - started)

    def random_real(self, ipc: int, image_size: int) -> dict[str, Any]:
        """The row of ``ipc`` random real images a class, another draw for every seed."""
        _, labels = self.train_features(self.selector)
        draws = []
        for seed in range(self.config.seeds):
            score = philox.uniform(torch.arange(len(labels)), 1, seed=seed, stream=philox.Stream.PROBE, step=1)[:, 0]
            draws.append(
                self._take(
                    lowest_per_class(score, labels.cpu(), self.num_classes, ipc, self.test.class_names), image_size
                )
            )
        return self.probe("random-real", [images for images, _ in draws], [labels for _, labels in draws])

    def nearest_real(self, ipc: int, image_size: int) -> dict[str, Any]:
        """The row of the ``ipc`` real images of each class nearest (Euclidean) to its centre in the selector's features."""
        return self.probe("nearest-real", *self.nearest_images(ipc, image_size))

    def nearest_images(self, ipc: int, image_size: int) -> tuple[Tensor, Tensor]:
        """Those images (C * ipc, channels, image_size, image_size) and their labels, class by class."""
        features, labels = self.train_features(self.selector)
        seen = ClassStatistics(
            self.num_classes, features.shape[1], class_names=self.test.class_names, device=features.device
        )
        seen.update(features, labels)
        centers = seen.centers
        distance = (features.double() - centers[labels]).norm(dim=1).cpu()
        return self._take(
            lowest_per_class(distance, labels.cpu(), self.num_classes, ipc, self.test.class_names), image_size
        )

    def _take(self, indices: Tensor, image_size: int) -> tuple[Tensor, Tensor]:
        assert self.train is not None
        channels = min(self.train.channels, self.selector.in_channels)
        return self.train.take(indices.tolist(), ImageTransform(image_size, image_size, channels))

    def _score(self, features: Tensor, labels: Tensor, seed: int) -> tuple[float, float]:
        weight, bias = train_linear(features, labels, self.num_classes, epochs=self.config.epochs, seed=seed)
        logits = self.test_features @ weight.T + bias
        return top_k_accuracy(logits, self.test_labels, 1), top_k_accuracy(logits, self.test_labels, 5)

    def _row(self, name: str, ipc: int, scores: list[tuple[float, float]], seconds: float) -> dict[str, Any]:
        row: dict[str, Any] = {"images": name, "mode": "probe", "ipc": ipc}
        for label, values in zip(("top1", "top5"), zip(*scores, strict=True), strict=True):
            row |= {
                f"{label}_mean": statistics.fmean(values),
                f"{label}_std": statistics.stdev(values) if len(values) > 1 else 0.0,
            }
        return row | {"backbone": self.backbone.name, "seconds": round(seconds, 3), **asdict(self.config)}


def lowest_per_class(score: Tensor, labels: Tensor, num_classes: int, count: int, class_names: list[str]) -> Tensor:
    """Indices (num_classes * count,) of the ``count`` lowest scores of every class, class by class, lowest first."""
    chosen = []
    for label in range(num_classes):
        rows = (labels == label).nonzero().flatten()
        if len(rows) < count:
            raise InputError(f"class {label} ({class_names[label]!r}) has {len(rows)} images, ipc={count} wants more")
        chosen.append(rows[torch.argsort(score[rows], stable=True)[:count]])
    return torch.cat(chosen)
