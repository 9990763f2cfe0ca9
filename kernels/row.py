"""One row, or a slice of one, per program: where its columns lie, an online softmax over them, and their gradient.

Classes are contiguous. Columns are accessed in groups that begin at a sector of 32 bytes, so that no request of a warp touches
one sector more than it has bytes for, 16 bytes a thread at any start of a row:

    rows of whole sectors       begin there themselves
    rows of 16-byte groups      may begin inside a sector: `head` is negative then, and the columns before the row are masked
    ragged rows (group is 1)    give their whole sectors; the fewer than two sectors left at the two ends of a row are its edges
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .groups import RowStats
from .label import is_here, load_target, read_label
from .rowwise import class_weights, finite_max, gap_terms, moved_gap_sum, through_transform, transform_logits


class Span(NamedTuple):
    """Columns of a row that are accessed in whole groups, [head, head + n_main), and those of them that are this program's."""

    head: Any
    n_main: Any
    first: Any
    n_own: Any
    part: Any  # of the row; the first has its edges, too


class Line(NamedTuple):
    """Where a row lies in a tensor."""

    row: Any  # its first class
    own: Any  # the first of this program's columns; at a sector


class Edges(NamedTuple):
    """Columns of a ragged row outside its groups; of other rows nothing that is read."""

    cols: Any
    mask: Any
    x: Any
    q: Any


@triton.constexpr_function
def elements_in_sector(ptr):
    """Elements in the 32 bytes that travel together between L2 and an SM."""
    return 256 // ptr.dtype.element_ty.primitive_bitwidth


@triton.constexpr_function
def shares_labels(asks, shape):
    """Whether a slice reads no labels' logits but those of its own columns, and finds the others beside the slices' statistics.
    They need a place there, and no sum may be relative to them. A forward has no use for them before all slices are merged."""
    return shape.n_blocks > 0 and shape.n_slices < shape.n_places and not asks.every_class


