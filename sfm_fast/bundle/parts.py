"""The parts of a bundle: which belong together, their files, and the projector where there is none yet."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..backbones.backbone import Backbone
from ..backbones.load import load_backbone
from ..backbones.record import as_recorded, save_weights
from ..checks import check_labels, told_differences
from ..data.sources import ImageSource
from ..errors import InputError
from ..evaluation.heads import Classifier, Projector
from ..files import load_tensors, save_tensors
from ..synthetic import SyntheticSet
from ..views import Augmentation
from .folder import CLASSIFIER, CONFIG, PROJECTOR, WEIGHTS, checked_file

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
IMAGES_FORMAT = "sfm_fast.bundle_images/1"
Head = TypeVar("Head", Classifier, Projector)


def check_parts(synthetic: SyntheticSet, classifier: Classifier, phi: Backbone) -> None:
    """Raise ``InputError`` unless images and classifier were made with ``phi``, for the same classes."""
    for what, metadata in (("synthetic", synthetic.metadata), ("classifier", classifier.metadata)):
        _check_backbone(f"{what}: made with", metadata.get("backbone") or {}, phi, "phi")
    if classifier.in_features != phi.num_features:
        raise InputError(
            f"classifier takes {classifier.in_features} features, phi ({phi.name}) gives {phi.num_features}"
        )
    if classifier.class_names != synthetic.class_names:
        differ = told_differences(classifier.class_names, synthetic.class_names)
        raise InputError(
            f"classifier: its {len(classifier.class_names)} classes are not the synthetic set's {len(synthetic.class_names)} "
            f"({differ})"
        )


def check_projector(projector: Projector, phi: Backbone, psi: Backbone) -> None:
    """Raise ``InputError`` unless ``projector`` takes psi's features and gives phi's; as far as it says itself, of these weights."""
    for key, model in (("psi", psi), ("phi", phi)):
        _check_backbone(f"projector: fitted for {key}", projector.metadata.get(key) or {}, model, key)
    if (projector.in_features, projector.out_features) != (psi.num_features, phi.num_features):
        raise InputError(
            f"projector takes {projector.in_features} features and gives {projector.out_features}, wanted {psi.num_features} of "
            f"{psi.name} to {phi.num_features} of {phi.name}"
        )


def _check_backbone(told: str, record: Mapping[str, Any], model: Backbone, role: str) -> None:
    """Raise ``InputError`` unless ``record`` names the weights and the input size of ``model``, as far as it names any."""
    for key, words in (("fingerprint", "weights"), ("input_size", "input size")):
        ours = getattr(model, key)
        if record.get(key, ours) != ours:
            raise InputError(
                f"{told} {record.get('name')!r} ({words} {record[key]}), {role} is {model.name!r} ({words} {ours})"
            )


def check_test_set(source: ImageSource, class_names: list[str]) -> None:
    """Raise ``InputError`` unless a data set has a bundle's classes, in its order."""
    if source.class_names != class_names:
        differ = told_differences(source.class_names, class_names)
        raise InputError(
            f"{source.name}: its {len(source.class_names)} classes are not the bundle's {len(class_names)} ({differ})"
        )


def on_cpu(head: Head) -> Head:
    """The same map, float32 on the CPU."""
    return replace(head, weight=head.weight.detach().float().cpu(), bias=head.bias.detach().float().cpu())


def rounded(head: Head, dtype: str) -> Head:
    """The same map with weights as ``dtype`` holds them, in float32."""
    return replace(head, weight=head.weight.to(DTYPES[dtype]).float())


def save_heads(
    folder: Path, classifier: Classifier, projector: Projector | None, dtype: str, backbone: Mapping[str, Any]
) -> dict[str, str]:
    """Write the maps, weights as ``dtype``; returns what each file holds. ``backbone``: whose features the classifier takes."""
    # Metadata stands in bundle.json once; here is what the classifier's file needs to be used alone.
    alone = replace(classifier, metadata={"backbone": backbone})
    heads = {CLASSIFIER: alone} | ({} if projector is None else {PROJECTOR: replace(projector, metadata={})})
    for name, head in heads.items():
        replace(head, weight=head.weight.to(DTYPES[dtype])).save(folder / name)
    return {name: f"{head.out_features} x {head.in_features}, {dtype}" for name, head in heads.items()}


def load_heads(folder: Path, config: Mapping[str, Any]) -> tuple[Classifier, Projector | None]:
    """Classifier and projector as ``config``, the bundle.json, tells of them.

    Raises ``InputError`` naming the file that is missing or damaged, or the folder where they don't fit together.
    """
    files, psi, made = config["files"], config["evaluating_backbone"], config["made"]
    classifier = Classifier.load(checked_file(folder, CLASSIFIER, files))
    projector = Projector.load(checked_file(folder, PROJECTOR, files)) if PROJECTOR in files else None
    taken = (classifier if projector is None else projector).in_features
    joined = projector is None or projector.out_features == classifier.in_features
    if classifier.class_names != config["class_names"] or taken != psi["num_features"] or not joined:
        raise InputError(f"{folder}: damaged bundle (its classifier, projector and {psi['name']!r} don't fit together)")
    if not config["folded"]:
        classifier.metadata |= made.get("classifier") or {}
    if projector is not None:
        projector.metadata |= made.get("projector") or {}
    return classifier, projector


