"""The result of a run: a safetensors file, a folder of PNG files by class, and image grids."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import InputError, require_package
from .files import Metadata, load_tensors, save_tensors, write_atomically
from .schema import BACKBONE, NAMES, check

FORMAT = "sfm_fast.synthetic/1"
_METADATA = {"class_names": NAMES, "backbones?": [BACKBONE], "config?": {"method?": str}}


@dataclass
class SyntheticSet:
    """images (N, channels, S, S) float32 in 0..1, labels (N,) int64, class names, and metadata about how they were made."""

    images: Tensor
    labels: Tensor
    class_names: list[str]
    metadata: Metadata

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, atomically."""
        save_tensors(
            path,
            {"images": self.images, "labels": self.labels},
            {"file_format": FORMAT, "class_names": self.class_names, **self.metadata},
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SyntheticSet:
        """Read a file of `save`, or ``synthetic.safetensors`` in a run's folder."""
        path = Path(path)
        if path.is_dir():
            path = path / "synthetic.safetensors"
        tensors, metadata = load_tensors(path)
        kind = metadata.pop("file_format", None)
        if str(kind).startswith("sfm_fast.bundle/"):
            raise InputError(
                f"{path}: must be an output folder of `sfm-fast distill`, got a bundle. In Python, bundle.synthetic holds its images, "
                "and Bundle.create(bundle.synthetic, …) makes another bundle of them"
            )
        if kind != FORMAT or not {"images", "labels"} <= tensors.keys():
            raise InputError(f"{path}: not a synthetic set of this package")
        check(path, metadata, _METADATA, "synthetic set")
        images, labels, names = tensors["images"], tensors["labels"], metadata.pop("class_names")
        whole = images.ndim == 4 and images.is_floating_point() and images.numel() and images.isfinite().all()
        if (
            not whole
            or images.shape[1] not in (1, 3)
            or labels.shape != images.shape[:1]
            or labels.dtype != torch.int64
        ):
            raise InputError(
                f"{path}: damaged synthetic set (images {tuple(images.shape)}, labels {tuple(labels.shape)})"
            )
        if labels.min() < 0 or labels.max() >= len(names):
            raise InputError(f"{path}: damaged synthetic set (labels beyond its {len(names)} classes)")
        return cls(images.float(), labels, names, metadata)


def to_bytes(images: Tensor) -> Tensor:
    """(N, channels, H, W) in 0..1 -> (N, H, W, channels) uint8."""
    return (images.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def from_bytes(pixels: Tensor) -> Tensor:
    """(N, H, W, channels) uint8 -> (N, channels, H, W) float32 in 0..1, the inverse of `to_bytes`."""
    return pixels.permute(0, 3, 1, 2).contiguous().float() / 255


def folder_name(label: int, name: str, num_classes: int) -> str:
    """A folder name such as '03_Dress', which sorts by label; special characters become '_', and long names are truncated."""
    return f"{label:0{len(str(num_classes - 1))}d}_{re.sub(r'[^A-Za-z0-9.-]+', '_', name)[:200]}"


def save_png(path: str | os.PathLike[str], image: Tensor) -> None:
    """Write one image (H, W, channels) uint8, atomically."""
    require_package("PIL", "writing PNG files", "distill")
    from PIL import Image

    array = image.numpy()
    picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"), expected_bytes=array.nbytes)


def save_image_folder(folder: str | os.PathLike[str], synthetic: SyntheticSet) -> None:
    """Write folder/LABEL_CLASS/NUMBER.png for every image; the folder is built elsewhere first and then replaces an earlier one."""
    folder = Path(folder)
    building, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    for leftover in (building, old):
        shutil.rmtree(leftover, ignore_errors=True)
    count = [0] * len(synthetic.class_names)
    for image, label in zip(to_bytes(synthetic.images), synthetic.labels.tolist(), strict=True):
        place = building / folder_name(label, synthetic.class_names[label], len(synthetic.class_names))
        place.mkdir(parents=True, exist_ok=True)
        save_png(place / f"{count[label]:04d}.png", image)
        count[label] += 1
    if folder.exists():
        os.replace(folder, old)
    os.replace(building, folder)
    shutil.rmtree(old, ignore_errors=True)


def grid(images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> Tensor:
    """Tile images (N, channels, H, W) in 0..1 row by row -> (H', W', channels) uint8 with white gaps."""
    pixels = to_bytes(images).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    count, height, width, channels = pixels.shape
    rows = -(-count // columns)
    canvas = torch.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, dtype=torch.uint8)
    for index, picture in enumerate(pixels):
        top, left = gap + (index // columns) * (height + gap), gap + (index % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    return canvas


def save_grid(
    path: str | os.PathLike[str], images: Tensor, labels: Tensor, classes: Sequence[str], most: int = 20
) -> None:
    """Write one PNG with a row per image index and a column per class that has images (at most ``most``), enlarged for viewing."""
    shown = [c for c in range(len(classes)) if (labels == c).any()][:most]
    per_class = [images[labels == c][:10] for c in shown]
    ordered = torch.cat([torch.stack([group[row] for group in per_class]) for row in range(min(map(len, per_class)))])
    save_png(path, grid(ordered, len(per_class), scale=max(1, 64 // images.shape[-1])))
