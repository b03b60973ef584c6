"""A linear classifier on features: training and accuracy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH = 256
LEARNING_RATE = 1e-3  # for a batch of 256; scaled in proportion


def train_linear(
    features: Tensor, labels: Tensor, num_classes: int, *, epochs: int = 1000, most_steps: int = 20000, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Adam with a cosine schedule on cross-entropy: features (views, N, D), labels (N,) -> weight (C, D), bias (C,).

    A step trains on about 256 features: a shuffled part of a large set, or every image of a small one in several views
    (drawn anew from the cached ones), so that ten images are trained on as thoroughly as ten thousand. An epoch sees every
    image at least once; lr is 1e-3 * batch / 256. ``epochs`` is cut where they would take more than ``most_steps`` steps.
    Deterministic in ``seed`` on one device.
    """
    views, count, dim = features.shape
    generator = torch.Generator().manual_seed(seed)
    bound = dim**-0.5
    weight = (
        torch.empty(num_classes, dim).uniform_(-bound, bound, generator=generator).to(features.device).requires_grad_()
    )
    bias = torch.zeros(num_classes, device=features.device, requires_grad=True)
    repeats = max(1, BATCH // count)
    batch = min(BATCH, count * repeats)
    steps_per_epoch = -(-count * repeats // batch)
    epochs = max(1, min(epochs, most_steps // steps_per_epoch))
    optimiser = torch.optim.Adam([weight, bias], lr=LEARNING_RATE * batch / BATCH, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * steps_per_epoch)
    flat, images = features.reshape(views * count, dim), torch.arange(count).repeat(repeats)
    for _ in range(epochs):
        order = images[torch.randperm(len(images), generator=generator)]
        view = torch.randint(views, order.shape, generator=generator)
        for image, row in zip(order.split(batch), (view * count + order).split(batch), strict=True):
            loss = F.cross_entropy(F.linear(flat[row.to(flat.device)], weight, bias), labels[image.to(labels.device)])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return weight.detach(), bias.detach()


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Share of rows whose label is among the k largest logits (k is cut to the number of classes)."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (best == labels.unsqueeze(1)).any(1).double().mean().item()
