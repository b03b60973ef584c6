"""Which images, classifier, projector and backbones belong together in a bundle; and the projector, where there is none yet."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from .checks import check_labels
from .data.backbones import Backbone
from .distill.export import SyntheticSet
from .errors import InputError
from .files import load_tensors, save_tensors
from .probe.heads import Classifier, Projector
from .reference.augment import Augmentation

IMAGES_FORMAT = "sfm_fast.bundle_images/1"
Head = TypeVar("Head", Classifier, Projector)


def check_parts(synthetic: SyntheticSet, classifier: Classifier, phi: Backbone) -> None:
    """Raise ``InputError`` unless images and classifier were made with ``phi``, for the same classes."""
    for what, metadata in (("synthetic", synthetic.metadata), ("classifier", classifier.metadata)):
        with_ = metadata.get("backbone") or {}
        if with_.get("fingerprint", phi.fingerprint) != phi.fingerprint:
            raise InputError(
                f"{what}: made with {with_.get('name')!r} (weights {with_['fingerprint']}), phi is {phi.name!r} ({phi.fingerprint})"
            )
    if classifier.in_features != phi.num_features:
        raise InputError(
            f"classifier takes {classifier.in_features} features, phi ({phi.name}) gives {phi.num_features}"
        )
    if classifier.class_names != synthetic.class_names:
        differ = sorted(set(classifier.class_names) ^ set(synthetic.class_names))[:6] or "order"
        raise InputError(
            f"classifier: its {len(classifier.class_names)} classes are not the synthetic set's {len(synthetic.class_names)} "
            f"(they differ in {differ})"
        )


def check_projector(projector: Projector, phi: Backbone, psi: Backbone) -> None:
    """Raise ``InputError`` unless ``projector`` takes psi's features and gives phi's; as far as it says itself, of these weights."""
    for key, model in (("psi", psi), ("phi", phi)):
        made_with = projector.metadata.get(key) or {}
        if made_with.get("fingerprint", model.fingerprint) != model.fingerprint:
            raise InputError(
                f"projector: fitted for {key} {made_with.get('name')!r} (weights {made_with['fingerprint']}), {key} is {model.name!r} "
                f"({model.fingerprint})"
            )
    if (projector.in_features, projector.out_features) != (psi.num_features, phi.num_features):
        raise InputError(
            f"projector takes {projector.in_features} features and gives {projector.out_features}, wanted {psi.num_features} of "
            f"{psi.name} to {phi.num_features} of {phi.name}"
        )


def on_cpu(head: Head) -> Head:
    """The same map, float32 on the CPU."""
    return replace(head, weight=head.weight.detach().float().cpu(), bias=head.bias.detach().float().cpu())


def from_bytes(pixels: Tensor) -> Tensor:
    """(N, H, W, channels) uint8 -> (N, channels, H, W) float32 in 0..1: what `to_bytes` did, backwards."""
    return pixels.permute(0, 3, 1, 2).contiguous().float() / 255


def save_images(path: str | os.PathLike[str], pixels: Tensor, labels: Tensor) -> None:
    """Write pixels (N, H, W, channels) uint8 and labels (N,) int64 as a safetensors file."""
    save_tensors(path, {"images": pixels, "labels": labels}, {"file_format": IMAGES_FORMAT})


def read_images(path: str | os.PathLike[str], classes: int) -> tuple[Tensor, Tensor]:
    """What `save_images` wrote; raises ``InputError`` naming the file where it holds anything else."""
    tensors, metadata = load_tensors(path)
    pixels, labels = tensors.get("images"), tensors.get("labels")
    if metadata.get("file_format") != IMAGES_FORMAT or pixels is None or labels is None or pixels.ndim != 4:
        raise InputError(f"{path}: damaged, or no images of a bundle")
    check_labels(f"{path}: labels", labels, len(pixels), classes)
    return pixels, labels


def fit(
    images: Tensor,
    phi: Backbone,
    psi: Backbone,
    *,
    solver: str,
    views: int,
    min_area: float,
    seed: int,
    batch_size: int,
) -> Projector:
    """The projector psi -> phi, fitted on `projector_features` of images (N, channels, H, W) in 0..1."""
    from .probe.features import projector_features  # here, so that a bundle is loaded without what fitting needs
    from .probe.inherit import fit_projector

    if views < 1:
        raise InputError(f"views must be at least 1, got {views}")
    augmentation = Augmentation(min_area=min_area, noise=False)
    # The same seed: both backbones see the same crops, each at its own input size.
    x, y = (
        projector_features(model, images, views, augmentation, seed=seed, batch_size=batch_size) for model in (psi, phi)
    )
    names = {key: {"name": model.name, "fingerprint": model.fingerprint} for key, model in (("psi", psi), ("phi", phi))}
    metadata = {"min_area": min_area, **names}
    return fit_projector(x, y.to(x.device), solver=solver, seed=seed, metadata=metadata)
