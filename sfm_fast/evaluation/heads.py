"""Linear maps on features: the classifier trained on the full data, and the projector through which another backbone uses it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..files import Metadata, load_tensors, save_tensors
from ..schema import BACKBONE, NAMES, check

CLASSIFIER_FORMAT, PROJECTOR_FORMAT = "sfm_fast.classifier/1", "sfm_fast.projector/1"
# Metadata that this package reads from them, here and in a bundle.
CLASSIFIER_METADATA = {
    "backbone?": (BACKBONE, None),
    "images?": int,
    "test_top1?": (float, None),
    "test_data?": (str, None),
}
PROJECTOR_METADATA = {"phi?": (BACKBONE, None), "psi?": (BACKBONE, None), "penalty?": (float, None), "blends?": bool}
_MEASURED = ("seconds", "feature_seconds")  # not stored, so that equal results give equal files


@dataclass
class LinearMap:
    """features (N, in) -> features @ weight.T + bias, (N, out): weight (out, in), bias (out,), float32."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return features @ self.weight.T + self.bias

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def parameters(self) -> int:
        """Number of weights and biases."""
        return self.weight.numel() + self.bias.numel()

    def nbytes(self, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the parameters when stored as ``dtype``."""
        return self.parameters * dtype.itemsize


@dataclass
class Projector(LinearMap):
    """Features of an evaluating backbone -> features of the distilling one. ``metadata`` records the fit and the two backbones."""

    metadata: Metadata = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, atomically; raises ``InputError`` like `check_metadata`."""
        check_metadata(self.metadata)
        save_tensors(
            path, {"weight": self.weight, "bias": self.bias}, {"file_format": PROJECTOR_FORMAT, **_kept(self.metadata)}
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Projector:
        """Read a file of `save`; raises ``InputError`` if it is damaged or another kind of file."""
        weight, bias, metadata = _load(path, PROJECTOR_FORMAT, PROJECTOR_METADATA, "projector")
        return cls(weight, bias, metadata)


@dataclass
class Classifier(LinearMap):
    """Features of one backbone -> logits of ``class_names``. ``metadata`` holds provenance and accuracies."""

    class_names: list[str] = field(default_factory=list)
    metadata: Metadata = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, atomically; raises ``InputError`` like `check_metadata`, also for the key "class_names"."""
        check_metadata(self.metadata, "class_names")
        save_tensors(
            path,
            {"weight": self.weight, "bias": self.bias},
            {"file_format": CLASSIFIER_FORMAT, "class_names": self.class_names, **_kept(self.metadata)},
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Classifier:
        """Read a file of `save`; raises ``InputError`` if it is damaged or another kind of file."""
        wanted = {"class_names": NAMES, **CLASSIFIER_METADATA}
        weight, bias, metadata = _load(path, CLASSIFIER_FORMAT, wanted, "classifier")
        names = metadata.pop("class_names")
        if len(names) != len(bias):
            raise InputError(f"{path}: damaged classifier ({len(bias)} outputs, class names {str(names)[:80]})")
        return cls(weight, bias, names, metadata)


def check_metadata(metadata: Mapping[str, Any], *more: str) -> None:
    """Raise ``InputError`` for keys that the file format reserves: "format", "file_format" and ``more``."""
    taken = sorted({"format", "file_format", *more} & metadata.keys())
    if taken:
        raise InputError(f"metadata must not have the reserved keys {', '.join(taken)}; choose other names")


def compose(outer: LinearMap, inner: LinearMap) -> LinearMap:
    """``outer(inner(x))`` as one map, such as a classifier after a projector."""
    return LinearMap(outer.weight @ inner.weight, outer.weight @ inner.bias + outer.bias)


def _kept(metadata: Mapping[str, Any]) -> Metadata:
    return {name: value for name, value in metadata.items() if name not in _MEASURED}


def _load(path: str | os.PathLike[str], wanted: str, spec: Metadata, what: str) -> tuple[Tensor, Tensor, Metadata]:
    tensors, metadata = load_tensors(path)
    file_format = metadata.pop("file_format", None)
    if file_format != wanted or not {"weight", "bias"} <= tensors.keys():
        raise InputError(f"{path}: no {what} of this package (format must be {wanted!r}, got {file_format!r})")
    check(path, metadata, spec, what)
    weight, bias = tensors["weight"].float(), tensors["bias"].float()
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or not (weight.isfinite().all() and bias.isfinite().all()):
        raise InputError(f"{path}: damaged {what} (weight {tuple(weight.shape)}, bias {tuple(bias.shape)})")
    return weight, bias, metadata
