"""What preparing a frozen backbone saves (`sfm_fast.backbones.prepare_frozen`): time and memory of a forward and backward pass to the image, and of steps.

    sfm-fast bench --preset cpu --suite backbones
    sfm-fast bench --preset cpu --suite backbones --only resnet

A case with a model's name alone is forward and backward of one batch of random images, with what autograd keeps in between
(`saved_bytes`). A case "step …" is one step of SFM and of each form of LGM, with the backbone prepared and as loaded; LGM stock always
has it as loaded. Weights of timm's models are random: time and memory don't depend on them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sfm_fast.backbones.backbone import Backbone
from sfm_fast.backbones.load import load_backbone
from sfm_fast.backbones.shipped import SHIPPED

from ..cells import Cell
from ..harness import Contender, Plan, measure
from ..presets import BACKBONE_BATCHES, BACKBONE_STEPS, Batch, StepShape
from ..registry import Cells, Options, suite
from ..rows import Row
from ..steps.contenders import Made, Setting, Way, lgm, one_shot
from ..steps.rows import StepRun, case_of, verdicts

SUITE = "backbones"
AS_LOADED = "as loaded"
# Of the images' gradient, relative. Rounding switches some ReLUs of such nets on or off, which changes the gradient by 2e-3 to 3e-3;
# the tests compare in float64, where it is 1e-10.
TOLERANCE = 1e-2
PLAN = Plan(seconds=4.0)


def opened(name: str, image_size: int | None, device: torch.device) -> Backbone:
    weights = "pretrained" if name in SHIPPED else "random"
    return load_backbone(name, device=device, image_size=image_size, weights=weights, precision="fp32")


def passes(backbone: Backbone, images: Tensor, cotangent: Tensor) -> Tensor:
    """The gradient of the features' product with ``cotangent`` with respect to the images."""
    leaf = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(backbone(leaf), leaf, cotangent)
    return gradient


def saved_bytes(backbone: Backbone, images: Tensor) -> int:
    """What a forward pass keeps for the backward pass, each memory once, without weights and the images themselves."""
    standing = {tensor.untyped_storage().data_ptr() for tensor in [*backbone.model.state_dict().values(), images]}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in standing:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features = backbone(images.detach().requires_grad_())  # alive, so that no memory is counted twice
    del features
    return sum(kept.values())


def batch_rows(batch: Batch, device: torch.device) -> list[Row]:
    """Prepared and as loaded, forward and backward of one batch."""
    prepared = opened(batch.backbone, batch.image_size, device)
    plain = prepared.unprepared()
    generator = torch.Generator().manual_seed(0)
    size = prepared.input_size
    images = torch.randn(batch.images, prepared.in_channels, size, size, generator=generator).to(device)
    cotangent = torch.randn(batch.images, prepared.num_features, generator=generator).to(device)
    expected = passes(plain, images, cotangent)
    off = float((passes(prepared, images, cotangent) - expected).norm() / expected.norm())
    case = Row(
        SUITE, batch.name, mode="both", backbone=batch.backbone, image_size=size, images=batch.images, precision="fp32",
        dim=prepared.num_features,
    )  # fmt: skip
    contenders = []
    for name, backbone in (("prepared", prepared), (AS_LOADED, plain)):
        row = replace(case, contender=name, ours=backbone is prepared, saved_bytes=saved_bytes(backbone, images))
        verdict = "" if backbone is plain or off <= TOLERANCE else f"wrong result: gradient off by {off:.0e}"
        contenders.append(Contender(row, functools.partial(passes, backbone, images, cotangent), verdict))
    return measure(contenders, device, PLAN)


def step_rows(shape: StepShape, device: torch.device) -> list[Row]:
    """One step of every method, with the backbone prepared and as loaded."""
    backbone = opened(shape.backbone, shape.image_size, device)
    setting, plain = Setting(shape, backbone), Setting(shape, backbone.unprepared())
    ways = [one_shot(shape, "SFM"), *(lgm(shape, variant) for variant in ("closed-form", "frozen"))]
    every: list[Way] = []
    for way in ways:
        every += [way, replace(way, name=f"{way.name}, {AS_LOADED}", make=_on(plain, way.make), ours=False)]
    every.append(lgm(shape, "stock"))
    checked = verdicts([*ways, every[-1]], shape, backbone, tolerance=TOLERANCE)
    checked |= {way.name: checked[way.name.removesuffix(f", {AS_LOADED}")] for way in every}
    run = StepRun(
        setting, case_of(SUITE, step_name(shape), setting), device, PLAN, checked, {way.name: None for way in every}
    )
    return [row for rows in run.measured(every, ("step",)) for row in rows]


def _on(setting: Setting, make: Callable[[Setting, Way], Made]) -> Callable[[Setting, Way], Made]:
    return lambda _, way: make(setting, way)


def step_name(shape: StepShape) -> str:
    return f"step {shape.name}"


@suite(SUITE, "Prepared backbones", "the backbone as loaded, with SFM and LGM", presets=BACKBONE_BATCHES)
def cells(preset: str, device: torch.device, options: Options) -> Cells:
    for batch in BACKBONE_BATCHES[preset]:
        yield Cell(batch.name, functools.partial(batch_rows, batch, device))
    for shape in BACKBONE_STEPS[preset]:
        yield Cell(step_name(shape), functools.partial(step_rows, shape, device))
