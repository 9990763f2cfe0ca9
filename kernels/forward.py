"""Forward kernels: every row's loss and the batch reduction in one launch. Derivations in rowwise.py and reduction.py.

Traffic: each logit of a counted row is read once, and each class probability; per row 8 bytes of target are read, where it is an
index, and 2 to 4 statistics written, with what the caller wants to know of the row 3 more.
Of a shard of the classes (groups.Shard) they are the 3 to 7 that slices.py names, and no loss.
An online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867) over blocks of columns keeps m and rest.

    forward_tile_kernel   several rows per program, any strides: few classes, or classes far apart in memory (N, C, d1, ...)
    forward_row_kernel    one row per program, or a slice of it, classes contiguous: 16-byte loads at any row start
"""

import triton
import triton.language as tl

from .groups import Problem, RowStats
from .label import read_label
from .reduction import reduce_batch, store_rows, store_stats
from .row import (
    Span,
    absorb,
    absorb_edges,
    elements_in_sector,
    in_row,
    load_label,
    load_logits,
    no_columns,
    row_line,
    whole_groups,
    with_known_total,
)
from .rowwise import class_weights, has_largest, load_terms, row_entropy, row_loss, row_lse
from .slices import merge_slices, publish_shard, publish_slice
from .tile import by_row, by_turn, load_held, load_turn_targets, tile_cols, tile_rows, tile_sources
from .tile_softmax import tile_statistics


# Specialised for n_rows, unlike the kernels that make the gradient at once: what is kept of rows lies n_rows apart, and goes in
# whole vectors only where the compiler knows that it is a multiple of 16.
@triton.jit(do_not_specialize=["top_k"])
def forward_tile_kernel(
    out, inputs, work, layout, n_rows, numbers, scale: "fp64", lam: "fp64", top_k: "i64", asks: tl.constexpr, shape: tl.constexpr
):
    """Losses of shape.rows rows of one block of rows."""
    dtype: tl.constexpr = out.saved.dtype.element_ty
    N_TURNS: tl.constexpr = shape.n_turns
    TURN_ROWS: tl.constexpr = shape.turn_rows
    terms = load_terms(inputs, numbers, scale, lam, dtype)
    n_cols = tile_cols(layout, shape)
    problem = Problem(inputs=inputs, terms=terms, n_rows=n_rows, n_cols=n_cols, shard=layout.shard)
    rows = tile_rows(layout, n_rows, shape)
    sources = tile_sources(inputs, layout, rows, asks, shape)
    held = load_held(inputs, n_rows, n_cols, asks, shape)
    turn_rows = by_turn(tl.where(rows.exist, rows.index, n_rows), N_TURNS)  # rows past the end get an index that is no row's
    targets = load_turn_targets(turn_rows, rows, problem, asks, shape)

    losses, maxima, rests, totals, lses, entropies, counts, corrects = (), (), (), (), (), (), (), ()
    count = tl.zeros((TURN_ROWS,), dtype)
    for i in tl.static_range(N_TURNS):
        label = read_label(targets[i], turn_rows[i], turn_rows[i] < n_rows, problem, asks)
        # Rows that do not count are not read, unless they share their 16 bytes with rows that do.
        read = rows.exist if shape.rows_contiguous else label.valid
        stats, _blocks = tile_statistics(held, i, sources, read, label, problem, asks, shape)
        if asks.sharded:
            publish_shard(stats, out.saved, turn_rows[i], turn_rows[i] < n_rows, n_rows, asks)
        else:
            loss = row_loss(stats, label, turn_rows[i], problem, asks)
            losses, totals = losses + (loss,), totals + (stats.weight_total,)
            maxima, rests = maxima + (stats.max,), rests + (stats.rest,)
            if out.row_stats is not None:
                lse = row_lse(stats, label, asks)
                lses, entropies = lses + (lse,), entropies + (row_entropy(stats, label, asks),)
                corrects = corrects + (has_largest(stats, label, lse, asks).to(tl.int32),)
            counts = counts + (label.counted.to(tl.int32),)  # integers: bits are not moved between threads as well
            count += label.weight if asks.weighs_the_mean else label.counted.to(dtype)
    if not asks.sharded:
        if asks.saves:
            tl.store(out.saved + 3, stats.weight_total if asks.needs_total else 0.0, mask=tl.program_id(0) == 0)

        loss, counted = by_row(losses), by_row(counts) != 0
        row_max = by_row(maxima)
        total = by_row(totals) if asks.probabilities else row_max
        stats = RowStats(
            max=row_max, rest=by_row(rests), x_t=row_max, x_b=row_max, shift=row_max, smooth_sum=row_max, weight_total=total,
            gap_sum=row_max,
        )  # fmt: skip
        store_rows(out, rows.index, rows.exist, counted, loss, stats, terms.scale, n_rows, asks)
        tally = None
        if out.row_stats is not None:
            correct, lse, entropy = by_row(corrects) != 0, by_row(lses), by_row(entropies)
            tally = store_stats(out, rows.index, rows.exist, counted, correct, lse, loss, entropy, n_rows)
        loss_sum, count_sum, n = tl.sum(loss, 0), tl.sum(count, 0), tl.num_programs(0)
        reduce_batch(out, work, loss_sum, count_sum, tally, terms.scale, top_k, tl.program_id(0), n, n_rows, asks)


