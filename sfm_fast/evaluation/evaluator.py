"""Test accuracy of classifiers from a few images in three modes, and of references on real images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

from torch import Tensor

from ..backbones.backbone import Backbone
from ..backbones.record import check_among_recorded
from ..checks import check_class_names
from ..data.sources import ImageSource
from ..errors import InputError
from ..features.cache import FeatureCache
from ..synthetic import SyntheticSet
from .classifier import train_on_source
from .heads import Classifier, LinearMap
from .modes import MODES, Features, ProbeConfig, Scored, check_classifier, fit, summary
from .references import REFERENCES
from .rows import Row
from .training_sets import TrainingSets

__all__ = ["MODES", "REFERENCES", "Evaluator", "ProbeConfig"]


class Evaluator:
    """Evaluates sets of images on one backbone; features are computed once and reused for all sets and modes.

    Modes: "probe" trains a linear classifier on features of the images' views; "inherit" reuses the classifier trained on all real
    images and the distilling backbone, and fits a projector to that backbone's features of the views (none if both backbones are the
    same); "kd" trains like "probe", with that classifier, on the distilling backbone's features of the same views, as teacher.

    Args:
        backbone: the evaluating backbone.
        test: real test images. train: real training images, needed for the references, and if no classifier is given.
        distilling: the distilling backbone, whose features also choose the references' real images (default: ``backbone``).
        classifier: trained on its features; None: trained on ``train`` when a mode first needs it.
        cache: stores features of data sets (default: in memory only).

    Raises ``InputError``, before any work, if the inputs don't match each other or a mode lacks one.
    """

    def __init__(
        self,
        backbone: Backbone,
        test: ImageSource,
        train: ImageSource | None = None,
        *,
        distilling: Backbone | None = None,
        classifier: Classifier | None = None,
        modes: Sequence[str] = ("probe",),
        config: ProbeConfig = ProbeConfig(),
        cache: FeatureCache | None = None,
        batch_size: int = 256,
        progress: bool = True,
    ) -> None:
        self.sets = TrainingSets(
            backbone, distilling or backbone, test, train, config, cache or FeatureCache(None), batch_size, progress
        )
        self.backbone, self.distilling, self.same = backbone, self.sets.distilling, self.sets.same
        self.modes, self.config = tuple(modes), config
        self.class_names, self.num_classes = test.class_names, len(test.class_names)
        for mode in self.modes:
            if mode not in MODES:
                raise InputError(f"modes must be among {', '.join(MODES)}, got {mode!r}")
        if not self.modes:
            raise InputError(f"modes must name at least one of {', '.join(MODES)}, got none")
        if train is not None:
            check_class_names(train.class_names, test.class_names, f"train {train.name}", "the test set's")
        if classifier is not None:
            check_classifier(classifier, self.distilling, self.class_names)
        elif train is None and set(self.modes) - {"probe"}:
            raise InputError(
                f"modes {', '.join(sorted(set(self.modes) - {'probe'}))} need classifier, or train to train one"
            )
        self._classifier = classifier

    @property
    def classifier(self) -> Classifier:
        """The classifier on the distilling backbone's features; trained now if none was given."""
        if self._classifier is None:
            sets = self.sets
            if sets.train is None:
                raise InputError("a classifier is needed: pass classifier, or train to train one")
            self._classifier = train_on_source(
                sets.train,
                self.distilling,
                test=sets.test if self.same else None,
                cache=sets.cache,
                batch_size=sets.batch_size,
                progress=sets.progress,
            )
        return self._classifier

    @property
    def test_features(self) -> Tensor:
        """(N, D) features of the test images on the evaluating backbone."""
        return self.sets.tested[0]

    @property
    def test_labels(self) -> Tensor:
        """(N,) int64 labels of the test images."""
        return self.sets.tested[1]

    def evaluate(
        self,
        name: str,
        images: Tensor | list[Tensor],
        labels: Tensor | list[Tensor],
        *,
        modes: Sequence[str] | None = None,
        chosen: bool = True,
        seed: int = 0,
    ) -> list[Row]:
        """A row for each mode: images (N, channels, H, W) in 0..1 with labels (N,); a list holds one set per seed, ``seed`` being the first.

        ``chosen``: whether the distilling backbone was used to make or choose the images. In a row, ``parameters`` and ``bytes_…``
        count what prediction needs besides the backbone, ``parameters_folded`` the same with classifier and projector as one map;
        ``fit_seconds`` is the mean time of a fit, ``seconds`` that of the row with its features, even if several modes share them.
        """
        modes = self.modes if modes is None else modes
        self._prepare(modes)
        sets = images if isinstance(images, list) else [images] * self.config.seeds
        label_sets = labels if isinstance(labels, list) else [labels] * self.config.seeds
        fits: dict[str, list[Scored]] = {mode: [] for mode in modes}
        seconds = dict.fromkeys(modes, 0.0)
        for place, (seed_images, seed_labels) in enumerate(zip(sets, label_sets, strict=True), seed):
            started = time.perf_counter()
            features = self.sets.of_views(seed_images, seed_labels, place, modes)
            shared = time.perf_counter() - started
            for mode in modes:
                started = time.perf_counter()
                fits[mode].append(self._fit(mode, features, place))
                seconds[mode] += shared + time.perf_counter() - started
        ipc = len(label_sets[0]) // self.num_classes
        return [self._row(name, mode, ipc, fits[mode], seconds[mode], chosen) for mode in modes]

    def evaluate_synthetic(self, synthetic: SyntheticSet, *, modes: Sequence[str] | None = None) -> list[Row]:
        """Rows of a distilled set: ``images`` in a row is "sfm" or "lgm", ``method`` the full name of the method.

        Raises ``InputError`` if it wasn't distilled on ``distilling`` (alone or among others), or has other classes than the data.
        """
        self.check_synthetic(synthetic)
        method = synthetic.metadata.get("config", {}).get("method", "synthetic")
        rows = self.evaluate(method.split("-")[0], synthetic.images, synthetic.labels, modes=modes)
        return [{**row, "method": method} for row in rows]

    def check_synthetic(
        self, synthetic: SyntheticSet, told: str = "synthetic", role: str = "the distilling backbone"
    ) -> None:
        """Raise ``InputError`` if ``synthetic`` wasn't distilled on ``distilling`` (alone or among others), or has other classes than the data.

        told: how the message names the set. role: how it names the distilling backbone.
        """
        records = synthetic.metadata.get("backbones", [])
        check_among_recorded(records, self.distilling, f"{told}: distilled on", role)
        check_class_names(synthetic.class_names, self.class_names, told, "the test set's")

    def reference(
        self,
        name: str,
        ipc: int = 1,
        image_size: int | None = None,
        *,
        like: SyntheticSet | None = None,
        modes: Sequence[str] | None = None,
    ) -> list[Row]:
        """Rows of one of `REFERENCES`, one per mode; "class-means" only has a row for mode "probe".

        "full": centre views of all real training images. "random-real": ``ipc`` random real images per class, others for each seed.
        "nearest-real": the real images nearest to their class centre. "neighbour-real": those nearest to the images of ``like``.
        "class-means": class means of real features instead of images (with ``ipc`` > 1 k-means centres, called "cluster-means").
        Images are chosen by features of the distilling backbone; means are of features of the evaluating one.
        Raises `TooFewImagesError` if a class has fewer real images than ``ipc``.
        """
        modes = self.modes if modes is None else modes
        size = image_size or self.distilling.image_size
        if name == "full":
            return self._from_features(name, modes, self.sets.of_real(modes))
        if name == "class-means":
            if "probe" not in modes:
                return []
            label = name if ipc == 1 else "cluster-means"
            return self._from_features(label, ("probe",), self.sets.of_means(ipc))
        if name == "random-real":
            draws = [self.sets.random_images(ipc, size, seed) for seed in range(self.config.seeds)]
            return self.evaluate(
                name, [images for images, _ in draws], [labels for _, labels in draws], modes=modes, chosen=False
            )
        if name == "nearest-real":
            return self.evaluate(name, *self.sets.nearest_images(ipc, size), modes=modes)
        if name == "neighbour-real":
            if like is None:
                raise InputError("neighbour-real needs like, the synthetic set whose nearest real images are wanted")
            return self.evaluate(name, *self.sets.neighbour_images(like.images, like.labels, size), modes=modes)
        raise InputError(f"reference must be one of {', '.join(REFERENCES)}, got {name!r}")

    def probe(self, name: str, images: Tensor | list[Tensor], labels: Tensor | list[Tensor]) -> Row:
        """The row of `evaluate` in mode "probe"."""
        return self.evaluate(name, images, labels, modes=("probe",))[0]

    def probe_synthetic(self, synthetic: SyntheticSet) -> Row:
        """The row of `evaluate_synthetic` in mode "probe"."""
        return self.evaluate_synthetic(synthetic, modes=("probe",))[0]

    def full(self) -> Row:
        """The row of `reference` "full" in mode "probe"."""
        return self.reference("full", modes=("probe",))[0]

    def random_real(self, ipc: int, image_size: int) -> Row:
        """The row of `reference` "random-real" in mode "probe"."""
        return self.reference("random-real", ipc, image_size, modes=("probe",))[0]

    def nearest_real(self, ipc: int, image_size: int) -> Row:
        """The row of `reference` "nearest-real" in mode "probe"."""
        return self.reference("nearest-real", ipc, image_size, modes=("probe",))[0]

    def _prepare(self, modes: Sequence[str]) -> None:
        """Train the classifier if a mode needs it, so that its time isn't part of a row's."""
        if set(modes) - {"probe"}:
            self.classifier  # noqa: B018

    def _from_features(self, name: str, modes: Sequence[str], features: Features) -> list[Row]:
        """Rows of a training set given as features; the seeds differ only in the initial weights."""
        self._prepare(modes)
        ipc, rows = len(features.labels) // self.num_classes, []
        for mode in modes:
            started = time.perf_counter()
            fits = [self._fit(mode, features, seed) for seed in range(self.config.seeds)]
            rows.append(self._row(name, mode, ipc, fits, time.perf_counter() - started, chosen=False))
        return rows

    def _fit(self, mode: str, features: Features, seed: int) -> Scored:
        device, classifier = self.backbone.device, None if mode == "probe" else self.classifier
        head = None if classifier is None else LinearMap(classifier.weight.to(device), classifier.bias.to(device))
        fitted = fit(mode, features, self.num_classes, head, self.config, seed)
        return Scored(fitted, *fitted.score(*self.sets.tested))

    def _row(self, name: str, mode: str, ipc: int, scored: list[Scored], seconds: float, chosen: bool) -> Row:
        about = {
            "backbone": self.backbone.name,
            "distilled_on": self.distilling.name if chosen or mode != "probe" else None,
        }
        measured = {"images": name, "mode": mode, "ipc": ipc, **summary(scored), **about, "seconds": round(seconds, 3)}
        return cast(Row, measured | self.config.settings(mode))
