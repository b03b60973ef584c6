"""The losses written exactly as the definition reads, with every flow built: slow, float64, obviously right."""

from __future__ import annotations

import torch
from torch import Tensor


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


def flow_alignment(
    features: Tensor, centers: Tensor, labels: Tensor | None, alignment: str, metric: str, eps: float = 1e-8
) -> Tensor:
    features, centers = features.double(), centers.double()
    nu, classes = class_means(features, labels, len(centers)), len(centers)
    if alignment == "pair":
        f, g = pair_flows(centers), pair_flows(nu)
        off = [(i, j) for i in range(classes) for j in range(classes) if i != j]
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
