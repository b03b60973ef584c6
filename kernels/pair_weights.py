"""The pair-alignment kernel that computes the weights of one tile of pairs and the sum of their cosines."""

import triton
import triton.language as tl

# The position of a block doesn't specialise the compilation.
PLACE = ["row_begin", "row_end", "column_begin", "column_end", "accumulate"]


@triton.jit
def to_tf32(x: tl.tensor) -> tl.tensor:
    """Round to 10 bits of mantissa, to nearest; NaN stays NaN (its bits could overflow to zero)."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def _from_differences(
    a: tl.tensor,
    b: tl.tensor,
    dim: tl.tensor,
    row_i: tl.tensor,
    row_j: tl.tensor,
    close: tl.tensor,
    ff: tl.tensor,
    gg: tl.tensor,
    numerator: tl.tensor,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tuple:
    """Recompute |f|^2, |g|^2 and <f, g> of a tile's ``close`` pairs from differences, for one row with such at a time."""
    index = tl.arange(0, TILE)
    pending = tl.max(close.to(tl.int32), axis=1)
    r = tl.min(tl.where(pending > 0, index, TILE), axis=0)
    while r < TILE:
        row = tl.sum(tl.where(index == r, row_i, 0), axis=0)
        row_ff = tl.zeros([TILE, BLOCK_K], tl.float32)
        row_gg = tl.zeros([TILE, BLOCK_K], tl.float32)
        row_fg = tl.zeros([TILE, BLOCK_K], tl.float32)
        for start in range(0, dim, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            mask = (k < dim)[None, :]
            f = tl.load(a + row_j[:, None] + k[None, :], mask=mask, other=0.0)
            f -= tl.load(a + row + k, mask=k < dim, other=0.0)[None, :]
            g = tl.load(b + row_j[:, None] + k[None, :], mask=mask, other=0.0)
            g -= tl.load(b + row + k, mask=k < dim, other=0.0)[None, :]
            row_ff += f * f
            row_gg += g * g
            row_fg += f * g
        here = close & (index == r)[:, None]
        ff = tl.where(here, tl.sum(row_ff, axis=1)[None, :], ff)
        gg = tl.where(here, tl.sum(row_gg, axis=1)[None, :], gg)
        numerator = tl.where(here, tl.sum(row_fg, axis=1)[None, :], numerator)
        pending = tl.where(index == r, 0, pending)
        r = tl.min(tl.where(pending > 0, index, TILE), axis=0)
    return ff, gg, numerator


@triton.jit(do_not_specialize=PLACE)
def weights_kernel(
    a: tl.tensor,
    b: tl.tensor,
    planes: tl.tensor,
    products: tl.tensor,
    groups: tl.tensor,
    weights: tl.tensor,
    totals: tl.tensor,
    classes: tl.tensor,
    dim: tl.tensor,
    row_begin: tl.tensor,
    row_end: tl.tensor,
    column_begin: tl.tensor,
    column_end: tl.tensor,
    width: tl.tensor,
    plane: tl.tensor,
    accumulate: tl.tensor,
    eps: tl.tensor,
    MIRROR: tl.constexpr,
    FACTOR: tl.constexpr,
    NEED_GRADIENT: tl.constexpr,
    HIGH: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One tile of a block of pairs: weights (2, rows, width) = -u, w, and FACTOR times its sum of cos to ``totals``.

    MIRROR: the block is on the diagonal; tiles above the diagonal are written on both sides and count twice.
    """
    column_tiles = tl.cdiv(column_end - column_begin, TILE)
    row_tile = tl.program_id(0) // column_tiles
    column_tile = tl.program_id(0) % column_tiles
    slot = totals + tl.program_id(0)
    if MIRROR and row_tile > column_tile:
        if accumulate == 0:
            tl.store(slot, tl.full([], 0.0, tl.float64))
        return
    local_i = row_tile * TILE + tl.arange(0, TILE)
    local_j = column_tile * TILE + tl.arange(0, TILE)
    # Rows past the end read the last row instead, so that the products need no masks; ``valid`` drops them.
    i = tl.minimum(row_begin + local_i, classes - 1)
    j = tl.minimum(column_begin + local_j, classes - 1)
    row_i = i.to(tl.int64) * dim
    row_j = j.to(tl.int64) * dim
    aa = tl.zeros([TILE, TILE], tl.float32)
    bb = tl.zeros([TILE, TILE], tl.float32)
    ab = tl.zeros([TILE, TILE], tl.float32)
    size = tl.cast(classes, tl.int64) * dim
    at_i = planes + row_i[:, None] + tl.arange(0, BLOCK_K)[None, :]
    at_j = planes + row_j[:, None] + tl.arange(0, BLOCK_K)[None, :]
    for start in range(0, dim, BLOCK_K):
        mask = (tl.arange(0, BLOCK_K) < dim - start)[None, :]
        a_j = tl.trans(tl.load(at_j, mask=mask, other=0.0))
        b_j = tl.trans(tl.load(at_j + size, mask=mask, other=0.0))
        if SPLIT:
            low_a = tl.load(at_i + 2 * size, mask=mask, other=0.0)
            low_b = tl.load(at_i + 3 * size, mask=mask, other=0.0)
            aa = tl.dot(low_a, a_j, aa, input_precision=PRECISION)
            bb = tl.dot(low_b, b_j, bb, input_precision=PRECISION)
            ab = tl.dot(low_a, b_j, ab, input_precision=PRECISION)
            ab = tl.dot(low_b, a_j, ab, input_precision=PRECISION)
        a_i = tl.load(at_i, mask=mask, other=0.0)
        b_i = tl.load(at_i + size, mask=mask, other=0.0)
        aa = tl.dot(a_i, a_j, aa, input_precision=PRECISION)
        bb = tl.dot(b_i, b_j, bb, input_precision=PRECISION)
        ab = tl.dot(a_i, b_j, ab, input_precision=PRECISION)
        ab = tl.dot(b_i, a_j, ab, input_precision=PRECISION)
        if SPLIT:
            low_a = tl.trans(tl.load(at_j + 2 * size, mask=mask, other=0.0))
            low_b = tl.trans(tl.load(at_j + 3 * size, mask=mask, other=0.0))
            aa = tl.dot(a_i, low_a, aa, input_precision=PRECISION)
            bb = tl.dot(b_i, low_b, bb, input_precision=PRECISION)
            ab = tl.dot(a_i, low_b, ab, input_precision=PRECISION)
            ab = tl.dot(b_i, low_a, ab, input_precision=PRECISION)
        at_i += BLOCK_K
        at_j += BLOCK_K
    # Not before the loop, where it would occupy registers that the products need.
    valid = (row_begin + local_i < row_end)[:, None] & (column_begin + local_j < column_end)[None, :]
    valid = valid & (row_begin + local_i[:, None] != column_begin + local_j[None, :])
    if groups is not None:
        valid = valid & (tl.load(groups + i)[:, None] != tl.load(groups + j)[None, :])
    near: tl.constexpr = 2.0**-5 if HIGH else 2.0**-8
    both_aa = tl.load(products + i)[:, None] + tl.load(products + j)[None, :]
    both_bb = tl.load(products + classes + i)[:, None] + tl.load(products + classes + j)[None, :]
    ff = both_aa - 2 * aa
    gg = both_bb - 2 * bb
    own = products + 2 * classes
    numerator = tl.load(own + i)[:, None] + tl.load(own + j)[None, :] - ab
    close = valid & ((ff < near * both_aa) | (gg < near * both_bb))
    ff, gg, numerator = _from_differences(a, b, dim, row_i, row_j, close, ff, gg, numerator, TILE, 32)
    dropped = (tl.sqrt(ff) < eps) | (tl.sqrt(gg) < eps)
    inverse_f = tl.rsqrt(tl.where(dropped, 1.0, ff))
    inverse_g = tl.rsqrt(tl.where(dropped, 1.0, gg))
    u = tl.where(dropped, 0.0, inverse_f * inverse_g)
    cosine = tl.where(valid, numerator * u, 0.0)  # 0 where dropped, but NaN for NaN or infinite rows
    total = tl.sum(tl.sum(cosine, axis=1), axis=0).to(tl.float64) * FACTOR
    if MIRROR:
        total = tl.where(row_tile < column_tile, 2 * total, total)
    # One slot per tile position: launches on a stream run one after the other, so the order of sums is fixed.
    if accumulate > 0:
        total += tl.load(slot)
    tl.store(slot, total)
    if NEED_GRADIENT:
        u = tl.where(valid, -u, 0.0)
        w = tl.where(valid, cosine * inverse_g * inverse_g, 0.0)
        if HIGH:  # the row sums must use the rounded values, as the products do
            u = to_tf32(u)
            w = to_tf32(w)
        target = weights + local_i[:, None] * width + local_j[None, :]
        tl.store(target, u)
        tl.store(target + plane, w)
        if MIRROR and row_tile < column_tile:
            target = weights + local_j[:, None] * width + local_i[None, :]
            tl.store(target, tl.trans(u))
            tl.store(target + plane, tl.trans(w))
