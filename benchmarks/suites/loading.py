"""LGM's cost of loading real images: a step's batch alone, and its step with images from files against images in memory.

    sfm-fast bench --preset laptop --suite loading

The files are in a temporary folder, read by this package's `open_dataset` (with a new loader for every batch, as its LGM does)
and by a loader that stays open and decodes the next batch meanwhile. The latter is measured alone, since it would work during
the others' turns. SFM loads no images and has no row.
"""

from __future__ import annotations

import functools
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from sfm_fast.errors import require_package

from ..cells import Cell
from ..harness import Contender, Plan, attempt, measure
from ..presets import STEPS, StepShape
from ..registry import Cells, Options, suite
from ..rows import Row
from ..steps.contenders import Setting, check_device, find_shape, lgm, open_backbone
from ..steps.rows import case_of, row_of

SUITE = "loading"
PLAN = Plan(seconds=2.0, memory=False)
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


def write_files(shape: StepShape, folder: Path) -> Files:
    """Enough files for two batches of LGM: the shape's data as PNG, or random smooth photographs as JPEG."""
    require_package("PIL", "writing images", "distill")
    count = 2 * shape.lgm_batch
    pictures, suffix = (_embedded(shape), ".png") if shape.data else (_photographs(), ".jpg")
    each, first = -(-count // shape.classes), []
    originals: list[Path] = []
    for number in range(each * shape.classes):
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


def _embedded(shape: StepShape) -> Iterator[np.ndarray]:
    """The data set's own images, sorted by class, as bytes."""
    source, each = open_dataset(shape.data, "train"), -(-2 * shape.lgm_batch // shape.classes)
    labels: Tensor = source.labels  # type: ignore[attr-defined]
    images: Tensor = source.images  # type: ignore[attr-defined]
    for label in range(shape.classes):
        for image in images[labels == label][:each]:
            yield image.permute(1, 2, 0).squeeze(2).numpy()


def _photographs() -> Iterator[np.ndarray]:
    """Random pictures, with enough detail that their JPEG files are about as large as ImageNet's photographs."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for _ in range(DISTINCT):
        total = np.zeros((PHOTO[1], PHOTO[0], 3), np.float32)
        for cells, strength in ((8, 60), (40, 30), (200, 32)):
            size = (cells * PHOTO[1] // PHOTO[0], cells, 3)
            coarse = generator.integers(0, 256, size, dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize(PHOTO, Image.Resampling.BICUBIC), np.float32)
            total += (smooth - 128) * (strength / 74)  # 74: the deviation of uniform bytes
        yield np.clip(total + 128, 0, 255).astype(np.uint8)


def _save(picture: np.ndarray, path: Path) -> None:
    from PIL import Image

    Image.fromarray(picture).save(path, quality=90)  # PNG ignores quality


class OpenLoader(ImageSource):
    """Random batches from a loader that stays open: each worker decodes its part of a batch, and of the next one in advance."""

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
    """Endless random batches of ``batch`` of ``count`` images, each in ``parts`` lists of indices."""

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
    """ "" if the first files are read as they were written, else the status with the error."""
    chosen = range(min(8, len(files.drawn)))
    read, _ = source.take(list(chosen), transform)
    wanted = torch.stack([transform(files.drawn[index]) for index in chosen])
    off = float((read - wanted).abs().mean())
    return "" if off <= TOLERANCE[files.suffix] else f"wrong result: pixels off by {off:.0e}"


@dataclass(frozen=True)
class Loading:
    """The two cases at ``shape``: one batch alone (mode "load"), and LGM's step with it (mode "step"). workers: processes that decode."""

    shape: StepShape
    device: torch.device
    workers: int
    plan: Plan = PLAN

    def cells(self) -> Cells:
        """Both cases; the files are written when the first one runs. A large shape's step is left out on a CPU."""
        with tempfile.TemporaryDirectory(prefix="sfm_fast_loading_") as folder:
            files = functools.cache(lambda: write_files(self.shape, Path(folder)))
            yield Cell(self._name(f"a batch of {self.shape.lgm_batch} images"), lambda: self.load_rows(files()))
            if not self.shape.large or self.device.type == "cuda":
                yield Cell(self._name("a step of LGM closed-form"), lambda: self.step_rows(files()))

    def _name(self, what: str) -> str:
        return f"{self.shape.name}: {what}"

    def _row(self, row: Row, files: Files, workers: int) -> Row:
        return replace(row, workers=workers, file_bytes=round(files.bytes_each), file_type=files.suffix[1:])

    def _open(self, files: Files, workers: int) -> MapSource:
        source = open_dataset(str(files.folder), "train", channels=self.shape.channels, workers=workers)
        assert isinstance(source, MapSource)
        return source

    def load_rows(self, files: Files) -> list[Row]:
        shape, batch = self.shape, self.shape.lgm_batch
        backbone = shape_of_backbone(shape.backbone, image_size=shape.image_size, precision="fp32")
        transform = self._transform(backbone)
        name = self._name(f"a batch of {batch} images")
        case = Row(SUITE, name, mode="load", classes=shape.classes, ipc=shape.ipc, views=shape.lgm_views, images=batch)
        loader = OpenLoader(self._open(files, self.workers), batch, transform, self.workers)
        sources: list[tuple[str, int, ImageSource]] = [
            ("open_dataset, this process", 0, self._open(files, 0)),
            (f"open_dataset, {self.workers} workers", self.workers, self._open(files, self.workers)),
            (f"loader kept open, {self.workers} workers", self.workers, loader),
        ]
        contenders = []
        for title, used, source in sources:
            verdict = verdict_of(self._open(files, used) if source is loader else source, files, transform)
            row = self._row(replace(case, contender=title), files, used)
            contenders.append(Contender(row, _taking(source, batch, transform), verdict))
        rows = self._measure(contenders, loader, torch.device("cpu"))
        for row in rows:
            if row.measured:
                row.images_per_second = batch / row.seconds
        return rows

    def step_rows(self, files: Files) -> list[Row]:
        check_device(self.shape, self.device)
        backbone = open_backbone(self.shape, self.device)
        transform, decoded = self._transform(backbone), self._open(files, self.workers)
        loader = OpenLoader(decoded, self.shape.lgm_batch, transform, self.workers)
        way, wrong = lgm(self.shape, "closed-form"), verdict_of(decoded, files, transform)
        sources: dict[str, tuple[ImageSource | None, str]] = {
            "LGM closed-form, images in memory": (None, ""),
            f"LGM closed-form, open_dataset with {self.workers} workers": (decoded, wrong),
            f"LGM closed-form, loader kept open with {self.workers} workers": (loader, wrong),
        }
        setting = Setting(self.shape, backbone)
        case = row_of(case_of(SUITE, self._name("a step of LGM closed-form"), setting), way, setting)
        contenders = []
        for title, (source, verdict) in sources.items():
            one = Setting(self.shape, backbone, source=source)
            made, _, failed = attempt(functools.partial(way.make, one, way), self.device)
            row = self._row(replace(case, contender=title), files, 0 if source is None else self.workers)
            contenders.append(Contender(row, list if failed else made.step, verdict or failed))
        return self._measure(contenders, loader, self.device)

    def _measure(self, contenders: list[Contender], loader: OpenLoader, device: torch.device) -> list[Row]:
        """All in turn, except the last, the open loader's, which is measured alone and without a ratio."""
        try:
            rows = [row for part in (contenders[:-1], contenders[-1:]) for row in measure(part, device, self.plan)]
        finally:
            loader.close()
        rows[-1].ratio = None
        return rows

    def _transform(self, backbone: Backbone) -> ImageTransform:
        """How LGM's objective reads its real images."""
        return ImageTransform(backbone.image_size, backbone.image_size, self.shape.channels)


def _taking(source: ImageSource, batch: int, transform: ImageTransform) -> Callable[[], Any]:
    turn = itertools.count()

    def call() -> Any:
        begin = next(turn) % 2 * batch  # two batches in turn
        return source.take(range(begin, begin + batch), transform)

    return call


@suite(SUITE, "Data loading", "the same images in memory", presets=[name for name in STEPS if name != "small"])
def cells(preset: str, device: torch.device, options: Options) -> Cells:
    return Loading(find_shape(preset), device, workers=min(8, os.cpu_count() or 1)).cells()
