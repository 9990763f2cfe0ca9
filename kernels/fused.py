"""The fused strategy: loss, batch reduction and gradient while the row is on chip. Derivations in rowwise.py and backward.py.

Traffic: each logit of a counted row is read once and every gradient written once, for rows that fit a block; longer rows are
read twice, the second time from L2. The gradient is that for an upstream gradient of 1; scale_gradient_kernel makes it right
for another.

The mean's denominator must be known before the first gradient is written. A single program has all rows in its tile; otherwise
denominator_kernel, a launch of its own over the targets alone, leaves the coefficient in saved[0].

    denominator_kernel     scale / sum of the counted rows' weights
    fused_tile_kernel      BLOCK_ROWS rows per program, any strides
    fused_row_kernel       one row per program, classes contiguous: 16-byte accesses at any row start
    scale_gradient_kernel  dlogits *= dloss, where dloss is not 1
"""

import triton
import triton.language as tl
from fusedloss.kernels.backward import minus_smoothing, store_tile
from fusedloss.kernels.forward import absorb, absorb_tile, aligned_columns, edge_columns
from fusedloss.kernels.reduction import reduce_batch
from fusedloss.kernels.rowwise import (
    STATE,
    finite_max,
    float_from_bits,
    gradient_factors,
    load_scale,
    load_target,
    load_target_weight,
    prove_alignment,
    row_loss,
)


