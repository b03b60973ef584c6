"""Training and test sets for classifiers: features of real images, of views of a few images, and of the references' real images."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..backbones.backbone import Backbone
from ..data.sources import ImageSource
from ..data.transforms import ImageTransform
from ..errors import InputError
from ..features.cache import FeatureCache
from ..features.compute import projector_features, view_features
from ..views import Augmentation
from . import references
from .modes import Features, ProbeConfig


@dataclass(frozen=True)
class TrainingSets:
    """Features on the evaluating ``backbone`` and on ``distilling``, each computed once; ``train`` may be None if no reference needs it."""

    backbone: Backbone
    distilling: Backbone
    test: ImageSource
    train: ImageSource | None
    config: ProbeConfig
    cache: FeatureCache
    batch_size: int = 256
    progress: bool = True

    @functools.cached_property
    def same(self) -> bool:
        """Whether both backbones are the same."""
        return self.distilling.identity == self.backbone.identity

    @functools.cached_property
    def tested(self) -> tuple[Tensor, Tensor]:
        """Features (N, D) of the test images on the evaluating backbone, and their labels (N,); computed at the first use."""
        return self._features(self.test, self.backbone)

    def real(self, backbone: Backbone) -> tuple[Tensor, Tensor]:
        """Features and labels of the real training images on ``backbone``."""
        if self.train is None:
            raise InputError("references need train, the real training images")
        return self._features(self.train, backbone)

    def _features(self, source: ImageSource, backbone: Backbone) -> tuple[Tensor, Tensor]:
        return self.cache.features(source, backbone, batch_size=self.batch_size, progress=self.progress)

    def of_real(self, modes: Sequence[str]) -> Features:
        """Features of the centre views of all real training images."""
        features, labels = self.real(self.backbone)
        other = None
        if not self.same and set(modes) - {"probe"}:
            other = self.real(self.distilling)[0].unsqueeze(0).to(features.device)
        return Features(features.unsqueeze(0), other, labels)

    def of_means(self, ipc: int) -> Features:
        """Class means of the real features, or k-means centres if ``ipc`` > 1."""
        means, labels = references.labelled_means(*self.real(self.backbone), self.test.class_names, ipc)
        return Features(means.unsqueeze(0), None, labels)

    def of_views(self, images: Tensor, labels: Tensor, seed: int, modes: Sequence[str]) -> Features:
        """Features of one seed's views of images: as many views as the modes need, with the same crops and flips on both backbones."""
        config = self.config
        views = config.views if "inherit" in modes and not self.same else min(config.views, config.epochs)
        augmentation = Augmentation(min_area=config.min_area, noise=False)
        device, models = self.backbone.device, [self.backbone]
        if not self.same and set(modes) - {"probe"}:
            models.append(self.distilling)
        plain = [
            view_features(model, images, views, augmentation, seed=seed, batch_size=self.batch_size).to(device)
            for model in models
        ]
        if len(plain) == 1:
            return Features(plain[0], None, labels.to(device))
        pair = None
        if "inherit" in modes and config.blends:
            inputs, targets = (
                projector_features(
                    model, images, views, augmentation, seed=seed, plain=known, batch_size=self.batch_size
                ).to(device)
                for model, known in zip(models, plain, strict=True)
            )
            pair = inputs, targets
        return Features(plain[0], plain[1], labels.to(device), pair)

    def random_images(self, ipc: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """``ipc`` random real images of each class, (C * ipc, channels, size, size), and their labels."""
        _, labels = self.real(self.distilling)
        return self._take(references.random_indices(labels.cpu(), self.test.class_names, ipc, seed), size)

    def nearest_images(self, ipc: int, size: int) -> tuple[Tensor, Tensor]:
        """The ``ipc`` real images of each class nearest to its centre, (C * ipc, channels, size, size), and their labels."""
        return self._take(references.nearest_indices(*self.real(self.distilling), self.test.class_names, ipc), size)

    def neighbour_images(self, images: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """For each of images (N, channels, H, W) in 0..1 the nearest real image of its class; distinct ones if the class has enough."""
        phi = self.distilling
        transform = phi.transform(min(images.shape[1], phi.in_channels))
        queries = phi.features(transform.batch(images.clamp(0, 1)), self.batch_size)
        return self._take(references.neighbour_indices(queries, labels, *self.real(phi)), size)

    def _take(self, indices: Tensor, size: int) -> tuple[Tensor, Tensor]:
        assert self.train is not None
        channels = min(self.train.channels, self.distilling.in_channels)
        return self.train.take(indices.tolist(), ImageTransform(size, size, channels))
