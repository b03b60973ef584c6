"""What loading real images costs LGM: a step's batch alone, and its step with images from files beside images in memory.

    sfm-fast bench --preset laptop --suite loading

The files are real ones in a temporary folder, read by this package's `open_dataset` (a loader anew for every batch, as its LGM does)
and by a loader that stays open and decodes the next batch meanwhile. That one is measured alone: it would work during the others' turns. SFM
loads no image and has no row.
"""

from __future__ import annotations

import functools
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfm_fast.backbones.backbone import Backbone
from sfm_fast.backbones.load import shape_of_backbone
from sfm_fast.data.datasets import open_dataset
from sfm_fast.data.sources import ImageSource, MapSource
from sfm_fast.data.transforms import ImageTransform
from sfm_fast.errors import InputError, require_package

from ..harness import Contender, Row, attempt, measure
from ..steps.contenders import Preset, Setting, check_device, find_preset, lgm, open_backbone
from ..steps.rows import case_of, facts_of

SUITE = "loading"
SECONDS = 2.0  # that the slowest contender of a case may take
PHOTO = (500, 375)  # pixels, ImageNet's usual size
DISTINCT = 100  # pictures drawn; the other files are links to them
TOLERANCE = {".png": 1e-6, ".jpg": 0.05}  # mean error of a pixel in 0..1, of what is read against what was written


@dataclass(frozen=True)
class Files:
    """Pictures in a folder, CLASS/NUMBER.suffix; ``drawn`` holds those of the first files in the order of their names."""

    folder: Path
    suffix: str
    bytes_each: float
    drawn: list[np.ndarray]


