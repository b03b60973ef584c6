"""The contenders of steps and their setting: backbone, data and centres of a shape, and every way of running a step of SFM or LGM."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sfm_fast.backbones.backbone import Backbone
from sfm_fast.backbones.load import arrange, load_backbone, shape_of_backbone
from sfm_fast.backbones.shipped import SHIPPED
from sfm_fast.data.datasets import open_dataset
from sfm_fast.data.sources import ImageSource
from sfm_fast.data.transforms import ImageTransform
from sfm_fast.distill.build import make_distiller
from sfm_fast.distill.config import DistillConfig, Execution
from sfm_fast.distill.images import SyntheticImages, class_labels
from sfm_fast.distill.objectives import LGM_VARIANTS, AnchoredFlowMatching, FlowMatching
from sfm_fast.distill.optimiser import BETAS
from sfm_fast.distill.predict import Prediction, predict_step
from sfm_fast.errors import InputError
from sfm_fast.features.statistics import ClassStatistics

from ..baselines.step import PlainStep, ReferenceStep
from ..presets import STEPS, StepShape

ANCHORED = "sfm-anchored"


def find_shape(preset: str | StepShape) -> StepShape:
    """The shape of the preset with this name. Raises ``InputError`` for an unknown one."""
    if isinstance(preset, StepShape):
        return preset
    if preset not in STEPS:
        raise InputError(f"preset must be one of {tuple(STEPS)}, got {preset!r}")
    return STEPS[preset]


def check_device(shape: StepShape, device: torch.device) -> None:
    """Raise ``InputError`` if ``device`` is a CPU and a step of ``shape`` would take minutes."""
    if shape.large and device.type != "cuda":
        raise InputError(
            f"preset {shape.name!r} needs a CUDA GPU, got device {str(device)!r}; its memory and operations can be predicted anywhere "
            "(--predict)"
        )


def open_backbone(shape: StepShape, device: torch.device, *, compile: bool = False, weights: bool = True) -> Backbone:
    """A shipped backbone, or a timm model with random weights (memory and time are the same). Without ``weights``: no values."""
    if weights and shape.backbone in SHIPPED:
        return load_backbone(shape.backbone, device=device, precision=shape.precision, compile=compile)
    empty = shape_of_backbone(shape.backbone, image_size=shape.image_size, precision=shape.precision)
    return with_random_weights(empty, device, compile=compile) if weights else empty


def with_random_weights(empty: Backbone, device: torch.device, *, compile: bool = False) -> Backbone:
    """The backbone ``empty`` on ``device`` with the same random weights each time, prepared if ``empty`` is."""
    plain = empty.unprepared()
    torch.manual_seed(0)
    model = plain.model.to_empty(device=device).requires_grad_(False)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            value.fill_(1) if name.endswith("running_var") else value.normal_(std=0.02)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
    plain = replace(plain, model=model, mean=empty.mean.to(device), std=empty.std.to(device))
    return arrange(plain, empty.precision, False, compile, prepare=bool(empty.prepared))


class RandomImages(ImageSource):
    """A batch of random images on the device, as if from a loader that takes no time."""

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
        """A copy of the first images: the choice makes no difference, and a loaded batch also takes memory."""
        return self.images[: len(indices)].clone(), self.labels[: len(indices)]


class Setting:
    """The common parts of the contenders of ``shape``: backbone, centres and real images. ``noise``: whether views have noise."""

    def __init__(
        self, shape: StepShape, backbone: Backbone, *, noise: bool = True, source: ImageSource | None = None
    ) -> None:
        self.shape, self.backbone, self.noise, self._source = shape, backbone, noise, source
        self.statistics = ClassStatistics(shape.classes, backbone.num_features)
        features = torch.randn(2 * shape.classes, backbone.num_features, generator=torch.Generator().manual_seed(0))
        self.statistics.update(features, torch.arange(len(features)) % shape.classes)
        self.statistics.provenance = {"channels": shape.channels}

    @functools.cached_property
    def source(self) -> ImageSource:
        shape, backbone = self.shape, self.backbone
        if self._source is not None:
            return self._source
        if shape.data:
            return open_dataset(shape.data, "train")
        return RandomImages(shape.lgm_batch, shape.channels, backbone.image_size, shape.classes, backbone.device)

    def config(self, way: DistillConfig) -> DistillConfig:
        """``way`` in this setting."""
        views = self.shape.lgm_views if way.method == "lgm" else self.shape.views
        return replace(way, ipc=self.shape.ipc, views=views, noise=self.noise)

    def images(self) -> SyntheticImages:
        """The images at the start of a run, with all levels live."""
        images = SyntheticImages(
            self.shape.images, self.shape.channels, self.backbone.image_size, device=self.backbone.device
        )
        while not images.fully_grown:
            images.grow()
        return images

    @property
    def labels(self) -> Tensor:
        return class_labels(self.shape.classes, self.shape.ipc, self.backbone.device)


@dataclass(frozen=True)
class Made:
    """A step, ready to be called again and again, and the images' gradient (N, floats of an image) after its first call."""

    step: Callable[[], Any]
    gradient: Callable[[], Tensor]


