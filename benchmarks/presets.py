"""The presets, and the sizes of every suite; tests check every backend at the sizes that are small enough."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from sfm_fast.backbones.names import DEFAULT
from sfm_fast.data.spec import EMBEDDED
from sfm_fast.settings import ALIGNMENTS

from .names import PRESETS as PRESETS
from .names import SUITES as SUITES
from .names import Preset as Preset
from .shapes import ImageShape, LossShape

# --- losses ------------------------------------------------------------------------------------------------------------


def _losses(alignment: str, classes: tuple[int, ...], dims: tuple[int, ...], ipc: int = 1) -> tuple[LossShape, ...]:
    """Shapes with varied classes at 768 features and with varied features at 1000 classes, each shape once."""
    sizes = [(count, 768) for count in classes] + [(1000, dim) for dim in dims]
    return tuple(LossShape(alignment, count, dim, ipc, naive=count != 1000) for count, dim in dict.fromkeys(sizes))


def _compiled(names: tuple[str, ...], shapes: tuple[LossShape, ...]) -> tuple[LossShape, ...]:
    """Add torch.compile at the shapes of these names only, since it takes half a minute for each."""
    return tuple(replace(shape, compiled=True) if shape.name in names else shape for shape in shapes)


LOSS_SHAPES: dict[str, tuple[LossShape, ...]] = {
    "small": (
        LossShape("global", 10, 384),
        LossShape("class", 100, 384, 10),
        LossShape("pair", 100, 384),
        LossShape("global", 1000, 768),
    ),
    "laptop": _compiled(
        ("global 1000x768", "pair 1000x768"),
        (
            *_losses("global", (10, 100, 1000, 10_000), (384, 1024)),
            LossShape("global", 1000, 768, 10),
            LossShape("global", 21_841, 1024),
            *_losses("class", (10, 100, 1000, 10_000), (384, 1024)),
            LossShape("class", 1000, 768, 10),
            LossShape("anchored", 1000, 768),
            LossShape("anchored", 1000, 768, 10),
            *_losses("pair", (10, 100, 1000, 4000), (384, 1024)),
        ),
    ),
    # The most useful shapes for a few minutes on a GPU.
    "imagenet-100": tuple(LossShape(alignment, 100, 768) for alignment in ALIGNMENTS),
    "imagenet-1k": (
        LossShape("global", 1000, 768, compiled=True),
        LossShape("global", 21_841, 1024),
        LossShape("global", 200_000, 1024),
        LossShape("class", 21_841, 1024),
        LossShape("anchored", 21_841, 1024),
        LossShape("pair", 1000, 768, compiled=True),
        LossShape("pair", 21_841, 1024),
    ),
    "full": _compiled(
        ("global 10x384", "global 1000x768", "global 21841x1024", "class 1000x768", "pair 10x384", "pair 1000x768"),
        tuple(
            LossShape(alignment, classes, dim, ipc, keops=alignment == "pair" and (classes, dim) in ((10, 384), (1000, 768)))
            for alignment in ALIGNMENTS
            for classes in (10, 100, 1000, 10_000, 21_841)
            for dim in (384, 768, 1024)
            for ipc in ((1, 10) if alignment != "pair" else (1,))
        ),
    ),
}  # fmt: skip


# --- the image path ----------------------------------------------------------------------------------------------------

IMAGE_SHAPES: dict[str, tuple[ImageShape, ...]] = {
    "small": (ImageShape(10, 28, 28, 1), ImageShape(2, 64, 56)),
    "laptop": (
        ImageShape(10, 28, 28, 1),
        ImageShape(10, 256, 224, compiled=True),
        ImageShape(100, 256, 224),
        ImageShape(100, 256, 224, dtype="bfloat16"),
    ),
    "imagenet-100": (ImageShape(100, 256, 224, compiled=True), ImageShape(100, 256, 224, dtype="bfloat16")),
    "imagenet-1k": (ImageShape(1000, 256, 224, dtype="bfloat16"),),
}


# --- whole steps, loading ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepShape:
    """A setting in which steps are compared.

    channels: of the synthetic images. views, lgm_views: per image and step, with SFM and with LGM. micro_batches: sizes tried, the
    largest first. data: a data set's name, or "" for random images. large: runs only on a GPU, but can be predicted anywhere.
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
STEPS = {
    shape.name: shape
    for shape in (
        StepShape("small", DEFAULT, None, 4, 1, 2, (2,)),
        StepShape("laptop", DEFAULT, None, 10, 1, 10, (5, 2), data=EMBEDDED),
        StepShape("imagenet-100", VIT_B, 224, 100, 3, 10, (64, 32, 8), precision="bf16", large=True),
        StepShape("imagenet-1k", VIT_B, 224, 1000, 3, 3, (128, 64, 16), precision="bf16", large=True),
    )
}


