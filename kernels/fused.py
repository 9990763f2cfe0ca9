"""The fused strategy: loss, batch reduction and gradient while the row is on chip. Derivations in rowwise.py.

Traffic: each logit of a counted row, and each of its class probabilities, is read once and every gradient written once; packed
rows and pixels (tile.py) are read with their neighbours, whether they count or not. Only a tile whose rows do not fit its
registers is read twice. The gradient is that for an upstream gradient of 1; scale_gradient_kernel makes it right for another.

The mean's denominator must be known before the first gradient is written: denominator.py.

    fused_tile_kernel      several rows per program (tile.py), any strides
    fused_row_kernel       one row per program, or one slice of it (slices.py), classes contiguous: 16-byte accesses at any start
    scale_gradient_kernel  dlogits *= dloss, where dloss is not 1
"""

import triton
import triton.language as tl

from .denominator import coefficient_of_row, coefficient_of_tile
from .groups import Problem, RowStats
from .label import read_label, weighted
from .reduction import publish, store_stats, sum_over_programs
from .row import (
    Span,
    absorb_edges,
    column_gradient,
    edge_columns,
    elements_in_sector,
    hold_columns,
    in_row,
    load_label,
    no_columns,
    row_line,
    store_edges,
    store_labels,
    whole_groups,
    with_known_total,
)
from .rowwise import finite_max, gradient_factors, has_largest, load_terms, row_entropy, row_loss, row_lse
from .slices import merge_slices, publish_slice, wait_for
from .tile import by_row, by_turn, load_held, load_turn_targets, store_packed, tile_cols, tile_lines, tile_rows, tile_sources
from .tile_softmax import one_thread_per_row, tile_gradients, tile_statistics


@triton.jit
def _publish_tile(out, work, rows, loss_sum, losses, lses, entropies, counts, corrects, n_rows):
    """What there is to say of a tile but its gradient, for whose stores the ticket's fence would wait: (the sum of its losses,
    whether to call sum_over_programs)."""
    tally = None
    if out.row_stats is not None:
        counted, correct = by_row(counts) != 0, by_row(corrects) != 0
        lse, loss, entropy = by_row(lses), by_row(losses), by_row(entropies)
        tally = store_stats(out, rows.index, rows.exist, counted, correct, lse, loss, entropy, n_rows)
    tile_loss = tl.sum(loss_sum, 0)
    return tile_loss, publish(out, work, tile_loss, tally, tl.program_id(0), tl.num_programs(0))


@triton.jit(do_not_specialize=["n_rows"])
def fused_tile_kernel(
    out, inputs, work, layout, n_rows, numbers, scale: "fp64", lam: "fp64", asks: tl.constexpr, shape: tl.constexpr
):
    """Losses and gradients of shape.rows rows of one block of rows."""
    dtype: tl.constexpr = out.saved.dtype.element_ty
    N_TURNS: tl.constexpr = shape.n_turns
    TURN_ROWS: tl.constexpr = shape.turn_rows
    terms = load_terms(inputs, numbers, scale, lam, dtype)
    n_cols = tile_cols(layout, shape)
    problem = Problem(inputs=inputs, terms=terms, n_rows=n_rows, n_cols=n_cols, shard=None)
    rows = tile_rows(layout, n_rows, shape)
    sources = tile_sources(inputs, layout, rows, asks, shape)
    dlogits = tile_lines(out.dlogits, layout.dlogits, rows, shape)
    held = load_held(inputs, n_rows, n_cols, asks, shape)
    turn_rows = by_turn(tl.where(rows.exist, rows.index, n_rows), N_TURNS)  # rows past the end get an index that is no row's
    targets = load_turn_targets(turn_rows, rows, problem, asks, shape)
    g = coefficient_of_tile(out, work, turn_rows, targets, problem, asks, shape)

    loss_sum = tl.zeros((TURN_ROWS,), dtype)
    turns, losses, lses, entropies, counts, corrects = (), (), (), (), (), ()
    for i in tl.static_range(N_TURNS):
        label = read_label(targets[i], turn_rows[i], turn_rows[i] < n_rows, problem, asks)
        # Rows that do not count are not read, unless they share their 16 bytes with rows that do.
        read = rows.exist if shape.rows_contiguous else label.valid
        stats, blocks = tile_statistics(held, i, sources, read, label, problem, asks, shape)
        if shape.is_wide and shape.rows_contiguous:  # a row's threads are many
            stats = one_thread_per_row(stats, asks)
        loss = row_loss(stats, label, turn_rows[i], problem, asks)
        loss_sum += loss
        if out.row_stats is not None:
            lse = row_lse(stats, label, asks)
            losses, lses, counts = losses + (loss,), lses + (lse,), counts + (label.counted.to(tl.int32),)
            corrects = corrects + (has_largest(stats, label, lse, asks).to(tl.int32),)
            entropies = entropies + (row_entropy(stats, label, asks),)
        if not shape.is_packed:  # there is one turn, and its gradient is stored with it
            tile_loss, last_of_group = _publish_tile(out, work, rows, loss_sum, losses, lses, entropies, counts, corrects, n_rows)
        row_g = tl.where(label.counted, weighted(g, turn_rows[i], label, inputs), 0.0)
        factors = gradient_factors(stats, label, row_g, problem, asks)
        gradients = tile_gradients(
            dlogits, blocks, sources, read, rows.exist, finite_max(stats.max), label, factors, problem, asks, shape
        )
        turns = turns + (gradients,)
    if shape.is_packed:
        tile_loss, last_of_group = _publish_tile(out, work, rows, loss_sum, losses, lses, entropies, counts, corrects, n_rows)
        store_packed(out.dlogits, turns, n_rows, n_cols, shape)
    if last_of_group:
        if shape.meets:
            tl.store(work.ticket + 1, 0)  # nobody waits any more
        total, last = sum_over_programs(out, work, tile_loss, tl.program_id(0), tl.num_programs(0))
        tl.store(out.loss, (g * total).to(dtype), mask=last)


