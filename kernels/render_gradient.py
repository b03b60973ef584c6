"""The gradient of pyramid levels from the gradient of their images, the transpose of render.py.

It is separable. A program owns a strip of columns: it writes g, the gradient of the sum, to the place of the gradient of
the level of the image's size, and from the cache sums it vertically to the rows of every other level. A second kernel
sums those rows horizontally. Every sum is divided by shape into parts of a few dozen values, without atomics.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import segments
from .bilinear import C00, C01, C02, C10, C11, C12, C20, C21, C22, place, tent
from .checks import check_images, check_sides

WORKSPACE = 1 << 27  # bytes; images that need more are done in parts
COLUMNS = 32  # of a strip
ROWS = 16  # parallel sums in a strip


@triton.jit
def _gradient(grad: tl.tensor, images: tl.tensor, index: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """The gradient before the sigmoid: 2 y (1 - y) grad."""
    y = tl.load(images + index, mask=mask, other=0.0).to(tl.float32)
    return tl.load(grad + index, mask=mask, other=0.0).to(tl.float32) * (2.0 * y * (1.0 - y))


@triton.jit
def _weight_in(pixel: tl.tensor, texel: tl.tensor, SIDE: tl.constexpr, SIZE: tl.constexpr) -> tl.tensor:
    distance = (place(pixel, SIDE, SIZE) - texel * (2 * SIZE)).to(tl.float32) / (2 * SIZE)
    return tl.where(pixel < SIZE, tent(distance), 0.0)


@triton.jit
def _first_pixel(texel: tl.tensor, SIDE: tl.constexpr, SIZE: tl.constexpr) -> tl.tensor:
    """The first pixel in which a texel has a weight above 0."""
    return tl.where(texel > 0, tl.maximum((2 * texel - 1) * SIZE - SIDE, 0) // (2 * SIDE) + 1, 0)


@triton.jit
def _store_all(
    pixels: tl.tensor, out: tl.tensor, g: tl.tensor, index: tl.tensor, mask: tl.tensor, FULL: tl.constexpr
) -> None:
    tl.store(pixels + index, g, mask=mask)
    for k in tl.static_range(len(FULL)):  # further levels of the image's size
        tl.store(out + FULL[k] + index, g, mask=mask)


@triton.jit
def _sum_down(
    source: tl.tensor,
    target: tl.tensor,
    inside: tl.tensor,
    SIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Sum a strip of pixels over the rows of a level: ROWS sums in parallel, PARTS of them for one texel."""
    TEXELS: tl.constexpr = ROWS // PARTS
    EACH: tl.constexpr = (PIXELS + PARTS - 1) // PARTS
    UNROLL: tl.constexpr = 4 if EACH % 4 == 0 else 1
    for first in range(0, SIDE, TEXELS):
        texel = first + tl.arange(0, TEXELS)
        start = _first_pixel(texel, SIDE, SIZE)[:, None] + (tl.arange(0, PARTS) * EACH)[None, :]
        total = tl.zeros([TEXELS, PARTS, inside.shape[0]], tl.float32)
        for step in range(0, EACH, UNROLL):
            for j in tl.static_range(UNROLL):
                row = start + (step + j)
                weight = _weight_in(row, texel[:, None], SIDE, SIZE)
                mask = (weight != 0)[:, :, None] & inside[None, None, :]
                total += weight[:, :, None] * tl.load(source + (row * SIZE)[:, :, None], mask=mask, other=0.0)
        mask = (texel < SIDE)[:, None] & inside[None, :]
        tl.store(target + (texel * SIZE)[:, None], tl.sum(total, axis=1), mask=mask)


