"""Linear gradient matching (LGM), the baseline: in closed form, and by autograd as in the public code.

Source: Cazenavette et al., "Dataset Distillation for Pre-Trained Self-Supervised Vision Models" (arXiv 2511.16674).
For a linear classifier (W, b) and the mean cross-entropy over N labelled features z, with P = softmax(z W^T + b) and
Y the one-hot labels,

    dl/dW = (P - Y)^T z / N,        dl/db = mean(P - Y).

At W = 0, b = 0 and balanced classes P = 1/C, so dl/dW_c = (C-1)/C^2 * F_c and dl/db = 0: the gradient is the flow
of class c, and this loss equals the `global` flow alignment.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_gradient(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Closed-form gradient of the mean cross-entropy with respect to (W, b), flattened: -> (C*D + C,)."""
    probabilities = torch.softmax(features @ weight.T + bias, dim=1)
    residual = (probabilities - F.one_hot(labels, weight.shape[0])) / features.shape[0]
    return torch.cat([(residual.T @ features).flatten(), residual.sum(0)])


def linear_gradient_autograd(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, create_graph: bool
) -> Tensor:
    """The same gradient through autograd; ``create_graph`` keeps it differentiable in ``features`` (double backward)."""
    weight, bias = weight.detach().requires_grad_(), bias.detach().requires_grad_()
    loss = F.cross_entropy(features @ weight.T + bias, labels)
    gradients = torch.autograd.grad(loss, (weight, bias), create_graph=create_graph)
    return torch.cat([g.flatten() for g in gradients])


def gradient_distance(synthetic_gradient: Tensor, real_gradient: Tensor) -> Tensor:
    """1 - cosine of two flattened gradients -> scalar."""
    return 1 - F.cosine_similarity(synthetic_gradient, real_gradient.detach(), dim=0)
