"""Backward kernels of the recompute strategy: the gradient from the logits and each row's saved (m, rest).

With g the upstream gradient times the row's coefficient, A = g (1 - eps) w_t and s_c = g eps/C w_c, S = sum_c s_c (rowwise.py):

    dlogits_c = (A + S) p_c - s_c           for c != t
    dlogits_t = S p_t - s_t - A rest / d    since p_t - 1 = -rest / d without cancellation

A z_loss adds 2 g z_loss lse to S where it multiplies p_c. Of two labels the first is t; the second, with its own A_b, adds that
to S in the same way, and has dlogits_b = (A + A_b + S) p_b - s_b - A_b. Class probabilities have no t: s_c = g a_c, whose sum S
the forward has saved for every row. A transform of the logits multiplies all by its derivative.

Traffic: each logit of a row with g != 0, and each of its class probabilities, is read once and every gradient written once; other
rows are written as zeros, without reading them, so that their logits may hold NaN. Packed rows and pixels (tile.py) are read with
their neighbours.

    backward_tile_kernel  BLOCK_ROWS rows per program (tile.py), any strides
    backward_row_kernel   one block of one row per program, classes contiguous: 16-byte accesses at any row start
"""

import triton
import triton.language as tl
from fusedloss.kernels.forward import edge_columns, in_main, main_columns
from fusedloss.kernels.rowwise import (
    STATE,
    check_target,
    class_factors,
    elements_in_sector,
    float_from_bits,
    gradient_factors,
    load_sample_weight,
    load_second_label,
    load_target,
    load_target_weight,
    prove_alignment,
    row_coefficient,
    through_transform,
    transform_logits,
)
from fusedloss.kernels.tile import (
    by_turn,
    exponentials,
    load_blocks,
    load_packed,
    load_tile_targets,
    rows_on_chip,
    store_blocks,
    store_packed,
    target_logit,
    tile_gradient,
    tile_rows,
    transform_blocks,
)


