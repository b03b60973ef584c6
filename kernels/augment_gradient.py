"""The gradient of images from the gradient of their views, the transpose of augment.py.

It gathers: each source pixel sums over the few view rows and columns that can read it, with exactly the weights of the
forward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bilinear import coordinate
from .checks import check_boxes, check_dtype, check_floats, check_images, check_sizes
from .segments import tile_warps

ROWS, COLUMNS = 16, 32  # size of a tile


@triton.jit
def _reach(
    first: tl.tensor,
    pixels: tl.tensor,
    start: tl.tensor,
    step: tl.tensor,
    EXTENT: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tuple:
    """The view rows (or columns) that can read ``pixels``, first .. first + BLOCK - 1: each one's first, a common count.

    The range is a little too wide: ``slack`` covers the rounding of the division here and of the forward's coordinates.
    """
    everything = tl.abs(step) < 1e-6
    divisor = tl.where(everything, 1.0, step)
    length = 2.0 / tl.abs(divisor)
    slack = (tl.abs(start) + (EXTENT + 2.0)) / tl.abs(divisor) * 1e-6
    low = (pixels.to(tl.float32) - start) / divisor - (0.5 * length + slack)
    # NaN from an overflow of float32 counts as 0, and then ``length`` is the whole axis.
    begin = tl.where(low > 0, tl.ceil(tl.minimum(low, SIZE * 1.0)), 0.0).to(tl.int32)
    begin = tl.where(everything, 0, begin)
    length += 2.0 * slack
    taps = tl.floor(tl.minimum(length, SIZE - 1.0)).to(tl.int32) + 1
    taps = tl.where(everything, SIZE, taps)
    near = (first - start) / divisor - (0.5 * length)
    far = (first + (BLOCK - 1.0) - start) / divisor - (0.5 * length)
    outside = (tl.minimum(near, far) > SIZE) | (tl.maximum(near, far) + length < -1.0)
    return begin, tl.where(outside & (everything == 0), 0, taps)


@triton.jit
def _weight(index: tl.tensor, pixels: tl.tensor, start: tl.tensor, step: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """The weight of each pixel in view row (or column) ``index`` in the forward."""
    x = coordinate(index, start, step)
    first = tl.floor(x)
    pixel = pixels.to(tl.float32)
    weight = tl.where(first == pixel, 1.0 - (x - first), tl.where(first + 1.0 == pixel, x - first, 0.0))
    return tl.where(index < SIZE, weight, 0.0)


@triton.jit
def _augment_backward_kernel(
    grad: tl.tensor,
    boxes: tl.tensor,
    std: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    views: tl.tensor,
    CHANNELS: tl.constexpr,
    COPIES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Computes a tile of one channel of an image's gradient."""
    tiles_across: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    tiles: tl.constexpr = tiles_across * ((HEIGHT + ROWS - 1) // ROWS)
    plane = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    image, channel = plane // CHANNELS, plane % CHANNELS
    first_row, first_column = tile // tiles_across * ROWS, tile % tiles_across * COLUMNS
    rows = first_row + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for view in range(image, views, count):
        x0 = tl.load(boxes + 4 * view)
        dx = tl.load(boxes + 4 * view + 1)
        y0 = tl.load(boxes + 4 * view + 2)
        dy = tl.load(boxes + 4 * view + 3)
        i0, taps_down = _reach(first_row, rows, y0, dy, HEIGHT, SIZE, ROWS)
        j0, taps_across = _reach(first_column, columns, x0, dx, WIDTH, SIZE, COLUMNS)
        taps_down = tl.where(taps_across == 0, 0, taps_down)
        source = grad + (tl.cast(view, tl.int64) * (CHANNELS * COPIES) + channel) * (SIZE * SIZE)
        for down in range(0, taps_down):
            i = i0 + down
            wy = _weight(i, rows, y0, dy, SIZE)
            line = source + (i * SIZE)[:, None]
            across = tl.zeros([ROWS, COLUMNS], tl.float32)
            for start in range(0, taps_across, 4):
                for k in tl.static_range(4):
                    j = j0 + (start + k)
                    wx = _weight(j, columns, x0, dx, SIZE)
                    mask = (wy != 0)[:, None] & (wx != 0)[None, :]
                    for copy in tl.static_range(COPIES):
                        g = tl.load(line + copy * (SIZE * SIZE) + j[None, :], mask=mask, other=0.0).to(tl.float32)
                        if COPIES > 1:
                            g *= 1.0 / tl.load(std + copy)
                        across += wx[None, :] * g
            total += wy[:, None] * across
    if COPIES == 1:
        total = total / tl.load(std + channel)
    target = out + tl.cast(plane, tl.int64) * (HEIGHT * WIDTH) + (rows * WIDTH)[:, None] + columns[None, :]
    mask = (rows < HEIGHT)[:, None] & (columns < WIDTH)[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=mask)


def augment_backward(
    grad: Tensor,
    boxes: Tensor,
    std: Tensor,
    images: int,
    channels: int,
    height: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient (images, channels, height, width) in ``dtype``, summed over each image's views: grad (V, C, size, size)."""
    check_dtype(dtype)
    check_floats("std", std, None, device=grad.device)
    check_boxes(boxes, images, grad.device)
    size = grad.shape[-1] if grad.ndim else 0
    check_images("grad", grad, len(boxes), len(std), size, size, device=grad.device)
    check_sizes(channels, len(std), height, width, size)
    out = torch.empty((images, channels, height, width), dtype=dtype, device=grad.device)
    if out.numel() == 0:
        return out
    tiles = triton.cdiv(height, ROWS) * triton.cdiv(width, COLUMNS)
    with torch.cuda.device_of(out):
        _augment_backward_kernel[(images * channels * tiles,)](
            grad.contiguous(),
            boxes.contiguous(),
            std.contiguous(),
            out,
            images,
            len(boxes),
            CHANNELS=channels,
            COPIES=len(std) // channels,
            HEIGHT=height,
            WIDTH=width,
            SIZE=size,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=tile_warps(),
        )
    return out
