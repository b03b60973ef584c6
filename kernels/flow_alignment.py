"""The flow-alignment losses that cost O(C*D): the loss with the factors of its exact gradient, then the gradient.

t_c is the mean of class c minus ``shift``, a_c its centre. Besides the loss, the forward keeps p, q (common, or one per
class) and m, r (D,) with dL/dt_c = p_c a_c + q_c (t_c - m) + r: the backward reads the features once and writes once.

Most kinds take one pass of partial sums and one program that finishes them. CLASS and ANCHORED have a cosine per class
(`class_alignment`), for which CLASS needs the mean over classes first; FLOW_MSE and PAIR_MSE of labelled features need the mean of class 0, their pivot. The order of
every sum is fixed by the shape, without atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfm_fast.reference import flow_alignment as reference

from .checks import check_floats, check_labelled
from .class_alignment import anchored_alignment, class_alignment
from .class_means import class_means
from .reductions import CLASS, DECOUPLED, FLOW_MSE, GLOBAL, finish_kernel, pivot_row
from .segments import class_mean, labelled, store_per_item, tile_warps, tiles_for


@triton.jit
def _partial_sums_kernel(
    source: tl.tuple,
    centers: tl.tensor,
    first_mean: tl.tensor,
    scalars: tl.tensor,
    sums: tl.tensor,
    classes: tl.tensor,
    dim: tl.tensor,
    chunks: tl.tensor,
    classes_per_chunk: tl.tensor,
    KIND: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROW_UNROLL: tl.constexpr,
    ITEM_UNROLL: tl.constexpr,
) -> None:
    """Sums a chunk of classes x a block of columns into ``sums`` (2, chunks, D) and ``scalars`` (3, programs) float64."""
    column_blocks = tl.cdiv(dim, BLOCK_D)
    chunk = tl.program_id(0) // column_blocks
    columns = tl.program_id(0) % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    column_mask = columns < dim
    if KIND != DECOUPLED:
        pivot = pivot_row(source, centers, first_mean, columns, column_mask, KIND)
    # Accumulators are as wide as the tile, so that threads exchange nothing before the end.
    squares = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    dot = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    center_squares = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    center_sum = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    first = chunk * classes_per_chunk
    for start in range(first, tl.minimum(first + classes_per_chunk, classes), BLOCK_C * ROW_UNROLL):
        for step in tl.static_range(ROW_UNROLL):  # unrolled, so that the loads of all steps overlap
            rows = start + step * BLOCK_C + tl.arange(0, BLOCK_C)
            row_mask = rows < classes
            mask = row_mask[:, None] & column_mask[None, :]
            t, _ = class_mean(source, rows, row_mask, columns, column_mask, ITEM_UNROLL)
            if KIND < FLOW_MSE:  # a cosine
                t -= pivot[None, :]
            if KIND != CLASS:
                a = tl.load(centers + (rows.to(tl.int64) * dim)[:, None] + columns[None, :], mask=mask, other=0.0)
                if KIND == GLOBAL:
                    t = tl.where(mask, t, 0.0)
                    dot += a * t
                    center_squares += a * a
                    center_sum += a
                else:
                    t -= a
                    if KIND != DECOUPLED:
                        t -= pivot[None, :]
                    t = tl.where(mask, t, 0.0)
                squares += t * t
            else:
                t = tl.where(mask, t, 0.0)
            row_sum += t
    target = sums + chunk.to(tl.int64) * dim + columns
    tl.store(target, tl.sum(row_sum, axis=0), mask=column_mask)
    slot = scalars + tl.program_id(0)
    if KIND != CLASS:
        tl.store(slot, tl.sum(tl.sum(squares, axis=1), axis=0).to(tl.float64))
    if KIND == GLOBAL:
        tl.store(target + tl.cast(chunks, tl.int64) * dim, tl.sum(center_sum, axis=0), mask=column_mask)
        tl.store(slot + tl.num_programs(0), tl.sum(tl.sum(dot, axis=1), axis=0).to(tl.float64))
        tl.store(slot + 2 * tl.num_programs(0), tl.sum(tl.sum(center_squares, axis=1), axis=0).to(tl.float64))


@triton.jit
def _backward_kernel(
    grad_output: tl.tensor,
    source: tl.tuple,
    centers: tl.tensor,
    rows_in: tl.tensor,
    columns_in: tl.tensor,
    out: tl.tensor,
    classes: tl.tensor,
    dim: tl.tensor,
    PER_CLASS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROW_UNROLL: tl.constexpr,
    ITEM_UNROLL: tl.constexpr,
) -> None:
    column_blocks = tl.cdiv(dim, BLOCK_D)
    first = tl.program_id(0) // column_blocks * (BLOCK_C * ROW_UNROLL)
    columns = tl.program_id(0) % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    column_mask = columns < dim
    m = tl.load(columns_in + columns, mask=column_mask, other=0.0)[None, :]
    r = tl.load(columns_in + dim + columns, mask=column_mask, other=0.0)[None, :]
    scale = tl.load(grad_output)
    for step in tl.static_range(ROW_UNROLL):
        rows = first + step * BLOCK_C + tl.arange(0, BLOCK_C)
        row_mask = rows < classes
        mask = row_mask[:, None] & column_mask[None, :]
        t, count = class_mean(source, rows, row_mask, columns, column_mask, ITEM_UNROLL)
        a = tl.load(centers + (rows.to(tl.int64) * dim)[:, None] + columns[None, :], mask=mask, other=0.0)
        index = rows if PER_CLASS else rows * 0
        p = tl.load(rows_in + index, mask=row_mask, other=0.0)
        q = tl.load(rows_in + (classes if PER_CLASS else 1) + index, mask=row_mask, other=0.0)
        value = p[:, None] * a + q[:, None] * (t - m) + r
        value *= tl.div_rn(tl.zeros_like(count) + scale, count)[:, None]
        store_per_item(out, value, source.order, source.offsets, rows, row_mask, columns, column_mask, dim, ITEM_UNROLL)


def flow_alignment(
    features: Tensor,
    order: Tensor | None,
    offsets: Tensor | None,
    centers: Tensor,
    shift: Tensor,
    anchor: Tensor | None,
    kind: int,
    eps: float,
    weight: float,
    delta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss () float32, rows (2, R) = (p, q) and columns (2, D) = (m, r) float32; R = C for CLASS and ANCHORED, else 1.

    features (N, D) float32, bfloat16 or float16, any strides; order (N,) and offsets (C + 1,) int64 or None; centers
    (C, D) and shift (D,) float32. Kinds: 0 cosine of all flows together, 1 mean of a cosine per class, 2 mean squared
    error of flows, 3 of pair flows (centers centred, all four), 4 decoupled with alpha ``weight`` (centers shifted),
    5 anchored with length weight ``weight``, Huber's from ``delta`` on (centers relative to the anchor; anchor (D,) float32, the anchor minus shift).
    """
    check_labelled(features, order, offsets, shift, centers)
    if kind not in range(reference.GLOBAL, reference.ANCHORED + 1):
        raise ValueError(f"kind must be {reference.GLOBAL} to {reference.ANCHORED}, got {kind}")
    if (anchor is not None) != (kind == reference.ANCHORED):
        raise ValueError(f"anchor belongs to kind {reference.ANCHORED}, got kind {kind}")
    if anchor is not None:
        check_floats("anchor", anchor, features.shape[1], device=features.device)
    if centers.numel() == 0:
        raise ValueError(f"centers must not be empty, got {tuple(centers.shape)}")
    (classes, dim), device, centers = centers.shape, features.device, centers.contiguous()
    loss = torch.empty((), dtype=torch.float32, device=device)
    rows = torch.empty((2, classes if kind in reference.PER_CLASS else 1), dtype=torch.float32, device=device)
    columns = torch.empty((2, dim), dtype=torch.float32, device=device)
    first_mean = (
        class_means(features, order, offsets[:2], shift)
        if offsets is not None and kind in (reference.FLOW_MSE, reference.PAIR_MSE)
        else None
    )
    if features.shape[0] == 0:  # labelled, and every class is empty: a readable row, so that the result is NaN
        features = features.new_full((1, dim), float("nan"))
    source = labelled(features, order, offsets, shift)
    tiles = tiles_for(features.shape[0], classes, dim, order is not None)
    if anchor is not None:
        with torch.cuda.device_of(features):
            anchored_alignment(source, centers, anchor.contiguous(), tiles, eps, weight, delta, loss, rows, columns)
        return loss, rows, columns
    chunks, classes_per_chunk = tiles.chunks(classes, dim)
    programs = chunks * tiles.column_blocks(dim)
    sums = torch.empty((1 + (kind == reference.GLOBAL), chunks, dim), dtype=torch.float32, device=device)
    scalars = torch.empty((3, programs), dtype=torch.float64, device=device)
    with torch.cuda.device_of(features):
        _partial_sums_kernel[(programs,)](
            source,
            centers,
            first_mean,
            scalars,
            sums,
            classes,
            dim,
            chunks,
            classes_per_chunk,
            KIND=kind,
            BLOCK_C=tiles.classes,
            BLOCK_D=tiles.columns,
            ROW_UNROLL=tiles.row_unroll,
            ITEM_UNROLL=tiles.item_unroll,
            num_warps=tile_warps(),
        )
        if kind == reference.CLASS:
            class_alignment(source, centers, sums[0], tiles, eps, loss, rows, columns)
            return loss, rows, columns
        block = min(512, max(16, triton.next_power_of_2(dim)))
        finish_kernel[(1,)](
            source,
            centers,
            first_mean,
            scalars,
            sums,
            loss,
            rows,
            columns,
            classes,
            dim,
            chunks,
            programs,
            eps,
            weight,
            KIND=kind,
            ROWS=min(8, triton.next_power_of_2(chunks)),
            BLOCK_D=block,
            BLOCK_P=256,
            num_warps=2 * tile_warps(),
        )
    return loss, rows, columns


