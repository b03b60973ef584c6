"""How well classifiers made with a few images do on the real test set, in three modes, beside honest references."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

from torch import Tensor

from ..backbones.backbone import Backbone
from ..backbones.record import check_recorded
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
    """Evaluates sets of images on one backbone; each feature is computed once, whatever number of sets and modes needs it.

    Modes: "probe" trains a linear classifier on features of the images' views; "inherit" keeps the classifier of all real data on
    the distilling backbone, and fits a projector to its features on the views (none where the backbones are one); "kd" trains
    as "probe", with that classifier on the distilling backbone's features of the same views as teacher.

    Args:
        backbone: the evaluating backbone.
        test: real test images. train: real training images, needed for the references, and where no classifier is given.
        distilling: the backbone that distilled, whose features choose real images too (default: ``backbone``).
        classifier: the one on its features; None trains it on ``train`` when a mode first needs it.
        cache: keeps features of data sets (default: in memory only).

    Raises ``InputError``, before any work, where the parts don't belong together or a mode misses one.
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
                raise InputError(f"modes: {mode!r} is none of {', '.join(MODES)}")
        if not self.modes:
            raise InputError(f"modes must name at least one of {', '.join(MODES)}")
        if train is not None:
            check_class_names(train.class_names, test.class_names, f"train {train.name}", "the test set's")
        if classifier is not None:
            check_classifier(classifier, self.distilling, self.class_names)
        elif train is None and set(self.modes) - {"probe"}:
            raise InputError(
                f"modes {', '.join(sorted(set(self.modes) - {'probe'}))} need a classifier, or train to train it on"
            )
        self._classifier = classifier

    @property
    def classifier(self) -> Classifier:
        """The classifier on the distilling backbone's features; trained now if none was given."""
        if self._classifier is None:
            sets = self.sets
            if sets.train is None:
                raise InputError("a classifier is needed: give classifier, or train to train it on")
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
        """(N, D) of the test images on the evaluating backbone."""
        return self.sets.tested[0]

    @property
    def test_labels(self) -> Tensor:
        """(N,) int64 of the test images."""
        return self.sets.tested[1]

    def evaluate(
        self,
        name: str,
        images: Tensor | list[Tensor],
        labels: Tensor | list[Tensor],
        *,
        modes: Sequence[str] | None = None,
        chosen: bool = True,
    ) -> list[Row]:
        """A row for each mode: images (N, channels, H, W) in 0..1 with labels (N,); a list holds one set per seed.

        ``chosen``: whether it took the distilling backbone to make or choose the images. In a row, ``parameters`` and ``bytes_…``
        are what must be stored to predict beside the backbone, ``parameters_folded`` is classifier and projector as one map;
        ``fit_seconds`` the mean time of a fit alone, ``seconds`` that of the row, features that modes share included in each.
        """
        modes = self.modes if modes is None else modes
        self._prepare(modes)
        sets = images if isinstance(images, list) else [images] * self.config.seeds
        their_labels = labels if isinstance(labels, list) else [labels] * self.config.seeds
        fits: dict[str, list[Scored]] = {mode: [] for mode in modes}
        seconds = dict.fromkeys(modes, 0.0)
        for seed, (some, theirs) in enumerate(zip(sets, their_labels, strict=True)):
            started = time.perf_counter()
            features = self.sets.of_views(some, theirs, seed, modes)
            shared = time.perf_counter() - started
            for mode in modes:
                started = time.perf_counter()
                fits[mode].append(self._fit(mode, features, seed))
                seconds[mode] += shared + time.perf_counter() - started
        ipc = len(their_labels[0]) // self.num_classes
        return [self._row(name, mode, ipc, fits[mode], seconds[mode], chosen) for mode in modes]

    def evaluate_synthetic(self, synthetic: SyntheticSet, *, modes: Sequence[str] | None = None) -> list[Row]:
        """Rows of a distilled set: ``images`` is "sfm" or "lgm", ``method`` says which kind of it.

        Raises ``InputError`` where it was distilled on another backbone than the distilling one, or has other classes than the data.
        """
        self.check_synthetic(synthetic)
        method = synthetic.metadata.get("config", {}).get("method", "synthetic")
        rows = self.evaluate(method.split("-")[0], synthetic.images, synthetic.labels, modes=modes)
        return [{**row, "method": method} for row in rows]

    def check_synthetic(
        self, synthetic: SyntheticSet, told: str = "synthetic", role: str = "the distilling backbone"
    ) -> None:
        """Raise ``InputError`` where `evaluate_synthetic` would: it was distilled on another backbone, or has other classes.

        told: begins the message. role: what it calls the distilling backbone.
        """
        record = synthetic.metadata.get("backbone", {})
        check_recorded(record, self.distilling, f"{told}: distilled on", role)
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
        """Rows of one of `REFERENCES`, a mode each; none of "class-means" without mode "probe".

        "full": centre views of all real training images. "random-real": ``ipc`` images a class, drawn anew for every seed.
        "nearest-real": those nearest to their class centre. "neighbour-real": those nearest to the images of ``like``. "class-means":
        no images, but class means of real features (with ``ipc`` > 1, k-means centres: then it is called "cluster-means").
        Images are chosen by the distilling backbone's features; means are the evaluating one's.
        Raises `TooFewImagesError` where a class has fewer real images than ``ipc``.
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
                raise InputError("neighbour-real needs the synthetic set whose neighbours are wanted: give like")
            return self.evaluate(name, *self.sets.neighbour_images(like.images, like.labels, size), modes=modes)
        raise InputError(f"reference {name!r} is none of {', '.join(REFERENCES)}")

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
        """Train the classifier where a mode needs it: no row's time."""
        if set(modes) - {"probe"}:
            self.classifier  # noqa: B018

    def _from_features(self, name: str, modes: Sequence[str], features: Features) -> list[Row]:
        """Rows of a training set that is given by its features: the seeds differ in their start alone."""
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
