"""The end of the flow-alignment losses: sums in a fixed order, the pivot, the guarded cosine, the last program."""

import triton
import triton.language as tl

from sfm_fast.reference import flow_alignment as reference

GLOBAL = tl.constexpr(reference.GLOBAL)
CLASS = tl.constexpr(reference.CLASS)
FLOW_MSE = tl.constexpr(reference.FLOW_MSE)
PAIR_MSE = tl.constexpr(reference.PAIR_MSE)
DECOUPLED = tl.constexpr(reference.DECOUPLED)
ANCHORED = tl.constexpr(reference.ANCHORED)


@triton.jit
def pivot_row(
    source: tl.tuple,
    centers: tl.tensor,
    first_mean: tl.tensor,
    columns: tl.tensor,
    column_mask: tl.tensor,
    KIND: tl.constexpr,
) -> tl.tensor:
    """A constant row near all rows to be summed. Subtracted from them, it keeps sums of squares from cancelling later.

    The first item for the t_c; the first class for the t_c - a_c, which can be close together even if the t_c aren't.
    ``first_mean`` (D,) is t_0, or None if t_0 is the first item.
    """
    if first_mean is not None:
        t = tl.load(first_mean + columns, mask=column_mask, other=0.0)
    else:
        x = tl.load(source.features + columns.to(tl.int64) * source.column_stride, mask=column_mask, other=0.0)
        t = x.to(tl.float32) - tl.load(source.shift + columns, mask=column_mask, other=0.0)
    if KIND >= FLOW_MSE:
        t -= tl.load(centers + columns, mask=column_mask, other=0.0)
    return t


@triton.jit
def sum_scalars(scalars: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(scalars + index, mask=index < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def sum_chunks(
    sums: tl.tensor,
    columns: tl.tensor,
    column_mask: tl.tensor,
    dim: tl.tensor,
    chunks: tl.tensor,
    ROWS: tl.constexpr,
) -> tl.tensor:
    total = tl.zeros([ROWS, columns.shape[0]], tl.float32)
    for start in range(0, chunks, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < chunks)[:, None] & column_mask[None, :]
        total += tl.load(sums + (rows.to(tl.int64) * dim)[:, None] + columns[None, :], mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def are_short(
    squares_a: tl.tensor, squares_b: tl.tensor, C: tl.tensor, eps: tl.tensor, KIND: tl.constexpr
) -> tl.tensor:
    """Whether a or b is shorter than eps; a flow is C/(C-1) times the vector, except for ANCHORED."""
    limit = tl.cast(eps, tl.float64)
    if KIND != ANCHORED:
        limit = limit * (C - 1) / C
    return (squares_a < limit * limit) | (squares_b < limit * limit)


@triton.jit
def safe_cosine(dot: tl.tensor, squares_a: tl.tensor, squares_b: tl.tensor, short: tl.tensor) -> tl.tuple:
    """cos, -1/(|a||b|) and cos/|b|^2 in float64; 0 where a or b is ``short``."""
    length = tl.sqrt(tl.where(short, 1.0, squares_a)) * tl.sqrt(tl.where(short, 1.0, squares_b))
    # dot * 0, not 0: NaN and infinity must give NaN even if the other flow is short.
    # + 0 * length: squares that overflow float32 give NaN instead of a cosine of 0.
    cosine = tl.where(short, dot * 0, dot / length + 0 * length)
    return cosine, tl.where(short, 0.0, -1 / length), tl.where(short, 0.0, cosine / tl.where(short, 1.0, squares_b))


@triton.jit
def finish_kernel(
    source: tl.tuple,
    centers: tl.tensor,
    first_mean: tl.tensor,
    scalars: tl.tensor,
    sums: tl.tensor,
    loss: tl.tensor,
    rows: tl.tensor,
    columns_out: tl.tensor,
    classes: tl.tensor,
    dim: tl.tensor,
    chunks: tl.tensor,
    programs: tl.tensor,
    eps: tl.tensor,
    weight: tl.tensor,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    """The kinds without a cosine per class, one program: loss (), rows (2, 1) = p, q, columns (2, D) = m, r; computed in float64."""
    C = tl.cast(classes, tl.float64)
    D = tl.cast(dim, tl.float64)
    own = tl.cast(weight, tl.float64) / (C * D)
    rest = tl.maximum(C - 1, 1.0)  # a single class has no others, and alpha 1
    others = (1 - tl.cast(weight, tl.float64)) / (rest * rest * C * D)
    mean_squares = tl.zeros([BLOCK_D], tl.float64)
    correction = tl.zeros([BLOCK_D], tl.float64)
    for start in range(0, dim, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        column_mask = columns < dim
        total = sum_chunks(sums, columns, column_mask, dim, chunks, ROWS).to(tl.float64)
        if KIND == DECOUPLED:
            mean_squares += total * total
            correction += total * 0  # infinite features: the mean of the other classes, and so the loss, is NaN
            m = tl.zeros([BLOCK_D], tl.float64)
            r = 2 * others * (C - 2) * total
        else:
            mean = total / C
            mean_squares += mean * mean
            if KIND == GLOBAL:
                second = sums + tl.cast(chunks, tl.int64) * dim
                correction += mean * sum_chunks(second, columns, column_mask, dim, chunks, ROWS).to(tl.float64)
            pivot = pivot_row(source, centers, first_mean, columns, column_mask, KIND)
            m = pivot.to(tl.float64) + mean
            r = tl.zeros([BLOCK_D], tl.float64)
        tl.store(columns_out + columns, m.to(tl.float32), mask=column_mask)
        tl.store(columns_out + dim + columns, r.to(tl.float32), mask=column_mask)
    squares = sum_scalars(scalars, programs, BLOCK_P)
    if KIND == DECOUPLED:
        value = own * squares + others * ((C - 2) * tl.sum(mean_squares, axis=0) + squares)
        value += tl.sum(correction, axis=0)
        q = 2 * own + 2 * others
        p = -q
    else:
        squares -= C * tl.sum(mean_squares, axis=0)
        squares = tl.where(squares < 0, 0.0, squares)  # keeps NaN
        if KIND == GLOBAL:
            dot = sum_scalars(scalars + programs, programs, BLOCK_P) - tl.sum(correction, axis=0)
            center_squares = sum_scalars(scalars + 2 * programs, programs, BLOCK_P)
            short = are_short(center_squares, squares, C, eps, KIND)
            cosine, p, q = safe_cosine(dot, center_squares, squares, short)
            value = 1 - cosine
        else:
            scale = C / (C - 1) * (2 if KIND == PAIR_MSE else C / (C - 1)) / (C * D)
            value = scale * squares
            q = 2 * scale
            p = -q
    tl.store(loss, value.to(tl.float32))
    tl.store(rows, p.to(tl.float32))
    tl.store(rows + 1, q.to(tl.float32))
