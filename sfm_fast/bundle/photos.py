"""From photos to names and probabilities, and to an accuracy: what a bundle does once its parts are there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..backbones.backbone import Backbone
from ..checks import check_labels
from ..data.photos import is_one, photo_batches
from ..data.sources import ImageSource
from ..data.transforms import ImageTransform
from ..errors import InputError
from ..evaluation.heads import Classifier, Projector
from .parts import check_test_set


class PhotoClassifier:
    """Photos through ``backbone``, then ``projector`` where there is one, then ``classifier``; `Bundle` has these."""

    class_names: list[str]
    classifier: Classifier
    projector: Projector | None
    channels: int
    accuracy: dict[str, dict[str, Any]]

    @property
    def backbone(self) -> Backbone:
        """What photos go through."""
        raise NotImplementedError

    def classify(self, photos: Any, *, top: int = 5, batch_size: int = 256) -> Any:
        """The likeliest classes, [(name, probability), …], best first; for several photos a list of such lists.

        Args:
            photos: a path, a PIL image, an array or tensor (HW, HWC or CHW; uint8, or floats in 0..1); several as a list or
                other iterable, or as one tensor (N, channels, H, W). Of any size: the shorter side is resized and the centre cut, as
                for the data that the backbone was trained with. A photo is turned as its EXIF data says.
            top: how many classes to name, at most.
        """
        if top < 1:
            raise InputError(f"top must be at least 1, got {top}")
        best = self.probabilities(photos, batch_size=batch_size).topk(min(top, len(self.class_names)), dim=1)
        named = [
            [(self.class_names[index], value) for index, value in zip(indices, values, strict=True)]
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        return named[0] if is_one(photos) else named

    def probabilities(self, photos: Any, *, batch_size: int = 256) -> Tensor:
        """Probabilities (N, C) float32 on the CPU, of what `classify` takes, batch by batch."""
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        batches = photo_batches(photos, self._transform(), batch_size)
        parts = [self.logits(self.backbone.features(batch, batch_size).cpu()) for batch in batches]
        logits = torch.cat(parts) if parts else torch.zeros(0, len(self.class_names))
        if not logits.isfinite().all():
            bad = int((~logits.isfinite().all(1)).nonzero()[0])
            raise InputError(f"photo {bad}: not finite numbers come out of it; pixels must be finite")
        return logits.softmax(1)

    def logits(self, features: Tensor) -> Tensor:
        """(N, C) of psi's features (N, Dpsi), float32 on the CPU."""
        return self.classifier(features if self.projector is None else self.projector(features))

    def _transform(self) -> ImageTransform:
        return self.backbone.transform(min(self.channels, self.backbone.in_channels))

    def evaluate(self, source: ImageSource, *, batch_size: int = 256, progress: bool = False) -> dict[str, Any]:
        """Top-1 accuracy on a labelled data set of these classes (`open_dataset`), as {"top1", "images"}.

        It joins ``accuracy``, which `save` writes; the weights are those in memory, `as_stored` has those of the files.
        """
        check_test_set(source, self.class_names)
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        right = images = 0
        with tqdm(total=len(source) or None, desc=source.name, unit="image", disable=not progress) as bar:
            for pixels, labels in source.batches(batch_size, self._transform()):
                check_labels(f"labels of {source.name}", labels, len(pixels), len(source.class_names))
                answers = self.logits(self.backbone.features(pixels, batch_size).cpu()).argmax(1)
                right += int((answers == labels).sum())
                images += len(labels)
                bar.update(len(labels))
        if not images:
            raise InputError(f"{source.name}: holds no images")
        self.accuracy = {**self.accuracy, source.name: {"top1": right / images, "images": images}}
        return dict(self.accuracy[source.name])
