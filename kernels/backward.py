"""Backward kernels of the recompute strategy: the gradient from the logits and each row's saved (m, rest); see rowwise.py.

Traffic: each logit of a row with g != 0, and each of its class probabilities, is read once and every gradient written once; other
rows are written as zeros, without reading them, so that their logits may hold NaN. Packed rows and pixels (tile.py) are read with
their neighbours. Of a shard of the classes (groups.Shard) out.saved has the statistics of whole rows, as slices.py names them.

    backward_tile_kernel  several rows per program, any strides
    backward_row_kernel   one block of one row per program, classes contiguous: 16-byte accesses at any row start
"""

import triton
import triton.language as tl

from .groups import Problem, RowStats
from .label import read_label, weighted
from .row import (
    Span,
    column_gradient,
    edge_columns,
    elements_in_sector,
    load_label,
    no_columns,
    row_line,
    store_labels,
    whole_groups,
)
from .rowwise import STATE, gradient_factors, load_terms, row_coefficient, transform_logits
from .slices import label_logits_of_shards
from .tile import by_turn, load_held, load_turn_targets, store_packed, tile_cols, tile_lines, tile_rows, tile_sources
from .tile_softmax import Blocks, exponentials, row_blocks, tile_gradients, tile_label_logit


@triton.jit  # specialised for n_rows, as forward_tile_kernel is
def backward_tile_kernel(out, dloss_ptr, inputs, layout, n_rows, numbers, lam: "fp64", asks: tl.constexpr, shape: tl.constexpr):
    """Gradient of shape.rows rows of one block of rows."""
    dtype: tl.constexpr = out.saved.dtype.element_ty
    N_TURNS: tl.constexpr = shape.n_turns
    terms = load_terms(inputs, numbers, 1.0, lam, dtype)
    n_cols = tile_cols(layout, shape)
    problem = Problem(inputs=inputs, terms=terms, n_rows=n_rows, n_cols=n_cols, shard=layout.shard)
    rows = tile_rows(layout, n_rows, shape)
    sources = tile_sources(inputs, layout, rows, asks, shape)
    dlogits = tile_lines(out.dlogits, layout.dlogits, rows, shape)
    turn_rows = by_turn(tl.where(rows.exist, rows.index, n_rows), N_TURNS)  # rows past the end get an index that is no row's
    targets = load_turn_targets(turn_rows, rows, problem, asks, shape)
    coefficient = row_coefficient(out.saved, dloss_ptr, rows.index, rows.exist, n_rows, asks)
    coefficients = by_turn(coefficient, N_TURNS)
    state = out.saved + (0 if asks.sharded else STATE) + rows.index
    maxima = by_turn(tl.load(state, mask=rows.exist, other=0.0), N_TURNS)
    rests = by_turn(tl.load(state + n_rows, mask=rows.exist, other=1.0), N_TURNS)
    totals = rests
    if asks.has_row_totals:
        totals = by_turn(tl.load(state + 3 * n_rows, mask=rows.exist, other=0.0), N_TURNS)
    weight_total = tl.load(out.saved + 3) if asks.needs_total else 0.0

    # Packed rows are read with their neighbours, unless none of them has a gradient, the usual case for max and topk.
    n_read = tl.where(tl.max((coefficient != 0).to(tl.int32), 0) > 0, n_rows, 0)
    held = load_held(inputs, n_read, n_cols, asks, shape)
    turns = ()
    for i in tl.static_range(N_TURNS):
        label = read_label(targets[i], turn_rows[i], turn_rows[i] < n_rows, problem, asks)
        g = weighted(coefficients[i], turn_rows[i], label, inputs)
        live = label.valid & (g != 0)
        # Rows without gradient are not read, unless they share their 16 bytes with rows that have one.
        read = rows.exist if shape.rows_contiguous else live
        x, q = row_blocks(held, i, sources, read, 0.0, problem, asks, shape)
        zeros = tl.zeros_like(g)
        if asks.sharded:
            x_t, x_b = label_logits_of_shards(out.saved, turn_rows[i], turn_rows[i] < n_rows, n_rows, asks)
        else:
            x_t = zeros if asks.probabilities else tile_label_logit(x, sources.logits, live, label.target, terms, asks, shape)
            x_b = tile_label_logit(x, sources.logits, live, label.target_b, terms, asks, shape) if asks.two_labels else zeros
        total = totals[i] if asks.has_row_totals else weight_total + zeros
        stats = RowStats(
            max=maxima[i], rest=rests[i], x_t=x_t, x_b=x_b, shift=zeros, smooth_sum=zeros, weight_total=total, gap_sum=zeros
        )
        factors = gradient_factors(stats, label, g, problem, asks)
        blocks = Blocks(x=x, q=q, e=exponentials(x, stats.max, shape))
        gradients = tile_gradients(dlogits, blocks, sources, read, rows.exist, stats.max, label, factors, problem, asks, shape)
        turns = turns + (gradients,)
    if shape.is_packed:
        store_packed(out.dlogits, turns, n_rows, n_cols, shape)


