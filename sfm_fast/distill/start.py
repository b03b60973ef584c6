"""The real images that synthetic ones start from: of each class those whose features are nearest to what its images will be matched with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbones.backbone import Backbone
from ..data.sources import ImageSource
from ..data.transforms import ImageTransform
from ..errors import InputError
from ..features.nearest import closest_pairs
from ..philox import Stream, permutation

PER_IMAGE, PER_CLASS = (
    20,
    100,
)  # real images looked at for each synthetic one, and for a class unless it has more synthetic ones than half
MOST = 10  # times as many images as are wanted, after which few of a class are enough
BATCH = 256


@dataclass(frozen=True)
class RealStart:
    """Chooses the images a run starts from, when it starts.

    centers: for each backbone (C, K, D), what image k of a class is compared with, or (C, D) for all its images; None: the class's mean,
    of the real images that are looked at. channels, size: of the synthetic images. seed: of the random order in which real images are
    looked at, so that a small part of a large data set is enough.
    """

    source: ImageSource
    backbones: Sequence[Backbone]
    centers: Sequence[Tensor | None]
    ipc: int
    channels: int
    size: int
    seed: int

    def __call__(self) -> Tensor:
        """(C * ipc, channels, size, size) in 0..1, ordered by class; distinct images if the class has enough.

        Raises ``InputError`` if a class has no images.
        """
        features, labels, places = self._looked_at()
        chosen = []
        for label, name in enumerate(self.source.class_names):
            rows = (labels == label).nonzero().flatten()
            if not len(rows):
                raise InputError(f"{self.source.name}: class {label} ({name!r}) has no images to start from")
            distance = torch.zeros(self.ipc, len(rows), dtype=torch.float64)
            for known, centers in zip(features, self.centers, strict=True):
                own = known[rows].double()
                wanted = own.mean(0) if centers is None else centers[label].double().cpu()
                apart = torch.cdist(wanted.expand(self.ipc, -1), own).square()
                # So that no backbone counts more because its features are longer.
                distance += apart / apart.mean().clamp(min=torch.finfo(torch.float64).tiny)
            chosen.append(places[rows[closest_pairs(distance)]])
        transform = ImageTransform(self.size, self.size, self.channels)
        return self.source.take(torch.cat(chosen).tolist(), transform)[0]

    def _looked_at(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """Features on each backbone (n, D), labels (n,) and places in the data set (n,) of real images, enough of each class if it has them."""
        enough, looked = max(2 * self.ipc, min(PER_IMAGE * self.ipc, PER_CLASS)), 0
        counts = torch.zeros(len(self.source.class_names), dtype=torch.int64)
        features: list[list[Tensor]] = [[] for _ in self.backbones]
        labels: list[Tensor] = []
        places: list[Tensor] = []
        for images, its_labels, its_places in self._batches():
            wanted = counts[its_labels] < enough
            if wanted.any():
                for known, backbone, some in zip(features, self.backbones, images, strict=True):
                    known.append(backbone.features(some[wanted], BATCH).cpu())
                labels.append(its_labels[wanted])
                places.append(its_places[wanted])
                counts += torch.bincount(labels[-1], minlength=len(counts))
            looked += len(its_labels)
            # Rare classes would otherwise take a pass over a large data set.
            rare = looked >= MOST * enough * len(counts) and int(counts.min()) >= self.ipc
            if rare or int(counts.min()) >= enough:
                break
        if not labels:
            raise InputError(f"{self.source.name}: holds no images to start from")
        return [torch.cat(known) for known in features], torch.cat(labels), torch.cat(places)

    def _batches(self) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
        """Images as each backbone sees them, labels and places: in random order, or in the data set's own if it can only be read so."""
        source, position = self.source, 0
        transforms = [one.transform(min(source.exact_channels, one.in_channels)) for one in self.backbones]
        if source.random_access:
            for part in permutation(len(source), seed=self.seed, stream=Stream.START).split(BATCH):
                taken = [source.take(part.tolist(), transform) for transform in transforms]
                yield [images for images, _ in taken], taken[0][1], part
            return
        for taken in zip(*(source.batches(BATCH, transform) for transform in transforms), strict=True):
            labels = taken[0][1]
            yield [images for images, _ in taken], labels, torch.arange(position, position + len(labels))
            position += len(labels)
