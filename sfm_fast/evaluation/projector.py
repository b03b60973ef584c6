"""Classifier inheritance: a linear projector from one backbone's features to another's, fitted on views of synthetic images."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import kind_of
from ..errors import InputError
from ..version import __version__
from .heads import Projector, check_metadata
from .linear import MOST_STEPS, check_range, check_seed, fit_linear

SOLVERS = ("ridge", "adam")
SELECTIONS = ("loo", "views", "images")
PENALTIES = tuple(10.0 ** (k / 2) for k in range(-12, 3))  # 1e-6 to 10, in units of the mean eigenvalue
LEARNING_RATE = 0.01  # Adam's, for a batch of 256
FOLDS = 10
BLOCK = 8192  # rows in float64 at a time


def fit_projector(
    inputs: Tensor,
    targets: Tensor,
    *,
    solver: str = "ridge",
    selection: str = "loo",
    penalties: Sequence[float] = PENALTIES,
    epochs: int = 1000,
    most_steps: int = MOST_STEPS,
    seed: int = 0,
    metadata: dict[str, Any] | None = None,
) -> Projector:
    """The linear map that takes ``inputs`` nearest to ``targets`` in mean squared error; labels play no part.

    With W (Dphi, Dpsi), "ridge" minimises ‖X Wᵀ + b - Y‖² + λ‖W‖² over all V * N rows, b unpenalised, in float64 and closed form. λ is a
    penalty times the mean eigenvalue of X's scatter matrix (centred X: ‖X‖² / Dpsi), so it depends neither on the features' scale nor
    on the number of rows.

    Args:
        inputs: (V, N, Dpsi) floats, views of N images on the evaluating backbone.
        targets: (V, N, Dphi) floats, the same views on the distilling one.
        solver: "ridge", or "adam": the paper's fit with `fit_linear`, lr 0.01 * batch / 256.
        selection: how ridge chooses among ``penalties``: by the squared error of every row left out in turn ("loo", exact, in
            closed form), of the last fifth of the views ("views"), or of images with all of their views, a tenth of them at a time ("images").
            Views of an image are near copies, so "loo" errs on the side of small penalties, and "images" with one image a class,
            which leaves whole classes out, on the large one. Which is best for accuracy depends on the backbones, and by little:
            "loo" is the default as none is better on average over sets and backbone pairs, and it is the cheapest. Choosing by the classifier's
            logits instead of features gained nothing.
            A single view can't be held out, nor a single image: "loo" takes over then, and the metadata says so.
        penalties: all positive; equal errors are decided for the largest.
        epochs, most_steps: Adam's, as of `fit_linear`.
        seed: of Adam's start and batches, and of the parts of "images".
        metadata: joins the projector's; not with the keys "format" and "file_format", which its file has.

    Returns:
        Projector, float32, on the inputs' device. Its metadata: solver, views, images, seconds, seed, sfm_fast; with ridge penalty,
        selection (None for a single penalty) and held_out_mse; with Adam epochs. Constant inputs, or a single row, give weight 0:
        the mean target.

    Raises ``InputError``: shapes that don't pair up, rows that aren't finite, an argument out of its range, scales of inputs and
    targets that no float32 map connects.
    """
    started = time.perf_counter()
    check_seed(seed)
    check_metadata(metadata or {})
    ordered = _check(inputs, targets, solver, selection, penalties, epochs)
    views, images = inputs.shape[:2]
    x, y = inputs.detach().flatten(0, 1), targets.detach().flatten(0, 1)
    facts: dict[str, Any] = {"solver": solver}
    if solver == "adam":
        wanted = y.float()
        weight, bias = fit_linear(
            inputs.detach().float(),
            y.shape[1],
            lambda predicted, rows, _: F.mse_loss(predicted, wanted[rows]),
            lr=LEARNING_RATE,
            epochs=epochs,
            most_steps=most_steps,
            seed=seed,
        )
        facts |= {"epochs": epochs}
    else:
        whole = Ridge(x, y)
        held: dict[str, Any] = {"selection": None, "held_out_mse": None}
        if len(ordered) > 1 and len(x) > 1:
            if (selection == "views" and views == 1) or (selection == "images" and images == 1):
                selection = "loo"
            if selection == "loo":
                errors = whole.left_out_errors(ordered)
            else:
                errors = _held_out_errors(inputs.detach(), targets.detach(), ordered, selection, seed)
            best = int(errors.argmin())
            ordered, held = [ordered[best]], {"selection": selection, "held_out_mse": float(errors[best])}
        weight, bias = whole.solve(ordered[0])
        facts |= {"penalty": ordered[0], **held}
    weight, bias = weight.float(), bias.float()
    if not (weight.isfinite().all() and bias.isfinite().all()):
        sizes = [float(part.abs().max()) for part in (x, y)]
        raise InputError(
            f"the projector left float32's range: inputs of up to {sizes[0]:.3g} and targets of up to {sizes[1]:.3g}; scale them"
        )
    facts |= {"views": views, "images": images, "seed": seed, "seconds": round(time.perf_counter() - started, 6)}
    return Projector(weight, bias, {**facts, "sfm_fast": __version__, **(metadata or {})})


class Ridge:
    """Ridge regression of targets (n, P) on inputs (n, D) with all of its work done but the penalty.

    One eigendecomposition, of the smaller of XᵀX and XXᵀ ("dual": its eigenvectors turned into XᵀX's): with Xᵀ X = V diag(s) Vᵀ
    and M = (X V)ᵀ Y, the solution is Wᵀ = V diag(1 / (s + λ)) M for every λ. X and Y are centred in float64, block by block of rows.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, *, dual: bool | None = None) -> None:
        self.inputs, self.targets = inputs, targets
        self.input_mean, self.target_mean = (part.mean(0, dtype=torch.float64) for part in (inputs, targets))
        rows, dim = inputs.shape
        if rows < dim if dual is None else dual:
            centred = inputs.double() - self.input_mean
            eigenvalues, vectors = torch.linalg.eigh(centred @ centred.T)
            # Of directions beyond X's rank only rounding is left, which the division would blow up.
            kept = eigenvalues > rows * torch.finfo(torch.float64).eps * eigenvalues[-1]
            self.eigenvalues = eigenvalues[kept]
            self.vectors = centred.T @ vectors[:, kept] / self.eigenvalues.sqrt()
        else:
            scatter = inputs.new_zeros(dim, dim, dtype=torch.float64)
            for x, _ in self._blocks():
                scatter.addmm_(x.T, x)
            eigenvalues, self.vectors = torch.linalg.eigh(scatter)
            self.eigenvalues = eigenvalues.clamp(min=0)
        total = float(self.eigenvalues.sum())
        if total <= 1e-24 * rows * float(self.input_mean.square().sum()):  # constant inputs, but for rounding
            self.eigenvalues, self.vectors = self.eigenvalues[:0], self.vectors[:, :0]
        self.unit = total / dim
        self.moments = self.vectors.new_zeros(len(self.eigenvalues), targets.shape[1])
        for x, y in self._blocks():
            self.moments.addmm_((x @ self.vectors).T, y)

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(self.inputs.split(BLOCK), self.targets.split(BLOCK), strict=True):
            yield x.double() - self.input_mean, y.double() - self.target_mean

    def _shrunk(self, penalty: float) -> Tensor:
        return torch.reciprocal(self.eigenvalues + penalty * self.unit)

    def solve(self, penalty: float) -> tuple[Tensor, Tensor]:
        """Weight (P, D) and bias (P,) float64; ``penalty`` in units of the mean eigenvalue of XᵀX."""
        weight = (self.vectors @ (self._shrunk(penalty).unsqueeze(1) * self.moments)).T
        return weight, self.target_mean - weight @ self.input_mean

    def left_out_errors(self, penalties: Sequence[float]) -> Tensor:
        """(penalties,) mean squared error of the rows, each predicted by the fit (same λ) to all others.

        Exact: row i's error is residual_i / (1 - h_i), h the diagonal of the hat matrix, 1/n of which is the bias's (Allen's PRESS).
        """
        rows, errors = len(self.inputs), []
        shrunk = [self._shrunk(penalty) for penalty in penalties]
        for x, y in self._blocks():
            scores = x @ self.vectors
            squares = scores.square()
            for inverse in shrunk:
                residual = y - scores @ (inverse.unsqueeze(1) * self.moments)
                rest = (1 - 1 / rows - squares @ inverse).clamp(min=1e-12)
                errors.append((residual / rest.unsqueeze(1)).square().sum())
        return torch.stack(errors).view(-1, len(shrunk)).sum(0) / self.targets.numel()


