"""The public losses: check the arguments, prepare the constants, call the operation."""

from __future__ import annotations

from torch import Tensor

from ..checks import check_anchor, check_centers, check_features, check_labels, kind_of
from ..errors import InputError
from ..ops.render import no_autocast
from ..reference import gradient_matching
from .evaluate import check_options, compute_dtype, constants_of, evaluate, pairs_of


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
    """Statistical flow matching: the distance between the flows of synthetic class means and those of real class centres.

    Args:
        features: (N, D) synthetic features, float32, float64, bfloat16 or float16, any strides. Differentiable.
        centers: (C, D) centres of the real classes, any float dtype, constant (it must not require grad); C >= 2.
        labels: (N,) int64 class ids in 0..C-1, in any order, every class at least once. ``None``: ``features`` are the
            C class means, in order.
        alignment: "global" (all flows flattened, the paper's), "class" (flow by flow), "pair" (every ordered pair) or "anchored"
            (`anchored_flow_loss` about the mean of the centres).
        metric: "cosine" (1 - cosine) or "mse", which "anchored" doesn't have.
        backend: "auto", "torch", "cpu", "triton" or "cuda"; see `explain`.
        eps: from 1e-18; a flow shorter than this (in feature units; for "global" all flows flattened) counts as cosine 0 with zero
            gradient.
        precision: of the matrix products of "pair" with "cosine" on a GPU: "highest" is as accurate as float32,
            "high" uses one TF32 product. CPU and plain torch always compute "highest".
        groups: (C,) int64, the class of every centre if a class has several, such as clusters; flows between centres of one
            class are left out. Only with alignment "pair". ``labels`` are then indices of centres, not classes.

    Returns:
        Scalar tensor, float64 for float64 features, else float32 (low-precision features accumulate in float32).
        NaN or infinite features give NaN. "pair" with "cosine" can be differentiated once; the others twice.
        The same inputs give the same bits on every run, with any number of threads.

    Constants computed from ``centers``, ``labels`` and ``groups`` are cached for as long as these tensors exist
    unchanged. On a GPU, writes that bypass autograd's version counter (``.data``, collectives, replays of CUDA graphs)
    aren't noticed, so pass a new tensor after them. Inside ``torch.compile``, ``torch.export`` or a CUDA graph the values
    of ``labels`` can't be checked: a class without a feature or a label out of range gives NaN. Inside ``torch.func``
    transforms, plain torch runs.

    Raises:
        InputError: wrong shape, dtype, device or label range, a class without a feature, or an unknown name.

    Source: Xia et al., arXiv 2602.05391; with several features per class, features are averaged per class first
    (the paper's code then divides the synthetic side by N-1 instead of C-1; this follows the definition).
    """
    options = check_options(alignment, metric, backend, eps, precision, groups)
    check_centers(centers)
    return evaluate(features, labels, constants_of(centers, alignment), options, pairs_of(centers, groups))


def decoupled_flow_loss(
    features: Tensor, centers: Tensor, labels: Tensor | None = None, *, alpha: float = 1.0, backend: str = "auto"
) -> Tensor:
    """alpha * mse(class means, centres) + (1 - alpha) * mse(mean of the other class means, mean of the other centres).

    Arguments, dtypes and errors as in `flow_alignment_loss`; ``alpha`` in [0, 1]. With alpha 1 a single class is enough.
    Source: arXiv 2602.05391.
    """
    if not isinstance(alpha, (int, float)) or not 0.0 <= alpha <= 1.0:
        raise InputError(f"alpha must be a number in [0, 1], got {alpha!r}")
    options = check_options(metric="mse", backend=backend)._replace(alignment="decoupled", weight=float(alpha))
    check_centers(centers, 1 if alpha == 1 else 2)
    return evaluate(features, labels, constants_of(centers, "decoupled"), options)


