"""Evaluates a loss for checked arguments: prepares the centres' constants, chooses a backend and calls the operation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_features, check_groups
from ..errors import InputError
from ..ops import backends
from ..ops.cache import TensorCache
from ..ops.flow_alignment import flow_alignment
from ..ops.pair_alignment import Pairs, pair_alignment
from ..ops.render import no_autocast
from ..ops.segments import Segments, segments_of
from ..options import number_of
from ..reference import flow_alignment as reference
from ..reference.class_means import class_means
from ..reference.pair_alignment import count_pairs, grouped_pair_mse, pair_cosine


class Options(NamedTuple):
    """Checked options. alignment: also "decoupled". weight: of "anchored" the length term's, of "decoupled" alpha. delta: of "anchored"."""

    alignment: str
    metric: str
    backend: str
    eps: float
    precision: str
    weight: float = 0.0
    delta: float = math.inf


class Constants(NamedTuple):
    """Constants of one alignment that a loss needs of the centres.

    shift: (D,) float32, subtracted from features before anything is summed. shifted: centres minus shift, (C, D) float64. rows: what
    the kernels take, (C, D) float32; see `rows_of`. anchor: (D,) float64, the anchor minus shift, only for "anchored".
    """

    shift: Tensor
    shifted: Tensor
    rows: Tensor
    anchor: Tensor | None = None

    def part(self, begin: int, end: int) -> Constants:
        """Views for the classes begin..end-1. Only where each class has a term of its own: "anchored", "decoupled" with alpha 1."""
        return self._replace(shifted=self.shifted[begin:end], rows=self.rows[begin:end])


def prepare(centers: Tensor, alignment: str, anchor: Tensor | None = None) -> Constants:
    """Constants of checked centres; ``anchor``: only for "anchored", None is the mean of the centres."""
    # In float64, because float32 would lose digits of the differences next to a large common mean.
    exact = centers.detach().double().contiguous()
    origin = exact.mean(0) if anchor is None else anchor.detach().double()
    shift = origin.float()
    shifted = exact - shift.double()
    rest = origin - shift.double() if alignment == "anchored" else None
    return Constants(shift, shifted, rows_of(shifted, alignment, rest).float(), rest)


def rows_of(shifted: Tensor, alignment: str, anchor: Tensor | None) -> Tensor:
    """The centres as the loss takes them, (C, D) float64: relative to the anchor, shifted for "decoupled", centred for flows."""
    if anchor is not None:
        return shifted - anchor
    return shifted if alignment == "decoupled" else reference.centre_rows(shifted)


constants_of = TensorCache(prepare)


def check_segments(features: Tensor, labels: Tensor | None, constants: Constants) -> Segments | None:
    """Segments of the checked features and labels; None if the features are the class means."""
    classes, dim = constants.rows.shape
    check_features("features", features, dim, "centers")
    if features.device != constants.shift.device:
        raise InputError(f"features are on {features.device}, centers on {constants.shift.device}; move one of them")
    if labels is not None:
        return segments_of(labels, features.shape[0], classes, features.device)
    if features.shape[0] != classes:
        raise InputError(
            f"features must have {classes} rows, one mean per class, if labels is None, got {features.shape[0]}"
        )
    return None


def evaluate(
    features: Tensor,
    labels: Tensor | None,
    constants: Constants,
    options: Options,
    pairs: Pairs = Pairs(None, 0),
) -> Tensor:
    """The loss of checked options over the classes of ``constants``, which may be a `Constants.part`; checks features and labels."""
    alignment, metric, backend, eps, precision, weight, delta = options
    segments = check_segments(features, labels, constants)
    grouped = pairs.groups is not None
    chosen = backends.choose(features.device.type, features.dtype, backend, alignment, metric, grouped).backend
    kind = reference.KINDS.get((alignment, metric))
    if torch._C._are_functorch_transforms_active():
        chosen = "torch"  # the other backends don't support torch.func's transforms
        if kind is None:
            raise InputError(
                "alignment='pair' with metric='cosine' can't run inside torch.func transforms: use torch.autograd.grad or another metric"
            )
    if chosen == "torch":
        loss = in_torch(features, segments, constants, kind, options, pairs)
    elif kind is None:
        high = precision == "high"
        loss = pair_alignment(
            features, segments, constants.rows, constants.shift, pairs, eps=eps, high=high, backend=chosen
        )
    else:
        anchor = None if constants.anchor is None else constants.anchor.float()
        loss = flow_alignment(
            features,
            segments,
            constants.rows,
            constants.shift,
            kind,
            anchor=anchor,
            eps=eps,
            weight=weight,
            delta=delta,
            backend=chosen,
        )
    if segments is None or segments.in_range is None:
        return loss
    return torch.where(segments.in_range, loss, torch.nan)


