"""Images from pyramid levels: bilinear sum, colour matrix, sigmoid. The gradient is in render_gradient.py.

With n(p) = (2p + 1) side - size, clamped to 0 .. 2 size (side - 1), texel i has weight max(0, 1 - |n(p) / (2 size) - i|)
in pixel p, computed in integers up to the last step. A thread has 4 x 4 pixels, which share a few texels of each level.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import segments
from .bilinear import C00, C01, C02, C10, C11, C12, C20, C21, C22, place, tent
from .checks import check_levels
from .render_gradient import render_backward

__all__ = ["render", "render_backward"]


@triton.jit
def _quads(first: tl.tensor, SIDE: tl.constexpr, SIZE: tl.constexpr) -> tl.tuple:
    """The first texel of each quad of pixels along an axis, and the position of each of the four pixels from there."""
    texel = place(first, SIDE, SIZE) // (2 * SIZE)
    a = (place(first, SIDE, SIZE) - texel * (2 * SIZE)).to(tl.float32) / (2 * SIZE)
    b = (place(first + 1, SIDE, SIZE) - texel * (2 * SIZE)).to(tl.float32) / (2 * SIZE)
    c = (place(first + 2, SIDE, SIZE) - texel * (2 * SIZE)).to(tl.float32) / (2 * SIZE)
    d = (place(first + 3, SIDE, SIZE) - texel * (2 * SIZE)).to(tl.float32) / (2 * SIZE)
    return texel, a, b, c, d


@triton.jit
def _add_scaled(row: tl.tuple, weight: tl.tuple, value: tl.tuple) -> tl.tuple:
    a = row[0] + weight[0] * value[0]
    b = row[1] + weight[1] * value[1]
    c = row[2] + weight[2] * value[2]
    d = row[3] + weight[3] * value[3]
    return a, b, c, d


@triton.jit
def _add_texel(row: tl.tuple, weight: tl.tuple, texel: tl.tensor) -> tl.tuple:
    value = tl.load(texel)
    return _add_scaled(row, weight, (value, value, value, value))


@triton.jit
def _add_row(total: tl.tuple, down: tl.tuple, u: tl.tensor, value: tl.tuple) -> tl.tuple:
    """Add the quads' u-th row of texels, interpolated at 4 columns, to their 4 rows of 4 pixels, (R, Q) each."""
    a = tent(down[1] - u)[:, None]
    b = tent(down[2] - u)[:, None]
    c = tent(down[3] - u)[:, None]
    d = tent(down[4] - u)[:, None]
    return (
        _add_scaled(total[0], (a, a, a, a), value),
        _add_scaled(total[1], (b, b, b, b), value),
        _add_scaled(total[2], (c, c, c, c), value),
        _add_scaled(total[3], (d, d, d, d), value),
    )


@triton.jit
def _add_pixels(row: tl.tuple, plane: tl.tensor, rows: tl.tensor, columns: tl.tensor, SIZE: tl.constexpr) -> tl.tuple:
    """Add a row of quads of a level that has the image's size. ``columns`` (4 Q,)."""
    mask = (rows < SIZE)[:, None] & (columns < SIZE)[None, :]
    value = tl.load(plane + (rows * SIZE)[:, None] + columns[None, :], mask=mask, other=0.0)
    even, odd = value.reshape(row[0].shape[0], row[0].shape[1], 2, 2).split()
    v0, v2 = even.split()
    v1, v3 = odd.split()
    return row[0] + v0, row[1] + v1, row[2] + v2, row[3] + v3


