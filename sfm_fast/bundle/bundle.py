"""A bundle: one file of synthetic images and a classifier, which classifies photos without the training data.

The classifier was trained on the full data with the distilling backbone, phi; the features of photos come from another one, psi.
A linear projector psi -> phi, fitted only on views of the synthetic images, connects them (arXiv 2602.05391): prediction is
``classifier(projector(psi(photo)))``. If psi is phi there is no projector.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ..backbones.backbone import Backbone, Record
from ..backbones.record import check_among_recorded, check_recorded, check_storable
from ..checks import check_class_names, check_labels
from ..data.photos import is_one, photo_batches
from ..data.sources import ImageSource
from ..data.transforms import ImageTransform
from ..errors import InputError
from ..evaluation.heads import Classifier, LinearMap, Projector, compose
from ..files import Metadata, expand
from ..synthetic import SyntheticSet, from_bytes, to_bytes
from . import card, format, place

DTYPES = dict(zip(place.DTYPES, (torch.bfloat16, torch.float32), strict=True))
Head = TypeVar("Head", Classifier, Projector)


class Accuracy(TypedDict):
    """Top-1 accuracy in 0..1, and the number of test images."""

    top1: float
    images: int


@dataclass(repr=False, eq=False)
class Bundle:
    """Class names, classifier, projector, the records of both backbones (`Backbone.describe`), and how the parts were made.

    ``phi``: the distilling backbone, ``psi``: the one for photos. ``channels`` of the synthetic images, 1 or 3. ``folded``: the
    ``classifier`` takes psi's features directly, and there are no images. ``made``: settings of the parts. ``accuracy``: results of
    `evaluate`, {"top1", "images"} by the data set's name. Made with `Bundle.create` or `Bundle.load`.
    """

    class_names: list[str]
    classifier: Classifier
    projector: Projector | None
    phi: Record
    psi: Record
    channels: int
    folded: bool = False
    made: Metadata = field(default_factory=dict)
    accuracy: dict[str, Accuracy] = field(default_factory=dict)
    _pixels: tuple[Tensor, Tensor] | None = None
    _backbone: Backbone | None = None
    _stored: format.Stored | None = None  # the file it was saved to or loaded from
    _weights: format.Weights | None = None  # psi's weights, if the file it was loaded from holds them
    _machine: Metadata = field(default_factory=dict)

    @classmethod
    def create(
        cls,
        synthetic: SyntheticSet,
        classifier: Classifier,
        phi: Backbone,
        psi: Backbone | None = None,
        projector: Projector | None = None,
        *,
        batch_size: int = 256,
        **fit: Any,
    ) -> Bundle:
        """A bundle of a synthetic set and the classifier trained on the full data; fits the projector if psi needs one and none is given.

        Args:
            phi: the distilling backbone, whose features ``classifier`` takes.
            psi: the backbone that will compute the features of photos; None: phi.
            fit: how the projector is fitted, the options of `sfm_fast.evaluation.projector.ProjectorFit`: solver, views, min_area,
                blends, seed. The views are the same for both backbones.

        Raises ``InputError`` if the parts weren't made with each other.
        """
        check_parts(synthetic, classifier, phi)
        same = psi is None or psi.identity == phi.identity
        evaluating = phi if psi is None or same else psi
        if same and projector is not None:
            raise InputError("projector must be None if psi is phi, got a projector")
        # As stored in the bundle, so that a projector fitted later on its images starts from the same ones.
        pixels = to_bytes(synthetic.images)
        if not same and projector is None:
            from ..evaluation.projector import ProjectorFit, fit_on_images

            projector = fit_on_images(from_bytes(pixels), phi, evaluating, ProjectorFit(**fit), batch_size=batch_size)
        if projector is not None:
            check_projector(projector, phi, evaluating)
        return cls(
            class_names=list(classifier.class_names),
            classifier=_on_cpu(classifier),
            projector=None if projector is None else _on_cpu(projector),
            phi=phi.describe(),
            psi=evaluating.describe(),
            channels=synthetic.images.shape[1],
            made={
                "synthetic": _without_backbone(synthetic.metadata),
                "classifier": _without_backbone(classifier.metadata),
                "projector": None if projector is None else projector.metadata,
            },
            _pixels=(pixels, synthetic.labels.cpu()),
            _backbone=evaluating,
        )

    def fold(self) -> Bundle:
        """The same bundle with classifier and projector as one map, C x Dpsi, and without images, so that it can only classify."""
        merged: LinearMap = self.classifier if self.projector is None else compose(self.classifier, self.projector)
        classifier = Classifier(merged.weight, merged.bias, self.class_names, {"backbone": self.psi})
        return replace(self, classifier=classifier, projector=None, folded=True, _pixels=None)

    def as_stored(self, *, dtype: str = "bf16", folded: bool = False) -> Bundle:
        """The bundle that `load` would read after `save` with these arguments, with rounded weights."""
        if dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        whole = self.fold() if folded and not self.folded else self
        projector = None if whole.projector is None else _rounded(whole.projector, dtype)
        return replace(whole, classifier=_rounded(whole.classifier, dtype), projector=projector)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: str = "bf16",
        folded: bool = False,
        with_backbone: bool | None = None,
    ) -> None:
        """Write the bundle as one safetensors file, atomically; an existing bundle is replaced, another file is refused.

        Args:
            dtype: of the stored weights, "bf16" or "fp32"; biases are float32. Images are stored with 8 bits per channel.
            folded: store the result of `fold`.
            with_backbone: also store psi's weights, so that only the file (and timm) is needed; None stores them if this bundle
                was loaded with them.
        """
        kept = self.as_stored(dtype=dtype, folded=folded)
        target = format.check_bundle_file(path)
        weights = None
        if with_backbone:
            check_storable(self.backbone)
            weights = format.Weights.of(self.backbone)
        elif with_backbone is None:
            weights = self._weights
        parts: dict[str, dict[str, Tensor]] = {}
        if kept._pixels is not None:
            parts[format.IMAGES] = dict(zip(("pixels", "labels"), kept._pixels, strict=True))
        for part, head in ((format.CLASSIFIER, kept.classifier), (format.PROJECTOR, kept.projector)):
            if head is not None:
                parts[part] = {"weight": head.weight.to(DTYPES[dtype]), "bias": head.bias}
        if weights is not None:
            parts[format.WEIGHTS] = dict(weights.tensors)
        config = kept.config()
        config |= {"weights": None if weights is None else dict(weights.about)}
        config |= {"readme": card.readme(config, weights is not None)}
        stored = format.Stored(config, parts)
        format.write(target, stored)
        self._stored = stored

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        backbone: Backbone | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        device: torch.device | str = "cpu",
        precision: str = "auto",
    ) -> Bundle:
        """Read a bundle. psi is ``backbone``, or is loaded at the first photo: from the bundle, from ``checkpoint``, or by its name.

        Raises ``InputError`` if the file is missing, damaged or of a later format, or if ``backbone`` isn't the recorded one.
        """
        stored = format.read(expand(path, "bundle"))
        config, parts, made = stored.config, stored.parts, stored.config["made"]
        about = {"backbone": config["evaluating_backbone" if config["folded"] else "distilling_backbone"]}
        about |= {} if config["folded"] else made.get("classifier") or {}
        head, inner = parts[format.CLASSIFIER], parts.get(format.PROJECTOR)
        pixels = parts.get(format.IMAGES)
        bundle = cls(
            class_names=config["class_names"],
            classifier=Classifier(head["weight"].float(), head["bias"].float(), config["class_names"], about),
            projector=None
            if inner is None
            else Projector(inner["weight"].float(), inner["bias"].float(), dict(made.get("projector") or {})),
            phi=config["distilling_backbone"],
            psi=config["evaluating_backbone"],
            channels=config["channels"],
            folded=config["folded"],
            made=made,
            accuracy=config["accuracy"],
            _pixels=None if pixels is None else (pixels["pixels"], pixels["labels"]),
            _stored=stored,
            _weights=stored.weights(),
            _machine={"checkpoint": checkpoint, "device": device, "precision": precision},
        )
        bundle._backbone = None if backbone is None else format.check_psi(backbone, bundle.psi, stored.where)
        return bundle

    def __repr__(self) -> str:
        way = "folded" if self.folded else "without projector" if self.projector is None else "with a projector"
        return f"<Bundle: {len(self.class_names)} classes, {self.phi['name']}'s classifier, photos through {self.psi['name']}, {way}>"

    @property
    def backbone(self) -> Backbone:
        """psi, loaded at the first use; raises ``InputError`` if its weights can't be loaded or aren't the recorded ones."""
        if self._backbone is None:
            assert self._stored is not None  # a bundle of `create` has its backbone
            self._backbone = format.load_psi(self._stored, self._machine)
        return self._backbone

    @property
    def synthetic(self) -> SyntheticSet:
        """The synthetic images; a folded bundle has none (``InputError``)."""
        if self._pixels is None:
            raise InputError("this bundle is folded and holds no images")
        pixels, labels = self._pixels
        metadata = {**(self.made.get("synthetic") or {}), "backbones": [self.phi]}
        return SyntheticSet(from_bytes(pixels), labels, self.class_names, metadata)

    def classify(self, photos: Any, *, top: int = 5, batch_size: int = 256) -> Any:
        """The most probable classes, [(name, probability), …], best first; for several photos a list of such lists.

        Args:
            photos: a path, a PIL image, an array or tensor (HW, HWC or CHW; uint8, or floats in 0..1); several as a list or
                other iterable, or as one tensor (N, channels, H, W). Any size: the shorter side is resized and the centre cropped, as
                in the evaluation of the backbone. Files and PIL images are rotated according to their EXIF data.
            top: the maximum number of classes.
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
        """Class probabilities (N, C) float32 on the CPU for photos as in `classify`, computed in batches."""
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        batches = photo_batches(photos, self._transform(), batch_size)
        parts = [self.logits(self.backbone.features(batch, batch_size).cpu()) for batch in batches]
        logits = torch.cat(parts) if parts else torch.zeros(0, len(self.class_names))
        if not logits.isfinite().all():
            bad = int((~logits.isfinite().all(1)).nonzero()[0])
            raise InputError(f"photo {bad}: its logits are not finite; pixels must be finite")
        return logits.softmax(1)

    def logits(self, features: Tensor) -> Tensor:
        """Logits (N, C) for psi's features (N, Dpsi), float32 on the CPU."""
        return self.classifier(features if self.projector is None else self.projector(features))

    def _transform(self) -> ImageTransform:
        return self.backbone.transform(min(self.channels, self.backbone.in_channels))

    def evaluate(self, source: ImageSource, *, batch_size: int = 256, progress: bool = False) -> Accuracy:
        """Top-1 accuracy on a labelled data set of these classes (`open_dataset`), as {"top1", "images"}.

        The result is added to ``accuracy``, which `save` writes. It uses the weights in memory; `as_stored` has the file's rounded ones.
        """
        check_class_names(source.class_names, self.class_names, source.name, "the bundle's")
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
        return self.accuracy[source.name]

    def config(self) -> Metadata:
        """The metadata of its file that doesn't depend on the options of `save`."""
        return {
            "class_names": self.class_names,
            "distilling_backbone": self.phi,
            "evaluating_backbone": self.psi,
            "channels": self.channels,
            "folded": self.folded,
            "made": self.made,
            "accuracy": self.accuracy,
        }

    def accuracy_text(self) -> str:
        """Its accuracy in words, as in `readme`."""
        return card.accuracy_text(self.config())

    def readme(self) -> str:
        """The description in the file that it was saved to or loaded from: its contents and how to use it."""
        return str(self._saved().config["readme"])

    def size_report(self) -> list[format.Size]:
        """Rows {"what", "bytes", "detail"} for the parts of the file it was saved to or loaded from, their total, and the training images."""
        rows = self._saved().sizes()
        count = (self.made.get("classifier") or {}).get("images")
        if isinstance(count, int):
            side = self.phi["input_size"]
            detail = f"{count} x {side} x {side} x {self.channels}, uint8, as {self.phi['name']} takes them"
            size = count * side**2 * self.channels
            rows.append({"what": "training images (not inside)", "bytes": size, "detail": detail})
        return rows

    def _saved(self) -> format.Stored:
        if self._stored is None:
            raise InputError("this needs the bundle's file: save the bundle first")
        return self._stored