@triton.jit
def _publish_row(out, work, row, program, part, stats, label, problem, asks: tl.constexpr):
    """As _publish_tile, for a row. Only the row's first slice publishes: (its loss, whether to call sum_over_programs)."""
    loss, last_of_group = tl.zeros((), problem.terms.scale.dtype), tl.full((), 0, tl.int1)
    if part == 0:  # a logarithm and a division are more than the others need
        loss = row_loss(stats, label, row, problem, asks)
        tally = None
        if out.row_stats is not None:
            lse, entropy, exists = row_lse(stats, label, asks), row_entropy(stats, label, asks), row < problem.n_rows
            correct = has_largest(stats, label, lse, asks)
            tally = store_stats(out, row, exists, label.counted, correct, lse, loss, entropy, problem.n_rows)
        last_of_group = publish(out, work, loss, tally, program, problem.n_rows)
    return loss, last_of_group


@triton.jit(do_not_specialize=["n_rows"])
def fused_row_kernel(
    out, inputs, work, layout, n_rows, numbers, scale: "fp64", lam: "fp64", asks: tl.constexpr, shape: tl.constexpr
):
    """Loss and gradient of one row, or of one slice of it: read once, kept in registers, written once.

    The loss of a row is counted by its first slice. What a slice needs of the others is two numbers each, four with smoothing,
    and one more for statistics, and the labels' logits.
    """
    dtype: tl.constexpr = out.saved.dtype.element_ty
    N_SLICES: tl.constexpr = shape.n_slices
    N_BLOCKS: tl.constexpr = shape.n_blocks
    COLS: tl.constexpr = shape.cols
    SECTOR: tl.constexpr = elements_in_sector(inputs.logits)
    n_cols = layout.n_cols
    program, part = tl.program_id(0), 0
    if N_SLICES > 1:
        drawn = tl.atomic_add(work.arrived, 1, sem="relaxed")  # not the program id: slices.py says why
        program, part = drawn // N_SLICES, drawn % N_SLICES
    row = program.to(tl.int64)  # int64: row * row_stride passes 2**31
    terms = load_terms(inputs, numbers, scale, lam, dtype)
    problem = Problem(inputs=inputs, terms=terms, n_rows=n_rows, n_cols=n_cols, shard=None)
    label = load_label(row, problem, asks)
    g = coefficient_of_row(out, work, label, part, problem, asks, shape)
    row_g = weighted(g, row, label, inputs)

    head, n_main = whole_groups(row, layout.logits.row, n_cols, SECTOR, shape)
    first = head + part * shape.slice_cols
    n_own = tl.minimum(n_main - part * shape.slice_cols, shape.slice_cols)
    span = Span(head=head, n_main=n_main, first=first, n_own=n_own, part=part)
    logits = row_line(inputs.logits, row, layout.logits.row, first, SECTOR, shape)
    dlogits = row_line(out.dlogits, row, layout.dlogits.row, first, SECTOR, shape)
    q_line = row_line(inputs.target, row, layout.probabilities.row, first, SECTOR, shape) if asks.probabilities else logits
    lane = tl.arange(0, COLS)
    masks = (in_row(lane, span, SECTOR, shape),)
    for i in tl.static_range(1, N_BLOCKS):
        masks = masks + (i * COLS + lane < n_own,)

    if label.valid:
        stats = no_columns(logits, label, label.valid, span, terms, asks, shape)
        stats, edges = absorb_edges(stats, logits, q_line, span, n_cols, label, problem, SECTOR, asks, shape)
        own, exps, blocks, q = hold_columns(logits, q_line, masks, stats, span, label, problem, asks, shape)
        stats = own
        if N_SLICES > 1:
            arrived_ptr = work.arrived + 1 + row
            arrived = publish_slice(own, work.slices, arrived_ptr, row, n_rows, span, label, asks, shape)
            if shape.waits:
                wait_for(arrived_ptr, arrived, N_SLICES)
            stats = merge_slices(own, work.slices, row, n_rows, asks, shape)
        finite = finite_max(stats.max)
        stats = with_known_total(stats, problem, asks)
        factors = gradient_factors(stats, label, row_g, problem, asks)
        loss, last_of_group = _publish_row(out, work, row, program, part, stats, label, problem, asks)
        store_edges(dlogits, edges, finite, factors, problem, asks, shape)
        p = factors.p
        if N_SLICES > 1 and not asks.softcap:
            p *= tl.exp(own.max - finite)  # the slice's exponentials are relative to its own maximum
        for i in tl.static_range(N_BLOCKS):
            # Under a cap the logits were kept, of which the gradient is a function, instead of their exponentials.
            e = tl.exp(blocks[i] - finite) if asks.softcap else exps[i]
            q_i = q[i] if asks.probabilities else None
            dz = column_gradient(e * p, blocks[i], q_i, first + i * COLS + lane, masks[i], factors, problem, asks)
            tl.store(dlogits.own + i * COLS + lane, dz, mask=masks[i])
        store_labels(dlogits, span, stats, label, label.valid, factors, problem, asks)
    else:  # a class index out of range, or a row that does not count: nothing is read
        missing = tl.where(label.counted & (row_g != 0), float("nan"), 0.0)
        none = tl.zeros((), dtype)
        stats = RowStats(max=none, rest=none, x_t=none, x_b=none, shift=none, smooth_sum=none, weight_total=none, gap_sum=none)
        loss, last_of_group = _publish_row(out, work, row, program, part, stats, label, problem, asks)
        for i in tl.static_range(N_BLOCKS):
            tl.store(dlogits.own + i * COLS + lane, tl.zeros((COLS,), dtype) + missing, mask=masks[i])
        if shape.is_ragged:
            cols, in_edge = edge_columns(span, n_cols, SECTOR)
            tl.store(dlogits.row + cols, tl.zeros((2 * SECTOR,), dtype) + missing, mask=in_edge)

    if last_of_group:
        loss_sum, last = sum_over_programs(out, work, loss, program, n_rows)
        tl.store(out.loss, (g * loss_sum).to(dtype), mask=last)


