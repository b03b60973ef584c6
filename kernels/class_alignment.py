"""Flow alignment with one cosine per class, in three steps: the mean over classes, each class, then r and the loss."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reductions import CLASS, pivot_row, safe_cosine, sum_chunks, sum_scalars
from .segments import TILE, Labelled, Tiles, class_mean, tile_warps


@triton.jit
def _finish_columns_kernel(
    source: tl.tuple,
    scalars: tl.tensor,
    sums: tl.tensor,
    loss: tl.tensor,
    out: tl.tensor,
    classes: tl.tensor,
    dim: tl.tensor,
    chunks: tl.tensor,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    """Kind 1: m (D,) from the sums of t; with LAST, r (D,) from the sums of p_c a_c + q_c b_c, and the loss."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    column_mask = columns < dim
    C = tl.cast(classes, tl.float64)
    mean = sum_chunks(sums, columns, column_mask, dim, chunks, ROWS).to(tl.float64) / C
    if LAST:
        mean = -mean
        if tl.program_id(0) == 0:
            tl.store(loss, (sum_scalars(scalars, chunks, BLOCK_P) / C).to(tl.float32))
    else:
        mean += pivot_row(source, None, None, columns, column_mask, CLASS).to(tl.float64)
    tl.store(out + columns, mean.to(tl.float32), mask=column_mask)


@triton.jit
def _center_and_deviation(
    source: tl.tuple,
    centers: tl.tensor,
    m: tl.tensor,
    rows: tl.tensor,
    row_mask: tl.tensor,
    columns: tl.tensor,
    dim: tl.tensor,
    ITEM_UNROLL: tl.constexpr,
) -> tl.tuple:
    """Tiles of a_c and of b_c = t_c - m, with zeros outside the range."""
    column_mask = columns < dim
    mask = row_mask[:, None] & column_mask[None, :]
    a = tl.load(centers + (rows.to(tl.int64) * dim)[:, None] + columns[None, :], mask=mask, other=0.0)
    mean = tl.load(m + columns, mask=column_mask, other=0.0)
    t, _ = class_mean(source, rows, row_mask, columns, column_mask, ITEM_UNROLL)
    return a, tl.where(mask, t - mean[None, :], 0.0)


@triton.jit
def _class_cosines_kernel(
    source: tl.tuple,
    centers: tl.tensor,
    m: tl.tensor,
    scalars: tl.tensor,
    sums: tl.tensor,
    rows_out: tl.tensor,
    classes: tl.tensor,
    dim: tl.tensor,
    eps: tl.tensor,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ITEM_UNROLL: tl.constexpr,
) -> None:
    """Kind 1, a block of classes: p, q, the sum of 1 - cos (float64) and the sum of p_c a_c + q_c b_c (D,)."""
    rows = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_mask = rows < classes
    dot = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    center_squares = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    squares = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for start in range(0, dim, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        a, b = _center_and_deviation(source, centers, m, rows, row_mask, columns, dim, ITEM_UNROLL)
        dot += a * b
        center_squares += a * a
        squares += b * b
    C = tl.cast(classes, tl.float64)
    row_dot = tl.sum(dot, axis=1).to(tl.float64)
    squares_a = tl.sum(center_squares, axis=1).to(tl.float64)
    cosine, p, q = safe_cosine(row_dot, squares_a, tl.sum(squares, axis=1).to(tl.float64), C, eps)
    p = (p / C).to(tl.float32)
    q = (q / C).to(tl.float32)
    tl.store(rows_out + rows, p, mask=row_mask)
    tl.store(rows_out + classes + rows, q, mask=row_mask)
    tl.store(scalars + tl.program_id(0), tl.sum(tl.where(row_mask, 1 - cosine, 0.0), axis=0))
    for start in range(0, dim, BLOCK_D):  # this second read comes from the cache
        columns = start + tl.arange(0, BLOCK_D)
        a, b = _center_and_deviation(source, centers, m, rows, row_mask, columns, dim, ITEM_UNROLL)
        part = tl.sum(tl.where(row_mask[:, None], p[:, None] * a + q[:, None] * b, 0.0), axis=0)
        tl.store(sums + tl.program_id(0).to(tl.int64) * dim + columns, part, mask=columns < dim)


def class_alignment(
    source: Labelled,
    centers: Tensor,
    sums: Tensor,
    tiles: Tiles,
    eps: float,
    loss: Tensor,
    rows: Tensor,
    columns: Tensor,
) -> None:
    """Fill ``loss``, ``rows`` and ``columns`` from the chunks' sums of t minus the pivot, (chunks, D) float32."""
    classes, dim = centers.shape
    # Few classes: few per program, so that there are enough programs. Many: more per program, for fewer partial rows.
    block_c = 8 if classes <= 4096 else 32
    block_d = min(4 * TILE // block_c, max(16, triton.next_power_of_2(dim)))
    blocks = triton.cdiv(classes, block_c)
    partial = torch.empty((blocks, dim), dtype=torch.float32, device=centers.device)
    scalars = torch.empty((blocks,), dtype=torch.float64, device=centers.device)
    finish = (triton.cdiv(dim, 32),)
    for last in (False, True):
        chunks = partial if last else sums
        if last:
            _class_cosines_kernel[(blocks,)](
                source,
                centers,
                columns[0],
                scalars,
                partial,
                rows,
                classes,
                dim,
                eps,
                BLOCK_C=block_c,
                BLOCK_D=block_d,
                ITEM_UNROLL=tiles.item_unroll,
                num_warps=2 * tile_warps(),
            )
        _finish_columns_kernel[finish](
            source,
            scalars,
            chunks,
            loss,
            columns[1] if last else columns[0],
            classes,
            dim,
            chunks.shape[0],
            LAST=last,
            ROWS=64,
            BLOCK_D=32,
            BLOCK_P=256,
            num_warps=tile_warps(),
        )
