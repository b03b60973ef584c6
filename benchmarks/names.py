"""Names of the suites, presets and comparisons, without torch, for the command line's help."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("bytes", "flops", "times")  # of comparisons
SUITES = (
    "losses",
    "images",
    "step",
    "backbones",
    "loading",
    "scaling",
    "startup",
)  # modules of benchmarks/suites, in the order they run


@dataclass(frozen=True)
class Preset:
    """A choice of sizes for one kind of machine. gpu: without a GPU it can only be predicted."""

    about: str
    gpu: bool = False


PRESETS = {
    "laptop": Preset("embedded data and the shipped backbone, about twelve minutes on 2 cores"),
    "cpu": Preset("backbones prepared and as loaded, on a CPU: ten minutes on 2 cores"),
    "imagenet-100": Preset("ViT-B/14 and 100 classes, for a GPU or --predict", gpu=True),
    "imagenet-1k": Preset("ViT-B/14 and 1000 classes, for a GPU or --predict", gpu=True),
    "full": Preset("the losses at every number of classes and features: half an hour on 2 cores"),
    "small": Preset("small shapes: does everything run"),
}
