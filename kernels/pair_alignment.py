"""Cosine alignment of all pair flows by matrix products, one block of the pair matrix at a time.

With f = a_j - a_i, g = b_j - b_i, n = <f, g>, u = 1/(|f||g|), cos = n u and w = cos/|g|^2, all symmetric in i, j,
d(sum of cos over ordered pairs)/d b_k = 2 [a_k sum_i u_ik - sum_i u_ik a_i - b_k sum_i w_ik + sum_i w_ik b_i].
For each block of at most SUPERBLOCK x SUPERBLOCK pairs, one kernel computes -u, w and the sum of cos, and another adds
their products with a and b to the gradient. If the rows are all classes, only blocks with I <= J are computed.

|f|^2, |g|^2 and n come from a_i.a_j, b_i.b_j and a_i.b_j + b_i.a_j; pairs so close that these cancel are recomputed from
differences. Tensor cores take TF32: a, b are split once into a TF32 value and a TF32 remainder, and a product is three
TF32 products, as accurate as float32; with ``high``, a and b are rounded to TF32 once and one product is exact. Both are
also stored transposed, since matrix products of 32-bit values need both operands contiguous along the sum.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_floats, check_tensor
from .pair_weights import PLACE, to_tf32, weights_kernel
from .segments import architecture

SUPERBLOCK = 2048
TILE = 64
# Triton 3.6's compiler fails on reductions of results in the memory of sm_100's tensor cores; 3.8's does not.
OLD = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8)
PAD = 32  # rows of the transposed copies are padded to a multiple of it, for aligned loads without a mask


class Plan(NamedTuple):
    """How a device computes products: the precision of one, whether a and b are split for three, and block sizes."""

    precision: str
    split: bool
    weights_k: int
    weights_warps: int
    weights_stages: int
    gradient_k: int
    gradient_stages: int


def plan(device: torch.device, high: bool) -> Plan:
    """Block sizes without register spills, by kind of matrix unit; ``high``: one TF32 product if the unit has TF32."""
    name = architecture(device)
    if name.startswith("gfx"):
        # AMD's matrix cores take float32; only gfx942's also take TF32. They have 64 KiB of shared memory.
        return Plan("tf32" if high and name == "gfx942" else "ieee", False, 32, 4, 2, 32, 2)
    if OLD and name in ("sm_100", "sm_103"):
        return Plan("ieee", False, 16, 8, 3, 16, 3)
    if name in ("sm_90", "sm_100", "sm_103"):  # operands go from shared memory to the tensor cores
        return Plan("tf32", not high, 16, 8, 3, 16, 3)
    # Operands go through registers, so few at a time. Triton 3.6 has no product of fewer than 16 columns.
    return Plan("tf32", not high, 16, 4 if high else 8, 3 if high else 2, 16, 3)


@triton.jit
def _prepare_kernel(
    a: tl.tensor,
    b: tl.tensor,
    planes: tl.tensor,
    turned: tl.tensor,
    products: tl.tensor,
    classes: tl.tensor,
    dim: tl.tensor,
    padded: tl.tensor,
    ROUND: tl.constexpr,
    SPLIT: tl.constexpr,
    TURN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """planes (2 or 4, C, D): a, b as the products take them (SPLIT: and the remainders); turned: their transposes, padded.

    products (3, C): a.a, b.b, a.b of every row, from the values in the planes.
    """
    rows = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_mask = rows < classes
    aa = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    bb = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    ab = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    size = tl.cast(classes, tl.int64) * dim
    turned_size = tl.cast(padded, tl.int64) * dim
    for start in range(0, dim, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        mask = row_mask[:, None] & (columns < dim)[None, :]
        index = (rows.to(tl.int64) * dim)[:, None] + columns[None, :]
        turned_index = (columns.to(tl.int64) * padded)[:, None] + rows[None, :]
        turned_mask = (columns < dim)[:, None] & (rows < padded)[None, :]
        x = tl.load(a + index, mask=mask, other=0.0)
        y = tl.load(b + index, mask=mask, other=0.0)
        for part in tl.static_range(2 if SPLIT else 1):
            x_part = to_tf32(x) if ROUND else x
            y_part = to_tf32(y) if ROUND else y
            if part == 0:
                x_full = x if SPLIT else x_part
                y_full = y if SPLIT else y_part
                aa += x_full * x_full
                bb += y_full * y_full
                ab += x_full * y_full
            tl.store(planes + 2 * part * size + index, x_part, mask=mask)
            tl.store(planes + (2 * part + 1) * size + index, y_part, mask=mask)
            if TURN:
                tl.store(turned + 2 * part * turned_size + turned_index, tl.trans(x_part), mask=turned_mask)
                tl.store(turned + (2 * part + 1) * turned_size + turned_index, tl.trans(y_part), mask=turned_mask)
            x -= x_part
            y -= y_part
    tl.store(products + rows, tl.sum(aa, axis=1), mask=row_mask)
    tl.store(products + classes + rows, tl.sum(bb, axis=1), mask=row_mask)
    tl.store(products + 2 * classes + rows, tl.sum(ab, axis=1), mask=row_mask)


@triton.jit(do_not_specialize=PLACE)
def _gradient_kernel(
    weights: tl.tensor,
    planes: tl.tensor,
    turned: tl.tensor,
    gradient: tl.tensor,
    classes: tl.tensor,
    dim: tl.tensor,
    row_begin: tl.tensor,
    row_end: tl.tensor,
    column_begin: tl.tensor,
    column_end: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    plane: tl.tensor,
    padded: tl.tensor,
    accumulate: tl.tensor,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Add a block's part of the gradient to its rows k (``gradient`` starts at the first); i runs over its other side."""
    dim_tiles = tl.cdiv(dim, BLOCK_N)
    local = tl.program_id(0) // dim_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(0) % dim_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    # Columns past the end read the last column instead and are not stored. Blocks start at multiples of PAD.
    at = turned + (tl.minimum(d, dim - 1).to(tl.int64) * padded + tl.multiple_of(column_begin, 16))[:, None]
    turned_size = tl.cast(padded, tl.int64) * dim
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sum_u = tl.zeros([BLOCK_M], tl.float32)
    sum_w = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, column_end - column_begin, BLOCK_K):
        step = start + tl.arange(0, BLOCK_K)
        source = weights + local[:, None] * row_stride + step[None, :] * column_stride
        u = tl.load(source)
        w = tl.load(source + plane)
        sum_u += tl.sum(u, axis=1)
        sum_w += tl.sum(w, axis=1)
        x = tl.trans(tl.load(at + step[None, :]))
        y = tl.trans(tl.load(at + turned_size + step[None, :]))
        if SPLIT:
            u_high = to_tf32(u)
            w_high = to_tf32(w)
            product = tl.dot(u - u_high, x, product, input_precision=PRECISION)
            product = tl.dot(w - w_high, y, product, input_precision=PRECISION)
            low_x = tl.trans(tl.load(at + 2 * turned_size + step[None, :]))
            low_y = tl.trans(tl.load(at + 3 * turned_size + step[None, :]))
            product = tl.dot(u_high, low_x, product, input_precision=PRECISION)
            product = tl.dot(w_high, low_y, product, input_precision=PRECISION)
            u = u_high
            w = w_high
        product = tl.dot(u, x, product, input_precision=PRECISION)
        product = tl.dot(w, y, product, input_precision=PRECISION)
    k = row_begin + local
    mask = (k < row_end)[:, None] & (d < dim)[None, :]
    own = planes + (k.to(tl.int64) * dim)[:, None] + d[None, :]
    size = tl.cast(classes, tl.int64) * dim
    for part in tl.static_range(2 if SPLIT else 1):
        product -= tl.load(own + 2 * part * size, mask=mask, other=0.0) * sum_u[:, None]
        product -= tl.load(own + (2 * part + 1) * size, mask=mask, other=0.0) * sum_w[:, None]
    product *= 2
    target = gradient + (local.to(tl.int64) * dim)[:, None] + d[None, :]
    if accumulate > 0:
        product += tl.load(target, mask=mask, other=0.0)
    tl.store(target, product, mask=mask)


