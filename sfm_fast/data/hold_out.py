"""Splits the training images of a data set that has no test images, the same way for every command with the same options."""

from __future__ import annotations

import torch

from .. import philox
from ..errors import InputError
from .folders import FileSource
from .sources import ArraySource
from .spec import HoldOut


def part_of(source: ArraySource | FileSource, split: str, held: HoldOut) -> ArraySource | FileSource:
    """The images of ``source``, all training images, that are in ``split``: "test" for those held out, "train" for the others.

    Whether an image is held out depends only on the seed, its class and its index. Every class has at least one image in both splits;
    raises ``InputError`` for a class with a single image.
    """
    labels = source.labels
    order = philox.uniform(
        torch.arange(len(labels)), 1, seed=held.hold_out_seed, stream=philox.Stream.HOLD_OUT, step=0
    )[:, 0]
    is_held = torch.zeros(len(labels), dtype=torch.bool)
    for label, name in enumerate(source.class_names):
        rows = (labels == label).nonzero().flatten()
        if len(rows) < 2:
            raise InputError(
                f"{source.name}: hold_out needs at least 2 images of every class, but {name!r} has {len(rows)}"
            )
        count = min(max(1, round(held.hold_out * len(rows))), len(rows) - 1)
        is_held[rows[torch.argsort(order[rows], stable=True)[:count]]] = True
    chosen = is_held if split == "test" else ~is_held
    told = f"{100 * held.hold_out:g} % held out by seed {held.hold_out_seed}"
    name = f"{source.name}, the {told}" if split == "test" else f"{source.name} without the {told}"
    return source.subset(chosen.nonzero().flatten().tolist(), name)