def flow_alignment_backward(
    grad_output: Tensor,
    features: Tensor,
    order: Tensor | None,
    offsets: Tensor | None,
    centers: Tensor,
    shift: Tensor,
    rows: Tensor,
    columns: Tensor,
) -> Tensor:
    """grad_output / n_c * (p_c a_c + q_c (t_c - m) + r) for every item: (N, D) contiguous, dtype of ``features``.

    ``rows`` and ``columns`` are results of ``flow_alignment``; grad_output () float32 is read on the device.
    """
    check_labelled(features, order, offsets, shift, centers)
    (classes, dim), device = centers.shape, features.device
    check_floats("grad_output", grad_output, device=device)
    check_floats("rows", rows, 2, classes if rows.shape[-1:] == (classes,) else 1, device=device)
    check_floats("columns", columns, 2, dim, device=device)
    out = torch.empty(features.shape, dtype=features.dtype, device=features.device)
    tiles = tiles_for(features.shape[0], classes, dim, order is not None)
    blocks = triton.cdiv(classes, tiles.classes * tiles.row_unroll)
    with torch.cuda.device_of(features):
        _backward_kernel[(blocks * tiles.column_blocks(dim),)](
            grad_output,
            labelled(features, order, offsets, shift),
            centers.contiguous(),
            rows.contiguous(),
            columns.contiguous(),
            out,
            classes,
            dim,
            PER_CLASS=rows.shape[1] != 1,
            BLOCK_C=tiles.classes,
            BLOCK_D=tiles.columns,
            ROW_UNROLL=tiles.row_unroll,
            ITEM_UNROLL=tiles.item_unroll,
            num_warps=tile_warps(),
        )
    return out