def save_psi(folder: Path, weights: Backbone | Path) -> None:
    """Store a backbone's weights, or those of another bundle's file, which were checked when that was made."""
    if isinstance(weights, Path):
        shutil.copyfile(weights, folder / WEIGHTS)
    else:
        save_weights(folder / WEIGHTS, weights)


def load_psi(record: Mapping[str, Any], folder: Path, files: Mapping[str, Any], options: Mapping[str, Any]) -> Backbone:
    """The backbone of ``record``: from the bundle in ``folder``, ``options["checkpoint"]``, or by its name; ``options`` as of `load_backbone`.

    Raises ``InputError`` where it can't be had, or is another one.
    """
    options = dict(options)
    if options.get("checkpoint") is None and WEIGHTS in files:
        options["checkpoint"] = checked_file(folder, WEIGHTS, files)
    try:
        found = load_backbone(record["name"], image_size=record["input_size"], **options)
    except InputError as error:
        raise InputError(f"{folder}: its backbone can't be loaded: {error}") from error
    return check_psi(found, record, folder)


def check_psi(found: Backbone, record: Mapping[str, Any], folder: Path) -> Backbone:
    """``found`` as ``record``, of the bundle in ``folder``, has it; raises ``InputError`` where it is another, or the record damaged."""
    recorded = as_recorded(found, record)
    if recorded.mean.shape != found.mean.shape:
        told = f"{len(record['mean'])} numbers, {found.name!r} wants {len(found.mean)}"
        raise InputError(f"{folder / CONFIG}: damaged bundle (evaluating_backbone: mean has {told})")
    return recorded


def how_made(synthetic: SyntheticSet, classifier: Classifier, projector: Projector | None) -> dict[str, Any]:
    """Their metadata; of the backbones, which bundle.json names itself, no second copy."""
    return {
        "synthetic": {key: value for key, value in synthetic.metadata.items() if key != "backbone"},
        "classifier": {key: value for key, value in classifier.metadata.items() if key != "backbone"},
        "projector": None if projector is None else projector.metadata,
    }


def from_bytes(pixels: Tensor) -> Tensor:
    """(N, H, W, channels) uint8 -> (N, channels, H, W) float32 in 0..1: what `to_bytes` did, backwards."""
    return pixels.permute(0, 3, 1, 2).contiguous().float() / 255


def save_images(path: str | os.PathLike[str], pixels: Tensor, labels: Tensor) -> str:
    """Write pixels (N, H, W, channels) uint8 and labels (N,) int64 as a safetensors file; returns what it holds."""
    save_tensors(path, {"images": pixels, "labels": labels}, {"file_format": IMAGES_FORMAT})
    return " x ".join(map(str, pixels.shape)) + ", uint8"


def read_images(path: str | os.PathLike[str], classes: int) -> tuple[Tensor, Tensor]:
    """What `save_images` wrote; raises ``InputError`` naming the file where it holds anything else."""
    tensors, metadata = load_tensors(path)
    pixels, labels = tensors.get("images"), tensors.get("labels")
    if metadata.get("file_format") != IMAGES_FORMAT or pixels is None or labels is None:
        raise InputError(f"{path}: damaged, or no images of a bundle")
    if pixels.ndim != 4 or pixels.dtype != torch.uint8 or pixels.shape[-1] not in (1, 3) or not pixels.numel():
        raise InputError(f"{path}: damaged (images {tuple(pixels.shape)} {pixels.dtype})")
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
    blends: bool,
    seed: int,
    batch_size: int,
) -> Projector:
    """The projector psi -> phi, fitted on `projector_features` of images (N, channels, H, W) in 0..1; without blends, on `view_features`."""
    from ..evaluation.projector import fit_projector
    from ..features.compute import projector_features, view_features

    if views < 1:
        raise InputError(f"views must be at least 1, got {views}")
    if not 0 < min_area <= 1:
        raise InputError(f"min_area must be in (0, 1], got {min_area}")
    augmentation = Augmentation(min_area=min_area, noise=False)
    seen_by = projector_features if blends else view_features
    # The same seed: both backbones see the same crops, each at its own input size.
    x, y = (seen_by(model, images, views, augmentation, seed=seed, batch_size=batch_size) for model in (psi, phi))
    kept = ("name", "fingerprint", "input_size")
    made_with = {key: {name: getattr(model, name) for name in kept} for key, model in (("psi", psi), ("phi", phi))}
    metadata = {"min_area": min_area, "blends": blends and views > 1, **made_with}
    return fit_projector(x, y.to(x.device), solver=solver, seed=seed, metadata=metadata)