@triton.jit
def _row_start(row, row_stride, shape: tl.constexpr):
    GROUP: tl.constexpr = shape.group
    return row * ((row_stride // GROUP) * GROUP)  # a multiple that the compiler can see, for 16-byte accesses


@triton.jit
def whole_groups(row, row_stride, n_cols, SECTOR: tl.constexpr, shape: tl.constexpr):
    """(head, n_main) of a row, multiples of a group: the proof the compiler needs for 16-byte accesses, masked as a whole."""
    GROUP: tl.constexpr = shape.group
    start = _row_start(row, row_stride, shape)
    if GROUP == 1:
        head = tl.minimum((SECTOR - start % SECTOR) % SECTOR, n_cols).to(tl.int32)
        n_main = ((n_cols - head) // SECTOR) * SECTOR
    else:
        head = 0
        if GROUP < SECTOR:
            head = -((start % SECTOR).to(tl.int32) // GROUP) * GROUP
        n_main = ((n_cols - head) // GROUP) * GROUP
    return head, n_main


@triton.jit
def row_line(ptr, row, row_stride, first, SECTOR: tl.constexpr, shape: tl.constexpr):
    start = _row_start(row, row_stride, shape)
    return Line(row=ptr + start, own=ptr + tl.multiple_of(start + first, SECTOR))


@triton.jit
def in_row(group, span, SECTOR: tl.constexpr, shape: tl.constexpr):
    """Which of the columns span.first + group are this program's."""
    mask = group < span.n_own
    if shape.group > 1 and shape.group < SECTOR:
        mask = mask & (group >= -span.first)
    return mask


@triton.jit
def edge_columns(span, n_cols, SECTOR: tl.constexpr):
    """The edges' columns, and which of them exist and are this program's."""
    lane = tl.arange(0, 2 * SECTOR)
    cols = tl.where(lane < SECTOR, lane, span.head + span.n_main + lane - SECTOR)
    return cols, tl.where(lane < SECTOR, lane < span.head, cols < n_cols) & (span.part == 0)


@triton.jit
def load_label(row, problem, asks: tl.constexpr):
    exists = row < problem.n_rows
    target = row if asks.probabilities else load_target(problem.inputs.target, row, exists, asks)
    return read_label(target, row, exists, problem, asks)


@triton.jit
def load_logits(ptr, mask, terms, asks: tl.constexpr):
    """Logits of a row as the loss sees them, -inf outside of it."""
    x = tl.load(ptr, mask=mask, other=float("-inf")).to(terms.scale.dtype)
    if asks.transforms:
        x = tl.where(mask, transform_logits(x, terms, asks), float("-inf"))
    return x


@triton.jit
def _row_label_logit(logits, target, read, terms, asks: tl.constexpr):
    x = tl.load(logits.row + target, mask=is_here(target, read, asks), other=0.0).to(terms.scale.dtype)
    return transform_logits(x, terms, asks)


@triton.jit
def no_columns(logits, label, read, span, terms, asks: tl.constexpr, shape: tl.constexpr):
    """The statistics of a row before its first column: of no columns, but with the labels' logits."""
    zero = tl.zeros((), terms.scale.dtype)
    read_t, read_b = read, read
    if shares_labels(asks, shape):
        read_t, read_b = read & is_own(label.target, span), read & is_own(label.target_b, span)
    x_t = zero if asks.probabilities else _row_label_logit(logits, label.target, read_t, terms, asks)
    x_b = _row_label_logit(logits, label.target_b, read_b, terms, asks) if asks.two_labels else zero
    return RowStats(
        max=zero + float("-inf"), rest=zero, x_t=x_t, x_b=x_b, shift=finite_max(x_t), smooth_sum=zero, weight_total=zero,
        gap_sum=zero,
    )  # fmt: skip


@triton.jit
def _row_weighted_sums(x, q, cols, mask, shift, problem, smooth_sum, weight_total, asks: tl.constexpr):
    """Adds w_c (shift - x_c) and w_c, or a_c for w_c; of class indices without weights W is known: see with_known_total."""
    d = shift - x
    if asks.probabilities or asks.sharded or problem.inputs.weight is not None:
        w = class_weights(q, cols, mask, problem, asks)
        d = w * d
        weight_total += w
    return smooth_sum + tl.where(mask, d, 0.0), weight_total


@triton.jit
def absorb(stats, x, q, cols, mask, first, last, label, problem, asks: tl.constexpr):
    """One step of the online softmax of a row: its statistics with another block of columns, which lie in [first, last)."""
    new_max = tl.maximum(stats.max, tl.max(x, 0))
    finite = finite_max(new_max)
    e = tl.exp(x - finite)
    if not asks.probabilities:
        in_block = (label.target >= first) & (label.target < last)
        if in_block:  # at most one block of a row pays for the comparison
            e = tl.where(cols == label.target.to(tl.int32), 0.0, e)
    rest = stats.rest * tl.exp(stats.max - finite) + tl.sum(e, 0)
    gap_sum = stats.gap_sum
    if asks.statistics:
        gap_sum = moved_gap_sum(stats, finite) + tl.sum(gap_terms(e, finite, x), 0)
    shift, smooth_sum, weight_total = stats.shift, stats.smooth_sum, stats.weight_total
    if asks.shifts_to_max:
        smooth_sum += weight_total * (finite - finite_max(stats.max))
        shift = finite
    if asks.every_class:
        zeros = tl.zeros(x.shape, x.dtype)
        sums, weights = _row_weighted_sums(x, q, cols, mask, shift, problem, zeros, zeros, asks)
        smooth_sum += tl.sum(sums, 0)
        weight_total += tl.sum(weights, 0)
    return RowStats(
        max=new_max, rest=rest, x_t=stats.x_t, x_b=stats.x_b, shift=shift, smooth_sum=smooth_sum, weight_total=weight_total,
        gap_sum=gap_sum,
    )  # fmt: skip


@triton.jit
def absorb_edges(
    stats, logits, probabilities, span, n_read, label, problem, SECTOR: tl.constexpr, asks: tl.constexpr, shape: tl.constexpr
):
    """The statistics with a ragged row's edges, and the edges."""
    cols, mask = edge_columns(span, n_read, SECTOR)
    edges = Edges(cols=cols, mask=mask, x=cols, q=cols)
    if shape.is_ragged:
        x = load_logits(logits.row + cols, mask, problem.terms, asks)
        q = tl.load(probabilities.row + cols, mask=mask, other=0.0) if asks.probabilities else x
        stats = absorb(stats, x, q, cols, mask, 0, problem.n_cols, label, problem, asks)
        edges = Edges(cols=cols, mask=mask, x=x, q=q)
    return stats, edges


@triton.jit
def with_known_total(stats, problem, asks: tl.constexpr):
    """W, which smoothing without class weights does not add up."""
    weight_total = stats.weight_total
    if asks.needs_total and problem.inputs.weight is None:
        weight_total = tl.zeros_like(weight_total) + problem.n_cols
    return RowStats(
        max=stats.max, rest=stats.rest, x_t=stats.x_t, x_b=stats.x_b, shift=stats.shift, smooth_sum=stats.smooth_sum,
        weight_total=weight_total, gap_sum=stats.gap_sum,
    )  # fmt: skip


@triton.jit
def hold_columns(logits, probabilities, masks, stats, span, label, problem, asks: tl.constexpr, shape: tl.constexpr):
    """Reads this program's columns, to keep them: (statistics, exp(x - m), x, q), the last three in blocks, in registers."""
    dtype: tl.constexpr = problem.terms.scale.dtype
    COLS: tl.constexpr = shape.cols
    N_BLOCKS: tl.constexpr = shape.n_blocks
    lane = tl.arange(0, COLS)
    lane_max = load_logits(logits.own + lane, masks[0], problem.terms, asks)
    blocks = (lane_max,)
    for i in tl.static_range(1, N_BLOCKS):
        block = load_logits(logits.own + i * COLS + lane, masks[i], problem.terms, asks)
        blocks = blocks + (block,)
        lane_max = tl.maximum(lane_max, block)
    q = ()
    if asks.probabilities:
        for i in tl.static_range(N_BLOCKS):
            q = q + (tl.load(probabilities.own + i * COLS + lane, mask=masks[i], other=0.0),)
    own_max = tl.maximum(stats.max, tl.max(lane_max, 0))
    finite = finite_max(own_max)
    shift, smooth_sum, weight_total = stats.shift, stats.smooth_sum, stats.weight_total
    if asks.probabilities:
        smooth_sum += weight_total * (finite - finite_max(stats.max))
        shift = finite
    if asks.every_class:
        lane_smooth = tl.zeros((COLS,), dtype)
        lane_weight = tl.zeros((COLS,), dtype)
        for i in tl.static_range(N_BLOCKS):
            cols, q_i = span.first + i * COLS + lane, q[i] if asks.probabilities else None
            lane_smooth, lane_weight = _row_weighted_sums(
                blocks[i], q_i, cols, masks[i], shift, problem, lane_smooth, lane_weight, asks
            )
        smooth_sum += tl.sum(lane_smooth, 0)
        weight_total += tl.sum(lane_weight, 0)
    lane_sum = tl.exp(blocks[0] - finite)
    exps = (lane_sum,)
    lane_gap = gap_terms(lane_sum, finite, blocks[0]) if asks.statistics else lane_sum
    for i in tl.static_range(1, N_BLOCKS):
        e = tl.exp(blocks[i] - finite)
        exps = exps + (e,)
        lane_sum += e
        if asks.statistics:
            lane_gap += gap_terms(e, finite, blocks[i])
    total = tl.sum(lane_sum, 0)
    edge_rest = stats.rest * tl.exp(stats.max - finite)  # the target kept out already
    rest = edge_rest + total
    if not asks.probabilities:
        # A slice may be -inf throughout, its target too, in a row that is not.
        e_t = tl.exp(stats.x_t - (finite if shape.n_slices > 1 else own_max))
        is_held = _in_groups(label.target, span)
        rest = edge_rest + tl.where(is_held, total - e_t, total)
        if (e_t > rest) & is_held:  # the subtraction would lose digits: keep the target out of the sum
            lane_rest = tl.zeros((COLS,), dtype)
            for i in tl.static_range(N_BLOCKS):
                e = tl.exp(blocks[i] - finite) if asks.softcap else exps[i]
                lane_rest += tl.where(i * COLS + lane == (label.target - span.first).to(tl.int32), 0.0, e)
            rest = edge_rest + tl.sum(lane_rest, 0)
    gap_sum = stats.gap_sum
    if asks.statistics:
        gap_sum = moved_gap_sum(stats, finite) + tl.sum(lane_gap, 0)
        if not asks.probabilities:  # it comes back where the row's entropy is made, and costs nothing of this sum's digits
            gap_sum -= tl.where(is_held, gap_terms(e_t, finite, stats.x_t), 0.0)
    stats = RowStats(
        max=own_max, rest=rest, x_t=stats.x_t, x_b=stats.x_b, shift=shift, smooth_sum=smooth_sum, weight_total=weight_total,
        gap_sum=gap_sum,
    )  # fmt: skip
    return stats, exps, blocks, q


@triton.jit
def column_gradient(dz, x, q, cols, mask, factors, problem, asks: tl.constexpr):
    """The gradient of columns; dz: exp(x_c - m) times factors.p, or a label's own."""
    if asks.probabilities or (asks.smoothing and problem.inputs.weight is not None):
        dz -= factors.smooth * class_weights(q, cols, mask, problem, asks)
    elif asks.smoothing:
        dz -= factors.smooth
    return through_transform(dz, x, problem.terms, asks)


@triton.jit
def store_edges(dlogits, edges, row_max, factors, problem, asks: tl.constexpr, shape: tl.constexpr):
    """The gradient of a ragged row's edges."""
    if shape.is_ragged:
        dz = tl.exp(edges.x - row_max) * factors.p
        dz = column_gradient(dz, edges.x, edges.q, edges.cols, edges.mask, factors, problem, asks)
        tl.store(dlogits.row + edges.cols, dz, mask=edges.mask)


@triton.jit
def store_labels(dlogits, span, stats, label, read, factors, problem, asks: tl.constexpr):
    """The labels' own gradients, last, by the program that has stored their neighbours: comparing every column with a label
    would cost two instructions per logit."""
    if not asks.probabilities:
        t, b = label.target, label.target_b
        t_here, b_here = is_here(t, read, asks), is_here(b, read, asks)
        at_t = column_gradient(factors.at_target, stats.x_t, None, t, t_here, factors, problem, asks)
        tl.debug_barrier()  # another thread stored this element with the others of its group
        tl.store(dlogits.row + t, at_t, mask=t_here & is_own(t, span))
        if asks.two_labels:
            at_b = column_gradient(factors.at_b, stats.x_b, None, b, b_here, factors, problem, asks)
            tl.store(dlogits.row + b, at_b, mask=b_here & is_own(b, span) & (b != t))


@triton.jit
def _in_groups(col, span):
    return (col >= span.first) & (col < span.first + span.n_own)


@triton.jit
def is_own(col, span):
    """Whether a column is this program's."""
    return _in_groups(col, span) | ((span.part == 0) & ((col < span.head) | (col >= span.head + span.n_main)))