@triton.jit(do_not_specialize=["n", "n_rows"])
def scale_gradient_kernel(
    dlogits_ptr,  # (n,) in and out, any tensor without gaps
    dloss_ptr,  # ()
    n,
    n_rows,
    layout,
    BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
):
    """dlogits *= dloss; where dloss is 1, the usual case, every program reads it and returns. No host looks at it."""
    dloss = tl.load(dloss_ptr).to(tl.float32 if dlogits_ptr.dtype.element_ty != tl.float64 else tl.float64)
    if dloss != 1.0:
        if dloss - dloss == 0.0:
            for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
                index = start + tl.arange(0, BLOCK)
                if start + BLOCK <= n:  # see load_targets_from
                    tl.store(dlogits_ptr + index, tl.load(dlogits_ptr + index).to(dloss.dtype) * dloss)
                else:
                    dlogits = tl.load(dlogits_ptr + index, mask=index < n).to(dloss.dtype)
                    tl.store(dlogits_ptr + index, dlogits * dloss, mask=index < n)
        else:
            _scale_rows(dlogits_ptr, dloss, n_rows, layout, ROW_BLOCK)


@triton.jit
def _scale_rows(dlogits_ptr, dloss, n_rows, layout, BLOCK: tl.constexpr):
    """By an infinity or NaN: a row of zeros, as an ignored one has, is not made NaN. Rare, so that nothing is done to be fast."""
    strides, n_cols = layout.dlogits, layout.n_cols
    n_inner = n_rows if layout.n_inner is None else layout.n_inner
    for row in range(tl.program_id(0).to(tl.int64), n_rows, tl.num_programs(0)):
        row_ptr = dlogits_ptr + row // n_inner * strides.outer + row % n_inner * strides.row
        is_zero = tl.full((BLOCK,), 1, tl.int32)
        for start in range(0, n_cols, BLOCK):
            cols = (start + tl.arange(0, BLOCK)).to(tl.int64)
            dlogits = tl.load(row_ptr + cols * strides.col, mask=cols < n_cols, other=0.0)
            is_zero = is_zero & (dlogits == 0.0).to(tl.int32)
        if tl.min(is_zero, 0) == 0:
            for start in range(0, n_cols, BLOCK):
                cols = (start + tl.arange(0, BLOCK)).to(tl.int64)
                dlogits = tl.load(row_ptr + cols * strides.col, mask=cols < n_cols, other=0.0).to(dloss.dtype)
                tl.store(row_ptr + cols * strides.col, dlogits * dloss, mask=cols < n_cols)
