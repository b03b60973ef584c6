"""Trains linear maps on features with Adam, for probes with and without a teacher, and computes accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam

from ..checks import check_labels, kind_of
from ..errors import InputError
from .config import ALPHA, TEMPERATURE, check_distillation

BATCH = 256
LEARNING_RATE = 1e-3  # for a batch of 256; proportional to the batch size
MOST_STEPS = 20000


def train_linear(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    teacher: Tensor | None = None,
    temperature: float = TEMPERATURE,
    alpha: float = ALPHA,
    epochs: int = 1000,
    most_steps: int = MOST_STEPS,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """A classifier: features (views, N, D), labels (N,) -> weight (C, D), bias (C,), trained by `fit_linear` on cross-entropy.

    With ``teacher``, logits (views, N, C) of the same views, the loss is `distillation_loss`; alpha 0 gives the same bits as no
    teacher. Features and teacher may be of any float dtype and are converted to float32. Raises ``InputError`` for labels outside
    0..C-1, shapes that don't match, values that aren't finite, or a scale with which training overflows.
    """
    check_distillation(temperature, alpha)
    check_seed(seed)
    if not isinstance(features, Tensor) or not features.is_floating_point():
        raise InputError(f"features must be a float tensor, got {kind_of(features)}")
    if features.ndim != 3 or 0 in features.shape:
        raise InputError(f"features must be (views, images, features), none of which is 0, got {tuple(features.shape)}")
    if num_classes < 1:
        raise InputError(f"num_classes must be at least 1, got {num_classes}")
    check_labels("labels", labels, features.shape[1], num_classes)
    check_range("features", features)
    if teacher is not None and (not isinstance(teacher, Tensor) or not teacher.is_floating_point()):
        raise InputError(f"teacher must be a float tensor, got {kind_of(teacher)}")
    if teacher is not None and teacher.shape != (*features.shape[:2], num_classes):
        raise InputError(
            f"teacher must be {(*features.shape[:2], num_classes)}, the logits of the features' views, got {tuple(teacher.shape)}"
        )
    if teacher is not None:
        check_range("teacher", teacher)
    features, labels = features.float(), labels.to(features.device)
    known = None if teacher is None else teacher.to(features.device, torch.float32).flatten(0, 1)

    def gradient(logits: Tensor, rows: Tensor, images: Tensor) -> Tensor:
        if known is None:
            return cross_entropy_gradient(logits, labels[images])
        teaching, wanted = known[rows], labels[images]
        return gradient_of(lambda student: distillation_loss(student, teaching, wanted, temperature, alpha), logits)

    weight, bias = fit_linear(
        features, num_classes, gradient, lr=LEARNING_RATE, epochs=epochs, most_steps=most_steps, seed=seed
    )
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise InputError(
            f"training left float32's range: scale down the features (up to {float(features.abs().max()):.3g}) or the teacher"
        )
    return weight, bias


def check_range(name: str, value: Tensor) -> None:
    """Raise ``InputError`` unless all values of the float tensor ``value`` are finite, in float32 too."""
    if not value.numel():
        return
    most = max(abs(float(end)) for end in value.detach().aminmax())
    if not most < float("inf"):
        raise InputError(f"{name} holds NaN or infinity")
    if most > torch.finfo(torch.float32).max:
        raise InputError(f"{name} reaches {most:.3g}, beyond the range of float32; scale it down")


def check_seed(seed: int) -> None:
    """Raise ``InputError`` unless ``seed`` is in [0, 2**64)."""
    if not 0 <= seed < 2**64:
        raise InputError(f"seed must be in [0, 2**64), got {seed}")


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float) -> Tensor:
    """alpha T² KL(teacher_T || student_T) + (1 - alpha) CE, means over rows: both logits (B, C), labels (B,) (Hinton et al. 2015)."""
    loss = (1 - alpha) * F.cross_entropy(student, labels) if alpha < 1 else student.new_zeros(())
    if alpha > 0:
        predicted, target = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
        loss = loss + alpha * temperature**2 * F.kl_div(predicted, target, reduction="batchmean", log_target=True)
    return loss


def gradient_of(loss: Callable[[Tensor], Tensor], predictions: Tensor) -> Tensor:
    """The gradient of ``loss`` at ``predictions``, by autograd."""
    with torch.enable_grad():
        leaf = predictions.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]


def cross_entropy_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the mean cross-entropy at logits (B, C): with the bits of autograd, which takes longer for small batches."""
    known = F.log_softmax(logits, dim=1)
    of_known = torch.zeros_like(known).scatter_(1, labels.unsqueeze(1), -1 / len(labels))
    result: Tensor = torch.ops.aten._log_softmax_backward_data(of_known, known, 1, known.dtype)
    return result


