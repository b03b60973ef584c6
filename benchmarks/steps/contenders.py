"""Whose step is measured, and on what: presets, their backbone and data, and every way of running a step of SFM or of LGM."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sfm_fast.backbones.backbone import Backbone
from sfm_fast.backbones.load import load_backbone, shape_of_backbone
from sfm_fast.backbones.shipped import DEFAULT, SHIPPED
from sfm_fast.data.datasets import EMBEDDED, open_dataset
from sfm_fast.data.sources import ImageSource
from sfm_fast.data.transforms import ImageTransform
from sfm_fast.distill.build import make_distiller
from sfm_fast.distill.config import DistillConfig, Execution
from sfm_fast.distill.images import SyntheticImages
from sfm_fast.distill.objectives import LGM_VARIANTS, FlowMatching
from sfm_fast.distill.optimiser import BETAS
from sfm_fast.distill.predict import Prediction, predict_step
from sfm_fast.errors import InputError
from sfm_fast.features.statistics import ClassStatistics

from ..baselines.step import PlainStep, ReferenceStep


@dataclass(frozen=True)
class Preset:
    """A setting in which steps are compared.

    channels: of the synthetic images. views, lgm_views: of an image a step, with SFM and with LGM. micro_batches: sizes tried, the
    largest first. data: a data set's name, or "" for random images. large: runs on a GPU alone; anywhere it can be predicted.
    """

    name: str
    backbone: str
    image_size: int | None
    classes: int
    channels: int
    lgm_views: int
    micro_batches: tuple[int, ...]
    ipc: int = 1
    views: int = 1
    precision: str = "fp32"
    data: str = ""
    large: bool = False

    @property
    def images(self) -> int:
        return self.classes * self.ipc

    @property
    def lgm_batch(self) -> int:
        """Real images in a step of LGM."""
        return self.ipc * self.lgm_views * self.classes


VIT_B = "vit_base_patch14_dinov2"
PRESETS = {
    preset.name: preset
    for preset in (
        Preset("small", DEFAULT, None, 4, 1, 2, (2,)),
        Preset("laptop", DEFAULT, None, 10, 1, 10, (5, 2), data=EMBEDDED),
        Preset("imagenet-100", VIT_B, 224, 100, 3, 10, (64, 32, 8), precision="bf16", large=True),
        Preset("imagenet-1k", VIT_B, 224, 1000, 3, 3, (128, 64, 16), precision="bf16", large=True),
    )
}


def find_preset(preset: str | Preset) -> Preset:
    """The preset of that name. Raises ``InputError`` for one that isn't there."""
    if isinstance(preset, Preset):
        return preset
    if preset not in PRESETS:
        raise InputError(f"preset must be one of {tuple(PRESETS)}, got {preset!r}")
    return PRESETS[preset]


def check_device(preset: Preset, device: torch.device) -> None:
    """Raise ``InputError`` where a step of ``preset`` would take minutes, on a CPU."""
    if preset.large and device.type != "cuda":
        raise InputError(
            f"preset {preset.name!r} needs a CUDA GPU, got device {str(device)!r}; its memory and operations can be predicted anywhere "
            "(--predict)"
        )


def open_backbone(preset: Preset, device: torch.device, *, compile: bool = False, weights: bool = True) -> Backbone:
    """The shipped one, or a timm model with random weights: memory and time don't depend on them. Without ``weights``: its shape."""
    if not weights:
        return shape_of_backbone(preset.backbone, image_size=preset.image_size, precision=preset.precision)
    if preset.backbone in SHIPPED:
        return load_backbone(preset.backbone, device=device, precision=preset.precision, compile=compile)
    shape = shape_of_backbone(preset.backbone, image_size=preset.image_size, precision=preset.precision)
    return with_random_weights(shape, device, compile=compile)


def with_random_weights(shape: Backbone, device: torch.device, *, compile: bool = False) -> Backbone:
    """``shape`` on ``device`` with the same random weights each time."""
    torch.manual_seed(0)
    model = shape.model.to_empty(device=device)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            value.normal_(std=0.02)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
    run = torch.compile(model) if compile else None
    return replace(
        shape, model=model.requires_grad_(False), mean=shape.mean.to(device), std=shape.std.to(device), run=run
    )


class RandomImages(ImageSource):
    """A batch of random images that lies on the device, as it would after a loader that costs nothing."""

    def __init__(self, count: int, channels: int, side: int, classes: int, device: torch.device) -> None:
        self.name, self.channels = "random images", channels
        self.class_names = [str(number) for number in range(classes)]
        generator = torch.Generator(device).manual_seed(0)
        self.images = torch.rand(count, channels, side, side, device=device, generator=generator)
        self.labels = torch.arange(count, device=device) % classes

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int, transform: ImageTransform) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True)

    def take(self, indices: Sequence[int], transform: ImageTransform) -> tuple[Tensor, Tensor]:
        """A copy of the first ones: which they are makes no difference, and a loaded batch takes memory too."""
        return self.images[: len(indices)].clone(), self.labels[: len(indices)]


