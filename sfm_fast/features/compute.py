"""Computes features for evaluation (of a whole data set, and of augmented views of a few images) and class statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict

import torch
from torch import Tensor
from tqdm import tqdm

from .. import philox
from ..backbones.backbone import Backbone
from ..checks import check_labels
from ..data.sources import ImageSource
from ..data.transforms import match_channels
from ..errors import InputError
from ..ops.augment import augment
from ..philox import Stream
from ..version import __version__
from ..views import Augmentation, draw_views
from .statistics import ClassStatistics

# Steps of the random stream PROBE; 0 is for plain views and 1 for random real images.
_CROPS_OF_BLENDS, _BLENDS = 2, 3


def stream_features(
    source: ImageSource, backbone: Backbone, *, batch_size: int = 256, progress: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (B, D) float32 features of the centre views and (B,) labels, in the data set's order, with a progress bar."""
    transform = backbone.transform(min(source.exact_channels, backbone.in_channels))
    # With disable=None tqdm shows no bar if stderr isn't a terminal.
    quiet, what = None if progress else True, f"{source.name} on {backbone.name}"
    with tqdm(total=len(source) or None, desc=what, unit="image", disable=quiet) as bar:
        for images, labels in source.batches(batch_size, transform):
            yield backbone.features(images, batch_size), labels.to(backbone.device)
            bar.update(len(labels))


def dataset_features(
    source: ImageSource, backbone: Backbone, *, batch_size: int = 256, progress: bool = True
) -> tuple[Tensor, Tensor]:
    """All features (N, D) float32 and labels (N,) of a data set; images are loaded batch by batch."""
    batches = list(stream_features(source, backbone, batch_size=batch_size, progress=progress))
    if not batches:
        raise InputError(f"{source.name}: holds no images")
    features, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    check_labels(f"labels of {source.name}", labels, len(features), len(source.class_names))
    return features, labels


@torch.no_grad()
def view_features(
    backbone: Backbone,
    images: Tensor,
    views: int,
    augmentation: Augmentation,
    *,
    seed: int,
    blend: bool = False,
    batch_size: int = 256,
) -> Tensor:
    """Features (views, N, D) float32 of flipped and cropped views of images (N, channels, H, W) in 0..1.

    blend: each view shows w * its image + (1 - w) * a random image, both w (uniform in 0..1) and that image drawn for every view. The
    same seed gives the same views on every backbone, each at its own input size.
    """
    images = images.to(backbone.device)
    if images.shape[1] > backbone.in_channels:
        images = match_channels(images, backbone.in_channels)
    parts = []
    # Random numbers are keyed by the index of view and image, so the views don't depend on the batch size.
    items = torch.arange(views * len(images), device=images.device)
    for chunk in items.split(batch_size):
        drawn = draw_views(
            chunk,
            (images.shape[2], images.shape[3]),
            backbone.input_size,
            backbone.mean,
            backbone.std,
            seed=seed,
            step=_CROPS_OF_BLENDS if blend else 0,
            augmentation=augmentation,
            streams=(Stream.PROBE, Stream.AUGMENT_NOISE),
        )
        shown = images[chunk % len(images)]
        if blend:
            u = philox.uniform(chunk, 2, seed=seed, stream=Stream.PROBE, step=_BLENDS)
            other, weight = (u[:, 0] * len(images)).long(), u[:, 1].view(-1, 1, 1, 1).to(images.dtype)
            shown = torch.lerp(images[other.clamp(max=len(images) - 1)], shown, weight)
        parts.append(backbone(augment(shown, drawn, dtype=backbone.dtype)))
    return torch.cat(parts).view(views, len(images), -1)


def projector_features(
    backbone: Backbone,
    images: Tensor,
    views: int,
    augmentation: Augmentation,
    *,
    seed: int,
    plain: Tensor | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Features (views, N, D) for fitting a projector: views of the images, the second half of them blends of two images.

    A few images cover a small part of the feature space; their blends cover more of it, and the fit needs no labels.
    ``plain``: `view_features` of as many views with the same seed, if they are computed already.
    """
    blends = views // 2
    if plain is None:
        plain = view_features(backbone, images, views - blends, augmentation, seed=seed, batch_size=batch_size)
    if not blends:
        return plain
    mixed = view_features(backbone, images, blends, augmentation, seed=seed, blend=True, batch_size=batch_size)
    return torch.cat([plain[: views - blends].to(mixed.device), mixed])


def class_statistics(
    source: ImageSource,
    backbone: Backbone,
    *,
    clusters: int = 0,
    covariance: bool = False,
    known: tuple[Tensor, Tensor] | None = None,
    batch_size: int = 256,
    progress: bool = True,
) -> ClassStatistics:
    """Statistics of a data set on a backbone in one pass; ``.provenance`` records backbone, data, transform and counts.

    clusters, covariance: as in `ClassStatistics`. ``known``: its `dataset_features`, if they are computed already. Raises ``InputError`` if a class has no images or no class has
    ``clusters`` of them; before the pass if the data set knows its counts.
    """
    _check_counts(source, clusters)
    statistics = ClassStatistics(
        len(source.class_names),
        backbone.num_features,
        clusters=clusters,
        covariance=covariance,
        class_names=source.class_names,
        device=backbone.device,
    )
    stream: Iterable[tuple[Tensor, Tensor]] = stream_features(
        source, backbone, batch_size=batch_size, progress=progress
    )
    if known is not None:
        stream = zip(*(part.split(batch_size) for part in known), strict=True)
    for features, labels in stream:
        statistics.update(features, labels)
    statistics.centers  # noqa: B018 (raises if a class is empty)
    statistics.provenance = {
        "sfm_fast": __version__,
        "backbone": backbone.describe(),
        "data": source.name,
        "fingerprint": source.fingerprint(),
        "images": int(statistics.counts.sum()),
        "channels": source.channels,
        "transform": asdict(backbone.transform(min(source.exact_channels, backbone.in_channels))),
        "clusters": clusters,
    }
    return statistics


def _check_counts(source: ImageSource, clusters: int) -> None:
    counts = source.counts() or []
    for label, count in enumerate(counts):
        if not count:
            raise InputError(f"{source.name}: class {label} ({source.class_names[label]!r}) has no images")
    if counts and max(counts) < clusters:
        raise InputError(
            f"{source.name}: the largest class has {max(counts)} images, too few for {clusters} k-means centres"
        )