@triton.jit(do_not_specialize=["scale_bits", "ignore_index"])
def denominator_kernel(
    loss_ptr,  # () overwritten by the launch that follows
    saved_ptr,  # (4 + 3 n_rows,) out: [0]
    partial_ptr,  # (2, n_programs) workspace, None with a single program
    ticket_ptr,  # () int32, likewise
    target_ptr,  # (n_rows,) int64 or uint8
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
        total += load_target_weight(weight_ptr, target, counted, valid, dtype)
    denominator = tl.sum(total, 0)
    scale = load_scale(scale_ptr, scale_bits, dtype)
    reduce_batch(
        loss_ptr, saved_ptr, partial_ptr, ticket_ptr, denominator * 0.0, denominator, scale, 0, n_rows,
        "mean", False, ticket_ptr is None, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["scale_bits", "smoothing_bits", "ignore_index"])
def fused_tile_kernel(
    loss_ptr,  # ()
    saved_ptr,  # (4 + 3 n_rows,), see rowwise.py; in: [0], for the mean with several programs
    dlogits_ptr,  # (n_outer, n_inner, n_cols)
    partial_ptr,  # (2, n_programs) workspace, None with a single program
    ticket_ptr,  # () int32, likewise
    logits_ptr,  # (n_outer, n_inner, n_cols)
    target_ptr,  # (n_rows,) int64 or uint8
    weight_ptr,  # (n_cols,) or None
    scale_ptr,  # () or None
    scale_bits: "i64",
    smoothing_bits: "i64",  # read with HAS_SMOOTHING
    ignore_index: "i64",
    n_rows,
    n_inner,
    n_cols,
    dlogits_outer_stride,
    dlogits_row_stride,
    dlogits_col_stride,
    outer_stride,
    row_stride,
    col_stride,
    REDUCTION: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    ROWS_CONTIGUOUS: tl.constexpr,  # both row strides are 1: neighbouring rows, not classes, lie side by side
    VECTOR: tl.constexpr,  # all strides and the contiguous size are multiples of it; at most 16 bytes
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    N_BLOCKS: tl.constexpr,  # 1: BLOCK_COLS >= n_cols, the rows stay in registers; 0: they are read twice
):
    """Losses and gradients of BLOCK_ROWS rows of one outer block."""
    dtype = saved_ptr.dtype.element_ty
    _, _, dlogits_outer_stride, dlogits_row_stride, dlogits_col_stride = prove_alignment(
        n_inner, n_cols, dlogits_outer_stride, dlogits_row_stride, dlogits_col_stride, ROWS_CONTIGUOUS, VECTOR
    )
    n_inner, n_cols, outer_stride, row_stride, col_stride = prove_alignment(
        n_inner, n_cols, outer_stride, row_stride, col_stride, ROWS_CONTIGUOUS, VECTOR
    )
    tiles_per_outer = tl.maximum(tl.cdiv(n_inner, BLOCK_ROWS), 1)
    outer = (tl.program_id(0) // tiles_per_outer).to(tl.int64)  # int64: offsets pass 2**31
    inner = (tl.program_id(0) % tiles_per_outer) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = inner < n_inner  # the last tile of an outer block is rarely full
    rows = outer * n_inner + inner
    target, counted, valid = load_target(target_ptr, rows, mask, ignore_index, n_cols)
    target_weight = load_target_weight(weight_ptr, target, counted, valid, dtype)

    row_ptr = logits_ptr + outer * outer_stride + inner.to(tl.int64) * row_stride
    dlogits_row_ptr = dlogits_ptr + outer * dlogits_outer_stride + inner.to(tl.int64) * dlogits_row_stride
    x_t = tl.load(row_ptr + target * col_stride, mask=valid, other=0.0).to(dtype)
    # Rows that do not count are not read, unless they share their 16 bytes with rows that do.
    read = mask if ROWS_CONTIGUOUS else valid
    row_max = tl.full((BLOCK_ROWS,), float("-inf"), dtype)
    rest = tl.zeros((BLOCK_ROWS,), dtype)
    shift = tl.zeros((BLOCK_ROWS,), dtype)
    smooth_sum = tl.zeros((BLOCK_ROWS,), dtype)
    weight_total = tl.zeros((1,), dtype)
    if N_BLOCKS == 1:
        cols = tl.arange(0, BLOCK_COLS)
        row_max, rest, shift, smooth_sum, weight_total, e = absorb_tile(
            row_ptr, col_stride, read, cols, n_cols, target, weight_ptr,
            row_max, rest, shift, smooth_sum, weight_total, HAS_SMOOTHING,
        )  # fmt: skip
    else:
        for start in range(0, n_cols, BLOCK_COLS):
            block_cols = start + tl.arange(0, BLOCK_COLS)
            row_max, rest, shift, smooth_sum, weight_total, _block_e = absorb_tile(
                row_ptr, col_stride, read, block_cols, n_cols, target, weight_ptr,
                row_max, rest, shift, smooth_sum, weight_total, HAS_SMOOTHING,
            )  # fmt: skip

    tl.store(saved_ptr + STATE + rows, row_max, mask=mask)  # for a second backward
    tl.store(saved_ptr + STATE + n_rows + rows, rest, mask=mask)
    if not ROWS_CONTIGUOUS:
        # Each thread holds a few columns of several rows, and each row's statistics are in as many threads as share it. Read
        # back, a row is in one thread, so that all that follows is computed once: a third of the kernel's instructions.
        tl.debug_barrier()  # other threads stored them
        row_max = tl.load(saved_ptr + STATE + rows, mask=mask, other=0.0)
        rest = tl.load(saved_ptr + STATE + n_rows + rows, mask=mask, other=0.0)
    smoothing = None
    if HAS_SMOOTHING:
        smoothing = float_from_bits(smoothing_bits, dtype)
        tl.store(saved_ptr + 3 + tl.arange(0, 1), weight_total, mask=(tl.program_id(0) + tl.arange(0, 1)) == 0)
    e_t = tl.exp(x_t - row_max)
    loss = row_loss(row_max, rest, x_t, e_t, target_weight, shift, weight_total, smooth_sum, smoothing, n_cols)
    loss = tl.where(valid, loss, tl.where(counted, float("nan"), 0.0))  # a class index out of range: NaN, nothing was read

    scale = load_scale(scale_ptr, scale_bits, dtype)
    if REDUCTION == "sum":
        g = scale
    elif ticket_ptr is None:
        g = scale / tl.sum(target_weight, 0)
    else:
        g = tl.load(saved_ptr)
    g = tl.where(mask, g, 0.0)
    p_factor, at_target, smooth_factor = gradient_factors(
        saved_ptr, weight_ptr, target, valid, counted, g, rest, e_t, smoothing, weight_total, n_cols
    )
    live = valid & (g != 0)
    if N_BLOCKS == 1:
        store_tile(
            dlogits_row_ptr, dlogits_col_stride, mask, live, cols, n_cols, target, weight_ptr,
            e, p_factor, at_target, smooth_factor, HAS_SMOOTHING,
        )  # fmt: skip
    else:
        finite = finite_max(row_max)
        for start in range(0, n_cols, BLOCK_COLS):
            again = start + tl.arange(0, BLOCK_COLS)
            offsets = again.to(tl.int64) * col_stride
            x = tl.load(row_ptr[:, None] + offsets[None, :], mask=read[:, None] & (again < n_cols)[None, :], other=0.0).to(dtype)
            store_tile(
                dlogits_row_ptr, dlogits_col_stride, mask, live, again, n_cols, target, weight_ptr,
                tl.exp(x - finite[:, None]), p_factor, at_target, smooth_factor, HAS_SMOOTHING,
            )  # fmt: skip

    reduce_batch(
        loss_ptr, saved_ptr, partial_ptr, ticket_ptr, tl.sum(loss, 0), tl.sum(target_weight, 0), scale, 0, n_rows,
        REDUCTION, False, ticket_ptr is None, ticket_ptr is None or REDUCTION == "sum",
    )  # fmt: skip


@triton.jit(do_not_specialize=["scale_bits", "smoothing_bits", "ignore_index"])
def fused_row_kernel(
    loss_ptr,  # ()
    saved_ptr,  # (4 + 3 n_rows,), see rowwise.py; in: [0], for the mean of several rows
    dlogits_ptr,  # (n_rows, n_cols), classes contiguous
    partial_ptr,  # (2, n_rows) workspace, None with a single row
    ticket_ptr,  # () int32, likewise
    logits_ptr,  # (n_rows, n_cols), classes contiguous
    target_ptr,  # (n_rows,) int64 or uint8
    weight_ptr,  # (n_cols,) or None
    scale_ptr,  # () or None
    scale_bits: "i64",
    smoothing_bits: "i64",  # read with HAS_SMOOTHING
    ignore_index: "i64",
    n_rows,
    n_cols,
    dlogits_row_stride,
    row_stride,
    REDUCTION: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_EDGES: tl.constexpr,  # some row starts or ends inside a 16-byte group
    VECTOR: tl.constexpr,  # elements in 16 bytes; in a sector of 32 with HAS_EDGES; the row strides are equal modulo VECTOR
    BLOCK_COLS: tl.constexpr,
    N_BLOCKS: tl.constexpr,  # blocks of columns that stay in registers between loss and gradient
    LOOP_COLS: tl.constexpr,  # columns at a time of the rest of the row, which is read twice; 0: there is no rest
):
    """Loss and gradient of one row."""
    RESIDENT: tl.constexpr = N_BLOCKS * BLOCK_COLS
    dtype = saved_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)  # int64: row * row_stride passes 2**31
    target, counted, valid = load_target(target_ptr, row, row < n_rows, ignore_index, n_cols)
    target_weight = load_target_weight(weight_ptr, target, counted, valid, dtype)

    if HAS_EDGES:
        row_start = row * row_stride
        dlogits_row_start = row * dlogits_row_stride
        head, n_main = aligned_columns(row_start, n_cols, VECTOR)
    else:
        row_start = row * ((row_stride // VECTOR) * VECTOR)
        dlogits_row_start = row * ((dlogits_row_stride // VECTOR) * VECTOR)
        head, n_main = 0, (n_cols // VECTOR) * VECTOR
    row_ptr = logits_ptr + row_start
    main_ptr = logits_ptr + tl.multiple_of(row_start + head, VECTOR)
    dlogits_row_ptr = dlogits_ptr + dlogits_row_start
    dlogits_main_ptr = dlogits_ptr + tl.multiple_of(dlogits_row_start + head, VECTOR)

    x_t = tl.load(row_ptr + target, mask=valid, other=0.0).to(dtype)
    row_max = tl.full((), float("-inf"), dtype)
    rest = tl.zeros((), dtype)
    shift = tl.zeros((), dtype)
    smooth_sum = tl.zeros((), dtype)
    weight_total = tl.zeros((), dtype)
    if HAS_EDGES:
        edge_cols, in_edge = edge_columns(head, n_main, n_cols, VECTOR)
        edge_x = tl.load(row_ptr + edge_cols, mask=in_edge & valid, other=float("-inf")).to(dtype)
        row_max, rest, shift, smooth_sum, weight_total = absorb(
            edge_x, edge_cols, in_edge, target, 0, n_cols, weight_ptr,
            row_max, rest, shift, smooth_sum, weight_total, HAS_SMOOTHING,
        )  # fmt: skip
    if LOOP_COLS > 0:
        for start in range(RESIDENT, tl.where(valid, n_main, 0), LOOP_COLS):
            group = start + tl.arange(0, LOOP_COLS)
            x = tl.load(main_ptr + group, mask=group < n_main, other=float("-inf"), eviction_policy="evict_last").to(dtype)
            first = head + start
            row_max, rest, shift, smooth_sum, weight_total = absorb(
                x, head + group, group < n_main, target, first, first + LOOP_COLS, weight_ptr,
                row_max, rest, shift, smooth_sum, weight_total, HAS_SMOOTHING,
            )  # fmt: skip
    if N_BLOCKS > 0:
        lane = tl.arange(0, BLOCK_COLS)
        lane_max = tl.load(main_ptr + lane, mask=(lane < n_main) & valid, other=float("-inf")).to(dtype)
        blocks = (lane_max,)
        for i in tl.static_range(1, N_BLOCKS):
            group = i * BLOCK_COLS + lane
            block = tl.load(main_ptr + group, mask=(group < n_main) & valid, other=float("-inf")).to(dtype)
            blocks = blocks + (block,)
            lane_max = tl.maximum(lane_max, block)
        new_max = tl.maximum(row_max, tl.max(lane_max, 0))
        finite = finite_max(new_max)
        if HAS_SMOOTHING:
            shift = tl.where(row_max == float("-inf"), finite, shift)
            lane_smooth = tl.zeros((BLOCK_COLS,), dtype)
            lane_weight = tl.zeros((BLOCK_COLS,), dtype)
            for i in tl.static_range(N_BLOCKS):
                group = i * BLOCK_COLS + lane
                w = (group < n_main).to(dtype)
                if weight_ptr is not None:
                    w = tl.load(weight_ptr + head + group, mask=group < n_main, other=0.0).to(dtype)
                lane_smooth += tl.where(group < n_main, w * (shift - blocks[i]), 0.0)
                lane_weight += w
            smooth_sum += tl.sum(lane_smooth, 0)
            weight_total += tl.sum(lane_weight, 0)
        lane_sum = tl.exp(blocks[0] - finite)
        exps = (lane_sum,)
        for i in tl.static_range(1, N_BLOCKS):
            e = tl.exp(blocks[i] - finite)
            exps = exps + (e,)
            lane_sum += e
        other_rest = rest * tl.exp(row_max - finite)  # of the edges and the loop, the target kept out already
        row_max = new_max
        e_t = tl.exp(x_t - row_max)
        elsewhere = (target < head) | (target >= head + tl.minimum(n_main, RESIDENT))
        total = tl.sum(lane_sum, 0)
        rest = other_rest + tl.where(elsewhere, total, total - e_t)
        if (e_t > rest) & (not elsewhere):  # the subtraction would lose digits: keep the target out of the sum
            lane_rest = tl.zeros((BLOCK_COLS,), dtype)
            for i in tl.static_range(N_BLOCKS):
                lane_rest += tl.where(i * BLOCK_COLS + lane == (target - head).to(tl.int32), 0.0, exps[i])
            rest = other_rest + tl.sum(lane_rest, 0)
    else:
        finite = finite_max(row_max)
        e_t = tl.exp(x_t - row_max)

    smoothing = None
    if HAS_SMOOTHING:
        smoothing = float_from_bits(smoothing_bits, dtype)
        tl.store(saved_ptr + 3, weight_total, mask=valid)  # every row that is read stores the same value
    loss = row_loss(row_max, rest, x_t, e_t, target_weight, shift, weight_total, smooth_sum, smoothing, n_cols)
    loss = tl.where(valid, loss, tl.where(counted, float("nan"), 0.0))  # a class index out of range: NaN, nothing was read
    tl.store(saved_ptr + STATE + row, row_max, mask=row < n_rows)  # for a second backward
    tl.store(saved_ptr + STATE + n_rows + row, rest, mask=row < n_rows)

    scale = load_scale(scale_ptr, scale_bits, dtype)
    if REDUCTION == "sum":
        g = scale
    elif ticket_ptr is None:
        g = scale / target_weight
    else:
        g = tl.load(saved_ptr)
    p_factor, at_target, smooth_factor = gradient_factors(
        saved_ptr, weight_ptr, target, valid, counted, g, rest, e_t, smoothing, weight_total, n_cols
    )
    if HAS_EDGES:
        edge_dlogits = tl.exp(edge_x - finite) * p_factor
        if HAS_SMOOTHING:
            edge_dlogits = minus_smoothing(edge_dlogits, smooth_factor, weight_ptr, edge_cols, in_edge)
        tl.store(dlogits_row_ptr + edge_cols, edge_dlogits, mask=in_edge)
    if N_BLOCKS > 0:
        for i in tl.static_range(N_BLOCKS):
            group = i * BLOCK_COLS + lane
            dlogits = exps[i] * p_factor
            if HAS_SMOOTHING:
                dlogits = minus_smoothing(dlogits, smooth_factor, weight_ptr, head + group, group < n_main)
            tl.store(dlogits_main_ptr + group, dlogits, mask=group < n_main)
    if LOOP_COLS > 0:
        for start in range(RESIDENT, n_main, LOOP_COLS):
            again = start + tl.arange(0, LOOP_COLS)
            in_row = again < n_main
            x_again = tl.load(main_ptr + again, mask=in_row & valid, other=float("-inf"), eviction_policy="evict_first").to(dtype)
            dlogits_again = tl.exp(x_again - finite) * p_factor
            if HAS_SMOOTHING:
                dlogits_again = minus_smoothing(dlogits_again, smooth_factor, weight_ptr, head + again, in_row)
            tl.store(dlogits_main_ptr + again, dlogits_again, mask=in_row, eviction_policy="evict_first")
    # The target's own gradient is stored last: comparing every column with the target would cost two instructions per logit.
    if HAS_SMOOTHING:
        at_target = minus_smoothing(at_target, smooth_factor, weight_ptr, target, valid)
    tl.debug_barrier()  # another thread stored this element with the others of its group
    tl.store(dlogits_row_ptr + target, at_target, mask=valid)

    reduce_batch(
        loss_ptr, saved_ptr, partial_ptr, ticket_ptr, loss, target_weight, scale, 0, n_rows,
        REDUCTION, False, ticket_ptr is None, ticket_ptr is None or REDUCTION == "sum",
    )  # fmt: skip


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
