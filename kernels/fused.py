"""The fused strategy: loss, batch reduction and gradient while the row is on chip. Derivations in rowwise.py and backward.py.

Traffic: each logit of a counted row, and each of its class probabilities, is read once and every gradient written once; packed
rows and pixels (tile.py) are read with their neighbours, whether they count or not. Only a tile whose rows do not fit its
registers is read twice. The gradient is that for an upstream gradient of 1; scale_gradient_kernel makes it right for another.

The mean's denominator must be known before the first gradient is written. A single program has all rows in its tile; where rows
are few, every program looks at all targets; otherwise denominator_kernel, a launch of its own over the targets alone, leaves the
coefficient in saved[0]. With class probabilities every row counts, and there is nothing to sum.

    denominator_kernel     scale / sum of the counted rows' weights
    fused_tile_kernel      BLOCK_ROWS rows per program (tile.py), any strides
    fused_row_kernel       one row per program, or one slice of it (slices.py), classes contiguous: 16-byte accesses at any start
    scale_gradient_kernel  dlogits *= dloss, where dloss is not 1
"""

import triton
import triton.language as tl
from fusedloss.kernels.backward import minus_smoothing, stored_here
from fusedloss.kernels.forward import absorb, edge_columns, in_main, load_logits, main_columns, smoothing_sums
from fusedloss.kernels.reduction import count_rows, mean_coefficient, store_stats, sum_over_programs
from fusedloss.kernels.rowwise import (
    check_target,
    elements_in_sector,
    finite_max,
    float_from_bits,
    gradient_factors,
    has_largest,
    load_sample_weight,
    load_scale,
    load_second_label,
    load_target,
    load_target_weight,
    prove_alignment,
    row_loss,
    through_transform,
    transform_logits,
)
from fusedloss.kernels.slices import merge_slices, publish_slice, wait_for_slices
from fusedloss.kernels.tile import (
    by_row,
    by_turn,
    exponentials,
    load_blocks,
    load_packed,
    load_tile_targets,
    one_thread_each,
    rows_on_chip,
    store_blocks,
    store_packed,
    target_logit,
    tile_gradient,
    tile_rows,
    tile_statistics,
    transform_blocks,
)


@triton.jit
def weights_in_mean(rows, target, counted, valid, target_b_ptr, weight_ptr, ignore_index, n_rows, n_cols, dtype: tl.constexpr):
    """What each of these rows, whose first label is loaded, adds to the mean's denominator; 0 for those past the end."""
    if target_b_ptr is not None:
        _, counted_b, _ = load_target(target_b_ptr, rows, rows < n_rows, ignore_index, n_cols)
        weights = (counted & counted_b).to(dtype)
    else:
        weights = load_target_weight(weight_ptr, target, counted, valid, dtype)
    return weights


