"""Shared by the image kernels: bilinear positions and weights, and the colour matrix."""

import triton
import triton.language as tl

# The colour decorrelation matrix of sfm_fast.reference.render, row by row.
COLORS = tuple(
    value / (0.26**2 + 0.27**2 + 0.27**2) ** 0.5 for value in (0.26, 0.09, 0.02, 0.27, 0.0, -0.05, 0.27, -0.09, 0.03)
)
C00, C01, C02, C10, C11, C12, C20, C21, C22 = map(tl.constexpr, COLORS)


@triton.jit
def place(pixel: tl.tensor, SIDE: tl.constexpr, SIZE: tl.constexpr) -> tl.tensor:
    """n(p): 2 SIZE i at the centre of texel i."""
    return tl.minimum(tl.maximum((2 * pixel + 1) * SIDE - SIZE, 0), (SIDE - 1) * 2 * SIZE)


@triton.jit
def tent(distance: tl.tensor) -> tl.tensor:
    return tl.maximum(1.0 - tl.abs(distance), 0.0)


@triton.jit
def coordinate(index: tl.tensor, start: tl.tensor, step: tl.tensor) -> tl.tensor:
    return tl.fma(index.to(tl.float32), tl.zeros_like(index).to(tl.float32) + step, start)