@dataclass(frozen=True)
class Way:
    """One way of running a step. ``config``: its method. ``replays_noise``: its noise is the package's, number by number.

    ours: it is this package's, not a baseline. predictable: `predict_step` supports it.
    """

    name: str
    make: Callable[[Setting, Way], Made]
    micro_batch: int
    config: DistillConfig = field(default_factory=DistillConfig.paper)
    host: bool = False
    replays_noise: bool = True
    predictable: bool = True
    ours: bool = True

    @property
    def method(self) -> str:
        return self.config.method

    @property
    def is_lgm(self) -> bool:
        return self.method == "lgm"

    def predict(self, setting: Setting) -> Prediction | None:
        """Memory and operations of a step; None where they can't be predicted."""
        if not self.predictable:
            return None
        shape, config = setting.shape, setting.config(self.config)
        return predict_step(
            config, setting.backbone, shape.classes, shape.channels, self.micro_batch, host_state=self.host
        )


def distilled(setting: Setting, way: Way) -> Made:
    """A step of this package's own `Distiller`."""
    distiller = make_distiller(
        setting.config(way.config),
        setting.backbone,
        setting.source if way.is_lgm else None,
        setting.statistics,
        execution=Execution(way.micro_batch, state="host" if way.host else "device"),
    )
    distiller.grow_fully()

    def step() -> None:
        distiller.step()
        if distiller.micro_batch < way.micro_batch:  # a run continues in smaller ones; here that is another contender
            raise MemoryError("out of memory")

    return Made(step, lambda: distiller.optimiser.exp_avg / (1 - BETAS[0]))


def plain(setting: Setting, way: Way) -> Made:
    """A step as usually written in torch."""
    centers = setting.statistics.centers.to(setting.backbone.device).float()
    augmentation = setting.config(way.config).augmentation
    step = PlainStep(setting.backbone, centers, setting.images(), setting.labels, setting.shape.views, augmentation)
    return Made(step, step.gradient)


def reference(setting: Setting, way: Way) -> Made:
    """The definition, differentiated by autograd."""
    centers = setting.statistics.centers.to(setting.backbone.device)
    kind = {"sfm": FlowMatching, ANCHORED: AnchoredFlowMatching}[way.method]
    objective = kind(centers, views=setting.shape.views, backend="torch")
    augmentation = setting.config(way.config).augmentation
    step = ReferenceStep(setting.backbone, objective, setting.images(), setting.labels, augmentation)
    return Made(step, step.gradient)


def one_shot(shape: StepShape, name: str = "SFM one-shot") -> Way:
    return Way(name, distilled, shape.images)


def micro_batch(size: int, *, host: bool = False, method: str = "sfm") -> Way:
    """``method`` `ANCHORED` has a separable loss, so nothing runs forward twice."""
    name = f"SFM{' anchored' if method == ANCHORED else ''} micro-batch {size}{', state on host' if host else ''}"
    return Way(name, distilled, size, DistillConfig.paper(method=method, length_weight=0.0), host)


def lgm(shape: StepShape, variant: str) -> Way:
    """LGM's ``variant`` in one shot, as its paper runs it."""
    config = DistillConfig.paper(method="lgm", lgm_variant=variant)
    return Way(f"LGM {variant}", distilled, shape.images, config, ours=False)


def ways_of(shape: StepShape) -> list[Way]:
    """Every contender of ``shape``, "SFM one-shot" first."""
    return [
        one_shot(shape),
        *(micro_batch(size) for size in shape.micro_batches),
        *(micro_batch(size, method=ANCHORED) for size in shape.micro_batches),
        micro_batch(shape.micro_batches[0], host=True),
        Way("SFM reference", reference, shape.images, predictable=False),
        Way("SFM plain torch", plain, shape.images, replays_noise=False, predictable=False, ours=False),
        *(lgm(shape, variant) for variant in LGM_VARIANTS),
    ]