class Setting:
    """What the contenders of ``preset`` share: backbone, centres and real images. ``noise``: whether views have any."""

    def __init__(
        self, preset: Preset, backbone: Backbone, *, noise: bool = True, source: ImageSource | None = None
    ) -> None:
        self.preset, self.backbone, self.noise, self._source = preset, backbone, noise, source
        self.statistics = ClassStatistics(preset.classes, backbone.num_features)
        features = torch.randn(2 * preset.classes, backbone.num_features, generator=torch.Generator().manual_seed(0))
        self.statistics.update(features, torch.arange(len(features)) % preset.classes)
        self.statistics.provenance = {"channels": preset.channels}

    @functools.cached_property
    def source(self) -> ImageSource:
        preset, backbone = self.preset, self.backbone
        if self._source is not None:
            return self._source
        if preset.data:
            return open_dataset(preset.data, "train")
        return RandomImages(preset.lgm_batch, preset.channels, backbone.image_size, preset.classes, backbone.device)

    def config(self, options: dict[str, Any]) -> DistillConfig:
        """Of a run with ``options``."""
        views = self.preset.lgm_views if options.get("method") == "lgm" else self.preset.views
        return DistillConfig(ipc=self.preset.ipc, views=views, noise=self.noise, **options)

    def images(self) -> SyntheticImages:
        """As a run starts, with all levels live."""
        found = SyntheticImages(
            self.preset.images, self.preset.channels, self.backbone.image_size, device=self.backbone.device
        )
        while not found.fully_grown:
            found.grow()
        return found

    @property
    def labels(self) -> Tensor:
        return torch.arange(self.preset.images, device=self.backbone.device) % self.preset.classes


@dataclass(frozen=True)
class Made:
    """A step, ready to be called again and again, and the images' gradient (N, floats of an image) after its first call."""

    step: Callable[[], Any]
    gradient: Callable[[], Tensor]


@dataclass(frozen=True)
class Way:
    """One way of running a step. ``options``: of `DistillConfig`. ``replays_noise``: its noise is the package's, number by number."""

    name: str
    make: Callable[[Setting, Way], Made]
    micro_batch: int
    options: dict[str, Any] = field(default_factory=dict)
    host: bool = False
    replays_noise: bool = True
    predictable: bool = True

    @property
    def is_lgm(self) -> bool:
        return self.options.get("method") == "lgm"

    def predict(self, setting: Setting) -> Prediction | None:
        """Memory and operations of a step; None for a step that `predict_step` doesn't know."""
        if not self.predictable:
            return None
        preset, config = setting.preset, setting.config(self.options)
        return predict_step(
            config, setting.backbone, preset.classes, preset.channels, self.micro_batch, host_state=self.host
        )


def distilled(setting: Setting, way: Way) -> Made:
    """A step of this package's own `Distiller`."""
    execution = Execution(way.micro_batch, state="host" if way.host else "device")
    distiller = make_distiller(
        setting.config(way.options),
        setting.backbone,
        setting.source if way.is_lgm else None,
        setting.statistics,
        execution=execution,
    )
    distiller.grow_fully()
    stock = way.options.get("lgm_variant") == "stock"

    def step() -> None:
        setting.backbone.model.requires_grad_(stock)
        try:
            distiller.step()
        finally:
            setting.backbone.model.requires_grad_(False)
        if (
            distiller.micro_batch < way.micro_batch
        ):  # a run goes on in smaller ones; here that would be another contender
            raise MemoryError("out of memory")

    return Made(step, lambda: distiller.optimiser.exp_avg / (1 - BETAS[0]))


def plain(setting: Setting, way: Way) -> Made:
    """A step as one writes it in torch."""
    centers, augmentation = setting.statistics.centers.to(setting.backbone.device), setting.config({}).augmentation
    step = PlainStep(
        setting.backbone, centers.float(), setting.images(), setting.labels, setting.preset.views, augmentation
    )
    return Made(step, step.gradient)


def reference(setting: Setting, way: Way) -> Made:
    """The definition, differentiated by autograd."""
    centers, augmentation = setting.statistics.centers.to(setting.backbone.device), setting.config({}).augmentation
    objective = FlowMatching(centers, views=setting.preset.views, backend="torch")
    step = ReferenceStep(setting.backbone, objective, setting.images(), setting.labels, augmentation)
    return Made(step, step.gradient)


def ways_of(preset: Preset) -> list[Way]:
    """Every contender of ``preset``, "SFM one-shot" first."""
    count = preset.images
    found = [Way("SFM one-shot", distilled, count)]
    found += [Way(f"SFM micro-batch {size}", distilled, size) for size in preset.micro_batches]
    first = preset.micro_batches[0]
    found.append(Way(f"SFM micro-batch {first}, state on host", distilled, first, host=True))
    found.append(Way("SFM reference", reference, count, predictable=False))
    found.append(Way("SFM plain torch", plain, count, replays_noise=False, predictable=False))
    return found + [lgm(preset, variant) for variant in LGM_VARIANTS]


def lgm(preset: Preset, variant: str) -> Way:
    """LGM's ``variant`` in one shot, as its paper runs it."""
    return Way(f"LGM {variant}", distilled, preset.images, {"method": "lgm", "lgm_variant": variant})
