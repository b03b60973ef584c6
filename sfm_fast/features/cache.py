"""A cache for features of data sets on backbones, in memory and optionally in a folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbones.backbone import Backbone
from ..checks import check_features, check_labels
from ..data.sources import ImageSource
from ..errors import InputError
from ..files import expand, load_tensors, save_tensors
from .compute import dataset_features

FORMAT = "sfm_fast.features/1"


class FeatureCache:
    """`features` computes only at the first call for a data set and backbone. Without ``folder`` the results are kept only in memory.

    The key is the backbone (fingerprint, precision, input transform), the data set's name, number of images and class names, and its
    fingerprint: every file's name and size and 32 evenly spaced images. A change of other images that keeps their sizes isn't noticed,
    so clear the folder after one. A streamed data set is identified by name and length; a stream without a length or a name of its own,
    and a data set whose images differ between passes, are cached only in memory, for that object.

    Several processes may use one folder, because files are written atomically. A damaged file is recomputed, with a warning: files
    hold a SHA-256 of their tensors, which takes about a quarter of a second for 300 MB (files of earlier versions have none).
    Raises ``InputError`` if ``folder`` is a file or can't be created.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = None if folder is None else expand(folder, "cache")
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self._streams: dict[int, ImageSource] = {}
        if self.folder is None:
            return
        if not str(folder):
            raise InputError("cache must be a folder, got an empty name")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cache {self.folder}: the folder can't be created ({error.strerror})") from error
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise InputError(f"cache {self.folder}: the folder can't be written")

    def features(
        self, source: ImageSource, backbone: Backbone, *, batch_size: int = 256, progress: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Features (N, D) float32 and labels (N,) int64 of the centre views, in the data set's order, on the backbone's device.

        These are the cached tensors themselves, not copies: clone them before changing them, or later calls return the changed ones.
        """
        key = self._key(source, backbone)
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        where = f"{digest} {backbone.device}"
        if where not in self._kept:
            path = None if self.folder is None or "object" in key else self.folder / _file_name(key, digest)
            features = None if path is None else _read(path, key, len(source.class_names), backbone)
            if features is None:
                features = dataset_features(source, backbone, batch_size=batch_size, progress=progress)
                if path is not None:
                    _write(path, key, features)
            self._kept[where] = features
        return self._kept[where]

    def _key(self, source: ImageSource, backbone: Backbone) -> Mapping[str, Any]:
        channels = min(source.exact_channels, backbone.in_channels)
        key = {
            "backbone": backbone.describe(),
            "channels": channels,
            "data": source.name,
            "images": len(source),
            "class_names": source.class_names,
        }
        content = source.fingerprint()
        if content:
            return key | {"content": content}
        if source.random_access or not len(source) or source.name == "iterable":
            self._streams[id(source)] = source  # kept alive, so that no other object gets its id
            return key | {"object": id(source)}
        return key


def _file_name(key: Mapping[str, Any], digest: str) -> str:
    words = (re.sub(r"[^A-Za-z0-9.-]+", "_", name)[-60:].strip("_.") for name in (key["data"], key["backbone"]["name"]))
    return f"{'-'.join(words)}-{digest}.safetensors"


def _read(path: Path, key: Mapping[str, Any], classes: int, backbone: Backbone) -> tuple[Tensor, Tensor] | None:
    """The features and labels of a file of `_write`, or None if it is missing or damaged."""
    while path.exists():
        before = _version(path)
        try:
            return _read_once(path, key, classes, backbone)
        except InputError as error:
            if _version(path) != before:
                continue  # replaced while it was read, so header and tensors may be of different files
            warnings.warn(f"cached features can't be used and are recomputed: {error}", stacklevel=3)
            return None
    return None


def _version(path: Path) -> tuple[int, int] | None:
    """Identifies the file that is at ``path`` now; changes when it is replaced."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _read_once(path: Path, key: Mapping[str, Any], classes: int, backbone: Backbone) -> tuple[Tensor, Tensor]:
    tensors, metadata = load_tensors(path)
    if metadata.get("file_format") != FORMAT or metadata.get("key") != key or set(tensors) != {"features", "labels"}:
        raise InputError(f"{path}: its contents don't match its name")
    features, labels = tensors["features"], tensors["labels"]
    check_features(f"features in {path}", features, backbone.num_features, "the backbone")
    check_labels(f"labels in {path}", labels, len(features), classes)
    if len(features) != (key["images"] or len(features)) or features.dtype != torch.float32:
        raise InputError(
            f"{path}: features must be {key['images']} rows of float32, got {len(features)} of {features.dtype}"
        )
    if not features.isfinite().all():
        raise InputError(f"{path}: features aren't finite")
    if metadata.get("sha256", digest := _digest(features, labels)) != digest:
        raise InputError(f"{path}: its tensors differ from those that were written")
    return features.to(backbone.device), labels.to(backbone.device)


def _digest(features: Tensor, labels: Tensor) -> str:
    digest = hashlib.sha256(features.contiguous().numpy().data)
    digest.update(labels.contiguous().numpy().data)
    return digest.hexdigest()


def _write(path: Path, key: Mapping[str, Any], tensors: tuple[Tensor, Tensor]) -> None:
    features, labels = (part.cpu() for part in tensors)
    metadata = {"file_format": FORMAT, "key": key, "sha256": _digest(features, labels)}
    try:
        save_tensors(path, {"features": features, "labels": labels}, metadata)
    except InputError as error:  # a full disk must not lose the features
        warnings.warn(f"features aren't cached: {error}", stacklevel=3)
