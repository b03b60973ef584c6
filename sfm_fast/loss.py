"""The public losses: check the arguments, prepare the constants, call the operation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import InputError
from .ops import backends
from .reference import flow_alignment as reference
from .reference import gradient_matching
from .reference.class_means import class_means
from .reference.pair_alignment import pair_cosine

ALIGNMENTS = ("global", "class", "pair")
METRICS = ("cosine", "mse")
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, torch.float64, *_LOW_PRECISION)


def flow_alignment_loss(
    features: Tensor,
    centers: Tensor,
    labels: Tensor | None = None,
    *,
    alignment: str = "global",
    metric: str = "cosine",
    backend: str = "auto",
    eps: float = 1e-8,
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

    Returns:
        Scalar tensor, float64 for float64 features, else float32 (low-precision features accumulate in float32).
        NaN or infinite features give NaN. "pair" with "cosine" can be differentiated once; the others twice.

    Raises:
        InputError: wrong shape, dtype, device, label range, a class without a feature, or an unknown name.

    Source: Xia et al., arXiv 2602.05391; for ``labels`` with several features a class, features are averaged per class
    first (the paper's code divides the synthetic side by N-1 instead of C-1 there; this follows the definition).
    """
    module = FlowAlignmentLoss(centers, alignment=alignment, metric=metric, backend=backend, eps=eps)
    return module.forward(features, labels)


def decoupled_flow_loss(
    features: Tensor, centers: Tensor, labels: Tensor | None = None, *, alpha: float = 1.0
) -> Tensor:
    """alpha * mse(class means, centres) + (1 - alpha) * mse(mean of the other classes, the same of the centres).

    Arguments, dtypes and errors as in `flow_alignment_loss`; ``alpha`` in [0, 1]. Source: arXiv 2602.05391.
    """
    if not isinstance(alpha, (int, float)) or not 0.0 <= alpha <= 1.0:
        raise InputError(f"alpha must be in [0, 1], got {alpha!r}")
    module = FlowAlignmentLoss(centers)
    shifted = module.shifted_class_means(features, labels)
    return reference.decoupled_mse(module.shifted_centers.to(shifted.dtype), shifted, alpha)


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
        _check_features(f"{name}_features", features, weight.shape[1], "weight")
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
    ``shifted_centers`` and ``centred_centers`` (C, D), float64.
    """

    shift: Tensor
    shifted_centers: Tensor
    centred_centers: Tensor

    def __init__(
        self,
        centers: Tensor,
        *,
        alignment: str = "global",
        metric: str = "cosine",
        backend: str = "auto",
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        if alignment not in ALIGNMENTS:
            raise InputError(f"alignment must be one of {ALIGNMENTS}, got {alignment!r}")
        if metric not in METRICS:
            raise InputError(f"metric must be one of {METRICS}, got {metric!r}")
        if not isinstance(eps, (int, float)) or not 0 < eps < float("inf"):
            raise InputError(f"eps must be a positive number, got {eps!r}")
        check_centers(centers)
        self.alignment, self.metric, self.backend, self.eps = alignment, metric, backend, float(eps)
        # Prepared in float64: centres computed in float64 keep what float32 would round off next to a large common mean.
        exact = centers.detach().double()
        shift = exact.mean(0).float()
        self.register_buffer("shift", shift)
        self.register_buffer("shifted_centers", exact - shift.double())
        self.register_buffer("centred_centers", reference.centre_rows(self.shifted_centers))

    def shifted_class_means(self, features: Tensor, labels: Tensor | None) -> Tensor:
        """Class means minus ``shift``: (N, D), (N,) or None -> (C, D) in the compute dtype; checks both arguments."""
        classes, dim = self.shifted_centers.shape
        _check_features("features", features, dim, "centers")
        if features.device != self.shift.device:
            raise InputError(f"features are on {features.device}, centers on {self.shift.device}; move one of them")
        shift = self.shift.to(_compute_dtype(features))
        if labels is None:
            if features.shape[0] != classes:
                raise InputError(
                    f"features has {features.shape[0]} rows for {classes} centers: without labels it must hold one mean a class"
                )
            return features.to(shift.dtype) - shift
        counts = check_labels("labels", labels, features.shape[0], classes)
        missing = (counts == 0).nonzero().flatten()
        if len(missing):
            raise InputError(
                f"labels: class {int(missing[0])} has no feature ({len(missing)} of {classes} classes are missing)"
            )
        return class_means(features, labels, counts, shift)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        shifted = self.shifted_class_means(features, labels)
        backends.explain(features, alignment=self.alignment, metric=self.metric, backend=self.backend)
        centers = self.centred_centers.to(shifted.dtype)
        if self.metric == "mse":
            mse = reference.pair_mse if self.alignment == "pair" else reference.flow_mse
            return mse(centers, shifted)
        cosine = {"global": reference.global_cosine, "class": reference.class_cosine, "pair": pair_cosine}[
            self.alignment
        ]
        return cosine(centers, shifted, self.eps)

    def extra_repr(self) -> str:
        classes, dim = self.shifted_centers.shape
        return f"classes={classes}, dim={dim}, alignment={self.alignment!r}, metric={self.metric!r}, backend={self.backend!r}, eps={self.eps}"


def _compute_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def check_centers(centers: Tensor) -> None:
    """Raise ``InputError`` unless ``centers`` is a constant (C >= 2, D >= 1) float tensor."""
    if not isinstance(centers, Tensor) or not centers.is_floating_point():
        raise InputError(f"centers must be a float tensor, got {getattr(centers, 'dtype', type(centers).__name__)}")
    if centers.ndim != 2 or centers.shape[1] < 1:
        raise InputError(f"centers must be (classes, features), got {tuple(centers.shape)}")
    if centers.shape[0] < 2:
        raise InputError(f"centers has {centers.shape[0]} class: a flow needs at least 2 classes")
    if centers.requires_grad:
        raise InputError("centers requires grad, but the real centres are constants here: pass centers.detach()")


def _check_features(name: str, features: Tensor, dim: int, against: str) -> None:
    if not isinstance(features, Tensor) or features.dtype not in _FLOATS:
        raise InputError(
            f"{name} must be a float32, float64, bfloat16 or float16 tensor, got {getattr(features, 'dtype', type(features).__name__)}"
        )
    if features.ndim != 2 or features.shape[0] < 1:
        raise InputError(f"{name} must be (items, features) with at least one item, got {tuple(features.shape)}")
    if features.shape[1] != dim:
        raise InputError(f"{name} has {features.shape[1]} features an item, but {against} has {dim}")


def check_labels(name: str, labels: Tensor, items: int, classes: int) -> Tensor:
    """Counts per class, (classes,) int64; raises ``InputError`` unless labels are (items,) int64 in 0..classes-1."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise InputError(f"{name} must be an int64 tensor, got {getattr(labels, 'dtype', type(labels).__name__)}")
    if labels.shape != (items,):
        raise InputError(f"{name} must be ({items},) to fit the features, got {tuple(labels.shape)}")
    low, high = labels.aminmax() if items else (torch.tensor(0), torch.tensor(0))
    if low < 0 or high >= classes:
        raise InputError(f"{name} must be in 0..{classes - 1}, got {int(low)}..{int(high)}")
    return torch.bincount(labels, minlength=classes)