@triton.jit(do_not_specialize=["n_rows", "top_k"])
def forward_row_kernel(
    out, inputs, work, layout, n_rows, numbers, scale: "fp64", lam: "fp64", top_k: "i64", asks: tl.constexpr, shape: tl.constexpr
):
    """Loss of one row, shape.cols classes at a time; or of one slice of it, and the last to finish has the row's."""
    dtype: tl.constexpr = out.saved.dtype.element_ty
    N_SLICES: tl.constexpr = shape.n_slices
    COLS: tl.constexpr = shape.cols
    SECTOR: tl.constexpr = elements_in_sector(inputs.logits)
    n_cols = layout.n_cols
    row = (tl.program_id(0) // N_SLICES).to(tl.int64)  # int64: row * row_stride passes 2**31
    part = tl.program_id(0) % N_SLICES
    terms = load_terms(inputs, numbers, scale, lam, dtype)
    problem = Problem(inputs=inputs, terms=terms, n_rows=n_rows, n_cols=n_cols, shard=layout.shard)
    label = load_label(row, problem, asks)
    n_read = tl.where(label.valid, n_cols, 0)  # a row that does not count is not read
    head, n_main = whole_groups(row, layout.logits.row, n_read, SECTOR, shape)
    span = Span(head=head, n_main=n_main, first=head, n_own=n_main, part=part)
    logits = row_line(inputs.logits, row, layout.logits.row, head, SECTOR, shape)
    q_line = row_line(inputs.target, row, layout.probabilities.row, head, SECTOR, shape) if asks.probabilities else logits

    stats = no_columns(logits, label, label.valid, span, terms, asks, shape)
    stats, _edges = absorb_edges(stats, logits, q_line, span, n_read, label, problem, SECTOR, asks, shape)
    slice_cols = tl.cdiv(n_main, N_SLICES * COLS) * COLS
    for start in range(part * slice_cols, tl.minimum((part + 1) * slice_cols, n_main), COLS):
        group = start + tl.arange(0, COLS)
        mask = in_row(group, span, SECTOR, shape)
        x = load_logits(logits.own + group, mask, terms, asks)
        q = tl.load(q_line.own + group, mask=mask, other=0.0) if asks.probabilities else x
        first = head + start
        stats = absorb(stats, x, q, head + group, mask, first, first + COLS, label, problem, asks)

    last_slice = True
    if N_SLICES > 1:
        arrived_ptr = work.arrived + 1 + row
        last_slice = publish_slice(stats, work.slices, arrived_ptr, row, n_rows, span, label, asks, shape) == N_SLICES
        tl.store(arrived_ptr, 0, mask=last_slice)  # ready for the next launch
    if last_slice:
        if N_SLICES > 1:
            stats = merge_slices(stats, work.slices, row, n_rows, asks, shape)
        if asks.sharded:
            publish_shard(stats, out.saved, row, row < n_rows, n_rows, asks)
        else:
            stats = with_known_total(stats, problem, asks)
            loss = row_loss(stats, label, row, problem, asks)
            store_rows(out, row, row < n_rows, label.counted, loss, stats, terms.scale, n_rows, asks)
            tally = None
            if out.row_stats is not None:
                lse = row_lse(stats, label, asks)
                correct, entropy = has_largest(stats, label, lse, asks), row_entropy(stats, label, asks)
                tally = store_stats(out, row, row < n_rows, label.counted, correct, lse, loss, entropy, n_rows)
            count = label.weight if asks.weighs_the_mean else label.counted.to(dtype)
            reduce_batch(out, work, loss, count, tally, terms.scale, top_k, row, n_rows, n_rows, asks)
    if asks.saves and tl.program_id(0) == 0:
        tl.store(out.saved + 3, _sum_class_weights(problem, COLS, asks))


@triton.jit
def _sum_class_weights(problem, COLS: tl.constexpr, asks: tl.constexpr):
    """W, for `saved`; 0 where the loss has none. Not a row's own: each adds up the weights from where its whole groups begin, and
    two sums may differ in their last bit."""
    dtype: tl.constexpr = problem.terms.scale.dtype
    total = tl.zeros((), dtype)
    if asks.needs_total and problem.inputs.weight is None:
        total += problem.n_cols
    elif asks.needs_total:
        for start in range(0, problem.n_cols, COLS):
            cols = start + tl.arange(0, COLS)
            total += tl.sum(class_weights(None, cols, cols < problem.n_cols, problem, asks), 0)
    return total
