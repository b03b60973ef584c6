"""One row of an evaluation, as written to JSON."""

from __future__ import annotations

from typing import TypedDict


class Row(TypedDict, total=False):
    """Accuracy of classifiers from one set of images over several seeds.

    images: a distilled set's method or a reference. distilled_on: the backbone that made or chose the images.
    ``top…``: accuracies in 0..1. parameters, bytes_…: of what prediction needs besides the backbone. seconds: time of the row.
    The other fields are the settings of the mode.
    """

    images: str
    mode: str
    ipc: int
    method: str
    run: str
    backbone: str
    distilled_on: str | None
    top1_mean: float
    top1_std: float
    top5_mean: float
    top5_std: float
    solver: str | None
    fit_seconds: float
    seconds: float
    parameters: int
    parameters_folded: int
    bytes_fp32: int
    bytes_bf16: int
    penalties: list[float]
    seeds: int
    epochs: int
    views: int
    min_area: float
    projector: str
    blends: bool
    temperature: float
    alpha: float


class LeftOut(TypedDict):
    """A reference without a row, and the reason."""

    images: str
    ipc: int
    reason: str
