"""The public losses: check the arguments, prepare the constants, call the operation."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_centers, check_features, check_groups, check_labels, kind_of
from .errors import InputError
from .ops.backends import ALIGNMENTS, BACKENDS, METRICS
from .ops.cache import TensorCache
from .ops.losses import Constants, Options, compute_dtype, constants_of, evaluate, evaluate_decoupled, prepare
from .ops.render import no_autocast
from .reference import flow_alignment as reference
from .reference import gradient_matching
from .reference.pair_alignment import count_pairs

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
        eps: a flow shorter than this (in feature units; for "global" all flows flattened) counts as cosine 0 with zero
            gradient.
        precision: of the matrix products of "pair" with "cosine" on a GPU: "highest" is as accurate as float32,
            "high" takes one TF32 product. CPU and plain torch always compute "highest".
        groups: (C,) int64, for centres that are clusters of classes: the class of every centre; flows between centres of the
            same class are left out. With alignment "pair" only. ``labels`` then count centres, not classes.

    Returns:
        Scalar tensor, float64 for float64 features, else float32 (low-precision features accumulate in float32).
        NaN or infinite features give NaN. "pair" with "cosine" can be differentiated once; the others twice.
        The same inputs give the same bits on every run, whatever the number of threads.

    What can be prepared from ``centers``, ``labels`` and ``groups`` is remembered for as long as these tensors live
    unchanged. On a GPU, writing into one of them past autograd (``.data``, collectives, replays of CUDA graphs) gives a
    stale result: pass a new tensor there. Inside ``torch.compile``, ``torch.export`` or a CUDA graph the values of
    ``labels`` can't be checked: a class without a feature or a label out of range gives NaN there. Inside ``torch.func``
    transforms plain torch runs.

    Raises:
        InputError: wrong shape, dtype, device, label range, a class without a feature, or an unknown name.

    Source: Xia et al., arXiv 2602.05391; for ``labels`` with several features a class, features are averaged per class
    first (the paper's code divides the synthetic side by N-1 instead of C-1 there; this follows the definition).
    """
    options = _check_options(alignment, metric, backend, eps, precision, groups)
    check_centers(centers)
    pairs = _pairs(centers, groups)
    return evaluate(features, labels, constants_of(centers), options, groups, pairs)


def decoupled_flow_loss(
    features: Tensor, centers: Tensor, labels: Tensor | None = None, *, alpha: float = 1.0, backend: str = "auto"
) -> Tensor:
    """alpha * mse(class means, centres) + (1 - alpha) * mse(mean of the other classes, the same of the centres).

    Arguments, dtypes and errors as in `flow_alignment_loss`; ``alpha`` in [0, 1]. Source: arXiv 2602.05391.
    """
    if not isinstance(alpha, (int, float)) or not 0.0 <= alpha <= 1.0:
        raise InputError(f"alpha must be a number in [0, 1], got {alpha!r}")
    options = _check_options("global", "mse", backend, 1e-8, "highest", None)
    check_centers(centers)
    return evaluate_decoupled(features, labels, constants_of(centers), options, float(alpha))


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
    # Autocast would run the products in low precision, next to a result that promises float32.
    with no_autocast(syn_features.device):
        synthetic = gradient_matching.linear_gradient(syn_features.to(dtype), syn_labels, weight, bias)
        real = gradient_matching.linear_gradient(real_features.detach().to(dtype), real_labels, weight, bias)
        return gradient_matching.gradient_distance(synthetic, real)