@triton.jit
def _store_row(out: tl.tensor, row: tl.tuple, rows: tl.tensor, columns: tl.tensor, SIZE: tl.constexpr) -> None:
    value = tl.join(tl.join(row[0], row[2]), tl.join(row[1], row[3])).reshape(rows.shape[0], columns.shape[0])
    y = 1.0 / (1.0 + tl.exp(-2.0 * value))
    mask = (rows < SIZE)[:, None] & (columns < SIZE)[None, :]
    tl.store(out + (rows * SIZE)[:, None] + columns[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _mix(red: tl.tuple, green: tl.tuple, blue: tl.tuple, R: tl.constexpr, G: tl.constexpr, B: tl.constexpr) -> tl.tuple:
    a = red[0] * R + green[0] * G + blue[0] * B
    b = red[1] * R + green[1] * G + blue[1] * B
    c = red[2] * R + green[2] * G + blue[2] * B
    d = red[3] * R + green[3] * G + blue[3] * B
    return a, b, c, d


@triton.jit
def _add_rows(total: tl.tuple, plane: tl.tensor, first: tl.tensor, columns: tl.tensor, SIZE: tl.constexpr) -> tl.tuple:
    """Add a channel of a level that has the image's size. ``columns`` (4 Q,)."""
    a = _add_pixels(total[0], plane, first, columns, SIZE)
    b = _add_pixels(total[1], plane, first + 1, columns, SIZE)
    c = _add_pixels(total[2], plane, first + 2, columns, SIZE)
    d = _add_pixels(total[3], plane, first + 3, columns, SIZE)
    return a, b, c, d


@triton.jit
def _render_kernel(
    levels: tl.tuple,
    strides: tl.tuple,
    rows: tl.tensor,
    out: tl.tensor,
    SIDES: tl.constexpr,
    TEXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
) -> None:
    """Renders a tile of 4 BLOCK_R x 4 BLOCK_Q pixels of an image, all channels."""
    tiles_across: tl.constexpr = (SIZE + 4 * BLOCK_Q - 1) // (4 * BLOCK_Q)
    tiles: tl.constexpr = tiles_across * ((SIZE + 4 * BLOCK_R - 1) // (4 * BLOCK_R))
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    first_row = 4 * (tile // tiles_across * BLOCK_R + tl.arange(0, BLOCK_R))
    first_column = 4 * (tile % tiles_across * BLOCK_Q + tl.arange(0, BLOCK_Q))
    columns = tile % tiles_across * (4 * BLOCK_Q) + tl.arange(0, 4 * BLOCK_Q)
    source = image
    if rows is not None:
        source = tl.load(rows + image)
    zero = tl.zeros([BLOCK_R, BLOCK_Q], tl.float32)
    nothing = (zero, zero, zero, zero)
    red = (nothing, nothing, nothing, nothing)
    green = (nothing, nothing, nothing, nothing)
    blue = (nothing, nothing, nothing, nothing)
    for k in tl.static_range(len(SIDES)):
        plane = levels[k] + source * strides[k]
        if SIDES[k] == SIZE:
            red = _add_rows(red, plane, first_row, columns, SIZE)
            if CHANNELS == 3:
                green = _add_rows(green, plane + SIZE * SIZE, first_row, columns, SIZE)
                blue = _add_rows(blue, plane + 2 * SIZE * SIZE, first_row, columns, SIZE)
        else:
            down = _quads(first_row, SIDES[k], SIZE)
            across = _quads(first_column, SIDES[k], SIZE)
            # Loops that the compiler unrolls later: written out here, all levels take half a minute to compile.
            for u in range(TEXELS[k]):
                line = plane + (tl.minimum(down[0] + u, SIDES[k] - 1) * SIDES[k])[:, None]
                r, g, b = nothing, nothing, nothing
                for v in range(TEXELS[k]):
                    texel = line + tl.minimum(across[0] + v, SIDES[k] - 1)[None, :]
                    w0 = tent(across[1] - v)[None, :]
                    w1 = tent(across[2] - v)[None, :]
                    w2 = tent(across[3] - v)[None, :]
                    w3 = tent(across[4] - v)[None, :]
                    r = _add_texel(r, (w0, w1, w2, w3), texel)
                    if CHANNELS == 3:
                        g = _add_texel(g, (w0, w1, w2, w3), texel + SIDES[k] * SIDES[k])
                        b = _add_texel(b, (w0, w1, w2, w3), texel + 2 * SIDES[k] * SIDES[k])
                red = _add_row(red, down, u, r)
                if CHANNELS == 3:
                    green = _add_row(green, down, u, g)
                    blue = _add_row(blue, down, u, b)
    target = out + image * (CHANNELS * SIZE * SIZE)
    for k in tl.static_range(4):
        if CHANNELS == 3:
            r, g, b = red[k], green[k], blue[k]
            _store_row(target, _mix(r, g, b, C00, C01, C02), first_row + k, columns, SIZE)
            _store_row(target + SIZE * SIZE, _mix(r, g, b, C10, C11, C12), first_row + k, columns, SIZE)
            _store_row(target + 2 * SIZE * SIZE, _mix(r, g, b, C20, C21, C22), first_row + k, columns, SIZE)
        else:
            _store_row(target, red[k], first_row + k, columns, SIZE)


@lru_cache(maxsize=64)
def _texels(side: int, size: int) -> int:
    """The maximum number of texels of a level that four pixels from a multiple of 4 on read along an axis."""

    def first(pixel: int) -> int:
        return min(max((2 * pixel + 1) * side - size, 0) // (2 * size), side - 1)

    return max(min(first(min(p + 3, size - 1)) + 1, side - 1) - first(p) + 1 for p in range(0, size, 4))


def render(levels: list[Tensor], rows: Tensor | None, size: int, dtype: torch.dtype) -> Tensor:
    """sigmoid(2 D sum_k bilinear(level_k -> size)): levels (N, c, r_k, r_k) float32 -> (M, c, size, size) in ``dtype``.

    ``rows`` (M,) int64 selects the images, None all. D only if c == 3. Levels may be rows of a wider tensor.
    """
    count, channels = check_levels(levels, rows, size, dtype)
    out = torch.empty((count, channels, size, size), dtype=dtype, device=levels[0].device)
    if out.numel() == 0:
        return out
    levels = [level if level[0].is_contiguous() else level.contiguous() for level in levels]
    quads = triton.cdiv(size, 4)
    across = 16 if quads % 16 == 0 else min(8, triton.next_power_of_2(quads))
    down = min(8, triton.next_power_of_2(quads))
    with torch.cuda.device_of(out):
        _render_kernel[(count * triton.cdiv(quads, across) * triton.cdiv(quads, down),)](
            tuple(levels),
            tuple(level.stride(0) for level in levels),
            None if rows is None else rows.contiguous(),
            out,
            SIDES=tuple(level.shape[-1] for level in levels),
            TEXELS=tuple(_texels(level.shape[-1], size) for level in levels),
            CHANNELS=channels,
            SIZE=size,
            BLOCK_R=down,
            BLOCK_Q=across,
            num_warps=max(1, segments.tile_warps() * across * down // 128),
        )
    return out
