"""Small inputs several tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfm_fast.data.sources import ImageSource
from sfm_fast.data.transforms import ImageTransform


def labelled(count: int, dim: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """float64 features and balanced labels, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(count) % classes)[torch.randperm(count, generator=generator)]
    return torch.randn(count, dim, generator=generator, dtype=torch.float64), labels


def write_image_folder(
    root: Path, classes: tuple[str, ...] = ("cat", "dog"), per_class: int = 4, size: int = 40, grey: bool = False
) -> Path:
    """root/train/CLASS/i.png and root/test/CLASS/i.png with a colour per class and some noise."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(per_class):
                base = np.array([40 + 150 * label, 90, 200 - 150 * label])
                pixels = np.clip(base + rng.integers(-30, 30, (size, size + 6, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels[..., 0] if grey else pixels).save(folder / f"{index}.png")
    return root


def everything(source: ImageSource, transform: ImageTransform = ImageTransform(8, 8, 3)) -> tuple[Tensor, Tensor]:
    """All images and labels of a source."""
    batches = list(source.batches(3, transform))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