class FlowAlignmentLoss(nn.Module):
    """`flow_alignment_loss` with the constants of ``centers`` prepared once and kept in the state_dict.

    ``forward(features, labels=None)`` -> scalar. Arguments and errors as in `flow_alignment_loss`. The state holds
    ``shift`` (D,), one row close to the mean of the centres, in float32 so that float32 features subtract exactly;
    ``shifted_centers`` (C, D), float64; and ``groups`` (C,) where given. The first two are buffers; ``groups`` is none, so that no
    averaging of modules (EMA, SWA) or broadcast of buffers touches whole numbers.
    """

    shift: Tensor
    shifted_centers: Tensor
    groups: Tensor | None
    pairs: Tensor
    _centred: Tensor
    _prepared_of: tuple[Any, ...]

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
        # Even where the module is made in inference mode: training with it must stay possible.
        with torch.inference_mode(False), torch.no_grad():
            pairs = _pairs(centers, groups)
            constants = prepare(centers)
            self.register_buffer("shift", constants.shift)
            self.register_buffer("shifted_centers", constants.shifted)
            self.groups = None if groups is None else groups.clone().contiguous()
            # Derived from the above. A copy: `pairs` may be what `_count_pairs` remembers.
            self._centred = constants.centred
            self.pairs = torch.as_tensor(pairs, device=centers.device).clone()
        self._prepared_of = self._versions()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.groups is not None:
            # A copy: averaging writes into the tensors of a state, and would cut whole numbers down.
            destination[f"{prefix}groups"] = self.groups.clone()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        key = f"{prefix}groups"
        others = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing, unexpected, errors)
        with torch.inference_mode(False), torch.no_grad():
            self.shift, self.shifted_centers = _lasting(self.shift.float()), _lasting(self.shifted_centers.double())
            self._centred = reference.centre_rows(self.shifted_centers).float()
            if self.groups is None or key not in state_dict:
                if strict and key in state_dict:
                    unexpected.append(key)
                elif strict and self.groups is not None:
                    missing.append(key)
            else:
                self.groups = _whole(state_dict[key], self.groups).to(self.shift.device)
                self.pairs = count_pairs(self.groups)
                if not self.pairs.is_meta and self.pairs == 0:
                    raise InputError("the loaded groups put all centers into one class: no flow is left")
        self._prepared_of = self._versions()

    def _apply(self, fn: Any, recurse: bool = True) -> FlowAlignmentLoss:
        """Follows ``to(device)`` but not ``half()`` and its like: the constants keep the precision that the result promises."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            changed: Tensor = fn(tensor)
            return _lasting(changed if changed.dtype == tensor.dtype else tensor.to(changed.device))

        with torch.inference_mode(False):
            super()._apply(keep_dtype, recurse)
            self._centred, self.pairs = keep_dtype(self._centred), keep_dtype(self.pairs)
            self.groups = None if self.groups is None else keep_dtype(self.groups)
        self._prepared_of = self._versions()
        return self

    def _versions(self) -> tuple[Any, ...]:
        return (*_version(self.shifted_centers), *(() if self.groups is None else _version(self.groups)))

    def _constants(self) -> tuple[Constants, int | Tensor]:
        """Constants and number of pairs: anew where the tensors they come from were written to (averaging), or are others for the time
        of a call (`torch.func.functional_call`), or were copied in inference mode."""
        centred, pairs = self._centred, self.pairs
        if not torch.compiler.is_compiling() and self._versions() != self._prepared_of:
            with torch.inference_mode(False), torch.no_grad():
                self.shift, self.shifted_centers = _lasting(self.shift), _lasting(self.shifted_centers)
                centred = reference.centre_rows(self.shifted_centers).float()
                if self.groups is not None:
                    self.groups = _lasting(self.groups)
                    pairs = count_pairs(self.groups)
            if not torch._C._are_functorch_transforms_active():
                self._centred, self.pairs, self._prepared_of = centred, pairs, self._versions()
        classes = self.shifted_centers.shape[0]
        return Constants(self.shift, self.shifted_centers, centred), pairs if self.groups is not None else classes * (
            classes - 1
        )

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        constants, pairs = self._constants()
        return evaluate(features, labels, constants, self.options, self.groups, pairs)

    def extra_repr(self) -> str:
        classes, dim = self.shifted_centers.shape
        options = ", ".join(f"{name}={value!r}" for name, value in self.options._asdict().items())
        return f"classes={classes}, dim={dim}, {options}"


def _version(tensor: Tensor) -> tuple[int, int, int]:
    """Another one after a write to ``tensor``, and for another tensor or storage; writes to inference tensors aren't counted."""
    address = 0
    if type(tensor) is Tensor:
        with contextlib.suppress(RuntimeError):  # of tensors that stand for others inside torch.func
            address = tensor.data_ptr()
    return id(tensor), address, -1 if tensor.is_inference() else tensor._version


def _lasting(tensor: Tensor) -> Tensor:
    """A tensor that autograd may save, also where ``tensor`` was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def _whole(loaded: Any, groups: Tensor) -> Tensor:
    """Loaded groups as int64, also where an average of states made them floats. Raises ``InputError``."""
    if not isinstance(loaded, Tensor) or loaded.shape != groups.shape:
        got = tuple(loaded.shape) if isinstance(loaded, Tensor) else kind_of(loaded)
        raise InputError(f"groups in the state must be a tensor {tuple(groups.shape)}, got {got}")
    if loaded.is_floating_point() and not loaded.is_meta:
        rounded = loaded.double().round()
        if not ((loaded - rounded).abs() < 1e-2).all():
            raise InputError("groups in the state aren't whole numbers: the average of losses with other groups?")
        return rounded.long()
    return loaded.detach().long().clone()


_count_pairs = TensorCache(count_pairs)


def _pairs(centers: Tensor, groups: Tensor | None) -> int | Tensor:
    if groups is None:
        return centers.shape[0] * (centers.shape[0] - 1)
    check_groups(groups, centers)
    pairs = _count_pairs(groups)
    readable = not torch.compiler.is_compiling() and not pairs.is_meta and type(pairs) is Tensor
    if readable and pairs == 0:
        raise InputError("groups puts all centers into one class: no flow is left")
    return pairs


def _check_options(
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
        raise InputError(f"groups is for alignment='pair', got it with {alignment!r}")
    return Options(alignment, metric, backend, float(eps), precision)
