"""Flow alignment with one cosine per class: CLASS in three steps, the mean over classes, each class, then r and the loss.

ANCHORED takes a given point in place of the mean: one pass over the classes, then the sum of their losses.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfm_fast.reference import flow_alignment as reference

from .reductions import CLASS, are_short, pivot_row, safe_cosine, sum_chunks, sum_scalars
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
def _finish_anchored_kernel(
    scalars: tl.tensor,
    anchor: tl.tensor,
    loss: tl.tensor,
    columns_out: tl.tensor,
    classes: tl.tensor,
    dim: tl.tensor,
    blocks: tl.tensor,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    """Kind 5: m = anchor and r = 0 (D,), and the loss."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    column_mask = columns < dim
    m = tl.load(anchor + columns, mask=column_mask, other=0.0)
    tl.store(columns_out + columns, m, mask=column_mask)
    tl.store(columns_out + dim + columns, tl.zeros_like(m), mask=column_mask)
    if tl.program_id(0) == 0:
        tl.store(loss, (sum_scalars(scalars, blocks, BLOCK_P) / tl.cast(classes, tl.float64)).to(tl.float32))


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
    length_weight: tl.tensor,
    delta: tl.tensor,
    KIND: tl.constexpr,
    LENGTHS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ITEM_UNROLL: tl.constexpr,
) -> None:
    """Kinds 1 and 5, a block of classes: p, q, the sum of 1 - cos (float64) and, for CLASS, of p_c a_c + q_c b_c (D,).

    With LENGTHS, length_weight * h(log(|b_c| / |a_c|)) is added to 1 - cos; h(x) is x^2 up to |x| = delta and straight beyond.
    """
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
    squares_b = tl.sum(squares, axis=1).to(tl.float64)
    short = are_short(squares_a, squares_b, C, eps, KIND)
    cosine, p, q = safe_cosine(row_dot, squares_a, squares_b, short)
    value = 1 - cosine
    if LENGTHS:
        weight = tl.cast(length_weight, tl.float64)
        safe_b = tl.where(short, 1.0, squares_b)
        logarithm = tl.log(safe_b / tl.where(short, 1.0, squares_a)) / 2
        limit = tl.cast(delta, tl.float64)
        near = tl.where(logarithm > limit, limit, tl.where(logarithm < -limit, -limit, logarithm))  # NaN stays
        value += weight * near * (2 * logarithm - near)
        q += 2 * weight * near / safe_b
    p = (p / C).to(tl.float32)
    q = (q / C).to(tl.float32)
    tl.store(rows_out + rows, p, mask=row_mask)
    tl.store(rows_out + classes + rows, q, mask=row_mask)
    tl.store(scalars + tl.program_id(0), tl.sum(tl.where(row_mask, value, 0.0), axis=0))
    if KIND == CLASS:
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
    scalars: Tensor | None = None
    for last in (False, True):
        if last:
            scalars, sums = _class_cosines(reference.CLASS, source, centers, columns[0], tiles, eps, 0.0, 0.0, rows)
        _finish_columns_kernel[(triton.cdiv(dim, 32),)](
            source,
            scalars,
            sums,
            loss,
            columns[1] if last else columns[0],
            classes,
            dim,
            sums.shape[0],
            LAST=last,
            ROWS=64,
            BLOCK_D=32,
            BLOCK_P=256,
            num_warps=tile_warps(),
        )


def anchored_alignment(
    source: Labelled,
    centers: Tensor,
    anchor: Tensor,
    tiles: Tiles,
    eps: float,
    length_weight: float,
    delta: float,
    loss: Tensor,
    rows: Tensor,
    columns: Tensor,
) -> None:
    """Fill ``loss``, ``rows`` and ``columns``; ``anchor`` (D,) is the m of all classes."""
    classes, dim = centers.shape
    scalars, _ = _class_cosines(reference.ANCHORED, source, centers, anchor, tiles, eps, length_weight, delta, rows)
    _finish_anchored_kernel[(triton.cdiv(dim, TILE),)](
        scalars, anchor, loss, columns, classes, dim, len(scalars), BLOCK_D=TILE, BLOCK_P=256, num_warps=tile_warps()
    )


def _class_cosines(
    kind: int,
    source: Labelled,
    centers: Tensor,
    m: Tensor,
    tiles: Tiles,
    eps: float,
    length_weight: float,
    delta: float,
    rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fill ``rows`` (2, C); gives each block's part of the loss, (blocks,) float64, and of the sum of p_c a_c + q_c b_c, (blocks, D) for CLASS."""
    classes, dim = centers.shape
    # Few classes: few per program, so that there are enough programs. Many: more per program, for fewer partial rows.
    block_c = 8 if classes <= 4096 else 32
    blocks = triton.cdiv(classes, block_c)
    summed = dim if kind == reference.CLASS else 0
    sums = torch.empty((blocks, summed), dtype=torch.float32, device=centers.device)
    scalars = torch.empty((blocks,), dtype=torch.float64, device=centers.device)
    _class_cosines_kernel[(blocks,)](
        source,
        centers,
        m,
        scalars,
        sums,
        rows,
        classes,
        dim,
        eps,
        length_weight,
        delta,
        KIND=kind,
        LENGTHS=length_weight != 0,
        BLOCK_C=block_c,
        BLOCK_D=min(4 * TILE // block_c, max(16, triton.next_power_of_2(dim))),
        ITEM_UNROLL=tiles.item_unroll,
        num_warps=2 * tile_warps(),
    )
    return scalars, sums
