"""Fits the linear projector of classifier inheritance, from one backbone's features to another's, on views of synthetic images."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones.backbone import Backbone
from ..checks import kind_of
from ..errors import InputError
from ..features.compute import projector_features, view_features
from ..files import Metadata
from ..version import __version__
from ..views import Augmentation
from .config import SOLVERS
from .config import ProjectorFit as ProjectorFit
from .heads import Projector, check_metadata
from .linear import MOST_STEPS, check_range, check_seed, fit_linear, gradient_of

PENALTIES = tuple(10.0 ** (k / 2) for k in range(-12, 5))  # 1e-6 to 100, in units of the mean eigenvalue
LEARNING_RATE = 0.01  # Adam's, for a batch of 256
BLOCK = 8192  # rows in float64 at a time


def fit_projector(
    inputs: Tensor,
    targets: Tensor,
    *,
    solver: str = "ridge",
    penalties: Sequence[float] = PENALTIES,
    epochs: int = 1000,
    most_steps: int = MOST_STEPS,
    seed: int = 0,
    metadata: Metadata | None = None,
) -> Projector:
    """The linear map from ``inputs`` to ``targets`` with the least mean squared error; it needs no labels.

    With W (Dphi, Dpsi), "ridge" minimises ‖X Wᵀ + b - Y‖² + λ‖W‖² over all V * N rows, b unpenalised, in float64 and closed form. λ is a
    penalty times the mean eigenvalue of X's scatter matrix (centred X: ‖X‖² / Dpsi), so a penalty doesn't depend on the features' scale
    or on the number of rows.

    Args:
        inputs: (V, N, Dpsi) floats, features of views of N images on the evaluating backbone.
        targets: (V, N, Dphi) floats, features of the same views on the distilling one.
        solver: "ridge", or "adam": the paper's fit with `fit_linear`, lr 0.01 * batch / 256.
        penalties: candidates for ridge, all positive; the one with the least squared error is used when each image with all its views is left
            out in turn (exact, in closed form; of a single image, each view), the largest of equal ones. Views of an image are similar, so
            leaving out single views would choose too small a penalty for other images.
        epochs, most_steps: for Adam, see `fit_linear`.
        seed: of Adam's initial weights and batches.
        metadata: added to the projector's; must not have the keys "format" and "file_format".

    Returns:
        Projector, float32, on the inputs' device. Its metadata: solver, views, images, seconds, seed, sfm_fast; for ridge penalty
        and held_out_mse (None for a single penalty); for Adam epochs. Constant inputs, or a single row, give weight 0, so that it
        returns the mean target.

    Raises ``InputError`` for shapes that don't match, rows that aren't finite, an argument out of its range, or scales of inputs and
    targets for which the map isn't finite in float32.
    """
    started = time.perf_counter()
    check_seed(seed)
    check_metadata(metadata or {})
    ordered = _check(inputs, targets, solver, penalties, epochs)
    views, images = inputs.shape[:2]
    x, y = inputs.detach().flatten(0, 1), targets.detach().flatten(0, 1)
    facts: Metadata = {"solver": solver}
    if solver == "adam":
        wanted = y.float()
        weight, bias = fit_linear(
            inputs.detach().float(),
            y.shape[1],
            lambda predicted, rows, _: gradient_of(lambda mapped: F.mse_loss(mapped, wanted[rows]), predicted),
            lr=LEARNING_RATE,
            epochs=epochs,
            most_steps=most_steps,
            seed=seed,
        )
        facts |= {"epochs": epochs}
    else:
        whole = Ridge(x, y)
        held_out = None
        if len(ordered) > 1 and len(x) > 1:
            errors = whole.left_out_errors(ordered, views if images > 1 else 1)
            best = int(errors.argmin())
            ordered, held_out = [ordered[best]], float(errors[best])
        weight, bias = whole.solve(ordered[0])
        facts |= {"penalty": ordered[0], "held_out_mse": held_out}
    weight, bias = weight.float(), bias.float()
    if not (weight.isfinite().all() and bias.isfinite().all()):
        sizes = [float(part.abs().max()) for part in (x, y)]
        raise InputError(
            f"the projector's weights left float32's range: inputs of up to {sizes[0]:.3g} and targets of up to {sizes[1]:.3g}; rescale them"
        )
    facts |= {"views": views, "images": images, "seed": seed, "seconds": round(time.perf_counter() - started, 6)}
    return Projector(weight, bias, {**facts, "sfm_fast": __version__, **(metadata or {})})


def fit_on_images(
    images: Tensor, phi: Backbone, psi: Backbone, fit: ProjectorFit, *, batch_size: int = 256
) -> Projector:
    """The projector psi -> phi, fitted on views of images (N, channels, H, W) in 0..1 with the settings of ``fit``."""
    augmentation = Augmentation(min_area=fit.min_area, noise=False)
    seen_by = projector_features if fit.blends else view_features
    # With the same seed, both backbones get the same crops, each at its own input size.
    x, y = (
        seen_by(model, images, fit.views, augmentation, seed=fit.seed, batch_size=batch_size) for model in (psi, phi)
    )
    kept = ("name", "fingerprint", "input_size")
    made_with = {key: {name: getattr(model, name) for name in kept} for key, model in (("psi", psi), ("phi", phi))}
    metadata = {"min_area": fit.min_area, "blends": fit.blends and fit.views > 1, **made_with}
    return fit_projector(x, y.to(x.device), solver=fit.solver, seed=fit.seed, metadata=metadata)


class Ridge:
    """Ridge regression of targets (n, P) on inputs (n, D), prepared so that it can be solved for many penalties.

    One eigendecomposition, of the smaller of XᵀX and XXᵀ ("dual": its eigenvectors are converted to XᵀX's): with Xᵀ X = V diag(s) Vᵀ
    and M = (X V)ᵀ Y, the solution is Wᵀ = V diag(1 / (s + λ)) M for every λ. X and Y are centred in float64, in blocks of rows.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, *, dual: bool | None = None) -> None:
        self.inputs, self.targets = inputs, targets
        self.input_mean, self.target_mean = (part.mean(0, dtype=torch.float64) for part in (inputs, targets))
        rows, dim = inputs.shape
        if rows < dim if dual is None else dual:
            centred = inputs.double() - self.input_mean
            eigenvalues, vectors = torch.linalg.eigh(centred @ centred.T)
            # Directions beyond X's rank hold only rounding errors, which the division would amplify.
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
        if total <= 1e-24 * rows * float(self.input_mean.square().sum()):  # constant inputs, up to rounding
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

    def left_out_errors(self, penalties: Sequence[float], together: int = 1) -> Tensor:
        """(penalties,) mean squared error of the rows, each predicted by a fit with the same λ to all rows that aren't left out with it.

        together: number of rows that are left out together, those whose numbers are equal modulo rows / together: the views of an image.
        Exact: the errors of rows b are (I - H_bb)^-1 residual_b, with H the hat matrix, whose entries have 1/n for the bias (of one row: Allen's PRESS).
        """
        rows = len(self.inputs)
        groups = rows // together
        shrunk = [self._shrunk(penalty) for penalty in penalties]
        totals = self.moments.new_zeros(len(shrunk))
        at_once = max(1, BLOCK // together)
        unit = torch.eye(together, dtype=self.moments.dtype, device=self.moments.device)
        for begin in range(0, groups, at_once):
            some = slice(begin, min(begin + at_once, groups))
            x, y = (
                part.view(together, groups, -1)[:, some].double() - mean
                for part, mean in ((self.inputs, self.input_mean), (self.targets, self.target_mean))
            )
            scores, wanted = (x @ self.vectors).transpose(0, 1), y.transpose(0, 1)  # (groups, together, …)
            for place, inverse in enumerate(shrunk):
                residual = wanted - scores @ (inverse.unsqueeze(1) * self.moments)
                if together == 1:
                    rest = (1 - 1 / rows - scores.square() @ inverse).clamp(min=1e-12)
                    error = residual / rest.unsqueeze(2)
                else:
                    error = torch.linalg.solve(unit * (1 + 1e-12) - 1 / rows - (scores * inverse) @ scores.mT, residual)
                totals[place] += error.square().sum()
        errors: Tensor = totals / self.targets.numel()
        return errors


def _check(inputs: Tensor, targets: Tensor, solver: str, penalties: Sequence[float], epochs: int) -> list[float]:
    """The penalties from large to small; raises ``InputError``."""
    if solver not in SOLVERS:
        raise InputError(f"solver must be one of {SOLVERS}, got {solver!r}")
    if not penalties or not all(0 < penalty < math.inf for penalty in penalties):
        raise InputError(f"penalties must be one or more positive numbers, got {list(penalties)}")
    if epochs < 1:
        raise InputError(f"epochs must be at least 1, got {epochs}")
    for name, value in (("inputs", inputs), ("targets", targets)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise InputError(f"{name} must be a float tensor, got {kind_of(value)}")
        if value.ndim != 3 or 0 in value.shape:
            raise InputError(f"{name} must be (views, images, features), none of which is 0, got {tuple(value.shape)}")
        check_range(name, value)
    if inputs.shape[:2] != targets.shape[:2] or inputs.device != targets.device:
        raise InputError(
            f"targets must have the inputs' views, images and device, {tuple(inputs.shape[:2])} on {inputs.device}, "
            f"got {tuple(targets.shape[:2])} on {targets.device}"
        )
    return sorted({float(penalty) for penalty in penalties}, reverse=True)
