"""A bundle's file: one safetensors file with all metadata in its header, written atomically."""

from __future__ import annotations

import hashlib
import math
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..backbones.backbone import Backbone
from ..backbones.load import load_backbone
from ..backbones.record import as_recorded, save_weights
from ..checks import MOST_PIXELS
from ..errors import InputError
from ..evaluation.heads import CLASSIFIER_METADATA, PROJECTOR_METADATA
from ..files import Metadata, parse_json, read_safetensors, save_tensors
from ..schema import check
from ..version import __version__
from .place import FORMAT, check_bundle_there
from .place import check_bundle_file as check_bundle_file

VERSION = 1
IMAGES, CLASSIFIER, PROJECTOR, WEIGHTS = "synthetic images", "classifier", "projector", "backbone's weights"
_PARTS = {
    IMAGES: "images.",
    CLASSIFIER: "classifier.",
    PROJECTOR: "projector.",
    WEIGHTS: "backbone.",
}  # prefixes of the tensors' names


def _is_count(most: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and 0 < value <= most


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(type(value) in (int, float) for value in values)


_BACKBONE = {
    "name": lambda name: isinstance(name, str) and bool(name),
    "fingerprint": str,
    "num_features": _is_count(),
    "input_size": _is_count(MOST_PIXELS),
    "resize": _is_count(MOST_PIXELS),
    "mean": _are_numbers,
    "std": lambda std: _are_numbers(std) and min(std) > 0,
}
_CONFIG = {
    "sfm_fast?": str,
    "class_names": lambda names: isinstance(names, list) and bool(names) and all(isinstance(n, str) for n in names),
    "distilling_backbone": _BACKBONE,
    "evaluating_backbone": _BACKBONE,
    "channels": lambda channels: type(channels) is int and channels in (1, 3),
    "folded": bool,
    "made": {
        "synthetic?": (dict, None),
        "classifier?": (CLASSIFIER_METADATA, None),
        "projector?": (PROJECTOR_METADATA, None),
    },
    "accuracy": {str: {"top1": lambda top1: type(top1) in (int, float) and 0 <= top1 <= 1, "images": _is_count()}},
    "weights": (dict, None),
    "readme": str,
    "sha256": str,
}


class Size(TypedDict):
    """Size and description of a part of a bundle."""

    what: str
    bytes: int
    detail: str


@dataclass(frozen=True)
class Weights:
    """A backbone's weights as `save_weights` writes them: tensors by name, and the file's metadata."""

    tensors: Mapping[str, Tensor]
    about: Mapping[str, Any]

    @classmethod
    def of(cls, backbone: Backbone) -> Weights:
        """The weights of ``backbone``, read back and compared; raises ``InputError`` if they would be loaded as another model."""
        with tempfile.TemporaryDirectory(prefix="sfm_fast_bundle_") as folder:
            path = Path(folder, "weights.safetensors")
            save_weights(path, backbone)
            tensors, encoded = read_safetensors(path)
        return cls(tensors, {name: parse_json(text) for name, text in encoded.items() if name != "format"})

    def load(self, name: str, image_size: int, options: Mapping[str, Any]) -> Backbone:
        """The backbone ``name`` with these weights; ``options`` are passed to `load_backbone`."""
        with tempfile.TemporaryDirectory(prefix="sfm_fast_bundle_") as folder:
            path = Path(folder, "weights.safetensors")
            save_tensors(path, self.tensors, self.about)
            return load_backbone(name, path, image_size=image_size, **options)


@dataclass
class Stored:
    """The contents of a bundle's file: its configuration, and tensors by part and name; ``where``: its path, for messages."""

    config: Metadata
    parts: dict[str, dict[str, Tensor]]
    where: Path = field(default_factory=Path)
    size: int = 0  # of the file, in bytes

    def weights(self) -> Weights | None:
        """The evaluating backbone's weights, or None if they aren't included."""
        return Weights(self.parts[WEIGHTS], self.config["weights"] or {}) if WEIGHTS in self.parts else None

    def sizes(self) -> list[Size]:
        """Rows {"what", "bytes", "detail"} for the parts and the header, and their total, the file's size."""
        rows: list[Size] = [
            {"what": part, "bytes": sum(tensor.nbytes for tensor in tensors.values()), "detail": self._detail(part)}
            for part, tensors in self.parts.items()
        ]
        header = self.size - sum(row["bytes"] for row in rows)
        rows.append({"what": "names and configuration", "bytes": header, "detail": "the file's header"})
        return [*rows, {"what": "total", "bytes": self.size, "detail": ""}]

    def _detail(self, part: str) -> str:
        if part == WEIGHTS:
            return str(self.config["evaluating_backbone"]["name"])
        first = self.parts[part]["pixels" if part == IMAGES else "weight"]
        return " x ".join(map(str, first.shape)) + f", {str(first.dtype).removeprefix('torch.')}"


def write(path: Path, stored: Stored) -> None:
    """Write ``stored`` to ``path``, atomically, and record its size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {_PARTS[part] + name: one for part, parts in stored.parts.items() for name, one in parts.items()}
    stored.config["sha256"] = _digest(tensors)
    save_tensors(path, tensors, {"file_format": f"{FORMAT}/{VERSION}", "sfm_fast": __version__, **stored.config})
    stored.where, stored.size = path, path.stat().st_size


def read(path: Path) -> Stored:
    """The contents of a file of `write`; raises ``InputError`` if it is missing, damaged or of a later format."""
    check_bundle_there(path)
    tensors, encoded = read_safetensors(path)
    try:
        config = {name: parse_json(text) for name, text in encoded.items() if name != "format"}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged bundle ({error})") from error
    kind, _, version = str(config.pop("file_format", None)).partition("/")
    if kind != FORMAT:
        raise InputError(f"{path}: not a bundle of this package")
    if not re.fullmatch("[1-9][0-9]{0,8}", version):
        raise InputError(f"{path}: damaged bundle (its format is {version[:60]!r})")
    if int(version) > VERSION:
        raise InputError(
            f"{path}: has format {version}, made by sfm_fast {config.get('sfm_fast')}, but sfm_fast {__version__} reads formats up to {VERSION}"
        )
    check(path, config, _CONFIG, "bundle")
    for key in ("distilling_backbone", "evaluating_backbone"):
        if len(config[key]["mean"]) != len(config[key]["std"]):
            raise InputError(f"{path}: damaged bundle ({key}: mean and std differ in length)")
    if _digest(tensors) != config["sha256"]:
        raise InputError(f"{path}: damaged bundle (its tensors differ from those that were written)")
    parts: dict[str, dict[str, Tensor]] = {}
    for part, prefix in _PARTS.items():
        of_part = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
        if of_part:
            parts[part] = of_part
    stored = Stored(config, parts, path, path.stat().st_size)
    _check_parts(stored)
    return stored


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode(errors="backslashreplace"))
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _check_parts(stored: Stored) -> None:
    """Raise ``InputError`` unless the shapes of images, classifier and projector match."""

    def damaged(why: str) -> InputError:
        return InputError(f"{stored.where}: damaged bundle ({why})")

    config, parts = stored.config, stored.parts
    for part in (CLASSIFIER, PROJECTOR):
        tensors = parts.get(part)
        if tensors is None and part == PROJECTOR:
            continue
        weight, bias = (tensors or {}).get("weight"), (tensors or {}).get("bias")
        if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise damaged(f"it has no {part}")
        if weight.dtype not in (torch.float32, torch.bfloat16) or bias.dtype != torch.float32:
            raise damaged(f"its {part} holds {weight.dtype} and {bias.dtype}")
        if not all(one.isfinite().all() for one in (weight, bias)):
            raise damaged(f"its {part} holds NaN or infinity")
    outer = parts[CLASSIFIER]["weight"]
    inner = parts[PROJECTOR]["weight"] if PROJECTOR in parts else None
    taken = (outer if inner is None else inner).shape[1]
    joined = inner is None or inner.shape[0] == outer.shape[1]
    names = len(config["class_names"])
    if len(outer) != names or taken != config["evaluating_backbone"]["num_features"] or not joined:
        raise damaged(f"its classifier, projector and {config['evaluating_backbone']['name']!r} don't fit together")
    if config["folded"]:
        return
    pixels, labels = (parts.get(IMAGES, {}).get(name) for name in ("pixels", "labels"))
    if pixels is None or labels is None:
        raise damaged("it has no synthetic images")
    whole = pixels.ndim == 4 and pixels.dtype == torch.uint8 and pixels.shape[-1] in (1, 3) and pixels.numel()
    if not whole or labels.dtype != torch.int64 or labels.shape != pixels.shape[:1]:
        raise damaged(f"images {tuple(pixels.shape)} {pixels.dtype}")
    if labels.min() < 0 or labels.max() >= names:
        raise damaged(f"labels beyond its {names} classes")


def load_psi(stored: Stored, options: Mapping[str, Any]) -> Backbone:
    """The evaluating backbone: from the bundle itself, from ``options["checkpoint"]``, or by its name; ``options`` are for `load_backbone`.

    Raises ``InputError`` if it can't be loaded, or isn't the recorded one.
    """
    record, inside = stored.config["evaluating_backbone"], stored.weights()
    try:
        if inside is not None and options.get("checkpoint") is None:
            known = {name: value for name, value in options.items() if name != "checkpoint"}
            loaded = inside.load(record["name"], record["input_size"], known)
        else:
            loaded = load_backbone(record["name"], image_size=record["input_size"], **options)
    except InputError as error:
        raise InputError(f"{stored.where}: its backbone can't be loaded: {error}") from error
    return check_psi(loaded, record, stored.where)


def check_psi(given: Backbone, record: Mapping[str, Any], where: Path) -> Backbone:
    """``given`` with the normalisation in ``record`` of the bundle at ``where``; raises ``InputError`` if it is another backbone, or the record damaged."""
    recorded = as_recorded(given, record)
    if recorded.mean.shape != given.mean.shape:
        lengths = f"{len(record['mean'])} numbers, but {given.name!r} needs {len(given.mean)}"
        raise InputError(f"{where}: damaged bundle (evaluating_backbone: mean has {lengths})")
    return recorded
