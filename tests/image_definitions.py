"""Views written as the definition reads, with the matrices of both axes built, and what the image operations' tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from cases.images import ImageInputs
from torch import Tensor

from sfm_fast import philox
from sfm_fast.ops.augment import augment
from sfm_fast.ops.render import render
from sfm_fast.ops.render_augment import render_augment
from sfm_fast.views import Views

KINDS = ("render", "augment", "render_augment")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Backends that run here on CPU tensors; Triton in its interpreter (conftest.py), CUDA in test_cuda_shim_images.py and on a GPU.
KERNELS = ("cpu", "triton")
# Small enough for the interpreter.
INTERPRETED = {"one-pixel", "smallest", "tiny", "same-side-again", "rows-of-flat-buffer", "one-row", "one-value"}


def kernel_calls(cases):
    """(backend, dtype, case): interpreted Triton is slow, and low precision differs in its loads and stores alone."""
    for backend in KERNELS:
        for dtype in DTYPES:
            for case in cases:
                if backend == "cpu" or (
                    case.name in INTERPRETED and (dtype == torch.float32 or case.name in ("smallest", "one-row"))
                ):
                    yield pytest.param(backend, dtype, case, id=f"{backend}-{dtype}-{case.name}")


def tents(origin: Tensor, step: Tensor, size: int, source: int) -> Tensor:
    """(size, source) float64 weights of bilinear sampling with zeros outside, at origin + j * step."""
    points = origin.double() + torch.arange(size, dtype=torch.float64) * step.double()
    return (1 - (points[:, None] - torch.arange(source)).abs()).clamp_min(0)


def shown(images: Tensor, views: Views) -> Tensor:
    """`augment` in float64."""
    height, width = images.shape[2:]
    result = []
    for v, (x0, dx, y0, dy) in enumerate(views.boxes):
        columns, rows = tents(x0, dx, views.size, width), tents(y0, dy, views.size, height)
        picture = rows @ images[v % len(images)].double() @ columns.T
        if views.noise_items[v] >= 0:
            normal = philox.normal(
                views.noise_items[v : v + 1], picture.numel(), seed=views.seed, stream=views.stream, step=views.step
            )
            picture = picture + views.noise_mean + views.noise_std * normal.view(picture.shape).double()
        result.append((picture - views.mean.double()[:, None, None]) / views.std.double()[:, None, None])
    return torch.stack(result)


def leaves_of(kind: str, inputs: ImageInputs) -> list[Tensor]:
    return [inputs.images] if kind == "augment" else inputs.levels


def call(
    kind: str, inputs: ImageInputs, leaves: Sequence[Tensor], backend: str, dtype: torch.dtype | None = None
) -> Tensor:
    if kind == "render":
        return render(leaves, inputs.canvas, rows=inputs.rows, dtype=dtype, backend=backend)
    if kind == "augment":
        return augment(leaves[0], inputs.views, dtype=dtype, backend=backend)
    return render_augment(leaves, inputs.canvas, inputs.views, rows=inputs.rows, dtype=dtype, backend=backend)


def incoming(result: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(result.numel())
    return torch.randn(result.shape, generator=generator).to(result.dtype).to(result.device)


def results(function: Callable[[list[Tensor]], Tensor], tensors: Sequence[Tensor], grad: Tensor | None = None):
    """What ``function`` gives and the gradients of ``tensors``, which keep their strides."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    result = function(leaves)
    grad = incoming(result) if grad is None else grad.to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves, grad)]


def assert_as_accurate_as_torch(
    run,
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
    backend: str,
    *,
    slack: float = 1e-6,
    image_is_saved: bool = False,
) -> None:
    """``run(tensors, backend, dtype)`` and its gradients; plain torch computes in float32 whatever the dtype.

    ``image_is_saved``: gradients see the image as rounded to ``dtype``, and so sigmoid's derivative off by up to eps.
    """
    ours = results(lambda leaves: run(leaves, backend, dtype), tensors)
    grad = incoming(ours[0])
    theirs = results(lambda leaves: run(leaves, "torch", torch.float32), [t.float() for t in tensors], grad)
    doubles = [t.double() for t in tensors]
    exact = results(lambda leaves: run(leaves, "torch", torch.float64), doubles, grad)
    scales = [three.abs().max() for three in exact]
    if image_is_saved:  # where levels are 0 the derivative is 1/2
        largest = results(lambda leaves: run(leaves, "torch", torch.float64), [t * 0 for t in doubles], grad.abs())
        scales[1:] = [2 * part.abs().max() for part in largest[1:]]
    assert ours[0].dtype == dtype
    for tensor, gradient in zip(tensors, ours[1:], strict=True):
        assert (gradient.dtype, gradient.shape) == (tensor.dtype, tensor.shape)
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 0
    for one, two, three, scale in zip(ours, theirs, exact, scales, strict=True):
        assert one.isfinite().all()
        bound = 1.5 * (two - three).abs().max() + slack * three.abs().max().clamp_min(1)
        assert (one.double() - three).abs().max() <= bound + rounding * scale