@torch.no_grad()
def fit_linear(
    features: Tensor,
    outputs: int,
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    lr: float,
    epochs: int = 1000,
    most_steps: int = MOST_STEPS,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Adam with a cosine schedule: features (views, N, D) -> weight (outputs, D), bias (outputs,).

    ``gradient(predictions, rows, images)`` gets predictions (B, outputs), their rows (B,) in the flattened (views * N, D) features,
    and their images (B,), 0..N-1, and returns the loss's gradient to the predictions. A step trains on about 256 features: a shuffled
    part of a large set, or every image of a small one in several views (random ones of the given views), so that small sets get as
    many updates per epoch. An epoch uses every image at least once; the learning rate is lr * batch / 256. ``epochs`` is reduced if
    they would take more than ``most_steps`` steps. Deterministic in ``seed`` on one device.
    """
    views, count, dim = features.shape
    generator = torch.Generator().manual_seed(seed)
    bound = dim**-0.5
    weight = torch.empty(outputs, dim).uniform_(-bound, bound, generator=generator).to(features.device)
    bias = torch.zeros(outputs, device=features.device)
    repeats = max(1, BATCH // count)
    batch = min(BATCH, count * repeats)
    steps_per_epoch = -(-count * repeats // batch)
    epochs = max(1, min(epochs, most_steps // steps_per_epoch))
    rates = iter(cosine_schedule(lr * batch / BATCH, epochs * steps_per_epoch))
    # A step takes tens of microseconds of arithmetic, so autograd, the optimiser's and the scheduler's classes would take most of it.
    trained = [weight, bias]
    means, squares = ([torch.zeros_like(part) for part in trained] for _ in range(2))
    steps = [torch.zeros((), device=features.device) for _ in trained]
    flat, everything = features.reshape(views * count, dim), torch.arange(count).repeat(repeats)
    for _ in range(epochs):
        order = everything[torch.randperm(len(everything), generator=generator)]
        view = torch.randint(views, order.shape, generator=generator)
        for images, rows in zip(order.split(batch), (view * count + order).split(batch), strict=True):
            images, rows = images.to(flat.device), rows.to(flat.device)
            shown = flat[rows]
            of_predictions = gradient(F.linear(shown, weight, bias), rows, images)
            adam(
                trained, [of_predictions.t() @ shown, of_predictions.sum(0)], means, squares, [], steps, fused=True, amsgrad=False,
                beta1=0.9, beta2=0.999, lr=next(rates), weight_decay=0.0, eps=1e-8, maximize=False,
            )  # fmt: skip
    return weight, bias


def cosine_schedule(rate: float, steps: int) -> list[float]:
    """The learning rates of torch's CosineAnnealingLR from ``rate`` to 0 over ``steps``, by its recurrence, for the same bits."""
    rates = [rate]
    for step in range(1, steps):
        rates.append((1 + math.cos(math.pi * step / steps)) / (1 + math.cos(math.pi * (step - 1) / steps)) * rates[-1])
    return rates


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Fraction of rows whose label is among the k largest logits (k is at most the number of classes)."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (best == labels.unsqueeze(1)).any(1).double().mean().item()
