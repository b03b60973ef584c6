"""The public losses: check the arguments, prepare the constants, call the operation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checks import check_centers, check_features, check_groups, check_labels
from .errors import InputError
from .ops import backends
from .ops.cache import TensorCache
from .ops.flow_alignment import flow_alignment
from .ops.pair_alignment import pair_alignment
from .ops.segments import Segments, segments_of
from .reference import flow_alignment as reference
from .reference import gradient_matching
from .reference.class_means import class_means
from .reference.pair_alignment import count_pairs, grouped_pair_mse, pair_cosine

ALIGNMENTS = ("global", "class", "pair")
METRICS = ("cosine", "mse")
PRECISIONS = ("highest", "high")


def flow_alignment_loss(
    features: Tensor,
    centers: Tensor,
    labels: Tensor | None = None,
    *,
    alignment: str = "global",
    metric: str = "cosine",
    backend: str = "auto",
    eps: float = 1e-8,
    precision: str = "highest",
    groups: Tensor | None = None,
) -> Tensor:
    """Statistical flow matching: how far the flows between synthetic class means are from those between real centres.

    Args:
        features: (N, D) synthetic features, float32, float64, bfloat16 or float16, any strides. Differentiable.
        centers: (C, D) centres of the real classes, any float dtype, constant (it must not require grad); C >= 2.
        labels: (N,) int64 class ids in 0..C-1, in any order, every class at least once. ``None``: ``features`` are the
            C class means, in order.
        alignment: "global" (all flows flattened, the paper's), "class" (flow by flow) or "pair" (every ordered pair).
        metric: "cosine" (1 - cosine) or "mse".
        backend: "auto", "torch", "cpu", "triton" or "cuda"; see `explain`.
        eps: a flow shorter than this (in feature units) counts as cosine 0 with zero gradient.
        precision: of the matrix products of "pair" with "cosine" on a GPU: "highest" is as accurate as float32,
            "high" one TF32 product. The CPU and plain torch always compute the former.
        groups: (C,) int64, for centres that are clusters: the class of every centre; flows between centres of the same
            class are left out. With alignment "pair" only.

    Returns:
        Scalar tensor, float64 for float64 features, else float32 (low-precision features accumulate in float32).
        NaN or infinite features give NaN. "pair" with "cosine" can be differentiated once; the others twice.
        The same inputs give the same bits on every run, whatever the number of threads.

    What can be prepared from ``centers``, ``labels`` and ``groups`` is remembered for as long as these tensors live
    unchanged. Inside ``torch.compile``, ``torch.export`` or a CUDA graph the values of ``labels`` can't be checked: a
    class without a feature or a label out of range gives NaN there.

    Raises:
        InputError: wrong shape, dtype, device, label range, a class without a feature, or an unknown name.

    Source: Xia et al., arXiv 2602.05391; for ``labels`` with several features a class, features are averaged per class
    first (the paper's code divides the synthetic side by N-1 instead of C-1 there; this follows the definition).
    """
    options = _check_options(alignment, metric, backend, eps, precision, groups)
    check_centers(centers)
    pairs = _pairs(centers, groups)
    return _evaluate(features, labels, _function_constants(centers), options, groups, pairs)


def decoupled_flow_loss(
    features: Tensor, centers: Tensor, labels: Tensor | None = None, *, alpha: float = 1.0, backend: str = "auto"
) -> Tensor:
    """alpha * mse(class means, centres) + (1 - alpha) * mse(mean of the other classes, the same of the centres).

    Arguments, dtypes and errors as in `flow_alignment_loss`; ``alpha`` in [0, 1]. Source: arXiv 2602.05391.
    """
    if not isinstance(alpha, (int, float)) or not 0.0 <= alpha <= 1.0:
        raise InputError(f"alpha must be in [0, 1], got {alpha!r}")
    options = _check_options("global", "mse", backend, 1e-8, "highest", None)
    check_centers(centers)
    constants = _function_constants(centers)
    segments = _segments(features, labels, constants)
    chosen = backends.explain(features, metric="mse", backend=options.backend).backend
    if chosen == "torch":
        shift, shifted = constants.shift, constants.shifted
        return _in_torch(features, segments, shifted, shift, reference.DECOUPLED, options.eps, alpha)
    shifted = _shifted_float32(constants.shifted)
    loss = flow_alignment(
        features, segments, shifted, constants.shift, reference.DECOUPLED, alpha=float(alpha), backend=chosen
    )
    return _in_range(loss, segments)


def linear_gradient_matching_loss(
    syn_features: Tensor, syn_labels: Tensor, real_features: Tensor, real_labels: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Linear gradient matching, closed form: 1 - cosine of the two gradients of a linear classifier's cross-entropy.

    Args:
        syn_features: (N, D), differentiable. syn_labels: (N,) int64.
        real_features: (M, D), constant. real_labels: (M,) int64.
        weight: (C, D) and bias: (C,), the classifier; constants.

    Returns a scalar, float64 for float64 features, else float32. Raises ``InputError`` on shapes that don't fit or labels
    outside 0..C-1. Source: Cazenavette et al., arXiv 2511.16674; formula in `sfm_fast.reference.gradient_matching`.
    """
    for name, tensor in (("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise InputError(f"{name} must be a float tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
    if weight.ndim != 2:
        raise InputError(f"weight must be (C, D), got {tuple(weight.shape)}")
    if bias.shape != weight.shape[:1]:
        raise InputError(f"bias must be ({weight.shape[0]},) to fit weight, got {tuple(bias.shape)}")
    for name, features, labels in (("syn", syn_features, syn_labels), ("real", real_features, real_labels)):
        check_features(f"{name}_features", features, weight.shape[1], "weight")
        check_labels(f"{name}_labels", labels, features.shape[0], weight.shape[0])
    dtype = _compute_dtype(syn_features)
    weight, bias = weight.detach().to(dtype), bias.detach().to(dtype)
    synthetic = gradient_matching.linear_gradient(syn_features.to(dtype), syn_labels, weight, bias)
    real = gradient_matching.linear_gradient(real_features.detach().to(dtype), real_labels, weight, bias)
    return gradient_matching.gradient_distance(synthetic, real)


class FlowAlignmentLoss(nn.Module):
    """`flow_alignment_loss` with the constants of ``centers`` prepared once and kept in the state_dict.

    ``forward(features, labels=None)`` -> scalar. Arguments and errors as in `flow_alignment_loss`. The state holds
    ``shift`` (D,), one row close to the mean of the centres, in float32 so that float32 features subtract exactly;
    ``shifted_centers`` (C, D), float64; and ``groups`` (C,) where given.
    """

    shift: Tensor
    shifted_centers: Tensor
    centred_centers: Tensor
    groups: Tensor | None
    pairs: Tensor

    def __init__(
        self,
        centers: Tensor,
        *,
        alignment: str = "global",
        metric: str = "cosine",
        backend: str = "auto",
        eps: float = 1e-8,
        precision: str = "highest",
        groups: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.options = _check_options(alignment, metric, backend, eps, precision, groups)
        check_centers(centers)
        pairs = _pairs(centers, groups)
        constants = _prepare(centers)
        self.register_buffer("shift", constants.shift)
        self.register_buffer("shifted_centers", constants.shifted)
        self.register_buffer("groups", None if groups is None else groups.clone())
        # Derived from the above, so not stored.
        self.register_buffer("centred_centers", constants.centred, persistent=False)
        self.register_buffer("pairs", torch.as_tensor(pairs, device=centers.device), persistent=False)

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        with torch.no_grad():
            self.centred_centers.copy_(reference.centre_rows(self.shifted_centers))
            if self.groups is not None:
                self.pairs.copy_(count_pairs(self.groups))

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        constants = _Constants(self.shift, self.shifted_centers, self.centred_centers)
        classes = self.shifted_centers.shape[0]
        pairs = classes * (classes - 1) if self.groups is None else self.pairs
        return _evaluate(features, labels, constants, self.options, self.groups, pairs)

    def extra_repr(self) -> str:
        classes, dim = self.shifted_centers.shape
        options = ", ".join(f"{name}={value!r}" for name, value in self.options._asdict().items())
        return f"classes={classes}, dim={dim}, {options}"


class _Options(NamedTuple):
    alignment: str
    metric: str
    backend: str
    eps: float
    precision: str


class _Constants(NamedTuple):
    """What a loss needs of the centres: the float32 shift (D,), and (C, D) float64 shifted and float32 centred."""

    shift: Tensor
    shifted: Tensor
    centred: Tensor


def _prepare(centers: Tensor) -> _Constants:
    # In float64: centres computed in float64 keep what float32 would round off next to a large common mean.
    exact = centers.detach().double()
    shift = exact.mean(0).float()
    shifted = exact - shift.double()
    return _Constants(shift, shifted, reference.centre_rows(shifted).float())


_function_constants = TensorCache(_prepare)
_shifted_float32 = TensorCache(Tensor.float)
_count_pairs = TensorCache(count_pairs)


def _pairs(centers: Tensor, groups: Tensor | None) -> int | Tensor:
    if groups is None:
        return centers.shape[0] * (centers.shape[0] - 1)
    check_groups(groups, centers)
    pairs = _count_pairs(groups)
    if not torch.compiler.is_compiling() and pairs == 0:
        raise InputError("groups puts all centers into one class: no flow is left")
    return pairs


def _check_options(
    alignment: str, metric: str, backend: str, eps: float, precision: str, groups: Tensor | None
) -> _Options:
    if alignment not in ALIGNMENTS:
        raise InputError(f"alignment must be one of {ALIGNMENTS}, got {alignment!r}")
    if metric not in METRICS:
        raise InputError(f"metric must be one of {METRICS}, got {metric!r}")
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    if not isinstance(eps, (int, float)) or not 0 < eps < float("inf"):
        raise InputError(f"eps must be a positive number, got {eps!r}")
    if groups is not None and alignment != "pair":
        raise InputError(f"groups is for alignment='pair', got it with {alignment!r}")
    return _Options(alignment, metric, backend, float(eps), precision)


def _segments(features: Tensor, labels: Tensor | None, constants: _Constants) -> Segments | None:
    """Checks features and labels; None where the features are the class means already."""
    classes, dim = constants.centred.shape
    check_features("features", features, dim, "centers")
    if features.device != constants.shift.device:
        raise InputError(f"features are on {features.device}, centers on {constants.shift.device}; move one of them")
    if labels is not None:
        return segments_of(labels, features.shape[0], classes, features.device)
    if features.shape[0] != classes:
        raise InputError(
            f"features has {features.shape[0]} rows for {classes} centers: without labels it must hold one mean a class"
        )
    return None


def _evaluate(
    features: Tensor,
    labels: Tensor | None,
    constants: _Constants,
    options: _Options,
    groups: Tensor | None,
    pairs: int | Tensor,
) -> Tensor:
    alignment, metric, backend, eps, precision = options
    segments = _segments(features, labels, constants)
    chosen = backends.explain(
        features, alignment=alignment, metric=metric, backend=backend, grouped=groups is not None
    ).backend
    shift, centred = constants.shift, constants.centred
    kind = reference.KINDS.get((alignment, metric))
    if chosen == "torch":
        if features.dtype == torch.float64:
            centred = reference.centre_rows(constants.shifted)
        return _in_torch(features, segments, centred, shift, kind, eps, 1.0, groups, pairs)
    if kind is None:
        loss = pair_alignment(
            features, segments, centred, shift, groups, pairs, eps=eps, high=precision == "high", backend=chosen
        )
    else:
        loss = flow_alignment(features, segments, centred, shift, kind, eps=eps, backend=chosen)
    return _in_range(loss, segments)


def _in_torch(
    features: Tensor,
    segments: Segments | None,
    centers: Tensor,
    shift: Tensor,
    kind: int | None,
    eps: float,
    alpha: float,
    groups: Tensor | None = None,
    pairs: int | Tensor = 0,
) -> Tensor:
    dtype = _compute_dtype(features)
    centers, shift = centers.to(dtype), shift.to(dtype)
    order, offsets = (None, None) if segments is None else (segments.order, segments.offsets)
    # Autocast would run the products in low precision, next to a result that promises float32.
    with torch.autocast(features.device.type, enabled=False):
        if kind is not None and groups is None:
            loss = reference.flow_alignment(features, order, offsets, centers, shift, kind, eps, alpha)
        else:
            means = class_means(features, order, offsets, shift)
            if kind is None:
                loss = pair_cosine(centers, means, eps, groups, pairs)
            else:
                assert groups is not None
                loss = grouped_pair_mse(centers, means, groups, pairs)
    return _in_range(loss, segments)


def _in_range(loss: Tensor, segments: Segments | None) -> Tensor:
    if segments is None or segments.in_range is None:
        return loss
    return torch.where(segments.in_range, loss, torch.nan)


def _compute_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32