def write_files(preset: Preset, folder: Path) -> Files:
    """Enough files for two batches of LGM: the preset's data as PNG, or random smooth photographs as JPEG."""
    require_package("PIL", "writing images", "distill")
    count = 2 * preset.lgm_batch
    pictures, suffix = (_embedded(preset), ".png") if preset.data else (_photographs(), ".jpg")
    each, first = -(-count // preset.classes), []
    originals: list[Path] = []
    for number in range(each * preset.classes):
        target = folder / f"{number // each:05d}" / f"{number % each:05d}{suffix}"
        target.parent.mkdir(exist_ok=True)
        picture = next(pictures, None)
        if picture is None:
            os.link(originals[number % len(originals)], target)
            continue
        _save(picture, target)
        originals.append(target)
        first.append(picture)
    size = sum(path.stat().st_size for path in originals) / len(originals)
    return Files(folder, suffix, size, first)


def _embedded(preset: Preset) -> Iterator[np.ndarray]:
    """The data set's own images, sorted by class, as bytes."""
    source, each = open_dataset(preset.data, "train"), -(-2 * preset.lgm_batch // preset.classes)
    labels: Tensor = source.labels  # type: ignore[attr-defined]
    images: Tensor = source.images  # type: ignore[attr-defined]
    for label in range(preset.classes):
        for image in images[labels == label][:each]:
            yield image.permute(1, 2, 0).squeeze(2).numpy()


def _photographs() -> Iterator[np.ndarray]:
    """Random pictures, rough enough that JPEG makes about as many bytes of them as of ImageNet's photographs."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for _ in range(DISTINCT):
        total = np.zeros((PHOTO[1], PHOTO[0], 3), np.float32)
        for cells, strength in ((8, 60), (40, 30), (200, 32)):
            shape = (cells * PHOTO[1] // PHOTO[0], cells, 3)
            coarse = generator.integers(0, 256, shape, dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize(PHOTO, Image.Resampling.BICUBIC), np.float32)
            total += (smooth - 128) * (strength / 74)  # 74: the deviation of uniform bytes
        yield np.clip(total + 128, 0, 255).astype(np.uint8)


def _save(picture: np.ndarray, path: Path) -> None:
    from PIL import Image

    Image.fromarray(picture).save(path, quality=90)  # which PNG ignores


class OpenLoader(ImageSource):
    """Random batches from a loader that stays open: each worker decodes its part of a batch, and of the next one ahead."""

    def __init__(self, source: MapSource, batch: int, transform: ImageTransform, workers: int) -> None:
        self.name, self.class_names, self.channels = source.name, source.class_names, source.channels
        self.count, self.workers = len(source), workers
        self.loader: Any = torch.utils.data.DataLoader(
            _Decoded(source.dataset, transform),
            batch_sampler=_Parts(self.count, batch, workers),
            num_workers=workers,
            prefetch_factor=1,
        )
        self.parts: Iterator[Any] | None = None

    def __len__(self) -> int:
        return self.count

    def take(self, indices: Sequence[int], transform: ImageTransform) -> tuple[Tensor, Tensor]:
        """The next batch, whatever ``indices`` are."""
        if self.parts is None:
            self.parts = iter(self.loader)
        images, labels = zip(*itertools.islice(self.parts, self.workers), strict=True)
        return torch.cat(images), torch.cat(labels)

    def close(self) -> None:
        """End the workers."""
        self.parts = None


class _Parts(torch.utils.data.Sampler):
    """Endless: a random batch of ``batch`` of ``count`` images, in ``parts`` lists of indices, then the next."""

    def __init__(self, count: int, batch: int, parts: int) -> None:
        self.count, self.batch, self.parts = count, batch, parts

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            drawn = torch.randperm(self.count, generator=generator)[: self.batch]
            yield from (part.tolist() for part in drawn.tensor_split(self.parts))


class _Decoded(torch.utils.data.Dataset):
    def __init__(self, dataset: Any, transform: ImageTransform) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index]
        return self.transform(image), int(label)


def verdict_of(source: ImageSource, files: Files, transform: ImageTransform) -> str:
    """ "" where the first files read as they were written, else the status that says how far off they are."""
    chosen = range(min(8, len(files.drawn)))
    read, _ = source.take(list(chosen), transform)
    wanted = torch.stack([transform(files.drawn[index]) for index in chosen])
    off = float((read - wanted).abs().mean())
    return "" if off <= TOLERANCE[files.suffix] else f"wrong result: pixels off by {off:.0e}"


def rows(
    preset: str | Preset,
    device: torch.device,
    only: str = "",
    *,
    seconds: float = SECONDS,
    workers: int | None = None,
) -> Iterator[list[Row]]:
    """The rows of each case whose name contains ``only``: one batch (mode "load"), and LGM's step (mode "step").

    workers: processes that decode; None takes one a core, at most 8. A large preset's step is left out on a CPU. Raises ``InputError``
    for an unknown preset.
    """
    preset = find_preset(preset)
    count = min(8, os.cpu_count() or 1) if workers is None else workers
    if count < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    cases: tuple[tuple[str, Callable[..., list[Row]]], ...] = (
        (f"{preset.name}: a batch of {preset.lgm_batch} images", _load_rows),
        (f"{preset.name}: a step of LGM closed-form", _step_rows),
    )
    wanted = [(name, make) for name, make in cases if only in name]
    if not wanted:
        return
    with tempfile.TemporaryDirectory(prefix="sfm_fast_loading_") as folder:
        files = write_files(preset, Path(folder))
        for name, make in wanted:
            if make is _step_rows and preset.large and device.type != "cuda":
                continue
            yield make(name, preset, device, files, seconds, count)


def _facts(preset: Preset, files: Files, workers: int) -> dict[str, Any]:
    return {
        "images": preset.lgm_batch,
        "workers": workers,
        "file_bytes": round(files.bytes_each),
        "file_type": files.suffix[1:],
    }


def _load_rows(
    name: str, preset: Preset, device: torch.device, files: Files, seconds: float, workers: int
) -> list[Row]:
    shape = shape_of_backbone(preset.backbone, image_size=preset.image_size, precision="fp32")
    transform, batch = _transform(preset, shape), preset.lgm_batch
    contenders, loader = [], None
    for kind, used in (("open_dataset", 0), ("open_dataset", workers), ("loader kept open", workers)):
        source = open_dataset(str(files.folder), "train", channels=preset.channels, workers=used)
        verdict = verdict_of(source, files, transform)
        if kind == "loader kept open":
            assert isinstance(source, MapSource)
            source = loader = OpenLoader(source, batch, transform, used)
        title = f"{kind}, {used} workers" if used else f"{kind}, this process"
        call = _taking(source, batch, transform)
        contenders.append(Contender(title, call, verdict, facts=_facts(preset, files, used)))
    case = {"suite": SUITE, "case": name, "classes": preset.classes, "ipc": preset.ipc, "views": preset.lgm_views}
    assert loader is not None
    found = _measure(contenders, loader, case, "load", torch.device("cpu"), seconds)
    for row in found:
        if row["status"] == "ok":
            row["images_per_second"] = preset.lgm_batch / row["median"]
    return found


def _measure(
    contenders: list[Contender],
    loader: OpenLoader,
    case: dict[str, Any],
    mode: str,
    device: torch.device,
    seconds: float,
) -> list[Row]:
    """All in turn, but the last, the open loader's, alone and without a ratio."""
    found = []
    try:
        for group in (contenders[:-1], contenders[-1:]):
            found += measure(group, suite=SUITE, case=case, mode=mode, device=device, seconds=seconds, memory=False)
    finally:
        loader.close()
    found[-1].pop("ratio", None)
    return found


def _transform(preset: Preset, backbone: Backbone) -> ImageTransform:
    """How LGM's objective reads its real images."""
    return ImageTransform(backbone.image_size, backbone.image_size, preset.channels)


def _taking(source: ImageSource, batch: int, transform: ImageTransform) -> Callable[[], Any]:
    turn = itertools.count()

    def call() -> Any:
        begin = next(turn) % 2 * batch  # two batches in turn
        return source.take(range(begin, begin + batch), transform)

    return call


def _step_rows(
    name: str, preset: Preset, device: torch.device, files: Files, seconds: float, workers: int
) -> list[Row]:
    check_device(preset, device)
    backbone = open_backbone(preset, device)
    transform = _transform(preset, backbone)
    decoded = open_dataset(str(files.folder), "train", channels=preset.channels, workers=workers)
    assert isinstance(decoded, MapSource)
    loader = OpenLoader(decoded, preset.lgm_batch, transform, workers)
    way, wrong = lgm(preset, "closed-form"), verdict_of(decoded, files, transform)
    sources: dict[str, tuple[ImageSource | None, str]] = {
        "LGM closed-form, images in memory": (None, ""),
        f"LGM closed-form, open_dataset with {workers} workers": (decoded, wrong),
        f"LGM closed-form, loader kept open with {workers} workers": (loader, wrong),
    }
    contenders, setting = [], Setting(preset, backbone)
    for title, (source, verdict) in sources.items():
        one = Setting(preset, backbone, source=source)
        made, _, failed = attempt(functools.partial(way.make, one, way), device)
        facts = facts_of(way, setting, None) | _facts(preset, files, 0 if source is None else workers)
        facts["images"] = preset.images
        contenders.append(Contender(title, list if failed else made.step, verdict or failed, facts=facts))
    case = {"suite": SUITE, **case_of(setting, name)}
    return _measure(contenders, loader, case, "step", device, seconds)