@triton.jit
def _total_kernel(totals: tl.tensor, total: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    value = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        value += tl.load(totals + index, mask=index < count, other=0.0)
    tl.store(total, tl.sum(value, axis=0))


def pair_alignment(
    a: Tensor,
    b: Tensor,
    groups: Tensor | None,
    row_start: int,
    row_stop: int,
    eps: float,
    need_gradient: bool,
    high: bool,
) -> tuple[Tensor, Tensor]:
    """Sum of cos(a_j - a_i, b_j - b_i) over row_start <= i < row_stop, j != i, and d(sum over all i, j)/d b.

    a, b (C, D) float32, each centred; groups (C,) int64 or None: pairs within a group are left out. Returns
    total () float64 and the gradient (row_stop - row_start, D) float32, (0, D) without ``need_gradient``. A pair with
    a flow shorter than ``eps`` counts 0; NaN and infinity give NaN. ``high``: TF32 products, else float32 accuracy.
    """
    check_floats("a", a, None, None, device=a.device)
    (classes, dim), device, rows = a.shape, a.device, row_stop - row_start
    check_floats("b", b, classes, dim, device=device)
    if not 0 <= row_start <= row_stop <= classes:
        raise ValueError(f"row_start and row_stop must be in order within 0..{classes}, got {row_start}, {row_stop}")
    a, b = a.contiguous(), b.contiguous()
    if groups is not None:
        check_tensor("groups", groups, (classes,), (torch.int64,), device)
        groups = groups.contiguous()
    total = torch.empty((), dtype=torch.float64, device=device)
    gradient = torch.empty((rows if need_gradient else 0, dim), dtype=torch.float32, device=device)
    if rows == 0:
        return total.zero_(), gradient
    height = min(SUPERBLOCK, triton.cdiv(rows, 128) * 128)
    width = min(SUPERBLOCK, triton.cdiv(classes, 128) * 128)
    chosen = plan(device, high)
    precision, split = chosen.precision, chosen.split
    parts, padded = 4 if split else 2, triton.cdiv(classes, PAD) * PAD
    products = torch.empty((3, classes), dtype=torch.float32, device=device)
    planes = torch.empty((parts, classes, dim), dtype=torch.float32, device=device)
    turned = torch.empty((parts, dim, padded) if need_gradient else (0,), dtype=torch.float32, device=device)
    weights = torch.empty((2, height, width) if need_gradient else (0,), dtype=torch.float32, device=device)
    slots = triton.cdiv(min(rows, SUPERBLOCK), TILE) * triton.cdiv(min(classes, SUPERBLOCK), TILE)  # of the first block
    totals = torch.empty((slots,), dtype=torch.float64, device=device)
    symmetric = rows == classes

    def add_gradient(begin: int, end: int, other: int, other_end: int, strides: tuple[int, int], again: bool) -> None:
        _gradient_kernel[(triton.cdiv(end - begin, TILE) * triton.cdiv(dim, TILE),)](
            weights, planes, turned, gradient[begin - row_start :], classes, dim, begin, end, other, other_end, *strides,
            height * width, padded, int(again), SPLIT=split, PRECISION=precision, BLOCK_M=TILE, BLOCK_N=TILE, BLOCK_K=chosen.gradient_k,
            num_warps=4, num_stages=chosen.gradient_stages,
        )  # fmt: skip

    with torch.cuda.device_of(a):
        _prepare_kernel[(triton.cdiv(padded, 16),)](
            a, b, planes, turned, products, classes, dim, padded, ROUND=precision == "tf32", SPLIT=split,
            TURN=need_gradient, BLOCK_C=16, BLOCK_D=64, num_warps=4,
        )  # fmt: skip
        for row in range(row_start, row_stop, SUPERBLOCK):
            row_end = min(row + SUPERBLOCK, row_stop)
            for column in range(row if symmetric else 0, classes, SUPERBLOCK):
                column_end = min(column + SUPERBLOCK, classes)
                first = row == row_start and column == 0
                tiles = triton.cdiv(row_end - row, TILE) * triton.cdiv(column_end - column, TILE)
                mirror = symmetric and row == column
                weights_kernel[(tiles,)](
                    a, b, planes, products, groups, weights, totals, classes, dim, row, row_end, column, column_end, width,
                    height * width, int(not first), eps, MIRROR=mirror, FACTOR=2 if symmetric and not mirror else 1,
                    NEED_GRADIENT=need_gradient, HIGH=precision == "tf32" and not split, SPLIT=split, PRECISION=precision, TILE=TILE, BLOCK_K=chosen.weights_k,
                    num_warps=chosen.weights_warps, num_stages=chosen.weights_stages,
                )  # fmt: skip
                if need_gradient:
                    # Blocks are in order of rows: the first to reach given rows is their block with the first rows.
                    add_gradient(row, row_end, column, column_end, (width, 1), column > 0)
                    if symmetric and not mirror:
                        add_gradient(column, column_end, row, row_end, (1, width), row > 0)
        _total_kernel[(1,)](totals, total, slots, BLOCK=256, num_warps=4)
    return total, gradient
