"""Class means of labelled features and their backward, one launch each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FEATURES, check_floats, check_labelled, check_segments
from .segments import class_mean, labelled, store_per_item, tile_warps, tiles_for


@triton.jit
def _means_kernel(
    source: tl.tuple,
    means: tl.tensor,
    classes: tl.tensor,
    dim: tl.tensor,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ITEM_UNROLL: tl.constexpr,
) -> None:
    column_blocks = tl.cdiv(dim, BLOCK_D)
    rows = tl.program_id(0) // column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = tl.program_id(0) % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    row_mask = rows < classes
    column_mask = columns < dim
    mean, _ = class_mean(source, rows, row_mask, columns, column_mask, ITEM_UNROLL)
    target = means + (rows.to(tl.int64) * dim)[:, None] + columns[None, :]
    tl.store(target, mean, mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def _means_backward_kernel(
    gradient: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    classes: tl.tensor,
    dim: tl.tensor,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ITEM_UNROLL: tl.constexpr,
) -> None:
    column_blocks = tl.cdiv(dim, BLOCK_D)
    rows = tl.program_id(0) // column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = tl.program_id(0) % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    row_mask = rows < classes
    column_mask = columns < dim
    mask = row_mask[:, None] & column_mask[None, :]
    value = tl.load(gradient + (rows.to(tl.int64) * dim)[:, None] + columns[None, :], mask=mask, other=0.0)
    if order is not None:
        start = tl.load(offsets + rows, mask=row_mask, other=0)
        count = (tl.load(offsets + rows + 1, mask=row_mask, other=1) - start).to(tl.float32)
        value = tl.div_rn(value, tl.broadcast_to(count[:, None], value.shape))
    store_per_item(out, value, order, offsets, rows, row_mask, columns, column_mask, dim, ITEM_UNROLL)


def class_means(features: Tensor, order: Tensor | None, offsets: Tensor | None, shift: Tensor) -> Tensor:
    """Mean of float32(x) - shift over each class: (N, D) any strides, (N,), (C + 1,), (D,) float32 -> (C, D) float32.

    ``order`` is the stable argsort (int64) of the labels, and class c has the items order[offsets[c] : offsets[c + 1]];
    both are None if row c is class c. The shift is subtracted before the sum, since the common mean of features can be
    far larger than the spread between classes. An empty class gives NaN.
    """
    check_labelled(features, order, offsets, shift)
    items, dim = features.shape
    classes = items if offsets is None else offsets.shape[0] - 1
    means = torch.empty((classes, dim), dtype=torch.float32, device=features.device)
    if means.numel() == 0:
        return means
    tiles = tiles_for(items, classes, dim, order is not None)
    with torch.cuda.device_of(features):
        _means_kernel[(triton.cdiv(classes, tiles.classes) * tiles.column_blocks(dim),)](
            labelled(features, order, offsets, shift),
            means,
            classes,
            dim,
            BLOCK_C=tiles.classes,
            BLOCK_D=tiles.columns,
            ITEM_UNROLL=tiles.item_unroll,
            num_warps=tile_warps(),
        )
    return means


def class_means_backward(
    grad: Tensor, order: Tensor | None, offsets: Tensor | None, num_items: int, dtype: torch.dtype
) -> Tensor:
    """grad_c / n_c for every item of class c: (C, D) float32 -> (num_items, D) contiguous in ``dtype``."""
    check_floats("grad", grad, None, None, device=grad.device)
    classes, dim = grad.shape
    check_segments(order, offsets, num_items, classes, grad.device)
    if dtype not in FEATURES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    out = torch.empty((num_items, dim), dtype=dtype, device=grad.device)
    if out.numel() == 0:
        return out
    tiles = tiles_for(num_items, classes, dim, order is not None)
    with torch.cuda.device_of(grad):
        _means_backward_kernel[(triton.cdiv(classes, tiles.classes) * tiles.column_blocks(dim),)](
            grad.contiguous(),
            None if order is None else order.contiguous(),
            None if offsets is None else offsets.contiguous(),
            out,
            classes,
            dim,
            BLOCK_C=tiles.classes,
            BLOCK_D=tiles.columns,
            ITEM_UNROLL=tiles.item_unroll,
            num_warps=tile_warps(),
        )
    return out
