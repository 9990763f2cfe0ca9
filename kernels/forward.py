"""Forward kernels: every row's loss and the batch reduction in one launch. Derivations in rowwise.py and reduction.py.

Traffic: each logit of a counted row is read once, and each class probability; per row 8 bytes of target are read, where it is an
index, and 2 to 4 statistics written.
An online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867) over blocks of columns keeps m and rest.

    forward_tile_kernel   BLOCK_ROWS rows per program, any strides: few classes, or classes far apart in memory (N, C, d1, ...)
    forward_row_kernel    one row per program, classes contiguous: 16-byte loads at any row start
"""

import triton
import triton.language as tl
from fusedloss.kernels.reduction import reduce_batch, store_stats
from fusedloss.kernels.rowwise import (
    STATE,
    check_target,
    class_factors,
    elements_in_sector,
    finite_max,
    float_from_bits,
    has_largest,
    load_sample_weight,
    load_scale,
    load_second_label,
    load_target,
    load_target_weight,
    prove_alignment,
    row_loss,
    transform_logits,
)
from fusedloss.kernels.slices import merge_slices, publish_slice
from fusedloss.kernels.tile import (
    by_row,
    by_turn,
    load_packed,
    load_tile_targets,
    rows_on_chip,
    target_logit,
    tile_rows,
    tile_statistics,
    transform_blocks,
)


@triton.jit
def _store_rows(
    loss_ptr,
    saved_ptr,
    program,
    rows,
    mask,
    counted,
    loss,
    row_max,
    rest,
    factor_total,  # A of class probabilities, else None
    scale,
    n_rows,
    REDUCTION: tl.constexpr,
    SAVE: tl.constexpr,
):
    """What a forward leaves per row: the loss itself, statistics for the backward, losses to select among."""
    if REDUCTION == "none":
        tl.store(loss_ptr + rows, scale * loss, mask=mask)
        tl.store(saved_ptr, scale, mask=program == 0)
    if SAVE:
        tl.store(saved_ptr + STATE + rows, row_max, mask=mask)
        tl.store(saved_ptr + STATE + n_rows + rows, rest, mask=mask)
        if factor_total is not None:
            tl.store(saved_ptr + STATE + 3 * n_rows + rows, factor_total, mask=mask)
    if REDUCTION == "max" or REDUCTION == "topk":
        tl.store(saved_ptr + STATE + 2 * n_rows + rows, tl.where(counted, loss, float("-inf")), mask=mask)