def check_parts(synthetic: SyntheticSet, classifier: Classifier, phi: Backbone) -> None:
    """Raise ``InputError`` unless images and classifier were made with ``phi``, for the same classes."""
    check_among_recorded(synthetic.metadata.get("backbones") or [], phi, "synthetic: made with", "phi")
    check_recorded(classifier.metadata.get("backbone") or {}, phi, "classifier: made with", "phi")
    if classifier.in_features != phi.num_features:
        raise InputError(
            f"classifier takes {classifier.in_features} features, but phi ({phi.name}) gives {phi.num_features}"
        )
    check_class_names(classifier.class_names, synthetic.class_names, "classifier", "the synthetic set's")


def check_projector(projector: Projector, phi: Backbone, psi: Backbone) -> None:
    """Raise ``InputError`` unless ``projector`` takes psi's features and gives phi's, and records no other weights."""
    for key, model in (("psi", psi), ("phi", phi)):
        check_recorded(projector.metadata.get(key) or {}, model, f"projector: fitted for {key}", key)
    if (projector.in_features, projector.out_features) != (psi.num_features, phi.num_features):
        raise InputError(
            f"projector must take the {psi.num_features} features of {psi.name} and give the {phi.num_features} of {phi.name}, "
            f"got one from {projector.in_features} to {projector.out_features}"
        )


def _on_cpu(head: Head) -> Head:
    """The same map, float32 on the CPU."""
    return replace(head, weight=head.weight.detach().float().cpu(), bias=head.bias.detach().float().cpu())


def _rounded(head: Head, dtype: str) -> Head:
    """The same map with weights rounded to ``dtype``, in float32."""
    return replace(head, weight=head.weight.to(DTYPES[dtype]).float())


def _without_backbone(metadata: Metadata) -> Metadata:
    """``metadata`` without the backbones: the bundle records phi itself."""
    return {key: value for key, value in metadata.items() if key not in ("backbone", "backbones")}