@triton.jit(do_not_specialize=["scale_bits", "ignore_index"])
def denominator_kernel(
    saved_ptr,  # (1,) out: the coefficient of a row's loss in the mean
    arrived_ptr,  # (1 + n_rows,) int32 out: zeros, where the launch that follows cuts rows into slices, else None
    partial_ptr,  # (n_programs,) workspace, None with a single program
    ticket_ptr,  # () int32, likewise
    target_ptr,  # (n_rows,) int64 or uint8
    target_b_ptr,  # the second of two labels, which take the weights out of the denominator: (n_rows,) or None
    weight_ptr,  # (n_cols,) or None
    scale_ptr,  # () or None
    scale_bits: "i64",
    ignore_index: "i64",
    n_rows,
    n_cols,
    BLOCK_ROWS: tl.constexpr,
):
    """Counts, or sums the weights of, every n_programs-th block of rows; the last program divides. Reads targets, not logits."""
    dtype = saved_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_ROWS,), dtype)
    for start in range(tl.program_id(0) * BLOCK_ROWS, n_rows, tl.num_programs(0) * BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        target, counted, valid = load_target(target_ptr, rows, rows < n_rows, ignore_index, n_cols)
        total += weights_in_mean(rows, target, counted, valid, target_b_ptr, weight_ptr, ignore_index, n_rows, n_cols, dtype)
        if arrived_ptr is not None:
            tl.store(arrived_ptr + 1 + rows, 0, mask=rows < n_rows)
    if arrived_ptr is not None:
        tl.store(arrived_ptr, 0)
    denominator, last = sum_over_programs(partial_ptr, ticket_ptr, tl.sum(total, 0), tl.program_id(0), tl.num_programs(0))
    tl.store(saved_ptr, mean_coefficient(load_scale(scale_ptr, scale_bits, dtype), denominator), mask=last)


@triton.jit(
    do_not_specialize=[
        "scale_bits", "smoothing_bits", "ignore_index", "lam_bits", "z_loss_bits", "logit_scale_bits", "softcap_bits",
    ]
)  # fmt: skip
def fused_tile_kernel(
    loss_ptr,  # ()
    saved_ptr,  # (4 + 3 n_rows,), see rowwise.py; in: [0], for the mean of class indices with several programs
    dlogits_ptr,  # (n_outer, n_inner, n_cols)
    row_stats_ptr,  # (2, n_rows), with the two that follow None without statistics
    counts_ptr,  # (3,) int64
    flags_ptr,  # (n_rows,) int8 workspace
    partial_ptr,  # (n_programs,) workspace, None with a single program
    ticket_ptr,  # () int32, likewise
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
    lam_bits,  # this and the following: None where absent
    z_loss_bits,
    logit_scale_bits,
    softcap_bits,
    n_rows,
    n_inner,
    n_cols,
    dlogits_outer_stride,
    dlogits_row_stride,
    dlogits_col_stride,
    outer_stride,
    row_stride,
    col_stride,
    probabilities_outer_stride,  # None without probabilities
    probabilities_row_stride,
    probabilities_col_stride,
    REDUCTION: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    ROWS_CONTIGUOUS: tl.constexpr,  # the row strides are 1: neighbouring rows, not classes, lie side by side
    VECTOR: tl.constexpr,  # all strides and the contiguous size are multiples of it; at most 16 bytes
    ROW_GROUP: tl.constexpr,  # packed rows that are whole 16-byte groups together; 0: rows may lie anywhere
    PADDED: tl.constexpr,  # elements of a packed row group, or of a thread's part of a packed row, to the next power of 2
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    N_BLOCKS: tl.constexpr,  # the rows stay in registers, in so many blocks of columns; 0: they are read twice
):
    """Losses and gradients of BLOCK_ROWS rows of one outer block."""
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
        _, _, dlogits_outer_stride, dlogits_row_stride, dlogits_col_stride = prove_alignment(
            n_inner, n_cols, dlogits_outer_stride, dlogits_row_stride, dlogits_col_stride, ROWS_CONTIGUOUS, VECTOR
        )
        n_inner, n_cols, outer_stride, row_stride, col_stride = prove_alignment(
            n_inner, n_cols, outer_stride, row_stride, col_stride, ROWS_CONTIGUOUS, VECTOR
        )
    outer, inner, mask, rows = tile_rows(n_inner, BLOCK_ROWS, ROW_GROUP)
    row_ptr = logits_ptr + outer * outer_stride + inner.to(tl.int64) * row_stride
    dlogits_row_ptr = dlogits_ptr + outer * dlogits_outer_stride + inner.to(tl.int64) * dlogits_row_stride
    q_row_ptr = None
    if probabilities_ptr is not None:
        q_row_ptr = probabilities_ptr + outer * probabilities_outer_stride + inner.to(tl.int64) * probabilities_row_stride
    else:
        targets = by_turn(load_tile_targets(target_ptr, rows, mask, ignore_index), N_TURNS)
    # Of rows that do not exist: the index of no row.
    turn_rows = by_turn(tl.where(mask, rows, n_rows), N_TURNS)

    if REDUCTION == "sum":
        g = scale
    elif probabilities_ptr is not None:
        g = mean_coefficient(scale, tl.zeros((), dtype) + n_rows)
    elif ticket_ptr is None:
        weight_sum = tl.zeros((TURN_ROWS,), dtype)
        for i in tl.static_range(N_TURNS):
            counted, valid = check_target(targets[i], ignore_index, n_cols)
            weight_sum += weights_in_mean(
                turn_rows[i], targets[i], counted, valid, target_b_ptr, weight_ptr, ignore_index, n_rows, n_cols, dtype
            )
        g = mean_coefficient(scale, tl.sum(weight_sum, 0))
    else:
        g = tl.load(saved_ptr)

    loss_sum = tl.zeros((TURN_ROWS,), dtype)
    gradients, losses, lses, counts, corrects = (), (), (), (), ()
    for i in tl.static_range(N_TURNS):
        label, target_weight, label_b, weight_b, lam = None, None, None, None, None
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
            label_b = target_b.to(tl.int32)
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
        row_max, rest, x_t, shift, smooth_sum, weight_total, exps = tile_statistics(
            blocks, q, row_ptr, col_stride, q_row_ptr, probabilities_col_stride, read, n_cols, label,
            weight_ptr, smoothing, logit_scale, softcap, dtype, BLOCK_COLS, N_BLOCKS, PART, HAS_SMOOTHING,
        )  # fmt: skip
        x_b, e_b = None, None
        if target_b_ptr is not None:
            x_b = target_logit(
                blocks, row_ptr, col_stride, valid, target_b, logit_scale, softcap, dtype, BLOCK_COLS, N_BLOCKS, PART
            )
        if BLOCK_COLS > 1 and ROWS_CONTIGUOUS:  # a row's threads are many
            row_max, rest, x_t = one_thread_each(row_max), one_thread_each(rest), one_thread_each(x_t)
        if probabilities_ptr is not None:
            x_t, e_t = None, tl.zeros_like(rest)
        else:
            e_t = tl.exp(x_t - row_max)
        if target_b_ptr is not None:
            e_b = tl.exp(x_b - row_max)
        loss = row_loss(
            row_max, rest, x_t, e_t, target_weight, shift, weight_total, smooth_sum, smoothing, n_cols,
            x_b, weight_b, z_loss, sample_weight,
        )  # fmt: skip
        loss = tl.where(valid, loss, tl.where(counted, float("nan"), 0.0))  # a class index out of range: NaN
        loss_sum += loss
        if row_stats_ptr is not None:
            losses = losses + (loss,)
            lse = tl.where(valid, row_max + tl.log(rest + e_t), float("nan"))
            correct = has_largest(x_t, row_max, lse, x_b, lam)
            lses = lses + (lse,)
            # Integers, since bits are not moved between threads as well.
            counts, corrects = counts + (counted.to(tl.int32),), corrects + (correct.to(tl.int32),)
        row_g = tl.where(counted, g if sample_weight_ptr is None else g * sample_weight, 0.0)
        p_factor, at_target, smooth_factor, at_b = gradient_factors(
            target_weight, valid, counted, row_g, rest, e_t, smoothing, weight_total, n_cols, row_max, e_b, weight_b, z_loss
        )
        live = valid & (row_g != 0)
        if N_BLOCKS > 0:
            dlogits = tile_gradient(
                exps, blocks, 0, n_cols, label, q, live, weight_ptr, smoothing, p_factor, at_target, smooth_factor, label_b, at_b,
                logit_scale, softcap, dlogits_ptr.dtype.element_ty, BLOCK_COLS, PART, HAS_SMOOTHING,
            )  # fmt: skip
            if ROW_GROUP > 0:
                gradients = gradients + (dlogits,)
            else:
                store_blocks(dlogits_row_ptr, dlogits_col_stride, dlogits, mask, 0, n_cols, BLOCK_COLS, True)
        else:
            finite = finite_max(row_max)
            for start in range(0, n_cols, BLOCK_COLS):
                again = load_blocks(row_ptr, col_stride, read, start, n_cols, 0.0, BLOCK_COLS, 1, False)
                again = transform_blocks(again, start, n_cols, logit_scale, softcap, dtype, BLOCK_COLS, PART)
                again_q = None
                if probabilities_ptr is not None:
                    again_q = load_blocks(q_row_ptr, probabilities_col_stride, read, start, n_cols, 0.0, BLOCK_COLS, 1, False)
                dlogits = tile_gradient(
                    exponentials(again, finite, BLOCK_COLS), again, start, n_cols, label, again_q, live, weight_ptr, smoothing,
                    p_factor, at_target, smooth_factor, label_b, at_b, logit_scale, softcap,
                    dlogits_ptr.dtype.element_ty, BLOCK_COLS, PART, HAS_SMOOTHING,
                )  # fmt: skip
                store_blocks(dlogits_row_ptr, dlogits_col_stride, dlogits, mask, start, n_cols, BLOCK_COLS, False)
    if ROW_GROUP > 0:
        store_packed(dlogits_ptr, gradients, n_rows, n_cols, ROW_GROUP, BLOCK_ROWS, BLOCK_COLS, N_BLOCKS, PADDED)

    if row_stats_ptr is not None:
        store_stats(
            row_stats_ptr, flags_ptr, rows, mask, by_row(counts) != 0, by_row(corrects) != 0, by_row(lses), by_row(losses), n_rows
        )
    total, last = sum_over_programs(partial_ptr, ticket_ptr, tl.sum(loss_sum, 0), tl.program_id(0), tl.num_programs(0))
    tl.store(loss_ptr, (g * total).to(dtype), mask=last)
    if row_stats_ptr is not None and last:
        count_rows(counts_ptr, row_stats_ptr, flags_ptr, n_rows)


@triton.jit(
    do_not_specialize=[
        "scale_bits", "smoothing_bits", "ignore_index", "lam_bits", "z_loss_bits", "logit_scale_bits", "softcap_bits",
    ]
)  # fmt: skip
def fused_row_kernel(
    loss_ptr,  # ()
    saved_ptr,  # (4 + 3 n_rows,), see rowwise.py; in: [0], for the mean of more class indices than COUNT_ROWS
    dlogits_ptr,  # (n_rows, n_cols), classes contiguous
    row_stats_ptr,  # (2, n_rows), with the two that follow None without statistics
    counts_ptr,  # (3,) int64
    flags_ptr,  # (n_rows,) int8 workspace
    partial_ptr,  # (n_rows,) workspace, None with a single row
    ticket_ptr,  # () int32, likewise
    slices_ptr,  # (4, n_rows, N_SLICES) workspace, None with a single slice
    arrived_ptr,  # (1 + n_rows,) int32, 0 before: programs started; slices published of each row; None with a single slice
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
    lam_bits,  # this and the following: None where absent
    z_loss_bits,
    logit_scale_bits,
    softcap_bits,
    n_rows,
    n_cols,
    dlogits_row_stride,
    row_stride,
    probabilities_row_stride,  # None without probabilities
    REDUCTION: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    GROUP: tl.constexpr,  # see forward_row_kernel; the row strides are equal modulo a sector
    BLOCK_COLS: tl.constexpr,
    N_BLOCKS: tl.constexpr,  # blocks of a slice: they stay in registers between loss and gradient
    N_SLICES: tl.constexpr,
    COUNT_ROWS: tl.constexpr,  # as many rows at most: every program sums the mean's denominator itself; 0: saved[0] has it
    WAITS: tl.constexpr,  # for the other slices of the row; not where programs run one after another
):
    """Loss and gradient of one row, or of one slice of it: read once, kept in registers, written once.

    The loss of a row is counted by its first slice. What a slice needs of the others is two numbers each, four with smoothing.
    """
    dtype = saved_ptr.dtype.element_ty
    SECTOR: tl.constexpr = elements_in_sector(logits_ptr)
    SLICE_COLS: tl.constexpr = N_BLOCKS * BLOCK_COLS
    HAS_SUMS: tl.constexpr = HAS_SMOOTHING or probabilities_ptr is not None
    program = tl.program_id(0)
    part = 0
    if N_SLICES > 1:
        program = tl.atomic_add(arrived_ptr, 1, sem="relaxed")  # not the program id: slices.py says why
        part = program % N_SLICES
        program = program // N_SLICES
    row = program.to(tl.int64)  # int64: row * row_stride passes 2**31
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
    z_loss = float_from_bits(z_loss_bits, dtype) if z_loss_bits is not None else None
    logit_scale = float_from_bits(logit_scale_bits, dtype) if logit_scale_bits is not None else None
    softcap = float_from_bits(softcap_bits, dtype) if softcap_bits is not None else None
    smoothing = float_from_bits(smoothing_bits, dtype) if HAS_SMOOTHING else None
    scale = load_scale(scale_ptr, scale_bits, dtype)
    if REDUCTION == "sum":
        g = scale
    elif probabilities_ptr is not None:
        g = mean_coefficient(scale, tl.zeros((), dtype) + n_rows)
    elif ticket_ptr is None:
        g = mean_coefficient(scale, target_weight if target_b_ptr is None else counted.to(dtype))
    elif COUNT_ROWS > 0:
        all_rows = tl.arange(0, COUNT_ROWS)
        targets, all_counted, all_valid = load_target(target_ptr, all_rows, all_rows < n_rows, ignore_index, n_cols)
        weights = weights_in_mean(
            all_rows, targets, all_counted, all_valid, target_b_ptr, weight_ptr, ignore_index, n_rows, n_cols, dtype
        )
        g = mean_coefficient(scale, tl.sum(weights, 0))
    else:
        g = tl.load(saved_ptr)
    sample_weight = None
    row_g = g
    if sample_weight_ptr is not None:
        sample_weight = load_sample_weight(sample_weight_ptr, row, counted, dtype)
        row_g = g * sample_weight

    row_start, head, n_main = main_columns(row, row_stride, n_cols, GROUP, SECTOR)
    dlogits_row_start, _, _ = main_columns(row, dlogits_row_stride, n_cols, GROUP, SECTOR)
    row_ptr = logits_ptr + row_start
    dlogits_row_ptr = dlogits_ptr + dlogits_row_start
    if GROUP == 1:
        edge_cols, in_edge = edge_columns(head, n_main, n_cols, SECTOR)
        in_edge = in_edge & (part == 0)
    first_col = head + part * SLICE_COLS
    n_own = tl.minimum(n_main - part * SLICE_COLS, SLICE_COLS)
    main_ptr = logits_ptr + tl.multiple_of(row_start + first_col, SECTOR)
    dlogits_main_ptr = dlogits_ptr + tl.multiple_of(dlogits_row_start + first_col, SECTOR)
    if probabilities_ptr is not None:
        q_row_start, _, _ = main_columns(row, probabilities_row_stride, n_cols, GROUP, SECTOR)
        q_main_ptr = probabilities_ptr + tl.multiple_of(q_row_start + first_col, SECTOR)
    lane = tl.arange(0, BLOCK_COLS)
    masks = (in_main(lane, first_col, n_own, GROUP, SECTOR),)
    for i in tl.static_range(1, N_BLOCKS):
        masks = masks + (i * BLOCK_COLS + lane < n_own,)

    if valid:
        edge_q, x_t, shift = None, None, None
        if probabilities_ptr is None:
            x_t = transform_logits(tl.load(row_ptr + target).to(dtype), logit_scale, softcap)
            shift = finite_max(x_t)
        x_b = None
        if target_b_ptr is not None:
            x_b = transform_logits(tl.load(row_ptr + target_b).to(dtype), logit_scale, softcap)
        row_max = tl.full((), float("-inf"), dtype)
        rest = tl.zeros((), dtype)
        smooth_sum = tl.zeros((), dtype)
        weight_total = tl.zeros((), dtype)
        if GROUP == 1:
            edge_x = load_logits(row_ptr + edge_cols, in_edge, logit_scale, softcap, dtype)
            if probabilities_ptr is not None:
                edge_q = tl.load(probabilities_ptr + q_row_start + edge_cols, mask=in_edge, other=0.0)
            row_max, rest, smooth_sum, weight_total = absorb(
                edge_x, edge_q, edge_cols, in_edge, target, 0, n_cols, shift, weight_ptr, smoothing, n_cols,
                row_max, rest, smooth_sum, weight_total, HAS_SMOOTHING,
            )  # fmt: skip
        lane_max = load_logits(main_ptr + lane, masks[0], logit_scale, softcap, dtype)
        blocks = (lane_max,)
        for i in tl.static_range(1, N_BLOCKS):
            block = load_logits(main_ptr + i * BLOCK_COLS + lane, masks[i], logit_scale, softcap, dtype)
            blocks = blocks + (block,)
            lane_max = tl.maximum(lane_max, block)
        q = ()
        if probabilities_ptr is not None:
            for i in tl.static_range(N_BLOCKS):
                q = q + (tl.load(q_main_ptr + i * BLOCK_COLS + lane, mask=masks[i], other=0.0),)
        own_max = tl.maximum(row_max, tl.max(lane_max, 0))
        finite = finite_max(own_max)
        if probabilities_ptr is not None:
            smooth_sum += weight_total * (finite - finite_max(row_max))
            shift = finite
        if HAS_SUMS:
            lane_smooth = tl.zeros((BLOCK_COLS,), dtype)
            lane_weight = tl.zeros((BLOCK_COLS,), dtype)
            for i in tl.static_range(N_BLOCKS):
                cols = first_col + i * BLOCK_COLS + lane
                lane_smooth, lane_weight = smoothing_sums(
                    blocks[i], q[i] if probabilities_ptr is not None else None, cols, masks[i],
                    shift, weight_ptr, smoothing, n_cols, lane_smooth, lane_weight,
                )  # fmt: skip
            smooth_sum += tl.sum(lane_smooth, 0)
            if probabilities_ptr is not None or weight_ptr is not None:
                weight_total += tl.sum(lane_weight, 0)
        lane_sum = tl.exp(blocks[0] - finite)
        exps = (lane_sum,)
        for i in tl.static_range(1, N_BLOCKS):
            e = tl.exp(blocks[i] - finite)
            exps = exps + (e,)
            lane_sum += e
        edge_rest = rest * tl.exp(row_max - finite)  # the target kept out already
        if probabilities_ptr is not None:
            e_t = tl.zeros((), dtype)
            rest = edge_rest + tl.sum(lane_sum, 0)
        else:
            e_t = tl.exp(x_t - own_max)
            in_blocks = (target >= first_col) & (target < first_col + n_own)
            total = tl.sum(lane_sum, 0)
            rest = edge_rest + tl.where(in_blocks, total - e_t, total)
            if (e_t > rest) & in_blocks:  # the subtraction would lose digits: keep the target out of the sum
                lane_rest = tl.zeros((BLOCK_COLS,), dtype)
                for i in tl.static_range(N_BLOCKS):
                    e = exps[i] if softcap is None else tl.exp(blocks[i] - finite)
                    lane_rest += tl.where(i * BLOCK_COLS + lane == (target - first_col).to(tl.int32), 0.0, e)
                rest = edge_rest + tl.sum(lane_rest, 0)

        row_max = own_max
        if N_SLICES > 1:
            arrived = publish_slice(
                slices_ptr, arrived_ptr + 1 + row, row, n_rows, part,
                row_max, rest, smooth_sum, weight_total, HAS_SUMS, N_SLICES,
            )  # fmt: skip
            if WAITS:
                wait_for_slices(arrived_ptr + 1 + row, arrived, N_SLICES)
            row_max, rest, smooth_sum, weight_total = merge_slices(
                slices_ptr, row, n_rows, smooth_sum, weight_total, HAS_SUMS, probabilities_ptr is not None, N_SLICES
            )
            if probabilities_ptr is None:
                e_t = tl.exp(x_t - row_max)
            finite = finite_max(row_max)

        if HAS_SMOOTHING and probabilities_ptr is None and weight_ptr is None:
            weight_total = tl.zeros((), dtype) + n_cols
        loss = row_loss(
            row_max, rest, x_t, e_t, target_weight, shift, weight_total, smooth_sum, smoothing, n_cols,
            x_b, weight_b, z_loss, sample_weight,
        )  # fmt: skip
        e_b = None
        if target_b_ptr is not None:
            e_b = tl.exp(x_b - row_max)
        p_factor, at_target, smooth_factor, at_b = gradient_factors(
            target_weight, valid, counted, row_g, rest, e_t, smoothing, weight_total, n_cols, row_max, e_b, weight_b, z_loss
        )
        if row_stats_ptr is not None:
            lse = row_max + tl.log(rest + e_t)
            correct = has_largest(x_t, row_max, lse, x_b, lam)
        if GROUP == 1:
            edge_dz = tl.exp(edge_x - finite) * p_factor
            if HAS_SUMS:
                edge_dz = minus_smoothing(edge_dz, smooth_factor, edge_q, edge_cols, in_edge, weight_ptr, smoothing, n_cols)
            tl.store(dlogits_row_ptr + edge_cols, through_transform(edge_dz, edge_x, logit_scale, softcap), mask=in_edge)
        if N_SLICES > 1 and softcap is None:
            p_factor *= tl.exp(own_max - finite)  # the slice's exponentials are relative to its own maximum
        for i in tl.static_range(N_BLOCKS):
            # Under a cap the logits were kept, of which the gradient is a function, instead of their exponentials.
            e = exps[i] if softcap is None else tl.exp(blocks[i] - finite)
            dz = e * p_factor
            if HAS_SUMS:
                cols = first_col + i * BLOCK_COLS + lane
                q_i = q[i] if probabilities_ptr is not None else None
                dz = minus_smoothing(dz, smooth_factor, q_i, cols, masks[i], weight_ptr, smoothing, n_cols)
            dlogits = through_transform(dz, blocks[i], logit_scale, softcap)
            tl.store(dlogits_main_ptr + i * BLOCK_COLS + lane, dlogits, mask=masks[i])
        # The labels' own gradients are stored last, by the slice that has stored their neighbours: comparing every column with a
        # label would cost two instructions per logit.
        if probabilities_ptr is None:
            if HAS_SMOOTHING:
                at_target = minus_smoothing(at_target, smooth_factor, None, target, valid, weight_ptr, smoothing, n_cols)
            at_target = through_transform(at_target, x_t, logit_scale, softcap)
            own_target = stored_here(target, first_col, first_col + n_own, head, n_main, part)
            tl.debug_barrier()  # another thread stored this element with the others of its group
            tl.store(dlogits_row_ptr + target, at_target, mask=own_target)
        if target_b_ptr is not None:
            if HAS_SMOOTHING:
                at_b = minus_smoothing(at_b, smooth_factor, None, target_b, valid, weight_ptr, smoothing, n_cols)
            at_b = through_transform(at_b, x_b, logit_scale, softcap)
            own_b = stored_here(target_b, first_col, first_col + n_own, head, n_main, part) & (target_b != target)
            tl.store(dlogits_row_ptr + target_b, at_b, mask=own_b)
    else:  # nothing is read
        missing = tl.where(counted & (row_g != 0), float("nan"), 0.0)  # a class index out of range, or a row that does not count
        loss = tl.where(counted, float("nan"), 0.0).to(dtype)
        lse = loss
        correct = counted & False
        for i in tl.static_range(N_BLOCKS):
            tl.store(dlogits_main_ptr + i * BLOCK_COLS + lane, tl.zeros((BLOCK_COLS,), dtype) + missing, mask=masks[i])
        if GROUP == 1:
            tl.store(dlogits_row_ptr + edge_cols, tl.zeros((2 * SECTOR,), dtype) + missing, mask=in_edge)

    if part == 0:
        if row_stats_ptr is not None:
            store_stats(row_stats_ptr, flags_ptr, row, row < n_rows, counted, correct, lse, loss, n_rows)
        loss_sum, last = sum_over_programs(partial_ptr, ticket_ptr, loss, program, n_rows)
        tl.store(loss_ptr, (g * loss_sum).to(dtype), mask=last)
        if row_stats_ptr is not None and last:
            count_rows(counts_ptr, row_stats_ptr, flags_ptr, n_rows)


@triton.jit
def scale_gradient_kernel(
    dlogits_ptr,  # (n,) in and out, any tensor without gaps
    dloss_ptr,  # ()
    n,
    BLOCK: tl.constexpr,
):
    """dlogits *= dloss; where dloss is 1, the usual case, every program reads it and returns. No host looks at it."""
    dloss = tl.load(dloss_ptr).to(tl.float32 if dlogits_ptr.dtype.element_ty != tl.float64 else tl.float64)
    if dloss != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
            index = start + tl.arange(0, BLOCK)
            dlogits = tl.load(dlogits_ptr + index, mask=index < n).to(dloss.dtype)
            tl.store(dlogits_ptr + index, dlogits * dloss, mask=index < n)