@triton.jit(do_not_specialize=["smoothing_bits", "ignore_index", "lam_bits", "z_loss_bits", "logit_scale_bits", "softcap_bits"])
def backward_tile_kernel(
    dlogits_ptr,  # (n_outer, n_inner, n_cols)
    dloss_ptr,  # (n_rows,) for "none", else ()
    saved_ptr,  # (4 + 3 n_rows,), or (4 + 4 n_rows,), see rowwise.py
    logits_ptr,  # (n_outer, n_inner, n_cols)
    target_ptr,  # (n_rows,) int64 or uint8; None: class probabilities
    probabilities_ptr,  # (n_outer, n_inner, n_cols) class probabilities as target, or None
    target_b_ptr,  # the second of two labels: (n_rows,) or None
    lam_ptr,  # share of the first: (n_rows,) or None
    weight_ptr,  # (n_cols,) or None
    sample_weight_ptr,  # (n_rows,) or None
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
    N_BLOCKS: tl.constexpr,  # blocks of columns on chip at a time, which are the whole row; 0: a block at a time
):
    """Gradient of BLOCK_ROWS rows of one outer block."""
    dtype = saved_ptr.dtype.element_ty
    smoothing = float_from_bits(smoothing_bits, dtype) if HAS_SMOOTHING else None
    weight_total = tl.load(saved_ptr + 3) if HAS_SMOOTHING and probabilities_ptr is None else None
    z_loss = float_from_bits(z_loss_bits, dtype) if z_loss_bits is not None else None
    logit_scale = float_from_bits(logit_scale_bits, dtype) if logit_scale_bits is not None else None
    softcap = float_from_bits(softcap_bits, dtype) if softcap_bits is not None else None
    N_TURNS: tl.constexpr = ROW_GROUP if ROW_GROUP > 0 else 1
    PART: tl.constexpr = N_BLOCKS if ROW_GROUP > 0 else 0
    if ROW_GROUP > 0:
        n_cols = N_BLOCKS if BLOCK_COLS == 1 else (n_cols // VECTOR) * VECTOR
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
        factor_totals = by_turn(tl.load(saved_ptr + STATE + 3 * n_rows + rows, mask=mask, other=0.0), N_TURNS)
    else:
        targets = by_turn(load_tile_targets(target_ptr, rows, mask, ignore_index), N_TURNS)
    # Of rows that do not exist: the index of no row.
    turn_rows = by_turn(tl.where(mask, rows, n_rows), N_TURNS)
    coefficient = row_coefficient(saved_ptr, dloss_ptr, rows, mask, n_rows, REDUCTION)
    coefficients = by_turn(coefficient, N_TURNS)
    maxima = by_turn(tl.load(saved_ptr + STATE + rows, mask=mask, other=0.0), N_TURNS)
    rests = by_turn(tl.load(saved_ptr + STATE + n_rows + rows, mask=mask, other=1.0), N_TURNS)

    if ROW_GROUP > 0:
        # Packed rows are read with their neighbours, unless none of them has a gradient, the usual case for max and topk.
        n_read = tl.where(tl.max((coefficient != 0).to(tl.int32), 0) > 0, n_rows, 0)
        held = load_packed(logits_ptr, n_read, n_cols, float("-inf"), ROW_GROUP, BLOCK_ROWS, BLOCK_COLS, N_BLOCKS, PADDED)
        if probabilities_ptr is not None:
            held_q = load_packed(probabilities_ptr, n_read, n_cols, 0.0, ROW_GROUP, BLOCK_ROWS, BLOCK_COLS, N_BLOCKS, PADDED)

    gradients = ()
    for i in tl.static_range(N_TURNS):
        label, target_weight, label_b, weight_b = None, None, None, None
        if probabilities_ptr is not None:
            counted = turn_rows[i] < n_rows
            valid = counted
            weight_total = factor_totals[i]
        else:
            counted, valid = check_target(targets[i], ignore_index, n_cols)
            target_weight = load_target_weight(weight_ptr, targets[i], counted, valid, dtype)
            label = targets[i].to(tl.int32)
        if target_b_ptr is not None:
            target_b, counted, valid, target_weight, weight_b, _ = load_second_label(
                target_b_ptr, lam_ptr, lam_bits, weight_ptr, turn_rows[i], turn_rows[i] < n_rows, targets[i], counted, valid,
                target_weight, ignore_index, n_cols,
            )  # fmt: skip
            label_b = target_b.to(tl.int32)
        g = coefficients[i]
        if sample_weight_ptr is not None:
            g *= load_sample_weight(sample_weight_ptr, turn_rows[i], counted, dtype)
        live = valid & (g != 0)
        # Rows without gradient are not read, unless they share their 16 bytes with rows that have one.
        read = mask if ROWS_CONTIGUOUS else live
        blocks, q, e_t = None, None, tl.zeros_like(g)
        if N_BLOCKS > 0:
            packed = held[i] if ROW_GROUP > 0 else None
            blocks = rows_on_chip(packed, row_ptr, col_stride, read, n_cols, 0.0, BLOCK_COLS, N_BLOCKS)
            blocks = transform_blocks(blocks, 0, n_cols, logit_scale, softcap, dtype, BLOCK_COLS, PART)
            if probabilities_ptr is not None:
                packed = held_q[i] if ROW_GROUP > 0 else None
                q = rows_on_chip(packed, q_row_ptr, probabilities_col_stride, read, n_cols, 0.0, BLOCK_COLS, N_BLOCKS)
        if probabilities_ptr is None:
            x_t = target_logit(
                blocks, row_ptr, col_stride, live, targets[i], logit_scale, softcap, dtype, BLOCK_COLS, N_BLOCKS, PART
            )
            e_t = tl.exp(x_t - maxima[i])
        e_b = None
        if target_b_ptr is not None:
            x_b = target_logit(
                blocks, row_ptr, col_stride, live, target_b, logit_scale, softcap, dtype, BLOCK_COLS, N_BLOCKS, PART
            )
            e_b = tl.exp(x_b - maxima[i])
        p_factor, at_target, smooth_factor, at_b = gradient_factors(
            target_weight, valid, counted, g, rests[i], e_t, smoothing, weight_total, n_cols,
            maxima[i], e_b, weight_b, z_loss,
        )  # fmt: skip
        if N_BLOCKS > 0:
            dlogits = tile_gradient(
                exponentials(blocks, maxima[i], BLOCK_COLS), blocks, 0, n_cols, label, q, live, weight_ptr, smoothing,
                p_factor, at_target, smooth_factor, label_b, at_b, logit_scale, softcap,
                dlogits_ptr.dtype.element_ty, BLOCK_COLS, PART, HAS_SMOOTHING,
            )  # fmt: skip
            if ROW_GROUP > 0:
                gradients = gradients + (dlogits,)
            else:
                store_blocks(dlogits_row_ptr, dlogits_col_stride, dlogits, mask, 0, n_cols, BLOCK_COLS, True)
        else:
            for start in range(0, n_cols, BLOCK_COLS):
                block = load_blocks(row_ptr, col_stride, read, start, n_cols, 0.0, BLOCK_COLS, 1, False)
                block = transform_blocks(block, start, n_cols, logit_scale, softcap, dtype, BLOCK_COLS, PART)
                block_q = None
                if probabilities_ptr is not None:
                    block_q = load_blocks(q_row_ptr, probabilities_col_stride, read, start, n_cols, 0.0, BLOCK_COLS, 1, False)
                dlogits = tile_gradient(
                    exponentials(block, maxima[i], BLOCK_COLS), block, start, n_cols, label, block_q, live, weight_ptr, smoothing,
                    p_factor, at_target, smooth_factor, label_b, at_b, logit_scale, softcap,
                    dlogits_ptr.dtype.element_ty, BLOCK_COLS, PART, HAS_SMOOTHING,
                )  # fmt: skip
                store_blocks(dlogits_row_ptr, dlogits_col_stride, dlogits, mask, start, n_cols, BLOCK_COLS, False)
    if ROW_GROUP > 0:
        store_packed(dlogits_ptr, gradients, n_rows, n_cols, ROW_GROUP, BLOCK_ROWS, BLOCK_COLS, N_BLOCKS, PADDED)


@triton.jit
def stored_here(col, first_col, after, head, n_main, part):
    """Whether the part of a row with the columns [first_col, after) stores this one; the first part has the edges, too."""
    return ((col >= first_col) & (col < after)) | ((part == 0) & ((col < head) | (col >= head + n_main)))


@triton.jit
def minus_smoothing(dlogits, smooth_factor, q, cols, mask, weight_ptr, smoothing, n_cols):
    """dlogits_c - s_c."""
    if q is not None:
        return dlogits - smooth_factor * class_factors(q, cols, mask, weight_ptr, smoothing, n_cols, dlogits.dtype)
    elif weight_ptr is not None:
        return dlogits - smooth_factor * tl.load(weight_ptr + cols, mask=mask, other=0.0).to(dlogits.dtype)
    return dlogits - smooth_factor


@triton.jit(
    do_not_specialize=[
        "smoothing_bits", "ignore_index", "lam_bits", "z_loss_bits", "logit_scale_bits", "softcap_bits",
    ]
)  # fmt: skip
def backward_row_kernel(
    dlogits_ptr,  # (n_rows, n_cols), classes contiguous
    dloss_ptr,  # (n_rows,) for "none", else ()
    saved_ptr,  # (4 + 3 n_rows,), or (4 + 4 n_rows,), see rowwise.py
    logits_ptr,  # (n_rows, n_cols), classes contiguous
    target_ptr,  # (n_rows,) int64 or uint8; None: class probabilities
    probabilities_ptr,  # (n_rows, n_cols) class probabilities as target, classes contiguous, or None
    target_b_ptr,  # the second of two labels: (n_rows,) or None
    lam_ptr,  # share of the first: (n_rows,) or None
    weight_ptr,  # (n_cols,) or None
    sample_weight_ptr,  # (n_rows,) or None
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
):
    """Gradient of BLOCK_COLS columns of one row, in whole groups; the first block of a row also writes its two ragged edges."""
    dtype = saved_ptr.dtype.element_ty
    SECTOR: tl.constexpr = elements_in_sector(logits_ptr)
    blocks_per_row = tl.num_programs(0) // n_rows
    row = (tl.program_id(0) // blocks_per_row).to(tl.int64)  # int64: row * row_stride passes 2**31
    block = tl.program_id(0) % blocks_per_row
    HAS_SUMS: tl.constexpr = HAS_SMOOTHING or probabilities_ptr is not None
    target_weight, weight_b = None, None
    if probabilities_ptr is not None:
        counted = row < n_rows
        valid = counted
    else:
        target, counted, valid = load_target(target_ptr, row, row < n_rows, ignore_index, n_cols)
        target_weight = load_target_weight(weight_ptr, target, counted, valid, dtype)
    if target_b_ptr is not None:
        target_b, counted, valid, target_weight, weight_b, _ = load_second_label(
            target_b_ptr, lam_ptr, lam_bits, weight_ptr, row, row < n_rows, target, counted, valid, target_weight,
            ignore_index, n_cols,
        )  # fmt: skip
    z_loss = float_from_bits(z_loss_bits, dtype) if z_loss_bits is not None else None
    logit_scale = float_from_bits(logit_scale_bits, dtype) if logit_scale_bits is not None else None
    softcap = float_from_bits(softcap_bits, dtype) if softcap_bits is not None else None
    g = row_coefficient(saved_ptr, dloss_ptr, row, row < n_rows, n_rows, REDUCTION)
    if sample_weight_ptr is not None:
        g *= load_sample_weight(sample_weight_ptr, row, counted, dtype)
    read = valid & (g != 0)  # the other rows are not read

    row_start, head, n_main = main_columns(row, row_stride, n_cols, GROUP, SECTOR)
    dlogits_row_start, _, _ = main_columns(row, dlogits_row_stride, n_cols, GROUP, SECTOR)
    main_ptr = logits_ptr + tl.multiple_of(row_start + head, SECTOR)
    dlogits_main_ptr = dlogits_ptr + tl.multiple_of(dlogits_row_start + head, SECTOR)

    row_max = tl.load(saved_ptr + STATE + row, mask=read, other=0.0)
    rest = tl.load(saved_ptr + STATE + n_rows + row, mask=read, other=1.0)
    if probabilities_ptr is not None:
        e_t = tl.zeros((), dtype)
    else:
        x_t = transform_logits(tl.load(logits_ptr + row_start + target, mask=read, other=0.0).to(dtype), logit_scale, softcap)
        e_t = tl.exp(x_t - row_max)
    e_b = None
    if target_b_ptr is not None:
        x_b = transform_logits(tl.load(logits_ptr + row_start + target_b, mask=read, other=0.0).to(dtype), logit_scale, softcap)
        e_b = tl.exp(x_b - row_max)
    smoothing = float_from_bits(smoothing_bits, dtype) if HAS_SMOOTHING else None
    weight_total = None
    if probabilities_ptr is not None:
        weight_total = tl.load(saved_ptr + STATE + 3 * n_rows + row, mask=read, other=0.0)
    elif HAS_SMOOTHING:
        weight_total = tl.load(saved_ptr + 3)
    p_factor, at_target, smooth_factor, at_b = gradient_factors(
        target_weight, valid, counted, g, rest, e_t, smoothing, weight_total, n_cols,
        row_max, e_b, weight_b, z_loss,
    )  # fmt: skip

    q = None
    if probabilities_ptr is not None:
        q_row_start, _, _ = main_columns(row, probabilities_row_stride, n_cols, GROUP, SECTOR)
        q_main_ptr = probabilities_ptr + tl.multiple_of(q_row_start + head, SECTOR)
    group = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    in_row = in_main(group, head, n_main, GROUP, SECTOR)
    x = transform_logits(tl.load(main_ptr + group, mask=in_row & read, other=0.0).to(dtype), logit_scale, softcap)
    dz = tl.exp(x - row_max) * p_factor
    if probabilities_ptr is not None:
        q = tl.load(q_main_ptr + group, mask=in_row & read, other=0.0)
    if HAS_SUMS:
        dz = minus_smoothing(dz, smooth_factor, q, head + group, in_row, weight_ptr, smoothing, n_cols)
    tl.store(dlogits_main_ptr + group, through_transform(dz, x, logit_scale, softcap), mask=in_row)
    if GROUP == 1 and block == 0:
        edge_cols, in_edge = edge_columns(head, n_main, n_cols, SECTOR)
        edge_x = tl.load(logits_ptr + row_start + edge_cols, mask=in_edge & read, other=0.0).to(dtype)
        edge_x = transform_logits(edge_x, logit_scale, softcap)
        edge_dz = tl.exp(edge_x - row_max) * p_factor
        edge_q = None
        if probabilities_ptr is not None:
            edge_q = tl.load(probabilities_ptr + q_row_start + edge_cols, mask=in_edge & read, other=0.0)
        if HAS_SUMS:
            edge_dz = minus_smoothing(edge_dz, smooth_factor, edge_q, edge_cols, in_edge, weight_ptr, smoothing, n_cols)
        edge_dlogits = through_transform(edge_dz, edge_x, logit_scale, softcap)
        tl.store(dlogits_ptr + dlogits_row_start + edge_cols, edge_dlogits, mask=in_edge)

    # The labels' own gradients are stored last, by the program that has stored their neighbours: comparing every column with a
    # label would cost two instructions per logit.
    first_col = head + block * BLOCK_COLS
    after = head + tl.minimum((block + 1) * BLOCK_COLS, n_main)
    if probabilities_ptr is None:
        if HAS_SMOOTHING:
            at_target = minus_smoothing(at_target, smooth_factor, None, target, read, weight_ptr, smoothing, n_cols)
        at_target = through_transform(at_target, x_t, logit_scale, softcap)
        own_target = stored_here(target, first_col, after, head, n_main, block)
        tl.debug_barrier()  # another thread stored this element with the others of its group
        tl.store(dlogits_ptr + dlogits_row_start + target, at_target, mask=read & own_target)
    if target_b_ptr is not None:
        if HAS_SMOOTHING:
            at_b = minus_smoothing(at_b, smooth_factor, None, target_b, read, weight_ptr, smoothing, n_cols)
        at_b = through_transform(at_b, x_b, logit_scale, softcap)
        own_b = stored_here(target_b, first_col, after, head, n_main, block) & (target_b != target)
        tl.store(dlogits_ptr + dlogits_row_start + target_b, at_b, mask=read & own_b)
