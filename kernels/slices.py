"""A row that several programs share: each has a slice of the columns, publishes its statistics, and merges those of all.

A slice's statistics are those of a row (rowwise.py), relative to the slice's own maximum m_i:

    m    = max_i m_i                          rest = sum_i rest_i exp(m_i - m)
    W    = sum_i W_i                          smooth_sum = sum_i smooth_sum_i
    G    = sum_i (G_i + rest_i (m - m_i)) exp(m_i - m)

With class probabilities A takes the place of W, and smooth_sum is sum_i (smooth_sum_i + A_i (m - m_i)): its shift is the maximum.

The pairs (m_i, rest_i) of a row have as many places as the next power of two, so that those of up to four slices are one sector.
Where a place is left, a fused slice reads of the labels' logits only those of its own columns, and publishes them there; where
none is, or where sums are relative to x_t, every slice reads them all.

Whoever merges adds in the order of the slices, so that all programs of a row, and all runs, find the same bits.

Forward: the slice that publishes last has all that the row's loss needs; nobody waits. Fused: every slice keeps its logits in
registers until it knows the row's statistics, so it has to wait for the others. They must run, then, and they do. A program
draws the next number from a counter when it starts, not its program id, so numbers go to running programs only, and the slices of
a row have consecutive ones. Take the lowest row whose slices have not all published.

    All its slices have been drawn: they all run, and wait for nothing but each other.
    Some have not: every running program of an earlier row ends without waiting for them, no later row has been drawn, and the
    plan has no more slices than the GPU has SMs. So the missing ones start when programs end.

This is proved for one launch; several at once also need the room that cut_rows.WAITING_SHARE leaves.

Shards of rows, on several devices, merge by the same formulas, but the host does that (fusedloss/shards.py). A shard publishes
what a slice does and the labels' logits, 0 where a label is not here; (3, 5 or 6, n_rows), smooth_sum relative to the maximum,
and a row more for statistics:

    m, rest, x_t        W or A, smooth_sum where every class has a weight        x_b of two labels        G

The backward reads the same of whole rows, without G.
"""

import triton
import triton.language as tl

from .groups import RowStats
from .row import is_own, shares_labels
from .rowwise import finite_max


@triton.jit
def publish_slice(stats, slices_ptr, arrived_ptr, row, n_rows, span, label, asks: tl.constexpr, shape: tl.constexpr):
    """Stores a slice's statistics; returns how many slices of the row have now done so.

    slices_ptr: (n_rows, PLACES, 2) of maxima and rests, and after a row's last the labels' logits, where slices share them, and
    (3, n_rows, PLACES), two planes of it where every class has a weight, the last for statistics; arrived_ptr: of this row.
    """
    N_SLICES: tl.constexpr = shape.n_slices
    PLACES: tl.constexpr = shape.n_places
    pairs_ptr = slices_ptr + 2 * row * PLACES
    slice_ptr = slices_ptr + row * PLACES + span.part
    plane = n_rows * PLACES  # int32 does: a slice has a thousand columns or more
    # Scalars: the thread that stores them is the one that counts the slice, so that acq_rel orders the two (reduction.py).
    tl.store(pairs_ptr + 2 * span.part, stats.max)
    tl.store(pairs_ptr + 2 * span.part + 1, stats.rest)
    if shares_labels(asks, shape):
        tl.store(pairs_ptr + 2 * N_SLICES, stats.x_t, mask=is_own(label.target, span))
        if asks.two_labels:
            tl.store(pairs_ptr + 2 * N_SLICES + 1, stats.x_b, mask=is_own(label.target_b, span))
    if asks.every_class:
        tl.store(slice_ptr + 2 * plane, stats.smooth_sum)
        tl.store(slice_ptr + 3 * plane, stats.weight_total)
    if asks.statistics:
        tl.store(slice_ptr + 4 * plane, stats.gap_sum)
    n_published = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") + 1
    tl.debug_barrier()  # for the other waves: see draws_last
    return n_published


