"""A bundle: one folder that classifies photos without the training data, by way of synthetic images and a classifier.

The classifier was trained on the full data with one backbone, phi (the one that distilled); photos go through another, psi.
A linear projector psi -> phi, fitted on views of the synthetic images alone, joins them (arXiv 2602.05391): prediction is
``classifier(projector(psi(photo)))``. Where psi is phi there is no projector.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbones.backbone import Backbone
from ..backbones.record import check_storable
from ..errors import InputError
from ..evaluation.heads import Classifier, LinearMap, Projector, compose
from ..files import expand
from ..synthetic import SyntheticSet, to_bytes
from .card import accuracy_text, config_of, write_texts
from .config import read_config
from .folder import IMAGES, WEIGHTS, checked_file, describe_file, replaced_folder
from .parts import (
    DTYPES,
    check_parts,
    check_projector,
    check_psi,
    fit,
    from_bytes,
    how_made,
    load_heads,
    load_psi,
    on_cpu,
    read_images,
    rounded,
    save_heads,
    save_images,
    save_psi,
)
from .photos import PhotoClassifier

VIEWS = 200


@dataclass(repr=False, eq=False)
class Bundle(PhotoClassifier):
    """Class names, classifier and projector, the two backbones as ``Backbone.describe()`` tells of them, and how all was made.

    ``phi`` distilled, ``psi`` evaluates. ``channels`` of the images it was made for, 1 or 3. ``folded``: ``classifier`` takes psi's
    features itself, and there are no images. ``made``: settings of the parts. ``accuracy``: what `evaluate` found,
    {"top1", "images"} by the data set's name. Make one with `Bundle.create` or `Bundle.load`.
    """

    class_names: list[str]
    classifier: Classifier
    projector: Projector | None
    phi: dict[str, Any]
    psi: dict[str, Any]
    channels: int
    folded: bool = False
    made: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, dict[str, Any]] = field(default_factory=dict)
    sizes: list[dict[str, Any]] = field(default_factory=list)
    _pixels: tuple[Tensor, Tensor] | None = None
    _backbone: Backbone | None = None
    _stored: tuple[Path, dict[str, Any]] = field(default_factory=lambda: (Path(), {}))
    _machine: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def create(
        cls,
        synthetic: SyntheticSet,
        classifier: Classifier,
        phi: Backbone,
        psi: Backbone | None = None,
        projector: Projector | None = None,
        *,
        solver: str = "ridge",
        views: int = VIEWS,
        min_area: float = 0.08,
        blends: bool = False,
        seed: int = 0,
        batch_size: int = 256,
    ) -> Bundle:
        """Join a synthetic set and the classifier trained on the full data; fits the projector where psi needs one and none is given.

        Args:
            phi: the backbone that distilled, and whose features ``classifier`` takes.
            psi: the backbone that photos will go through; None takes phi.
            solver, views, min_area, blends, seed: how the projector is fitted (`fit_projector`): on ``views`` flips and crops of
                every image, of at least ``min_area`` of it, the same for both backbones; with ``blends`` half of them
                of two images blended.

        Raises ``InputError`` where the parts weren't made with each other.
        """
        check_parts(synthetic, classifier, phi)
        same = psi is None or psi.identity == phi.identity
        evaluating = phi if psi is None or same else psi
        if same and projector is not None:
            raise InputError("projector must be left out where psi is phi: there is nothing to project")
        # As the bundle keeps them: who fits another projector on a bundle's images later starts from the same ones.
        pixels = to_bytes(synthetic.images)
        if not same and projector is None:
            projector = fit(
                from_bytes(pixels),
                phi,
                evaluating,
                solver=solver,
                views=views,
                min_area=min_area,
                blends=blends,
                seed=seed,
                batch_size=batch_size,
            )
        if projector is not None:
            check_projector(projector, phi, evaluating)
        return cls(
            class_names=list(classifier.class_names),
            classifier=on_cpu(classifier),
            projector=None if projector is None else on_cpu(projector),
            phi=phi.describe(),
            psi=evaluating.describe(),
            channels=synthetic.images.shape[1],
            made=how_made(synthetic, classifier, projector),
            _pixels=(pixels, synthetic.labels.cpu()),
            _backbone=evaluating,
        )

    def fold(self) -> Bundle:
        """The same with classifier and projector as one map, C x Dpsi, and without images: it classifies, and no more."""
        merged: LinearMap = self.classifier if self.projector is None else compose(self.classifier, self.projector)
        classifier = Classifier(merged.weight, merged.bias, self.class_names, {"backbone": self.psi})
        return replace(self, classifier=classifier, projector=None, folded=True, sizes=[], _pixels=None)

    def as_stored(self, *, dtype: str = "bf16", folded: bool = False) -> Bundle:
        """The bundle that `load` reads of what `save` with these arguments writes: its weights are the rounded ones."""
        if dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        whole = self.fold() if folded and not self.folded else self
        projector = None if whole.projector is None else rounded(whole.projector, dtype)
        return replace(whole, classifier=rounded(whole.classifier, dtype), projector=projector)

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        dtype: str = "bf16",
        folded: bool = False,
        with_backbone: bool | None = None,
    ) -> None:
        """Write the bundle as a folder, whole or not at all; an earlier bundle there is replaced, anything else is refused.

        Args:
            dtype: of the stored weights, "bf16" or "fp32"; biases are float32. Images are stored with 8 bits a channel.
            folded: store `fold` of it.
            with_backbone: store psi's weights too, so that nothing is needed but the folder (and timm); None stores those that
                this bundle was loaded with.
        """
        kept = self.as_stored(dtype=dtype, folded=folded)
        source, files = self._stored
        weights: Backbone | Path | None = None
        if with_backbone:
            check_storable(weights := self.backbone)
        elif with_backbone is None and WEIGHTS in files:
            weights = checked_file(source, WEIGHTS, files)
        pixels = None if self.folded else self._read_pixels()  # though folded: this may take the place where they lie
        with replaced_folder(folder) as place:
            details = {} if pixels is None or kept.folded else {IMAGES: save_images(place / IMAGES, *pixels)}
            made_with = kept.psi if kept.folded else kept.phi
            details |= save_heads(place, kept.classifier, kept.projector, dtype, made_with)
            if weights is not None:
                save_psi(place, weights)
                details[WEIGHTS] = self.psi["name"]
            config = config_of(kept, dtype) | {"files": {name: describe_file(place / name) for name in details}}
            write_texts(place, config, details)
        self.sizes = config["sizes"]
        if files and os.path.realpath(source) == os.path.realpath(expand(folder, "folder")):
            self._stored = (source, config["files"])  # what it was loaded from is this now

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        backbone: Backbone | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        device: torch.device | str = "cpu",
        precision: str = "auto",
    ) -> Bundle:
        """Read a bundle. psi is loaded at the first photo: from the bundle, ``checkpoint``, or by its name; or is ``backbone``.

        Raises ``InputError`` naming the file that is missing, damaged or of a later format, or the backbone that is another one.
        """
        place = expand(folder, "bundle")
        config = read_config(place)
        classifier, projector = load_heads(place, config)
        bundle = cls(
            class_names=classifier.class_names,
            classifier=classifier,
            projector=projector,
            phi=config["distilling_backbone"],
            psi=config["evaluating_backbone"],
            channels=config["channels"],
            folded=config["folded"],
            made=config["made"],
            accuracy=config["accuracy"],
            sizes=config["sizes"],
            _stored=(place, config["files"]),
            _machine={"checkpoint": checkpoint, "device": device, "precision": precision},
        )
        bundle._backbone = None if backbone is None else check_psi(backbone, bundle.psi, place)
        return bundle

    def __repr__(self) -> str:
        way = "folded" if self.folded else "without projector" if self.projector is None else "with a projector"
        return f"<Bundle: {len(self.class_names)} classes, {self.phi['name']}'s classifier, photos through {self.psi['name']}, {way}>"

    @property
    def backbone(self) -> Backbone:
        """psi, loaded at the first use; raises ``InputError`` where its weights can't be had, or are others."""
        if self._backbone is None:
            self._backbone = load_psi(self.psi, *self._stored, self._machine)
        return self._backbone

    @property
    def synthetic(self) -> SyntheticSet:
        """The synthetic images, read at the first use; a folded bundle has none (``InputError``)."""
        pixels, labels = self._read_pixels()
        metadata = {**(self.made.get("synthetic") or {}), "backbone": self.phi}
        return SyntheticSet(from_bytes(pixels), labels, self.class_names, metadata)

    def _read_pixels(self) -> tuple[Tensor, Tensor]:
        if self.folded:
            raise InputError("this bundle is folded: it classifies, and holds no images")
        if self._pixels is None:
            place, files = self._stored
            self._pixels = read_images(checked_file(place, IMAGES, files), len(self.class_names))
        return self._pixels

    def accuracy_text(self) -> str:
        """What is known of its accuracy, as its README says it."""
        return accuracy_text(config_of(self, ""))

    def size_report(self) -> list[dict[str, Any]]:
        """Rows {"what", "bytes", "detail"} of the folder's files as they were saved or loaded, their total, and the training images'."""
        if not self.sizes:
            raise InputError("sizes are those of files: save the bundle first")
        return [dict(row) for row in self.sizes]