# --- prepared backbones ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """A batch of ``images`` random images of ``image_size`` pixels (None: the model's own size) through ``backbone``."""

    backbone: str
    image_size: int | None
    images: int

    @property
    def name(self) -> str:
        return self.backbone + ("" if self.image_size is None else f" at {self.image_size} px")


BACKBONE_BATCHES: dict[str, tuple[Batch, ...]] = {
    "small": (Batch("resnet10t", 64, 2),),
    "cpu": (
        Batch("fashion_vit", None, 32),
        Batch("fashion_cnn", None, 32),
        Batch("tf_efficientnet_lite0", 96, 8),
        Batch("tf_efficientnet_lite2", 96, 8),
        Batch("mobilenetv2_100", 96, 8),
        Batch("mobilenetv3_small_100", 96, 8),
        Batch("resnet18", 96, 8),
        Batch("resnet50", 96, 8),
        Batch("resnetv2_50", 96, 8),
        Batch("regnety_002", 96, 8),
        Batch("convnext_tiny", 96, 8),
        Batch("swin_tiny_patch4_window7_224", 224, 2),
        Batch("vit_small_patch16_224", 224, 2),
        Batch("vit_small_patch14_reg4_dinov2", 224, 2),
        Batch("eva02_tiny_patch14_224", 224, 2),
        Batch("vit_base_patch16_clip_224", 224, 2),
    ),
}  # fmt: skip
BACKBONE_STEPS: dict[str, tuple[StepShape, ...]] = {
    "small": (StepShape(f"{DEFAULT}, 4 classes, A = 2", DEFAULT, None, 4, 1, 2, ()),),
    "cpu": (
        StepShape("fashion_vit, 10 classes, A = 10", "fashion_vit", None, 10, 1, 10, (), data=EMBEDDED),
        StepShape("fashion_cnn, 10 classes, A = 10", "fashion_cnn", None, 10, 1, 10, (), data=EMBEDDED),
        StepShape("lite0 at 64 px, 10 classes, A = 10", "tf_efficientnet_lite0", 64, 10, 3, 10, ()),
        StepShape("ViT-S at 96 px, 10 classes, A = 3", "vit_small_patch16_224", 96, 10, 3, 3, ()),
    ),
}  # fmt: skip


# --- scaling -----------------------------------------------------------------------------------------------------------

VIT = "vit_of_width_"  # and a number: a ViT like the shipped one, of that width


@dataclass(frozen=True)
class Axes:
    """The numbers that are varied from ``shape``. backbones: of different widths."""

    shape: StepShape
    classes: tuple[int, ...]
    ipc: tuple[int, ...]
    views: tuple[int, ...]
    backbones: tuple[str, ...]

    def points(self) -> list[tuple[str, int | None, StepShape]]:
        """(what is varied, its value, the shape with it), the small ones of every axis first; None: a width, which the backbone knows."""
        shape = self.shape
        axes: list[list[tuple[str, int | None, StepShape]]] = [
            [("classes", value, replace(shape, classes=value)) for value in self.classes],
            [("ipc", value, replace(shape, ipc=value)) for value in self.ipc],
            [("views", value, replace(shape, views=value, lgm_views=value)) for value in self.views],
            [("dim", None, replace(shape, backbone=name)) for name in self.backbones],
        ]
        return [point for places in itertools.zip_longest(*axes) for point in places if point is not None]


SCALING = {
    "small": Axes(replace(STEPS["small"], backbone=f"{VIT}64"), (2, 4), (1, 2), (1,), (f"{VIT}64",)),
    "laptop": Axes(
        replace(STEPS["laptop"], backbone=f"{VIT}192", data=""),  # a backbone like the shipped one
        (10, 20, 50, 100),
        (1, 2, 5, 10),
        (1, 3, 4, 10),
        tuple(f"{VIT}{width}" for width in (96, 192, 384, 768)),
    ),
    "imagenet-100": Axes(
        STEPS["imagenet-100"],
        (10, 100, 1000, 10000),
        (1, 2, 5, 10),
        (1, 3, 4, 10),
        tuple(f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large")),
    ),
}