def _held_out_errors(inputs: Tensor, targets: Tensor, penalties: Sequence[float], selection: str, seed: int) -> Tensor:
    """(penalties,) mean squared error of views, or of images with all their views, by fits to the others."""
    views, images, _ = inputs.shape
    held = []  # masks over (views, images)
    if selection == "views":
        held.append(torch.arange(views).unsqueeze(1).expand(views, images) >= views - max(1, views // 5))
    else:
        order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
        folds = min(FOLDS, images)
        part = torch.empty(images, dtype=torch.int64).scatter_(0, order, torch.arange(images) % folds)
        held += [(part == fold).expand(views, images) for fold in range(folds)]
    total, count = torch.zeros(len(penalties), dtype=torch.float64), 0
    for mask in held:
        mask = mask.to(inputs.device)
        fit, x, y = Ridge(inputs[~mask], targets[~mask]), inputs[mask].double(), targets[mask].double()
        for place, penalty in enumerate(penalties):
            weight, bias = fit.solve(penalty)
            total[place] += float((x @ weight.T + bias - y).square().sum())
        count += y.numel()
    return total / count


def _check(
    inputs: Tensor, targets: Tensor, solver: str, selection: str, penalties: Sequence[float], epochs: int
) -> list[float]:
    """The penalties from large to small; raises ``InputError``."""
    if solver not in SOLVERS:
        raise InputError(f"solver must be one of {SOLVERS}, got {solver!r}")
    if selection not in SELECTIONS:
        raise InputError(f"selection must be one of {SELECTIONS}, got {selection!r}")
    if not penalties or not all(0 < penalty < math.inf for penalty in penalties):
        raise InputError(f"penalties must be positive numbers, at least one, got {list(penalties)}")
    if epochs < 1:
        raise InputError(f"epochs must be at least 1, got {epochs}")
    for name, value in (("inputs", inputs), ("targets", targets)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise InputError(f"{name} must be a float tensor, got {kind_of(value)}")
        if value.ndim != 3 or 0 in value.shape:
            raise InputError(f"{name} must be (views, images, features), none of them 0, got {tuple(value.shape)}")
        check_range(name, value)
    if inputs.shape[:2] != targets.shape[:2] or inputs.device != targets.device:
        raise InputError(
            f"targets must be of the inputs' views and images, {tuple(inputs.shape[:2])} on {inputs.device}, "
            f"got {tuple(targets.shape[:2])} on {targets.device}"
        )
    return sorted({float(penalty) for penalty in penalties}, reverse=True)