def anchored_flow_loss(
    features: Tensor,
    centers: Tensor,
    labels: Tensor | None = None,
    *,
    anchor: Tensor | None = None,
    length_weight: float = 0.0,
    length_delta: float | None = None,
    backend: str = "auto",
    eps: float = 1e-8,
) -> Tensor:
    """mean_c [1 - cos(b_c, a_c)] + length_weight * mean_c h(log(|b_c| / |a_c|)), with b_c and a_c the synthetic class mean and the centre minus ``anchor``.

    Args:
        features, labels, backend: as in `flow_alignment_loss`.
        centers: (C, D) centres of the real classes, any float dtype, constant; C >= 1, or C >= 2 if ``anchor`` is None.
        anchor: (D,) the point from which all flows start, any float dtype, constant, on the device of ``centers``. None: the mean of
            the centres.
        length_weight: weight of the term for lengths, 0 to 1e30. With 0 the loss doesn't depend on |b_c|.
        length_delta: h(x) = x^2 up to |x| = length_delta, from there on the straight line 2 length_delta |x| - length_delta^2 (Huber's
            function), so that a length out of reach pulls no harder; above 0. None: x^2 everywhere.
        eps: a class with |a_c| or |b_c| shorter than this (in feature units) counts as cosine 0 and length term 0, with zero
            gradient.

    Returns:
        Scalar tensor, as `flow_alignment_loss`; twice differentiable. Constants are cached for as long as ``centers`` and ``anchor``
        exist unchanged. Each class has a term of its own, so the loss of all classes is the mean of those of single classes. It is
        equal to alignment "class" if the anchor is the mean of the centres and the synthetic class means have the same mean.

    Raises:
        InputError: as `flow_alignment_loss`; an anchor, a length_weight or a length_delta that doesn't fit.

    Source: this project's own; docs/losses.md explains it.
    """
    options = check_options(
        "anchored", backend=backend, eps=eps, length_weight=length_weight, length_delta=length_delta
    )
    check_centers(centers, 2 if anchor is None else 1)
    if anchor is not None:
        check_anchor(anchor, centers)
    return evaluate(features, labels, constants_of(centers, "anchored", anchor), options)


def linear_gradient_matching_loss(
    syn_features: Tensor, syn_labels: Tensor, real_features: Tensor, real_labels: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Linear gradient matching in closed form: 1 - cosine of the gradients of a linear classifier's cross-entropy on two sets.

    Args:
        syn_features: (N, D), differentiable. syn_labels: (N,) int64.
        real_features: (M, D), constant. real_labels: (M,) int64.
        weight: (C, D) and bias: (C,), the classifier; constants.

    Returns a scalar, float64 for float64 features, else float32. Raises ``InputError`` on shapes that don't fit or labels
    outside 0..C-1. Source: Cazenavette et al., arXiv 2511.16674; formula in `sfm_fast.reference.gradient_matching`.
    """
    for name, tensor in (("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise InputError(f"{name} must be a float tensor, got {kind_of(tensor)}")
    if weight.ndim != 2:
        raise InputError(f"weight must be (C, D), got {tuple(weight.shape)}")
    if bias.shape != weight.shape[:1]:
        raise InputError(f"bias must be ({weight.shape[0]},) to fit weight, got {tuple(bias.shape)}")
    for name, features, labels in (("syn", syn_features, syn_labels), ("real", real_features, real_labels)):
        check_features(f"{name}_features", features, weight.shape[1], "weight")
        check_labels(f"{name}_labels", labels, features.shape[0], weight.shape[0])
    tensors = dict(
        syn_labels=syn_labels, real_features=real_features, real_labels=real_labels, weight=weight, bias=bias
    )
    for name, tensor in tensors.items():
        if tensor.device != syn_features.device:
            raise InputError(f"syn_features are on {syn_features.device}, {name} on {tensor.device}; move one of them")
    dtype = compute_dtype(syn_features)
    weight, bias = weight.detach().to(dtype), bias.detach().to(dtype)
    # Without autocast, which would compute the products of a float32 result in low precision.
    with no_autocast(syn_features.device):
        synthetic = gradient_matching.linear_gradient(syn_features.to(dtype), syn_labels, weight, bias)
        real = gradient_matching.linear_gradient(real_features.detach().to(dtype), real_labels, weight, bias)
        return gradient_matching.gradient_distance(synthetic, real)
