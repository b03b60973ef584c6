"""Random views of images: flip, crop and resize as one affine sampling, noise, normalisation. Gradient: augment_gradient.py.

View column j reads source column x = x0 + j dx, bilinearly, with zeros outside.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .augment_gradient import augment_backward
from .bilinear import coordinate
from .checks import check_boxes, check_dtype, check_floats, check_images, check_sizes, check_tensor
from .philox import normal4, signed
from .segments import tile_warps

ROWS, COLUMNS = 16, 32  # size of a tile
__all__ = ["augment", "augment_backward"]


@triton.jit
def _taps(index: tl.tensor, start: tl.tensor, step: tl.tensor, extent: tl.constexpr) -> tl.tuple:
    """The first of two source pixels along an axis, -2 .. extent + 1, and the weight of the second."""
    x = coordinate(index, start, step)
    x = tl.minimum(tl.maximum(x, -2.0), extent + 1.0)
    first = tl.floor(x)
    return first.to(tl.int32), x - first


@triton.jit(do_not_specialize=["key_low", "key_high", "step", "stream"])
def _augment_kernel(
    images: tl.tensor,
    boxes: tl.tensor,
    noise_items: tl.tensor,
    mean: tl.tensor,
    std: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    noise_mean: tl.tensor,
    noise_std: tl.tensor,
    key_low: tl.tensor,
    key_high: tl.tensor,
    step: tl.tensor,
    stream: tl.tensor,
    CHANNELS: tl.constexpr,
    COPIES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Computes a tile of a view, all channels. Tiles start at multiples of 4 in the noise, which is made in blocks of 4."""
    aligned: tl.constexpr = SIZE % 4 == 0
    tiles_across: tl.constexpr = (SIZE + (0 if aligned else 3) + COLUMNS - 1) // COLUMNS
    tiles: tl.constexpr = tiles_across * ((SIZE + ROWS - 1) // ROWS)
    view = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    rows = tile // tiles_across * ROWS + tl.arange(0, ROWS)
    first = tile % tiles_across * COLUMNS
    x0 = tl.load(boxes + 4 * view)
    dx = tl.load(boxes + 4 * view + 1)
    y0 = tl.load(boxes + 4 * view + 2)
    dy = tl.load(boxes + 4 * view + 3)
    item = tl.load(noise_items + view)
    images += view % count * (CHANNELS * HEIGHT * WIDTH)
    out += view * (CHANNELS * COPIES * SIZE * SIZE)
    iy, wy = _taps(rows, y0, dy, HEIGHT)
    upper = ((iy >= 0) & (iy < HEIGHT))[:, None]
    lower = ((iy >= -1) & (iy < HEIGHT - 1))[:, None]
    wy = wy[:, None]
    for channel in tl.static_range(CHANNELS):
        position = (channel * SIZE + rows) * SIZE + first
        columns = (first + tl.arange(0, COLUMNS))[None, :]
        if not aligned:
            columns -= (position & 3)[:, None]
        ix, wx = _taps(columns, x0, dx, WIDTH)
        left = (ix >= 0) & (ix < WIDTH)
        right = (ix >= -1) & (ix < WIDTH - 1)
        source = images + channel * (HEIGHT * WIDTH) + (iy * WIDTH)[:, None] + ix
        v00 = tl.load(source, mask=upper & left, other=0.0).to(tl.float32)
        v01 = tl.load(source + 1, mask=upper & right, other=0.0).to(tl.float32)
        v10 = tl.load(source + WIDTH, mask=lower & left, other=0.0).to(tl.float32)
        v11 = tl.load(source + WIDTH + 1, mask=lower & right, other=0.0).to(tl.float32)
        value = (1.0 - wy) * ((1.0 - wx) * v00 + wx * v01) + wy * ((1.0 - wx) * v10 + wx * v11)
        # Quads from here on, for the noise and for wide stores; the gathers before need neighbouring pixels in a warp.
        even, odd = value.reshape(ROWS, COLUMNS // 4, 2, 2).split()
        v0, v2 = even.split()
        v1, v3 = odd.split()
        if item >= 0:
            block = (position // 4)[:, None] + tl.arange(0, COLUMNS // 4)[None, :]
            n0, n1, n2, n3 = normal4(block, item, step, stream, key_low, key_high)
            v0 += noise_mean + noise_std * n0
            v1 += noise_mean + noise_std * n1
            v2 += noise_mean + noise_std * n2
            v3 += noise_mean + noise_std * n3
        value = tl.join(tl.join(v0, v2), tl.join(v1, v3)).reshape(ROWS, COLUMNS // 4, 4)
        column = columns.reshape(columns.shape[0], COLUMNS // 4, 4)
        mask = (rows < SIZE)[:, None, None] & (column >= 0) & (column < SIZE)
        target = out + (rows * SIZE)[:, None, None] + column
        for copy in tl.static_range(COPIES):
            to = channel + copy
            scaled = (value - tl.load(mean + to)) * (1.0 / tl.load(std + to))
            tl.store(target + to * (SIZE * SIZE), scaled.to(out.dtype.element_ty), mask=mask)


def augment(
    images: Tensor,
    boxes: Tensor,
    noise_items: Tensor,
    size: int,
    mean: Tensor,
    std: Tensor,
    noise_mean: float,
    noise_std: float,
    seed: int,
    step: int,
    stream: int,
    dtype: torch.dtype,
) -> Tensor:
    """Views (V, C, size, size) in ``dtype`` of images (M, c, H, W), c = C or 1; view v shows image v % M.

    boxes (V, 4) float32 = x0, dx, y0, dy; noise_items (V,) int64: the counters of the noise, negative for no noise; mean
    and std (C,) float32. The normal numbers of a view are positions 0 .. c size size - 1 of its item.
    """
    check_dtype(dtype)
    check_images("images", images, None, None, None, None, device=images.device)
    count, channels, height, width = images.shape
    check_boxes(boxes, count, images.device)
    check_tensor("noise_items", noise_items, (len(boxes),), (torch.int64,), images.device)
    check_floats("mean", mean, None, device=images.device)
    check_floats("std", std, len(mean), device=images.device)
    check_sizes(channels, len(mean), height, width, size)
    if not 0 <= step < 1 << 32:
        raise ValueError(f"step must be 0 to {(1 << 32) - 1}, got {step}")
    out = torch.empty((len(boxes), len(mean), size, size), dtype=dtype, device=images.device)
    if out.numel() == 0:
        return out
    across = triton.cdiv(size + (3 if size % 4 else 0), COLUMNS)
    with torch.cuda.device_of(out):
        _augment_kernel[(len(boxes) * across * triton.cdiv(size, ROWS),)](
            images.contiguous(),
            boxes.contiguous(),
            noise_items.contiguous(),
            mean.contiguous(),
            std.contiguous(),
            out,
            count,
            noise_mean,
            noise_std,
            signed(seed),
            signed(seed >> 32),
            signed(step),
            signed(stream),
            CHANNELS=channels,
            COPIES=len(mean) // channels,
            HEIGHT=height,
            WIDTH=width,
            SIZE=size,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=tile_warps(),
        )
    return out