@triton.jit
def _saved_statistics(saved_ptr, row, n_rows, labels, read, asks: tl.constexpr):
    """What the forward has left of a row; labels: statistics with the labels' logits."""
    row_ptr = saved_ptr + (0 if asks.sharded else STATE) + row
    row_max = tl.load(row_ptr, mask=read, other=0.0)
    zero = tl.zeros_like(row_max)
    weight_total = zero
    if asks.has_row_totals:
        weight_total = tl.load(row_ptr + 3 * n_rows, mask=read, other=0.0)
    elif asks.needs_total:
        weight_total = tl.load(saved_ptr + 3)
    rest = tl.load(row_ptr + n_rows, mask=read, other=1.0)
    x_t, x_b = labels.x_t, labels.x_b
    if asks.sharded:
        x_t, x_b = label_logits_of_shards(saved_ptr, row, read, n_rows, asks)
    return RowStats(
        max=row_max, rest=rest, x_t=x_t, x_b=x_b, shift=zero, smooth_sum=zero, weight_total=weight_total, gap_sum=zero
    )


@triton.jit
def _gradient(logits_ptr, q_ptr, cols, mask, read, row_max, factors, problem, asks: tl.constexpr):
    """The gradient of some columns of a row."""
    dtype: tl.constexpr = problem.terms.scale.dtype
    x = transform_logits(tl.load(logits_ptr, mask=mask & read, other=0.0).to(dtype), problem.terms, asks)
    q = tl.load(q_ptr, mask=mask & read, other=0.0) if asks.probabilities else x
    return column_gradient(tl.exp(x - row_max) * factors.p, x, q, cols, mask, factors, problem, asks)


@triton.jit(do_not_specialize=["n_rows"])
def backward_row_kernel(out, dloss_ptr, inputs, layout, n_rows, numbers, lam: "fp64", asks: tl.constexpr, shape: tl.constexpr):
    """Gradient of shape.cols columns of one row, in whole groups; the first block of a row also writes its two ragged edges."""
    dtype: tl.constexpr = out.saved.dtype.element_ty
    COLS: tl.constexpr = shape.cols
    SECTOR: tl.constexpr = elements_in_sector(inputs.logits)
    n_cols = layout.n_cols
    blocks_per_row = tl.num_programs(0) // n_rows
    row = (tl.program_id(0) // blocks_per_row).to(tl.int64)  # int64: row * row_stride passes 2**31
    part = tl.program_id(0) % blocks_per_row
    terms = load_terms(inputs, numbers, 1.0, lam, dtype)
    problem = Problem(inputs=inputs, terms=terms, n_rows=n_rows, n_cols=n_cols, shard=layout.shard)
    label = load_label(row, problem, asks)
    g = weighted(row_coefficient(out.saved, dloss_ptr, row, row < n_rows, n_rows, asks), row, label, inputs)
    read = label.valid & (g != 0)  # the other rows are not read

    head, n_main = whole_groups(row, layout.logits.row, n_cols, SECTOR, shape)
    first = head + part * COLS
    span = Span(head=head, n_main=n_main, first=first, n_own=tl.minimum(n_main - part * COLS, COLS), part=part)
    logits = row_line(inputs.logits, row, layout.logits.row, head, SECTOR, shape)
    dlogits = row_line(out.dlogits, row, layout.dlogits.row, head, SECTOR, shape)
    q_line = row_line(inputs.target, row, layout.probabilities.row, head, SECTOR, shape) if asks.probabilities else logits
    labels = no_columns(logits, label, read, span, terms, asks, shape)
    stats = _saved_statistics(out.saved, row, n_rows, labels, read, asks)
    factors = gradient_factors(stats, label, g, problem, asks)

    group = part * COLS + tl.arange(0, COLS)
    mask = group < n_main
    if shape.group > 1 and shape.group < SECTOR:
        mask = mask & (group >= -head)
    dz = _gradient(logits.own + group, q_line.own + group, head + group, mask, read, stats.max, factors, problem, asks)
    tl.store(dlogits.own + group, dz, mask=mask)
    if shape.is_ragged and part == 0:
        cols, in_edge = edge_columns(span, n_cols, SECTOR)
        edge_dz = _gradient(logits.row + cols, q_line.row + cols, cols, in_edge, read, stats.max, factors, problem, asks)
        tl.store(dlogits.row + cols, edge_dz, mask=in_edge)
    store_labels(dlogits, span, stats, label, read, factors, problem, asks)