@triton.jit
def publish_shard(stats, shards_ptr, rows, exist, n_rows, asks: tl.constexpr):
    """Stores the statistics of rows of a shard, as above."""
    row_ptr = shards_ptr + rows
    tl.store(row_ptr, stats.max, mask=exist)
    tl.store(row_ptr + n_rows, stats.rest, mask=exist)
    tl.store(row_ptr + 2 * n_rows, stats.x_t, mask=exist)
    if asks.every_class or asks.two_labels:
        tl.store(row_ptr + 3 * n_rows, stats.weight_total, mask=exist)
        tl.store(row_ptr + 4 * n_rows, stats.smooth_sum, mask=exist)
    if asks.two_labels:
        tl.store(row_ptr + 5 * n_rows, stats.x_b, mask=exist)
    if asks.statistics:
        N_BEFORE: tl.constexpr = 6 if asks.two_labels else 5 if asks.every_class else 3
        tl.store(row_ptr + N_BEFORE * n_rows, stats.gap_sum, mask=exist)


@triton.jit
def label_logits_of_shards(shards_ptr, rows, mask, n_rows, asks: tl.constexpr):
    """The labels' logits wherever they lie; 0 of what is no label."""
    x_t = tl.load(shards_ptr + 2 * n_rows + rows, mask=mask, other=0.0)
    x_b = tl.zeros_like(x_t)
    if asks.two_labels:
        x_b = tl.load(shards_ptr + 5 * n_rows + rows, mask=mask, other=0.0)
    return x_t, x_b


@triton.jit
def wait_for(arrived_ptr, arrived, n):
    """Returns when n programs have published. One thread looks; a barrier holds the others until it has seen it."""
    while arrived < n:
        arrived = tl.atomic_add(arrived_ptr, 0, sem="acquire")
    tl.debug_barrier()  # for the other waves: see draws_last


@triton.jit
def merge_slices(stats, slices_ptr, row, n_rows, asks: tl.constexpr, shape: tl.constexpr):
    """The statistics of the row, of which `stats` are a slice's."""
    N_SLICES: tl.constexpr = shape.n_slices
    PLACES: tl.constexpr = shape.n_places
    N_PAIRS: tl.constexpr = N_SLICES + 1 if shares_labels(asks, shape) else N_SLICES
    index = tl.arange(0, PLACES)
    mask = index < N_SLICES
    slice_ptr = slices_ptr + row * PLACES + index
    plane = n_rows * PLACES  # int32 does: a slice has a thousand columns or more
    # .cg: other SMs wrote these, L1 may hold an old line.
    pairs_ptr = slices_ptr + 2 * row * PLACES + 2 * index[:, None] + tl.arange(0, 2)[None, :]
    firsts, rests = tl.split(tl.load(pairs_ptr, mask=index[:, None] < N_PAIRS, other=0.0, cache_modifier=".cg"))
    maxima = tl.where(mask, firsts, float("-inf"))
    row_max = tl.max(maxima, 0)
    # Products are masked, not factors: fused with the sum's first step, threads would round them differently.
    rest = tl.sum(tl.where(mask, rests * tl.exp(maxima - finite_max(row_max)), 0.0), 0)
    x_t, x_b = stats.x_t, stats.x_b
    if shares_labels(asks, shape):
        x_t = tl.sum(tl.where(index == N_SLICES, firsts, 0.0), 0)
        if asks.two_labels:
            x_b = tl.sum(tl.where(index == N_SLICES, rests, 0.0), 0)
    smooth_sum, weight_total = stats.smooth_sum, stats.weight_total
    if asks.every_class:
        sums = tl.load(slice_ptr + 2 * plane, mask=mask, other=0.0, cache_modifier=".cg")
        weights = tl.load(slice_ptr + 3 * plane, mask=mask, other=0.0, cache_modifier=".cg")
        if asks.shifts_to_max:
            sums += weights * (finite_max(row_max) - finite_max(maxima))
        smooth_sum, weight_total = tl.sum(sums, 0), tl.sum(weights, 0)
    gap_sum = stats.gap_sum
    if asks.statistics:
        gaps = tl.load(slice_ptr + 4 * plane, mask=mask, other=0.0, cache_modifier=".cg")
        gaps += rests * (finite_max(row_max) - finite_max(maxima))
        gap_sum = tl.sum(tl.where(mask, gaps * tl.exp(maxima - finite_max(row_max)), 0.0), 0)
    return RowStats(
        max=row_max,
        rest=rest,
        x_t=x_t,
        x_b=x_b,
        shift=stats.shift,
        smooth_sum=smooth_sum,
        weight_total=weight_total,
        gap_sum=gap_sum,
    )