def in_torch(
    features: Tensor,
    segments: Segments | None,
    constants: Constants,
    kind: int | None,
    options: Options,
    pairs: Pairs,
) -> Tensor:
    dtype, eps, anchor = compute_dtype(features), options.eps, constants.anchor
    exact = dtype == torch.float64
    centers = rows_of(constants.shifted, options.alignment, anchor) if exact else constants.rows
    shift, anchor = constants.shift.to(dtype), None if anchor is None else anchor.to(dtype)
    order, offsets = (None, None) if segments is None else (segments.order, segments.offsets)
    # Without autocast, which would compute the products of a float32 result in low precision.
    with no_autocast(features.device):
        if kind is not None and pairs.groups is None:
            weight, delta = options.weight, options.delta
            return reference.flow_alignment(features, order, offsets, centers, shift, anchor, kind, eps, weight, delta)
        means = class_means(features, order, offsets, shift)
        if kind is None:
            return pair_cosine(centers, means, eps, pairs.groups, pairs.number)
        assert pairs.groups is not None
        return grouped_pair_mse(centers, means, pairs.groups, pairs.number)


def compute_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


PRECISIONS = ("highest", "high")
LEAST_EPS = 1e-18  # its square is a float32 number that isn't subnormal


_count_pairs = TensorCache(count_pairs)


def pairs_of(centers: Tensor, groups: Tensor | None) -> Pairs:
    """The pairs of ``centers``; raises ``InputError`` if ``groups`` don't fit, or leave no pair."""
    if groups is None:
        return Pairs(None, centers.shape[0] * (centers.shape[0] - 1))
    check_groups(groups, centers)
    count = _count_pairs(groups)
    readable = not torch.compiler.is_compiling() and not count.is_meta and type(count) is Tensor
    if readable and count == 0:
        raise InputError("groups must hold at least two classes, got one: no flow is left")
    return Pairs(groups, count)


def check_options(
    alignment: str = "global",
    metric: str = "cosine",
    backend: str = "auto",
    eps: float = 1e-8,
    precision: str = "highest",
    groups: Tensor | None = None,
    length_weight: float = 0.0,
    length_delta: float | None = None,
) -> Options:
    backends.check_names(alignment, metric, backend)
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise InputError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    if not LEAST_EPS <= number_of(eps) <= 1e30:
        raise InputError(f"eps must be a number from {LEAST_EPS:g} to 1e30, got {eps!r}")
    if groups is not None and alignment != "pair":
        raise InputError(f"alignment must be 'pair' if groups is given, got {alignment!r}")
    if not 0 <= number_of(length_weight) <= 1e30:
        raise InputError(f"length_weight must be a number from 0 to 1e30, got {length_weight!r}")
    if length_weight and alignment != "anchored":
        raise InputError(f"alignment must be 'anchored' if length_weight is given, got {alignment!r}")
    if length_delta is not None and not 0 < number_of(length_delta) <= 1e30:
        raise InputError(f"length_delta must be None or a number above 0 up to 1e30, got {length_delta!r}")
    if length_delta is not None and alignment != "anchored":
        raise InputError(f"alignment must be 'anchored' if length_delta is given, got {alignment!r}")
    delta = math.inf if length_delta is None else float(length_delta)
    return Options(alignment, metric, backend, float(eps), precision, float(length_weight), delta)
