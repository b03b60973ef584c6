"""Shared by the kernels over labelled features: the mean of a class, writing to its items, block sizes by shape."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

IS_HIP = torch.version.hip is not None
TILE = 1024  # elements of a tile: 8 per thread, so one 128-bit load of a 16-bit type, or two of float32


def tile_warps() -> int:
    """The number of warps with which a tile has 8 elements per thread (AMD's warps are 64 wide)."""
    return 2 if IS_HIP else 4


def architecture(device: torch.device) -> str:
    """The device's architecture in a compiler's terms: "sm_90", "gfx942"; "cpu" in Triton's interpreter."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    return str(properties.gcnArchName).split(":")[0] if IS_HIP else f"sm_{properties.major}{properties.minor}"


class Labelled(NamedTuple):
    """Features (N, D) and their classes: class c has the items order[offsets[c] : offsets[c + 1]].

    ``order`` (N,) and ``offsets`` (C + 1,), int64, are None if row c is class c. ``shift`` (D,) float32.
    """

    features: Any
    order: Any
    offsets: Any
    shift: Any
    row_stride: Any
    column_stride: Any


def labelled(features: Tensor, order: Tensor | None, offsets: Tensor | None, shift: Tensor) -> Labelled:
    """Takes features of any strides. The meaningless stride of a dimension of size 1 becomes one the compiler can use."""
    if order is not None and offsets is not None:
        order, offsets = order.contiguous(), offsets.contiguous()
    rows, dim = features.shape
    row_stride = dim if rows == 1 else features.stride(0)
    return Labelled(features, order, offsets, shift.contiguous(), row_stride, 1 if dim == 1 else features.stride(1))


class Tiles(NamedTuple):
    """Block sizes of a launch; ``row_unroll`` tiles of classes and ``item_unroll`` items of a class load together."""

    classes: int
    columns: int
    row_unroll: int
    item_unroll: int

    def column_blocks(self, dim: int) -> int:
        return triton.cdiv(dim, self.columns)

    def chunks(self, classes: int, dim: int, programs: int = 512) -> tuple[int, int]:
        """Divide the classes for about ``programs`` programs in total: (number of chunks, classes per chunk)."""
        step = self.classes * self.row_unroll
        steps = triton.cdiv(classes, step)
        steps_each = triton.cdiv(steps, max(1, programs // self.column_blocks(dim)))
        return triton.cdiv(steps, steps_each), steps_each * step


def tiles_for(items: int, classes: int, dim: int, labelled: bool) -> Tiles:
    """Block sizes that depend only on the shape, so that results are the same on every run."""
    width = max(16, triton.next_power_of_2(dim))
    if not labelled:
        # Few rows: narrow tiles, for more programs and fewer partial sums for the last program.
        columns = min(width, 64 if classes <= 8192 else 128)
        return Tiles(TILE // columns, columns, 4, 1)
    average = max(1, items // max(1, classes))
    # Short segments: many classes per tile. Long ones: few, each as wide as the tile.
    columns = min(width, 128 if average < 16 else TILE)
    return Tiles(TILE // columns, columns, 1, min(8, triton.next_power_of_2(average)))


@triton.jit
def class_mean(
    source: tl.tuple,
    rows: tl.tensor,
    row_mask: tl.tensor,
    columns: tl.tensor,
    column_mask: tl.tensor,
    ITEM_UNROLL: tl.constexpr,
) -> tl.tuple:
    """Means of float32(x) - shift over a tile of classes, and their sizes: (R, K) and (R,) float32.

    The shift is subtracted before the sum: see ``class_means``. An empty class gives NaN (0/0).
    """
    shift = tl.load(source.shift + columns, mask=column_mask, other=0.0)[None, :]
    base = source.features + (columns.to(tl.int64) * source.column_stride)[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    if source.order is None:
        x = tl.load(base + (rows.to(tl.int64) * source.row_stride)[:, None], mask=mask, other=0.0).to(tl.float32)
        mean = tl.where(mask, x - shift, 0.0)
        count = tl.where(row_mask, 1.0, 1.0)
    else:
        start = tl.load(source.offsets + rows, mask=row_mask, other=0)
        size = tl.load(source.offsets + rows + 1, mask=row_mask, other=0) - start
        longest = tl.max(size, axis=0).to(tl.int32)
        mean = tl.zeros(mask.shape, tl.float32)
        for first in range(0, longest, ITEM_UNROLL):
            for step in tl.static_range(ITEM_UNROLL):
                here = first + step < size
                item = tl.load(source.order + start + (first + step), mask=here, other=0)
                both = here[:, None] & column_mask[None, :]
                x = tl.load(base + (item * source.row_stride)[:, None], mask=both, other=0.0).to(tl.float32)
                mean += tl.where(both, x - shift, 0.0)
        count = size.to(tl.float32)
        mean = tl.div_rn(mean, tl.broadcast_to(count[:, None], mean.shape))
    return mean, count


@triton.jit
def store_per_item(
    out: tl.tensor,
    value: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    rows: tl.tensor,
    row_mask: tl.tensor,
    columns: tl.tensor,
    column_mask: tl.tensor,
    dim: tl.tensor,
    ITEM_UNROLL: tl.constexpr,
) -> None:
    """Write each row of a tile (R, K), one per class, to every item of its class in ``out`` (N, D), contiguous."""
    value = value.to(out.dtype.element_ty)
    base = out + columns[None, :]
    if order is None:
        tl.store(base + (rows.to(tl.int64) * dim)[:, None], value, mask=row_mask[:, None] & column_mask[None, :])
    else:
        start = tl.load(offsets + rows, mask=row_mask, other=0)
        size = tl.load(offsets + rows + 1, mask=row_mask, other=0) - start
        longest = tl.max(size, axis=0).to(tl.int32)
        for first in range(0, longest, ITEM_UNROLL):
            for step in tl.static_range(ITEM_UNROLL):
                here = first + step < size
                item = tl.load(order + start + (first + step), mask=here, other=0)
                tl.store(base + (item * dim)[:, None], value, mask=here[:, None] & column_mask[None, :])