@triton.jit
def _columns_kernel(
    grad: tl.tensor,
    images: tl.tensor,
    out: tl.tensor,
    pixels: tl.tensor,
    pixels_stride: tl.tensor,
    work: tl.tensor,
    out_stride: tl.tensor,
    FULL: tl.constexpr,
    SIDES: tl.constexpr,
    PIXELS: tl.constexpr,
    STARTS: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WRITE: tl.constexpr,
    SUM: tl.constexpr,
) -> None:
    """A strip of an image's columns: g to ``pixels``, and its sums over the rows of every other level to ``work``."""
    strips: tl.constexpr = (SIZE + COLUMNS - 1) // COLUMNS
    area: tl.constexpr = SIZE * SIZE
    image = (tl.program_id(0) // strips).to(tl.int64)
    columns = tl.program_id(0) % strips * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < SIZE
    grad += image * (CHANNELS * area)
    images += image * (CHANNELS * area)
    out += image * out_stride
    pixels += image * pixels_stride
    work += image * (CHANNELS * STARTS[len(SIDES)] * SIZE)
    if WRITE:
        for first in range(0, SIZE, ROWS):
            rows = first + tl.arange(0, ROWS)
            mask = (rows < SIZE)[:, None] & inside[None, :]
            index = (rows * SIZE)[:, None] + columns[None, :]
            if CHANNELS == 3:
                r = _gradient(grad, images, index, mask)
                g = _gradient(grad + area, images + area, index, mask)
                b = _gradient(grad + 2 * area, images + 2 * area, index, mask)
                _store_all(pixels, out, r * C00 + g * C10 + b * C20, index, mask, FULL)
                _store_all(pixels, out, r * C01 + g * C11 + b * C21, area + index, mask, FULL)
                _store_all(pixels, out, r * C02 + g * C12 + b * C22, 2 * area + index, mask, FULL)
            else:
                _store_all(pixels, out, _gradient(grad, images, index, mask), index, mask, FULL)
    if WRITE and SUM:
        tl.debug_barrier()  # other threads of the program read what these have written
    if SUM:
        for channel in range(0, CHANNELS):
            source = pixels + channel * area + columns[None, None, :]
            target = work + channel * (STARTS[len(SIDES)] * SIZE) + columns[None, :]
            for k in tl.static_range(len(SIDES)):
                _sum_down(source, target + STARTS[k] * SIZE, inside, SIDES[k], PIXELS[k], PARTS[k], SIZE, ROWS)


@triton.jit
def _sum_across(
    source: tl.tensor,
    target: tl.tensor,
    block: tl.tensor,
    SIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    TEXELS: tl.constexpr,
    LANES: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """Sum a level's rows of pixels horizontally for a block of its texels, LANES pixels of each in parallel."""
    index = block * TEXELS + tl.arange(0, TEXELS)
    row, texel = index // SIDE, index % SIDE
    inside = index < SIDE * SIDE
    start = _first_pixel(texel, SIDE, SIZE)[:, None] + tl.arange(0, LANES)[None, :]
    total = tl.zeros([TEXELS, LANES], tl.float32)
    for first in range(0, PIXELS, LANES):
        pixel = start + first
        weight = _weight_in(pixel, texel[:, None], SIDE, SIZE)
        mask = (weight != 0) & inside[:, None]
        total += weight * tl.load(source + (row * SIZE)[:, None] + pixel, mask=mask, other=0.0)
    tl.store(target + index, tl.sum(total, axis=1), mask=inside)


@triton.jit
def _across_kernel(
    work: tl.tensor,
    out: tl.tensor,
    out_stride: tl.tensor,
    SIDES: tl.constexpr,
    PIXELS: tl.constexpr,
    STARTS: tl.constexpr,
    OFFSETS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TEXELS: tl.constexpr,
    LANES: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """Sums for a block of texels of one channel of one level."""
    count: tl.constexpr = len(SIDES)
    plane = (tl.program_id(0) // BLOCKS[count]).to(tl.int64)
    block = tl.program_id(0) % BLOCKS[count]
    work += plane * (STARTS[count] * SIZE)
    out += plane // CHANNELS * out_stride
    channel = (plane % CHANNELS).to(tl.int32)
    for k in tl.static_range(count):
        if (block >= BLOCKS[k]) & (block < BLOCKS[k + 1]):
            source = work + STARTS[k] * SIZE
            target = out + OFFSETS[k] + channel * (SIDES[k] * SIDES[k])
            _sum_across(source, target, block - BLOCKS[k], SIDES[k], PIXELS[k], TEXELS[k], LANES[k], SIZE)


@lru_cache(maxsize=64)
def _pixels(side: int, size: int) -> int:
    """The maximum number of pixels along an axis in which a texel has a weight, counted as in `_first_pixel`."""

    def first(texel: int) -> int:
        return max((2 * texel - 1) * size - side, 0) // (2 * side) + 1 if texel else 0

    def end(texel: int) -> int:
        return size if texel == side - 1 else -(-((2 * texel + 3) * size - side) // (2 * side))

    return max(end(texel) - first(texel) for texel in range(side))


def render_backward(grad: Tensor, images: Tensor, sides: list[int]) -> Tensor:
    """Gradient of the levels, (M, c sum_k r_k^2) float32, with the levels of an image one after the other.

    ``images`` (M, c, S, S) is the result of ``render``; ``grad`` has its shape, any strides, and either's dtype.
    """
    check_images("images", images, None, None, None, None, device=images.device)
    count, channels, size, _ = images.shape
    check_images("grad", grad, count, channels, size, size, device=images.device)
    check_sides(sides, channels, size, images.shape[3])
    areas = [channels * side * side for side in sides]
    offsets = [sum(areas[:k]) for k in range(len(sides))]
    out = torch.empty((count, sum(areas)), dtype=torch.float32, device=images.device)
    if out.numel() == 0:
        return out
    grad, images = grad.contiguous(), images.contiguous()
    full = [offset for offset, side in zip(offsets, sides, strict=True) if side == size]
    coarse = [(offset, side) for offset, side in zip(offsets, sides, strict=True) if side != size]
    lower = tuple(side for _, side in coarse)
    reach = tuple(_pixels(side, size) for side in lower)
    height = sum(lower)
    lanes = tuple(min(256, triton.next_power_of_2(pixels)) for pixels in reach)
    texels = tuple(
        min(max(1, 2048 // lane), triton.next_power_of_2(side * side)) for lane, side in zip(lanes, lower, strict=True)
    )
    blocks = [triton.cdiv(side * side, texel) for texel, side in zip(texels, lower, strict=True)]
    bytes_each = 4 * channels * size * (height + (0 if full else size))
    part = max(1, min(count, WORKSPACE // max(1, bytes_each)))
    work = torch.empty((part, channels, height, size), dtype=torch.float32, device=images.device)
    scratch = None if full else torch.empty((part, channels, size, size), dtype=torch.float32, device=images.device)
    shared = {
        "SIDES": lower,
        "PIXELS": reach,
        "STARTS": tuple(sum(lower[:k]) for k in range(len(lower) + 1)),
        "CHANNELS": channels,
        "SIZE": size,
    }
    with torch.cuda.device_of(out):
        for first in range(0, count, part):
            here = out[first : first + part]
            pixels = here[:, full[0] :] if scratch is None else scratch
            # Two launches on AMD, where a barrier doesn't wait for stores.
            for write, total in ((True, False), (False, True)) if segments.IS_HIP else ((True, True),):
                _columns_kernel[(len(here) * triton.cdiv(size, COLUMNS),)](
                    grad[first : first + part],
                    images[first : first + part],
                    here,
                    pixels,
                    pixels.stride(0),
                    work,
                    here.stride(0),
                    FULL=tuple(full[1:]),
                    PARTS=tuple(ROWS // min(ROWS, triton.next_power_of_2(side)) for side in lower),
                    ROWS=ROWS,
                    COLUMNS=COLUMNS,
                    WRITE=write,
                    SUM=total,
                    num_warps=segments.tile_warps(),
                    **shared,
                )
            if not lower:
                continue
            _across_kernel[(len(here) * channels * sum(blocks),)](
                work,
                here,
                here.stride(0),
                OFFSETS=tuple(offset for offset, _ in coarse),
                BLOCKS=tuple(sum(blocks[:k]) for k in range(len(lower) + 1)),
                TEXELS=texels,
                LANES=lanes,
                num_warps=segments.tile_warps(),
                **shared,
            )
    return out
