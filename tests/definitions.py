"""The losses written exactly as the definition reads, with every flow built: slow, float64, obviously right."""

from __future__ import annotations

import functools
import math
from typing import Any

import expected_cache
import torch
from cases.losses import LOSS_CASES
from torch import Tensor

import sfm_fast
from sfm_fast.ops.backends import ALIGNMENTS, METRICS

# The losses under one name each. "anchored-lengths" is "anchored" with an anchor of its own and the length term,
# most of whose logarithms are beyond its delta.
NAMES = (*ALIGNMENTS, "anchored-lengths")
LENGTH_WEIGHT, LENGTH_DELTA = 0.7, 0.1
LENGTHS = {"length_weight": LENGTH_WEIGHT, "length_delta": LENGTH_DELTA}
KINDS = [
    (name, metric) for name in NAMES for metric in METRICS if metric == "cosine" or not name.startswith("anchored")
]
Inputs = tuple[Tensor, Tensor, Tensor | None]


def class_means(features: Tensor, labels: Tensor | None, classes: int) -> Tensor:
    if labels is None:
        return features
    return torch.stack([features[labels == c].mean(0) for c in range(classes)])


def flows(means: Tensor) -> Tensor:
    classes = len(means)
    return torch.stack(
        [sum(means[k] for k in range(classes) if k != c) / (classes - 1) - means[c] for c in range(classes)]
    )


def pair_flows(means: Tensor) -> Tensor:
    return means[None, :, :] - means[:, None, :]


def cosine(f: Tensor, g: Tensor, eps: float) -> Tensor:
    if f.norm() < eps or g.norm() < eps:
        return f.sum() * 0 + g.sum() * 0
    return (f * g).sum() / (f.norm() * g.norm())


def anchor_of(centers: Tensor) -> Tensor:
    """A point for "anchored-lengths" away from the centres' mean: float64, so that the part that float32 can't hold isn't 0."""
    centers = centers.double()
    return centers.mean(0) + 0.25 * (centers[0] - centers[1])


def loss(
    features: Tensor, centers: Tensor, labels: Tensor | None = None, *, alignment: str = "global", **options: Any
) -> Tensor:
    """The public function for a name of NAMES."""
    if alignment == "anchored-lengths":
        options = {name: value for name, value in options.items() if name not in ("metric", "groups")}
        anchor = anchor_of(centers)
        return sfm_fast.anchored_flow_loss(features, centers, labels, anchor=anchor, **LENGTHS, **options)
    return sfm_fast.flow_alignment_loss(features, centers, labels, alignment=alignment, **options)


def module(centers: Tensor, *, alignment: str = "global", **options: Any) -> sfm_fast.FlowAlignmentLoss:
    """The module for a name of NAMES."""
    if alignment == "anchored-lengths":
        options |= dict(alignment="anchored", anchor=anchor_of(centers), **LENGTHS)
        return sfm_fast.FlowAlignmentLoss(centers, **options)
    return sfm_fast.FlowAlignmentLoss(centers, alignment=alignment, **options)


def flow_alignment(
    features: Tensor,
    centers: Tensor,
    labels: Tensor | None,
    alignment: str,
    metric: str,
    eps: float = 1e-8,
    groups: Tensor | None = None,
) -> Tensor:
    if alignment == "anchored":
        return anchored(features, centers, labels, centers.double().mean(0), 0.0, eps)
    if alignment == "anchored-lengths":
        return anchored(features, centers, labels, anchor_of(centers), LENGTH_WEIGHT, eps, LENGTH_DELTA)
    features, centers = features.double(), centers.double()
    nu, classes = class_means(features, labels, len(centers)), len(centers)
    if alignment == "pair":
        f, g = pair_flows(centers), pair_flows(nu)
        group = range(classes) if groups is None else groups.tolist()
        off = [(i, j) for i in range(classes) for j in range(classes) if group[i] != group[j]]
        if metric == "mse":
            return torch.stack([(f[i, j] - g[i, j]).square() for i, j in off]).mean()
        return torch.stack([1 - cosine(f[i, j], g[i, j], eps) for i, j in off]).mean()
    F, G = flows(centers), flows(nu)
    if metric == "mse":
        return (F - G).square().mean()
    if alignment == "class":
        return torch.stack([1 - cosine(F[c], G[c], eps) for c in range(classes)]).mean()
    return 1 - cosine(F.flatten(), G.flatten(), eps)


def decoupled(features: Tensor, centers: Tensor, labels: Tensor | None, alpha: float) -> Tensor:
    features, centers = features.double(), centers.double()
    nu, classes = class_means(features, labels, len(centers)), len(centers)

    def others(means: Tensor) -> Tensor:
        return torch.stack([sum(means[k] for k in range(classes) if k != c) / (classes - 1) for c in range(classes)])

    return alpha * (nu - centers).square().mean() + (1 - alpha) * (others(nu) - others(centers)).square().mean()


def anchored(
    features: Tensor,
    centers: Tensor,
    labels: Tensor | None,
    anchor: Tensor,
    length_weight: float,
    eps: float = 1e-8,
    length_delta: float = math.inf,
) -> Tensor:
    features, centers, anchor = features.double(), centers.double(), anchor.double()
    terms = []
    for a, b in zip(centers - anchor, class_means(features, labels, len(centers)) - anchor, strict=True):
        terms.append(1 - cosine(a, b, eps))
        if a.norm() >= eps and b.norm() >= eps:
            logarithm = (b.norm() / a.norm()).log().abs()
            near = logarithm <= length_delta
            term = logarithm**2 if near else 2 * length_delta * logarithm - length_delta**2
            terms[-1] = terms[-1] + length_weight * term
    return torch.stack(terms).mean()


def value_and_gradient(function, features: Tensor, grad_output: float = 1.0) -> tuple[Tensor, Tensor]:
    leaf = features.detach().requires_grad_()
    loss = function(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.as_tensor(grad_output, dtype=loss.dtype))
    return loss.detach(), gradient


@functools.cache
def expected(case_name: str, dtype: torch.dtype, alignment: str, metric: str) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a case of the registry. Sees the rounded inputs in float64: only the computation's error remains."""
    inputs = inputs_of(case_name, dtype)
    kept = expected_cache.read(kept_name(case_name, dtype, alignment, metric, inputs))
    return computed(inputs, alignment, metric) if kept is None else kept


def inputs_of(case_name: str, dtype: torch.dtype) -> Inputs:
    """features, centers, labels"""
    return next(case for case in LOSS_CASES if case.name == case_name).make(dtype)


def computed(inputs: Inputs, alignment: str, metric: str) -> tuple[Tensor, Tensor]:
    features, centers, labels = inputs
    return value_and_gradient(lambda z: flow_alignment(z, centers, labels, alignment, metric), features.double())


DEFINITION = (class_means, flows, pair_flows, cosine, anchor_of, flow_alignment, anchored, value_and_gradient, computed)


def kept_name(case_name: str, dtype: torch.dtype, alignment: str, metric: str, inputs: Inputs) -> str:
    """Under which a result can be kept (expected_cache.py): another definition or other inputs have another name."""
    mark = expected_cache.fingerprint(DEFINITION, inputs)
    return "-".join([case_name, str(dtype).removeprefix("torch."), alignment, metric, mark])
