"""The flow-alignment losses without this package: the paper's formula in eager torch, and three ways to compute all pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def class_means(features: Tensor, labels: Tensor | None, classes: int) -> Tensor:
    if labels is None:
        return features
    sums = torch.zeros(classes, features.shape[1], dtype=features.dtype, device=features.device)
    return sums.index_add(0, labels, features) / torch.bincount(labels, minlength=classes).unsqueeze(1)


def paper_global(features: Tensor, centers: Tensor, labels: Tensor | None = None) -> Tensor:
    """1 - cosine of all flows, each class against the mean of the others, written like the definition."""
    classes = len(centers)
    means = class_means(features, labels, classes)
    real = (centers.sum(0, keepdim=True) - centers) / (classes - 1) - centers
    synthetic = (means.sum(0, keepdim=True) - means) / (classes - 1) - means
    return 1 - torch.nn.functional.cosine_similarity(real.flatten(), synthetic.flatten(), dim=0)


def paper_class(features: Tensor, centers: Tensor, labels: Tensor | None = None) -> Tensor:
    """mean over classes of 1 - cosine of the class's flow."""
    classes = len(centers)
    means = class_means(features, labels, classes)
    real = (centers.sum(0, keepdim=True) - centers) / (classes - 1) - centers
    synthetic = (means.sum(0, keepdim=True) - means) / (classes - 1) - means
    return (1 - torch.nn.functional.cosine_similarity(real, synthetic, dim=1)).mean()


def eager_anchored(features: Tensor, centers: Tensor, labels: Tensor | None = None) -> Tensor:
    """mean over classes of 1 - cosine of the class's flow from the mean of the centres."""
    anchor = centers.mean(0)
    means = class_means(features, labels, len(centers))
    return (1 - torch.nn.functional.cosine_similarity(centers - anchor, means - anchor, dim=1)).mean()


def naive_pair(features: Tensor, centers: Tensor, labels: Tensor | None = None) -> Tensor:
    """All pair flows as C x C x D tensors."""
    means = class_means(features, labels, len(centers))
    real, synthetic = centers[None] - centers[:, None], means[None] - means[:, None]
    off_diagonal = ~torch.eye(len(centers), dtype=torch.bool, device=centers.device)
    return (1 - torch.nn.functional.cosine_similarity(real, synthetic, dim=2))[off_diagonal].mean()


def _squared_lengths(x: Tensor, diagonal: Tensor) -> Tensor:
    own = x.square().sum(1)
    return (own[:, None] + own[None, :] - 2 * x @ x.T) * (1 - diagonal) + diagonal


def gram_constants(centers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`gram_pair`'s part that depends only on the centres: centred, squared lengths of their flows, and ones on the diagonal."""
    diagonal = torch.eye(len(centers), device=centers.device)  # a class with itself: length 1, and not in the sum
    a = centers - centers.mean(0)
    return a, _squared_lengths(a, diagonal), diagonal


def gram_pair(features: Tensor, constants: tuple[Tensor, Tensor, Tensor], labels: Tensor | None = None) -> Tensor:
    """All pairs from matrix products: C x C matrices, no C x C x D tensor. ``constants``: of `gram_constants`."""
    a, real_lengths, diagonal = constants
    classes = len(a)
    b = class_means(features, labels, classes)
    b = b - b.mean(0)

    cross = a @ b.T
    own = (a * b).sum(1)
    numerator = own[:, None] + own[None, :] - cross - cross.T
    cosine = numerator * (real_lengths * _squared_lengths(b, diagonal)).rsqrt()
    return ((1 - cosine) * (1 - diagonal)).sum() / (classes * (classes - 1))


def keops_pair(features: Tensor, centers: Tensor, labels: Tensor | None = None) -> Tensor:
    """All pairs as a KeOps reduction: O(C D) memory. Needs pykeops; the first call compiles."""
    from pykeops.torch import LazyTensor

    means = class_means(features, labels, len(centers))
    a_i, a_j = LazyTensor(centers[:, None, :].contiguous()), LazyTensor(centers[None, :, :].contiguous())
    b_i, b_j = LazyTensor(means[:, None, :].contiguous()), LazyTensor(means[None, :, :].contiguous())
    f, g = a_j - a_i, b_j - b_i
    # On the diagonal both lengths are 0: the small constant gives 0 / 1e-12 there and changes nothing elsewhere.
    cosine = (f * g).sum(-1) / ((f * f).sum(-1) * (g * g).sum(-1) + 1e-24).sqrt()
    classes = len(centers)
    return 1 - cosine.sum(1).sum() / (classes * (classes - 1))


EAGER = {"global": paper_global, "class": paper_class, "anchored": eager_anchored}  # of cost O(C D), by alignment
