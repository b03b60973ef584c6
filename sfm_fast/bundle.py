"""A bundle: one folder that classifies photos without the training data, by way of synthetic images and a classifier.

The classifier was trained on the full data with one backbone, phi (the one that distilled); photos go through another, psi.
A linear projector psi -> phi, fitted on views of the synthetic images alone, joins them (arXiv 2602.05391): prediction is
``classifier(projector(psi(photo)))``. Where psi is phi there is no projector.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bundle_folder import (
    CLASSIFIER,
    FORMAT,
    IMAGES,
    PROJECTOR,
    VERSION,
    WEIGHTS,
    checked_file,
    describe_file,
    read_config,
    replaced_folder,
    write_texts,
)
from .bundle_parts import check_parts, check_projector, fit, from_bytes, on_cpu, read_images, save_images
from .data.backbones import Backbone, load_backbone
from .data.photos import is_one, photo_batches
from .data.sources import ImageTransform
from .data.weights import as_recorded, check_storable, save_weights
from .distill.export import SyntheticSet, to_bytes
from .errors import InputError
from .probe.heads import Classifier, LinearMap, Projector, compose
from .version import __version__

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
VIEWS = 200


@dataclass(repr=False, eq=False)
class Bundle:
    """Class names, classifier and projector, the two backbones as ``Backbone.describe()`` tells of them, and how all was made.

    ``phi`` distilled, ``psi`` evaluates. ``channels`` of the images it was made for, 1 or 3. ``folded``: ``classifier`` takes psi's
    features itself, and there are no images. ``made``: settings of the parts. ``accuracy``: top-1 by the name of what was tested.
    Make one with `Bundle.create` or `Bundle.load`.
    """

    class_names: list[str]
    classifier: Classifier
    projector: Projector | None
    phi: dict[str, Any]
    psi: dict[str, Any]
    channels: int
    folded: bool = False
    made: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    sizes: list[dict[str, Any]] = field(default_factory=list)
    _pixels: tuple[Tensor, Tensor] | None = None
    _backbone: Backbone | None = None
    _stored: tuple[Path, dict[str, Any]] | None = None
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
        seed: int = 0,
        batch_size: int = 256,
        accuracy: Mapping[str, float] | None = None,
    ) -> Bundle:
        """Join a synthetic set and the classifier trained on the full data; fits the projector where psi needs one and none is given.

        Args:
            phi: the backbone that distilled, and whose features ``classifier`` takes.
            psi: the backbone that photos will go through; None takes phi.
            solver, views, min_area, seed: how the projector is fitted (`fit_projector`): on ``views`` flips and crops of every
                image, of at least ``min_area`` of it, the same for both backbones.
            accuracy: top-1 of this bundle by the name of the test, to be told in its files; the classifier's own is added.

        Raises ``InputError`` where the parts weren't made with each other.
        """
        check_parts(synthetic, classifier, phi)
        same = psi is None or (psi.fingerprint, psi.input_size) == (phi.fingerprint, phi.input_size)
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
                seed=seed,
                batch_size=batch_size,
            )
        if projector is not None:
            check_projector(projector, phi, evaluating)
        tested = classifier.metadata.get("test_top1")
        test = f"{phi.name}, classifier alone, {classifier.metadata.get('test_data', 'test')}"
        known = {} if tested is None else {test: float(tested)}
        return cls(
            class_names=list(classifier.class_names),
            classifier=on_cpu(classifier),
            projector=None if projector is None else on_cpu(projector),
            phi=phi.describe(),
            psi=evaluating.describe(),
            channels=synthetic.images.shape[1],
            made={
                "synthetic": {key: value for key, value in synthetic.metadata.items() if key != "backbone"},
                "classifier": {key: value for key, value in classifier.metadata.items() if key != "backbone"},
                "projector": None if projector is None else projector.metadata,
            },
            accuracy=known | dict(accuracy or {}),
            _pixels=(pixels, synthetic.labels.cpu()),
            _backbone=evaluating,
        )

    def fold(self) -> Bundle:
        """The same bundle with classifier and projector as one map, C x Dpsi, and without images: it classifies, and no more."""
        merged: LinearMap = self.classifier if self.projector is None else compose(self.classifier, self.projector)
        classifier = Classifier(merged.weight, merged.bias, self.class_names, {"backbone": self.psi})
        return replace(self, classifier=classifier, projector=None, folded=True, sizes=[], _pixels=None)

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        dtype: str = "bf16",
        folded: bool = False,
        with_backbone: bool = False,
    ) -> None:
        """Write the bundle as a folder, whole or not at all; an earlier bundle there is replaced, anything else is refused.

        Args:
            dtype: of the stored weights, "bf16" or "fp32"; biases are float32. Images are stored with 8 bits a channel.
            folded: store `fold` of it.
            with_backbone: store psi's weights too, so that nothing is needed but the folder (and timm).
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if folded and not self.folded:
            whole = self.fold()
            whole.save(folder, dtype=dtype, with_backbone=with_backbone)
            self.sizes = whole.sizes
            return
        if with_backbone:
            check_storable(self.backbone)
        pixels, details = None if self.folded else self._read_pixels(), {}
        with replaced_folder(folder) as place:
            if pixels is not None:
                save_images(place / IMAGES, *pixels)
                details[IMAGES] = " x ".join(map(str, pixels[0].shape)) + ", uint8"
            heads = {CLASSIFIER: self.classifier} | ({} if self.projector is None else {PROJECTOR: self.projector})
            for name, head in heads.items():
                # Metadata stands in bundle.json once; here is what the file needs to be used alone.
                short = {"backbone": (self.psi if self.folded else self.phi)} if name == CLASSIFIER else {}
                replace(head, weight=head.weight.to(DTYPES[dtype]), metadata=short).save(place / name)
                details[name] = f"{head.out_features} x {head.in_features}, {dtype}"
            if with_backbone:
                save_weights(place / WEIGHTS, self.backbone)
                details[WEIGHTS] = self.psi["name"]
            config = self._config(dtype) | {"files": {name: describe_file(place / name) for name in details}}
            write_texts(place, config, details)
        self.sizes = config["sizes"]

    def _config(self, dtype: str) -> dict[str, Any]:
        return {
            "file_format": f"{FORMAT}/{VERSION}",
            "sfm_fast": __version__,
            "class_names": self.class_names,
            "distilling_backbone": self.phi,
            "evaluating_backbone": self.psi,
            "channels": self.channels,
            "folded": self.folded,
            "dtype": dtype,
            "made": self.made,
            "accuracy": self.accuracy,
        }

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
        place = Path(folder).expanduser()
        config = read_config(place)
        files = config["files"]
        classifier = Classifier.load(checked_file(place, CLASSIFIER, files))
        projector = Projector.load(checked_file(place, PROJECTOR, files)) if PROJECTOR in files else None
        phi, psi = config["distilling_backbone"], config["evaluating_backbone"]
        taken = (classifier if projector is None else projector).in_features
        joined = projector is None or projector.out_features == classifier.in_features
        if classifier.class_names != config["class_names"] or taken != psi["num_features"] or not joined:
            raise InputError(
                f"{place}: damaged bundle (its classifier, projector and {psi['name']!r} don't fit together)"
            )
        made = config["made"]
        if not config["folded"]:
            classifier.metadata |= made.get("classifier") or {}
        if projector is not None:
            projector.metadata |= made.get("projector") or {}
        bundle = cls(
            class_names=classifier.class_names,
            classifier=classifier,
            projector=projector,
            phi=phi,
            psi=psi,
            channels=config["channels"],
            folded=config["folded"],
            made=made,
            accuracy=config["accuracy"],
            sizes=config["sizes"],
            _stored=(place, files),
            _machine={"checkpoint": checkpoint, "device": device, "precision": precision},
        )
        if backbone is not None:
            bundle._backbone = as_recorded(backbone, psi)
        return bundle

    def __repr__(self) -> str:
        way = "folded" if self.folded else "without projector" if self.projector is None else "with a projector"
        return f"<Bundle: {len(self.class_names)} classes, {self.phi['name']}'s classifier, photos through {self.psi['name']}, {way}>"

    @property
    def backbone(self) -> Backbone:
        """psi, loaded at the first use; raises ``InputError`` where its weights can't be had, or are others."""
        if self._backbone is None:
            place, files = self._stored or (Path(), {})
            options = dict(self._machine)
            if options.get("checkpoint") is None and WEIGHTS in files:
                options["checkpoint"] = checked_file(place, WEIGHTS, files)
            try:
                found = load_backbone(self.psi["name"], image_size=self.psi["input_size"], **options)
            except InputError as error:
                raise InputError(f"{place}: its backbone can't be loaded: {error}") from error
            self._backbone = as_recorded(found, self.psi)
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
            place, files = self._stored or (Path(), {})
            self._pixels = read_images(checked_file(place, IMAGES, files), len(self.class_names))
        return self._pixels

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
        psi = self.backbone
        transform = ImageTransform(psi.resize, psi.input_size, min(self.channels, psi.in_channels))
        parts = [
            self.logits(psi.features(batch, batch_size).cpu()) for batch in photo_batches(photos, transform, batch_size)
        ]
        logits = torch.cat(parts) if parts else torch.zeros(0, len(self.class_names))
        if not logits.isfinite().all():
            bad = int((~logits.isfinite().all(1)).nonzero()[0])
            raise InputError(f"photo {bad}: not finite numbers come out of it; pixels must be finite")
        return logits.softmax(1)

    def logits(self, features: Tensor) -> Tensor:
        """(N, C) of psi's features (N, Dpsi), float32 on the CPU."""
        return self.classifier(features if self.projector is None else self.projector(features))

    def size_report(self) -> list[dict[str, Any]]:
        """Rows {"what", "bytes", "detail"} of the folder's files as they were saved or loaded, their total, and the training images'."""
        if not self.sizes:
            raise InputError("sizes are those of files: save the bundle first")
        return [dict(row) for row in self.sizes]
