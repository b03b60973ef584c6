"""Evaluates a loss for checked arguments: prepares the centres' constants, chooses a backend and calls the operation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_features, check_groups
from ..errors import InputError
from ..ops import backends
from ..ops.backends import ALIGNMENTS, BACKENDS, METRICS
from ..ops.cache import TensorCache
from ..ops.flow_alignment import flow_alignment
from ..ops.pair_alignment import Pairs, pair_alignment
from ..ops.render import no_autocast
from ..ops.segments import Segments, segments_of
from ..reference import flow_alignment as reference
from ..reference.class_means import class_means
from ..reference.pair_alignment import count_pairs, grouped_pair_mse, pair_cosine


class Options(NamedTuple):
    alignment: str
    metric: str
    backend: str
    eps: float
    precision: str


class Constants(NamedTuple):
    """Constants that a loss needs of the centres: the shift (D,) float32, the shifted centres (C, D) float64, the centred ones (C, D) float32."""

    shift: Tensor
    shifted: Tensor
    centred: Tensor


def prepare(centers: Tensor) -> Constants:
    # In float64, because float32 would lose digits of the differences next to a large common mean.
    exact = centers.detach().double().contiguous()
    shift = exact.mean(0).float()
    shifted = exact - shift.double()
    return Constants(shift, shifted, reference.centre_rows(shifted).float())


def _to_float32(tensor: Tensor) -> Tensor:
    return tensor.float()


constants_of = TensorCache(prepare)
shifted_float32 = TensorCache(_to_float32)


def check_segments(features: Tensor, labels: Tensor | None, constants: Constants) -> Segments | None:
    """Segments of the checked features and labels; None if the features are the class means."""
    classes, dim = constants.centred.shape
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
    pairs: Pairs,
) -> Tensor:
    """The loss of checked centres and options; checks features and labels."""
    alignment, metric, backend, eps, precision = options
    segments = check_segments(features, labels, constants)
    chosen = backends.explain(
        features, alignment=alignment, metric=metric, backend=backend, grouped=pairs.groups is not None
    ).backend
    kind = reference.KINDS.get((alignment, metric))
    if torch._C._are_functorch_transforms_active():
        chosen = "torch"  # the other backends don't support torch.func's transforms
        if kind is None:
            raise InputError(
                "alignment='pair' with metric='cosine' can't run inside torch.func transforms: use torch.autograd.grad or another metric"
            )
    shift, centred = constants.shift, constants.centred
    if chosen == "torch":
        if features.dtype == torch.float64:
            centred = reference.centre_rows(constants.shifted)
        return in_torch(features, segments, centred, shift, kind, eps, 1.0, pairs)
    if kind is None:
        loss = pair_alignment(
            features, segments, centred, shift, pairs, eps=eps, high=precision == "high", backend=chosen
        )
    else:
        loss = flow_alignment(features, segments, centred, shift, kind, eps=eps, backend=chosen)
    return nan_out_of_range(loss, segments)


def evaluate_decoupled(
    features: Tensor, labels: Tensor | None, constants: Constants, options: Options, alpha: float
) -> Tensor:
    """The decoupled loss of checked options; checks features and labels."""
    segments = check_segments(features, labels, constants)
    chosen = backends.explain(features, metric="mse", backend=options.backend).backend
    if torch._C._are_functorch_transforms_active():
        chosen = "torch"
    kind, shift = reference.DECOUPLED, constants.shift
    if chosen == "torch":
        return in_torch(features, segments, constants.shifted, shift, kind, options.eps, alpha)
    centers = shifted_float32(constants.shifted)
    loss = flow_alignment(features, segments, centers, shift, kind, alpha=alpha, backend=chosen)
    return nan_out_of_range(loss, segments)


def in_torch(
    features: Tensor,
    segments: Segments | None,
    centers: Tensor,
    shift: Tensor,
    kind: int | None,
    eps: float,
    alpha: float,
    pairs: Pairs = Pairs(None, 0),
) -> Tensor:
    dtype = compute_dtype(features)
    centers, shift = centers.to(dtype), shift.to(dtype)
    order, offsets = (None, None) if segments is None else (segments.order, segments.offsets)
    # Without autocast, which would compute the products of a float32 result in low precision.
    with no_autocast(features.device):
        if kind is not None and pairs.groups is None:
            loss = reference.flow_alignment(features, order, offsets, centers, shift, kind, eps, alpha)
        else:
            means = class_means(features, order, offsets, shift)
            if kind is None:
                loss = pair_cosine(centers, means, eps, pairs.groups, pairs.number)
            else:
                assert pairs.groups is not None
                loss = grouped_pair_mse(centers, means, pairs.groups, pairs.number)
    return nan_out_of_range(loss, segments)


def nan_out_of_range(loss: Tensor, segments: Segments | None) -> Tensor:
    if segments is None or segments.in_range is None:
        return loss
    return torch.where(segments.in_range, loss, torch.nan)


def compute_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


PRECISIONS = ("highest", "high")


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
    alignment: str, metric: str, backend: str, eps: float, precision: str, groups: Tensor | None
) -> Options:
    if not isinstance(alignment, str) or alignment not in ALIGNMENTS:
        raise InputError(f"alignment must be one of {ALIGNMENTS}, got {alignment!r}")
    if not isinstance(metric, str) or metric not in METRICS:
        raise InputError(f"metric must be one of {METRICS}, got {metric!r}")
    if not isinstance(backend, str) or backend not in ("auto", *BACKENDS):
        raise InputError(f"backend must be 'auto' or one of {BACKENDS}, got {backend!r}")
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise InputError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps <= 1e30:
        raise InputError(f"eps must be a positive number up to 1e30, got {eps!r}")
    if groups is not None and alignment != "pair":
        raise InputError(f"alignment must be 'pair' if groups is given, got {alignment!r}")
    return Options(alignment, metric, backend, float(eps), precision)
