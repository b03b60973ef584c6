"""Runs `sfm-fast info`."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from typing import Any

import torch

from ...backbones.shipped import DEFAULT, SHIPPED
from ...errors import InputError
from ...files import load_tensors
from ...ops.backends import explain
from ...version import __version__
from . import common

_PACKAGES = ("torch", "numpy", "timm", "safetensors", "torchvision", "triton", "scikit-learn", "tensorboard")


def run(args: argparse.Namespace) -> None:
    versions = {"sfm_fast": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = ["cpu", *(["cuda"] if gpus else [])]
    choices = {device: explain(torch.empty(2, 1, device=device)) for device in devices}
    cards = {}
    for name, path in SHIPPED.items():
        try:
            cards[name] = load_tensors(path)[1]
        except (
            InputError
        ) as error:  # safetensors is missing when only the losses are installed; the report must still be printed
            cards[name] = {"figures": str(error)}
    result: dict[str, Any] = {
        "versions": versions,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "backend": {device: choice.reasons for device, choice in choices.items()},
        "backbone": cards[DEFAULT],
        "shipped": cards,
    }
    lines = [
        *(f"{name:14} {version}" for name, version in versions.items()),
        f"{'threads':14} {torch.get_num_threads()}",
        f"{'gpus':14} {', '.join(gpus) or 'none'}",
        *(f"losses on {device} tensors run on {choice}" for device, choice in choices.items()),
        *(f"{name}: {card['figures']}" for name, card in cards.items()),
    ]
    common.finish(args, result, *lines)