@triton.jit(
    do_not_specialize=[
        "scale_bits", "smoothing_bits", "ignore_index", "top_k", "lam_bits", "z_loss_bits", "logit_scale_bits", "softcap_bits",
    ]
)  # fmt: skip
def forward_tile_kernel(
    loss_ptr,  # (n_rows,) for "none", else ()
    saved_ptr,  # (4 + 3 n_rows,), or (4 + 4 n_rows,), see rowwise.py
    row_stats_ptr,  # (2, n_rows), with the two that follow None without statistics
    counts_ptr,  # (3,) int64
    flags_ptr,  # (n_rows,) int8 workspace
    partial_ptr,  # (2, n_programs) workspace, None with a single program or "none"
    ticket_ptr,  # () int32, likewise
    selection_ptr,  # (4,) int64, where launches of their own follow that select among the rows (selection.py), else None
    logits_ptr,  # (n_outer, n_inner, n_cols)
    target_ptr,  # (n_rows,) int64 or uint8; None: class probabilities
    probabilities_ptr,  # (n_outer, n_inner, n_cols) class probabilities as target, or None
    target_b_ptr,  # the second of two labels: (n_rows,) or None
    lam_ptr,  # share of the first: (n_rows,) or None
    weight_ptr,  # (n_cols,) or None
    sample_weight_ptr,  # (n_rows,) or None
    scale_ptr,  # () or None
    scale_bits: "i64",
    smoothing_bits: "i64",  # read with HAS_SMOOTHING
    ignore_index: "i64",
    top_k: "i64",
    lam_bits,  # this and the following: None where absent
    z_loss_bits,
    logit_scale_bits,
    softcap_bits,
    n_rows,
    n_inner,
    n_cols,
    outer_stride,
    row_stride,
    col_stride,
    probabilities_outer_stride,  # None without probabilities
    probabilities_row_stride,
    probabilities_col_stride,
    REDUCTION: tl.constexpr,
    TOP_K_IS_FRACTION: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    SAVE: tl.constexpr,
    ROWS_CONTIGUOUS: tl.constexpr,  # the row strides are 1: neighbouring rows, not classes, lie side by side
    VECTOR: tl.constexpr,  # all strides and the contiguous size are multiples of it; at most 16 bytes
    ROW_GROUP: tl.constexpr,  # packed rows that are whole 16-byte groups together; 0: rows may lie anywhere
    PADDED: tl.constexpr,  # elements of a packed row group, or of a thread's part of a packed row, to the next power of 2
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    N_BLOCKS: tl.constexpr,  # blocks of columns on chip at a time, which are the whole row; 0: a block at a time
):
    """Losses of BLOCK_ROWS rows of one outer block."""
    dtype = saved_ptr.dtype.element_ty
    smoothing = float_from_bits(smoothing_bits, dtype) if HAS_SMOOTHING else None
    z_loss = float_from_bits(z_loss_bits, dtype) if z_loss_bits is not None else None
    logit_scale = float_from_bits(logit_scale_bits, dtype) if logit_scale_bits is not None else None
    softcap = float_from_bits(softcap_bits, dtype) if softcap_bits is not None else None
    scale = load_scale(scale_ptr, scale_bits, dtype)
    N_TURNS: tl.constexpr = ROW_GROUP if ROW_GROUP > 0 else 1
    TURN_ROWS: tl.constexpr = BLOCK_ROWS // N_TURNS
    PART: tl.constexpr = N_BLOCKS if ROW_GROUP > 0 else 0
    if ROW_GROUP > 0:
        n_cols = N_BLOCKS if BLOCK_COLS == 1 else (n_cols // VECTOR) * VECTOR
        held = load_packed(logits_ptr, n_rows, n_cols, float("-inf"), ROW_GROUP, BLOCK_ROWS, BLOCK_COLS, N_BLOCKS, PADDED)
        if probabilities_ptr is not None:
            held_q = load_packed(probabilities_ptr, n_rows, n_cols, 0.0, ROW_GROUP, BLOCK_ROWS, BLOCK_COLS, N_BLOCKS, PADDED)
    else:
        if probabilities_ptr is not None:
            _, _, probabilities_outer_stride, probabilities_row_stride, probabilities_col_stride = prove_alignment(
                n_inner, n_cols, probabilities_outer_stride, probabilities_row_stride, probabilities_col_stride,
                ROWS_CONTIGUOUS, VECTOR,
            )  # fmt: skip
        n_inner, n_cols, outer_stride, row_stride, col_stride = prove_alignment(
            n_inner, n_cols, outer_stride, row_stride, col_stride, ROWS_CONTIGUOUS, VECTOR
        )
    outer, inner, mask, rows = tile_rows(n_inner, BLOCK_ROWS, ROW_GROUP)
    row_ptr = logits_ptr + outer * outer_stride + inner.to(tl.int64) * row_stride
    q_row_ptr = None
    if probabilities_ptr is not None:
        q_row_ptr = probabilities_ptr + outer * probabilities_outer_stride + inner.to(tl.int64) * probabilities_row_stride
    else:
        targets = by_turn(load_tile_targets(target_ptr, rows, mask, ignore_index), N_TURNS)
    # Of rows that do not exist: the index of no row.
    turn_rows = by_turn(tl.where(mask, rows, n_rows), N_TURNS)

    losses, maxima, rests, factor_totals, lses, counts, corrects = (), (), (), (), (), (), ()
    count = tl.zeros((TURN_ROWS,), dtype)
    for i in tl.static_range(N_TURNS):
        label, target_weight, weight_b, lam = None, None, None, None
        if probabilities_ptr is not None:
            counted = turn_rows[i] < n_rows
            valid = counted
        else:
            counted, valid = check_target(targets[i], ignore_index, n_cols)
            target_weight = load_target_weight(weight_ptr, targets[i], counted, valid, dtype)
            label = targets[i].to(tl.int32)
        if target_b_ptr is not None:
            target_b, counted, valid, target_weight, weight_b, lam = load_second_label(
                target_b_ptr, lam_ptr, lam_bits, weight_ptr, turn_rows[i], turn_rows[i] < n_rows, targets[i], counted, valid,
                target_weight, ignore_index, n_cols,
            )  # fmt: skip
            lam += tl.zeros((TURN_ROWS,), dtype)  # it may be a number
        sample_weight = None
        if sample_weight_ptr is not None:
            sample_weight = load_sample_weight(sample_weight_ptr, turn_rows[i], counted, dtype)
        # Rows that do not count are not read, unless they share their 16 bytes with rows that do.
        read = mask if ROWS_CONTIGUOUS else valid
        blocks, q = None, None
        if N_BLOCKS > 0:
            packed = held[i] if ROW_GROUP > 0 else None
            blocks = rows_on_chip(packed, row_ptr, col_stride, read, n_cols, float("-inf"), BLOCK_COLS, N_BLOCKS)
            blocks = transform_blocks(blocks, 0, n_cols, logit_scale, softcap, dtype, BLOCK_COLS, PART)
            if probabilities_ptr is not None:
                packed = held_q[i] if ROW_GROUP > 0 else None
                q = rows_on_chip(packed, q_row_ptr, probabilities_col_stride, read, n_cols, 0.0, BLOCK_COLS, N_BLOCKS)
        row_max, rest, x_t, shift, smooth_sum, weight_total, _exps = tile_statistics(
            blocks, q, row_ptr, col_stride, q_row_ptr, probabilities_col_stride, read, n_cols, label,
            weight_ptr, smoothing, logit_scale, softcap, dtype, BLOCK_COLS, N_BLOCKS, PART, HAS_SMOOTHING,
        )  # fmt: skip
        x_b = None
        if target_b_ptr is not None:
            x_b = target_logit(
                blocks, row_ptr, col_stride, valid, target_b, logit_scale, softcap, dtype, BLOCK_COLS, N_BLOCKS, PART
            )
        if probabilities_ptr is not None:
            x_t, e_t = None, tl.zeros_like(rest)
            factor_totals = factor_totals + (weight_total,)
        else:
            e_t = tl.exp(x_t - row_max)
        loss = row_loss(
            row_max, rest, x_t, e_t, target_weight, shift, weight_total, smooth_sum, smoothing, n_cols,
            x_b, weight_b, z_loss, sample_weight,
        )  # fmt: skip
        loss = tl.where(valid, loss, tl.where(counted, float("nan"), 0.0))  # a class index out of range: NaN
        losses, maxima, rests = losses + (loss,), maxima + (row_max,), rests + (rest,)
        if row_stats_ptr is not None:
            lse = tl.where(valid, row_max + tl.log(rest + e_t), float("nan"))
            correct = has_largest(x_t, row_max, lse, x_b, lam)
            lses = lses + (lse,)
            corrects = corrects + (correct.to(tl.int32),)
        counts = counts + (counted.to(tl.int32),)  # integers, since bits are not moved between threads as well
        if REDUCTION == "mean" and probabilities_ptr is None and target_b_ptr is None:
            count += target_weight
        else:
            count += counted.to(dtype)
    if HAS_SMOOTHING and SAVE and probabilities_ptr is None:
        tl.store(saved_ptr + 3, weight_total, mask=tl.program_id(0) == 0)

    loss, counted = by_row(losses), by_row(counts) != 0
    _store_rows(
        loss_ptr, saved_ptr, tl.program_id(0), rows, mask, counted, loss, by_row(maxima), by_row(rests),
        by_row(factor_totals) if probabilities_ptr is not None else None, scale, n_rows, REDUCTION, SAVE,
    )  # fmt: skip
    if row_stats_ptr is not None:
        store_stats(row_stats_ptr, flags_ptr, rows, mask, counted, by_row(corrects) != 0, by_row(lses), loss, n_rows)
    if REDUCTION != "none" or row_stats_ptr is not None:
        reduce_batch(
            loss_ptr, saved_ptr, partial_ptr, ticket_ptr, tl.sum(loss, 0), tl.sum(count, 0), scale, top_k,
            tl.program_id(0), tl.num_programs(0), n_rows, REDUCTION, TOP_K_IS_FRACTION, partial_ptr is None,
            counts_ptr, row_stats_ptr, flags_ptr, selection_ptr,
        )  # fmt: skip


@triton.jit
def main_columns(row, row_stride, n_cols, GROUP: tl.constexpr, SECTOR: tl.constexpr):
    """Where a row starts, and which of its columns are accessed in whole groups: (row_start, head, n_main).

    Columns head to head + n_main begin at a sector of 32 bytes, so that no request of a warp touches one sector more than it
    has bytes for. Rows of whole sectors begin there themselves. A row of whole 16-byte groups may begin inside a sector: head is
    negative then, and the columns before the row are masked. A ragged row (GROUP is 1) gives only its whole sectors; what is left
    at its two ends are its edges. Both head and n_main are multiples of a group: the proof the compiler needs for 16-byte
    accesses, masked as a whole.
    """
    if GROUP == 1:
        row_start = row * row_stride
        head = tl.minimum((SECTOR - row_start % SECTOR) % SECTOR, n_cols).to(tl.int32)
        n_main = ((n_cols - head) // SECTOR) * SECTOR
    else:
        row_start = row * ((row_stride // GROUP) * GROUP)
        head = 0
        if GROUP < SECTOR:
            head = -((row_start % SECTOR).to(tl.int32) // GROUP) * GROUP
        n_main = ((n_cols - head) // GROUP) * GROUP
    return row_start, head, n_main


@triton.jit
def in_main(group, head, n_main, GROUP: tl.constexpr, SECTOR: tl.constexpr):
    """Which of the columns head + group are in the row."""
    mask = group < n_main
    if GROUP > 1 and GROUP < SECTOR:
        mask = mask & (group >= -head)
    return mask


@triton.jit
def edge_columns(head, n_main, n_cols, SECTOR: tl.constexpr):
    """The fewer than 2 SECTOR columns of a row outside its groups, and which of them exist."""
    lane = tl.arange(0, 2 * SECTOR)
    cols = tl.where(lane < SECTOR, lane, head + n_main + lane - SECTOR)
    return cols, tl.where(lane < SECTOR, lane < head, cols < n_cols)


@triton.jit
def load_logits(ptr, mask, logit_scale, softcap, dtype: tl.constexpr):
    """Logits of a row as the loss sees them, -inf outside of it."""
    x = tl.load(ptr, mask=mask, other=float("-inf")).to(dtype)
    if logit_scale is not None or softcap is not None:
        x = tl.where(mask, transform_logits(x, logit_scale, softcap), float("-inf"))
    return x


@triton.jit
def smoothing_sums(x, q, cols, in_row, shift, weight_ptr, smoothing, n_cols, smooth_sum, weight_total):
    """Adds w_c (shift - x_c) and w_c, or a_c for w_c where q has class probabilities.

    Of class indices without weights W is known, and left to the caller.
    """
    if q is not None:
        w = class_factors(q, cols, in_row, weight_ptr, smoothing, n_cols, x.dtype)
        return smooth_sum + tl.where(in_row, w * (shift - x), 0.0), weight_total + w
    elif weight_ptr is not None:
        w = tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(x.dtype)
        return smooth_sum + tl.where(in_row, w * (shift - x), 0.0), weight_total + w
    else:
        return smooth_sum + tl.where(in_row, shift - x, 0.0), weight_total


@triton.jit
def absorb(
    x,  # (BLOCK_COLS,) logits of one row, -inf outside of it
    q,  # (BLOCK_COLS,) class probabilities, 0 outside of it; None: class indices
    cols,  # (BLOCK_COLS,) their columns
    in_row,  # (BLOCK_COLS,)
    target,  # None: class probabilities
    first,  # the block's columns lie in [first, last)
    last,
    shift,  # of class indices; that of probabilities is the maximum
    weight_ptr,
    smoothing,
    n_cols,
    row_max,
    rest,
    smooth_sum,
    weight_total,
    HAS_SMOOTHING: tl.constexpr,
):
    """One step of the online softmax of a row: its statistics with another block of columns."""
    new_max = tl.maximum(row_max, tl.max(x, 0))
    finite = finite_max(new_max)
    e = tl.exp(x - finite)
    if target is not None:
        in_block = (target >= first) & (target < last)
        if in_block:  # at most one block of a row pays for the comparison
            e = tl.where(cols == target.to(tl.int32), 0.0, e)
    rest = rest * tl.exp(row_max - finite) + tl.sum(e, 0)
    if q is not None:
        smooth_sum += weight_total * (finite - finite_max(row_max))
        shift = finite
    if HAS_SMOOTHING or q is not None:
        zeros = tl.zeros(x.shape, x.dtype)
        sums, weights = smoothing_sums(x, q, cols, in_row, shift, weight_ptr, smoothing, n_cols, zeros, zeros)
        smooth_sum += tl.sum(sums, 0)
        if q is not None or weight_ptr is not None:
            weight_total += tl.sum(weights, 0)
    return new_max, rest, smooth_sum, weight_total


@triton.jit(
    do_not_specialize=[
        "scale_bits", "smoothing_bits", "ignore_index", "top_k", "lam_bits", "z_loss_bits", "logit_scale_bits", "softcap_bits",
    ]
)  # fmt: skip
def forward_row_kernel(
    loss_ptr,  # (n_rows,) for "none", else ()
    saved_ptr,  # (4 + 3 n_rows,), or (4 + 4 n_rows,), see rowwise.py
    row_stats_ptr,  # (2, n_rows), with the two that follow None without statistics
    counts_ptr,  # (3,) int64
    flags_ptr,  # (n_rows,) int8 workspace
    partial_ptr,  # (2, n_rows) workspace, None for "none" without statistics
    ticket_ptr,  # () int32, likewise; with slices (1 + n_rows,): [1 + row] of which have published
    selection_ptr,  # as above
    slices_ptr,  # (4, n_rows, N_SLICES) workspace, None with a single slice
    logits_ptr,  # (n_rows, n_cols), classes contiguous
    target_ptr,  # (n_rows,) int64 or uint8; None: class probabilities
    probabilities_ptr,  # (n_rows, n_cols) class probabilities as target, classes contiguous, or None
    target_b_ptr,  # the second of two labels: (n_rows,) or None
    lam_ptr,  # share of the first: (n_rows,) or None
    weight_ptr,  # (n_cols,) or None
    sample_weight_ptr,  # (n_rows,) or None
    scale_ptr,  # () or None
    scale_bits: "i64",
    smoothing_bits: "i64",  # read with HAS_SMOOTHING
    ignore_index: "i64",
    top_k: "i64",
    lam_bits,  # this and the following: None where absent
    z_loss_bits,
    logit_scale_bits,
    softcap_bits,
    n_rows,
    n_cols,
    row_stride,
    probabilities_row_stride,  # equal to row_stride modulo a sector's logits; None without probabilities
    REDUCTION: tl.constexpr,
    TOP_K_IS_FRACTION: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    SAVE: tl.constexpr,
    GROUP: tl.constexpr,  # elements in 16 or 32 bytes that every row consists of; 1: some row starts or ends inside of 16 bytes
    BLOCK_COLS: tl.constexpr,
    N_SLICES: tl.constexpr,
):
    """Loss of one row, BLOCK_COLS classes at a time; or of one slice of it, and the last to finish has the row's."""
    dtype = saved_ptr.dtype.element_ty
    row = (tl.program_id(0) // N_SLICES).to(tl.int64)  # int64: row * row_stride passes 2**31
    part = tl.program_id(0) % N_SLICES
    HAS_SUMS: tl.constexpr = HAS_SMOOTHING or probabilities_ptr is not None
    target, target_weight, weight_b, lam = None, None, None, None
    if probabilities_ptr is not None:
        counted = row < n_rows
        valid = counted
    else:
        target, counted, valid = load_target(target_ptr, row, row < n_rows, ignore_index, n_cols)
        target_weight = load_target_weight(weight_ptr, target, counted, valid, dtype)
    if target_b_ptr is not None:
        target_b, counted, valid, target_weight, weight_b, lam = load_second_label(
            target_b_ptr, lam_ptr, lam_bits, weight_ptr, row, row < n_rows, target, counted, valid, target_weight,
            ignore_index, n_cols,
        )  # fmt: skip
    sample_weight = None
    if sample_weight_ptr is not None:
        sample_weight = load_sample_weight(sample_weight_ptr, row, counted, dtype)
    z_loss = float_from_bits(z_loss_bits, dtype) if z_loss_bits is not None else None
    logit_scale = float_from_bits(logit_scale_bits, dtype) if logit_scale_bits is not None else None
    softcap = float_from_bits(softcap_bits, dtype) if softcap_bits is not None else None
    smoothing = float_from_bits(smoothing_bits, dtype) if HAS_SMOOTHING else None
    n_read = tl.where(valid, n_cols, 0)  # a row that does not count is not read

    SECTOR: tl.constexpr = elements_in_sector(logits_ptr)
    row_start, head, n_main = main_columns(row, row_stride, n_read, GROUP, SECTOR)
    row_ptr = logits_ptr + row_start
    main_ptr = logits_ptr + tl.multiple_of(row_start + head, SECTOR)

    if probabilities_ptr is not None:
        q_row_start, _, _ = main_columns(row, probabilities_row_stride, n_read, GROUP, SECTOR)
        q_main_ptr = probabilities_ptr + tl.multiple_of(q_row_start + head, SECTOR)

    edge_q, x_t, shift = None, None, None
    if probabilities_ptr is None:
        x_t = transform_logits(tl.load(row_ptr + target, mask=valid, other=0.0).to(dtype), logit_scale, softcap)
        shift = finite_max(x_t)
    x_b = None
    if target_b_ptr is not None:
        x_b = transform_logits(tl.load(row_ptr + target_b, mask=valid, other=0.0).to(dtype), logit_scale, softcap)
    row_max = tl.full((), float("-inf"), dtype)
    rest = tl.zeros((), dtype)
    smooth_sum = tl.zeros((), dtype)
    weight_total = tl.zeros((), dtype)
    if GROUP == 1:
        edge_cols, in_edge = edge_columns(head, n_main, n_read, SECTOR)
        in_edge = in_edge & (part == 0)
        edge_x = load_logits(row_ptr + edge_cols, in_edge, logit_scale, softcap, dtype)
        if probabilities_ptr is not None:
            edge_q = tl.load(probabilities_ptr + q_row_start + edge_cols, mask=in_edge, other=0.0)
        row_max, rest, smooth_sum, weight_total = absorb(
            edge_x, edge_q, edge_cols, in_edge, target, 0, n_cols, shift, weight_ptr, smoothing, n_cols,
            row_max, rest, smooth_sum, weight_total, HAS_SMOOTHING,
        )  # fmt: skip
    slice_cols = tl.cdiv(n_main, N_SLICES * BLOCK_COLS) * BLOCK_COLS
    for start in range(part * slice_cols, tl.minimum((part + 1) * slice_cols, n_main), BLOCK_COLS):
        group = start + tl.arange(0, BLOCK_COLS)
        in_row = in_main(group, head, n_main, GROUP, SECTOR)
        x = load_logits(main_ptr + group, in_row, logit_scale, softcap, dtype)
        q = None
        if probabilities_ptr is not None:
            q = tl.load(q_main_ptr + group, mask=in_row, other=0.0)
        cols, first = head + group, head + start
        row_max, rest, smooth_sum, weight_total = absorb(
            x, q, cols, in_row, target, first, first + BLOCK_COLS, shift, weight_ptr, smoothing, n_cols,
            row_max, rest, smooth_sum, weight_total, HAS_SMOOTHING,
        )  # fmt: skip

    last_slice = True
    if N_SLICES > 1:
        arrived_ptr = ticket_ptr + 1 + row
        arrived = publish_slice(
            slices_ptr, arrived_ptr, row, n_rows, part,
            row_max, rest, smooth_sum, weight_total, HAS_SUMS, N_SLICES,
        )  # fmt: skip
        last_slice = arrived == N_SLICES
        tl.store(arrived_ptr, 0, mask=last_slice)  # ready for the next launch
    if last_slice:
        if N_SLICES > 1:
            row_max, rest, smooth_sum, weight_total = merge_slices(
                slices_ptr, row, n_rows, smooth_sum, weight_total, HAS_SUMS, probabilities_ptr is not None, N_SLICES
            )
        factor_total = None
        if probabilities_ptr is not None:
            factor_total = weight_total
            e_t = tl.zeros((), dtype)
        elif HAS_SMOOTHING:
            if weight_ptr is None:
                weight_total = tl.zeros((), dtype) + n_cols
            if SAVE:
                tl.store(saved_ptr + 3, weight_total, mask=valid)  # every row that is read stores the same value
        if probabilities_ptr is None:
            e_t = tl.exp(x_t - row_max)
        loss = row_loss(
            row_max, rest, x_t, e_t, target_weight, shift, weight_total, smooth_sum, smoothing, n_cols,
            x_b, weight_b, z_loss, sample_weight,
        )  # fmt: skip
        loss = tl.where(valid, loss, tl.where(counted, float("nan"), 0.0))  # a class index out of range: NaN, nothing was read

        scale = load_scale(scale_ptr, scale_bits, dtype)
        _store_rows(
            loss_ptr, saved_ptr, row, row, row < n_rows, counted, loss, row_max, rest, factor_total, scale,
            n_rows, REDUCTION, SAVE,
        )  # fmt: skip
        if row_stats_ptr is not None:
            lse = tl.where(valid, row_max + tl.log(rest + e_t), float("nan"))
            correct = has_largest(x_t, row_max, lse, x_b, lam)
            store_stats(row_stats_ptr, flags_ptr, row, row < n_rows, counted, correct, lse, loss, n_rows)
        if REDUCTION != "none" or row_stats_ptr is not None:
            count = counted.to(dtype)
            if REDUCTION == "mean" and probabilities_ptr is None and target_b_ptr is None:
                count = target_weight
            reduce_batch(
                loss_ptr, saved_ptr, partial_ptr, ticket_ptr, loss, count, scale, top_k, row, n_rows, n_rows,
                REDUCTION, TOP_K_IS_FRACTION, partial_ptr is None, counts_ptr, row_stats_ptr, flags_ptr, selection_ptr,
            )  # fmt: skip
