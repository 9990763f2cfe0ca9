"""The batch reduction at the end of the forward: done by whichever program finishes last, in the same launch.

Each program stores two partial sums and draws a ticket from an atomic counter; the one that draws the last ticket adds all
partials in the order of the programs. So the result does not depend on the order in which programs ran, and no float is
ever added atomically. (The technique of CUDA's threadFenceReduction sample.) Where programs are many, groups of
them do so first. Where tickets are dear there is none, and finish_kernel does what is left (finish.py).

Statistics are counted in the same way: a program leaves a tally of its own rows, and the last one adds up those of programs.
Only "max" and "topk" keep every row's loss, and the last program selects among them (radix.py); of many rows, launches of their
own do so (selection.py).
"""

import triton
import triton.language as tl

from . import constants
from .groups import Tally
from .keys import key_from_int64, loss_from_sortable_bits, sortable_bits
from .radix import kth_largest, largest, sum_above
from .rowwise import STATE

PARTIALS_BLOCK = tl.constexpr(constants.PARTIALS_BLOCK)
TALLIES_BLOCK = tl.constexpr(constants.PARTIALS_BLOCK // 2)  # twice two registers of each: more would spill in a single warp
MAX_UNGROUPED = tl.constexpr(constants.MAX_UNGROUPED)
N_GROUPS = tl.constexpr(constants.N_GROUPS)
FRACTION_BITS = tl.constexpr(constants.FRACTION_BITS)
HALF = tl.constexpr(1 << (constants.FRACTION_BITS - 1))
COUNT_BITS = tl.constexpr(32)  # a program or a group has fewer rows: two counts are one integer
COUNT_MASK = tl.constexpr(2**32 - 1)
NO_ROW = tl.constexpr(2**63 - 1)  # after all rows


@triton.jit
def draws_last(ticket_ptr, n):
    """Whether this is the last of n programs to draw this ticket; what the others stored before they drew theirs is published.

    Store scalars: the thread that stores them is the one that draws the ticket, so that acq_rel orders the two. Triton up to
    3.7.1 puts no CTA barrier between a tensor store and an atomic.
    """
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == n - 1
    tl.debug_barrier()  # it acquires for the other waves: on RDNA those of the other compute unit have a cache of their own
    tl.store(ticket_ptr, 0, mask=last)  # ready for the next launch, or the next replay of a CUDA graph
    return last


@triton.jit
def _draws_last_of_its_group(ticket_ptr, program, n_programs):
    """Whether all other programs have drawn, or of many those of this one's group, which are every N_GROUPS-th."""
    group, n_members = _group(program, n_programs)
    grouped = n_programs > MAX_UNGROUPED
    # One atomic with one of two addresses: a fused row draws in two places, and would have two in each.
    return draws_last(ticket_ptr + tl.where(grouped, 1 + group, 0), tl.where(grouped, n_members, n_programs))


@triton.jit
def _group(program, n_programs):
    """The program's group, and how many programs that has."""
    group = program & (N_GROUPS - 1)  # of a power of two
    return group, (n_programs - 1 - group) // N_GROUPS + 1


@triton.jit
def _finishes_last(work, program, n_programs, N_SUMS: tl.constexpr):
    """Whether the last of a group, or of few programs, is the last of all. Of many, it adds its group up first."""
    last = tl.full((), 1, tl.int1)
    if n_programs > MAX_UNGROUPED:
        add_up_group(work, program, n_programs, N_SUMS)
        last = draws_last(work.ticket, N_GROUPS)
    return last


@triton.jit
def add_up_group(work, program, n_programs, N_SUMS: tl.constexpr):
    """Adds up the partials of a program's group in the place of the first: 65536 partials would be 64 journeys to L2, one after
    the other, for a program that all others have left alone, and as many atomics on one address."""
    group, n_members = _group(program, n_programs)
    for i in tl.static_range(N_SUMS):
        group_ptr = work.partial + i * n_programs + group
        tl.store(group_ptr, sum_partials(group_ptr, n_members, N_GROUPS).to(work.partial.dtype.element_ty))
    if work.tallies is not None:
        group_ptr = work.tallies + group
        tally = _merge_tallies(group_ptr, n_programs, n_members, N_GROUPS, work.partial.dtype.element_ty)
        _store_tally(group_ptr, n_programs, tally)


@triton.jit
def sum_left(partial_ptr, n_programs):
    """The sum of all programs' values, or of those that add_up_group has left."""
    return sum_partials(partial_ptr, _n_left(n_programs))


@triton.jit
def _n_left(n_programs):
    return tl.where(n_programs > MAX_UNGROUPED, N_GROUPS, n_programs)


@triton.jit
def sum_partials(partial_ptr, n, stride=1):
    """The sum of n values, in float64, that other programs left."""
    total = tl.zeros((), tl.float64)
    for start in range(0, n, PARTIALS_BLOCK):
        index = start + tl.arange(0, PARTIALS_BLOCK)
        # The last block is rarely full. .cg: other SMs wrote these, L1 may hold an old line.
        partials = tl.load(partial_ptr + index * stride, mask=index < n, other=0.0, cache_modifier=".cg")
        total += tl.sum(partials.to(tl.float64), 0)  # per block: kept per lane they would be 64 registers of a single warp
    return total


@triton.jit
def publish(out, work, value, tally, program, n_programs):
    """For a program that knows its value, but may have more to do, for which nobody has to wait. Whether it is among the last,
    which then call sum_over_programs. tally: None without statistics."""
    last_of_group = tl.full((), 1, tl.int1)
    if work.partial is not None:
        tl.store(work.partial + program, value)
        if tally is not None:
            _store_tally(work.tallies + program, n_programs, tally)
        if work.ticket is not None:
            last_of_group = _draws_last_of_its_group(work.ticket, program, n_programs)
        else:
            last_of_group = tl.full((), 0, tl.int1)
    elif tally is not None:
        _store_counts(out, tally)
    return last_of_group


@triton.jit
def sum_over_programs(out, work, value, program, n_programs):
    """Sum of all programs' values, for the program that finishes last, which also adds up their tallies: (sum, whether this is
    the one)."""
    total = value.to(tl.float64)
    last = tl.full((), 1, tl.int1)
    if work.ticket is not None:
        last = _finishes_last(work, program, n_programs, 1)
        if last:
            total = sum_left(work.partial, n_programs)
            if work.tallies is not None:
                add_up_tallies(out, work, n_programs)
    return total, last


@triton.jit
def mean_coefficient(scale, count):
    """scale / count; nan, as in PyTorch, where no row counts, or only rows of weight 0, to which smoothing may give a loss."""
    return scale / tl.where(count == 0, float("nan"), count)


@triton.jit
def store_stats(out, rows, exist, counted, correct, lse, loss, entropy, n_rows):
    """What the caller gets of rows, or of one: (3, n_rows) of lse, loss and entropy, 0 where it does not count. Returns their
    tally."""
    tl.store(out.row_stats + rows, tl.where(counted, lse, 0.0), mask=exist)
    tl.store(out.row_stats + n_rows + rows, tl.where(counted, loss, 0.0), mask=exist)
    tl.store(out.row_stats + 2 * n_rows + rows, tl.where(counted, entropy, 0.0), mask=exist)
    key = sortable_bits(loss)
    key = tl.where(counted, key, key * 0)
    n_counted, n_correct = counted.to(tl.int32), (counted & correct).to(tl.int32)
    if len(loss.shape) > 0:
        worst_key = tl.max(key, 0)
        key, rows = worst_key, tl.min(tl.where(key == worst_key, rows.to(tl.int64), NO_ROW), 0)
        n_counted, n_correct = tl.sum(n_counted, 0), tl.sum(n_correct, 0)
    return Tally(counted=n_counted, correct=n_correct, worst_key=key, worst=rows)


@triton.jit
def _store_tally(tally_ptr, n_programs, tally):
    tl.store(tally_ptr, tally.counted.to(tl.int64) | (tally.correct.to(tl.int64) << COUNT_BITS))
    tl.store(tally_ptr + n_programs, tally.worst_key.to(tl.int64))
    tl.store(tally_ptr + 2 * n_programs, tally.worst.to(tl.int64))


@triton.jit
def _merge_tallies(tally_ptr, n_programs, n, stride, dtype: tl.constexpr):
    """The tally of n programs, whose losses have this dtype. Programs have their rows in order; groups of them, which have not,
    are a single block."""
    counted, correct = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    worst_key = key_from_int64(counted, dtype)
    block = tl.zeros((), tl.int32)
    for start in range(0, n, TALLIES_BLOCK):
        index = start + tl.arange(0, TALLIES_BLOCK)
        counts = tl.load(tally_ptr + index * stride, mask=index < n, other=0, cache_modifier=".cg")
        key = tl.max(_load_keys(tally_ptr + n_programs, index, n, stride, dtype), 0)
        counted += tl.sum(counts & COUNT_MASK, 0)
        correct += tl.sum(counts >> COUNT_BITS, 0)
        block = tl.where(key > worst_key, start, block).to(tl.int32)  # of equal ones the first
        worst_key = tl.maximum(key, worst_key)
    index = block + tl.arange(0, TALLIES_BLOCK)
    tied = (index < n) & (_load_keys(tally_ptr + n_programs, index, n, stride, dtype) == worst_key)
    rows = tl.load(tally_ptr + 2 * n_programs + index * stride, mask=tied, other=NO_ROW, cache_modifier=".cg")
    return Tally(counted=counted, correct=correct, worst_key=worst_key, worst=tl.min(rows, 0))


@triton.jit
def _load_keys(key_ptr, index, n, stride, dtype: tl.constexpr):
    return key_from_int64(tl.load(key_ptr + index * stride, mask=index < n, other=0, cache_modifier=".cg"), dtype)


@triton.jit
def add_up_tallies(out, work, n_programs):
    """Of all programs, by the last one."""
    _store_counts(out, _merge_tallies(work.tallies, n_programs, _n_left(n_programs), 1, out.row_stats.dtype.element_ty))


@triton.jit
def _store_counts(out, tally):
    """out.counts: rows that count, those whose target is the largest logit, and the first with the largest loss, or -1."""
    tl.store(out.counts, tally.counted.to(tl.int64))
    tl.store(out.counts + 1, tally.correct.to(tl.int64))
    tl.store(out.counts + 2, tl.where(tally.worst_key == 0, -1, tally.worst.to(tl.int64)))


@triton.jit
def store_rows(out, rows, exist, counted, loss, stats, scale, n_rows, asks: tl.constexpr):
    """What a forward leaves per row: the loss itself, statistics for the backward, losses to select among."""
    if asks.reduction == "none":
        tl.store(out.loss + rows, scale * loss, mask=exist)
    if asks.saves:
        row_ptr = out.saved + STATE + rows
        tl.store(row_ptr, stats.max, mask=exist)
        tl.store(row_ptr + n_rows, stats.rest, mask=exist)
        tl.store(row_ptr + 2 * n_rows, tl.where(counted, loss, float("-inf")), mask=exist)
        if asks.probabilities:
            tl.store(row_ptr + 3 * n_rows, stats.weight_total, mask=exist)


@triton.jit
def _store_coefficient(out, coefficient, mask, asks: tl.constexpr):
    """The head of `saved` where no rows are selected; whoever has W stores it."""
    tl.store(out.saved, coefficient, mask=mask)
    if asks.saves:
        tl.store(out.saved + 1, 0.0, mask=mask)
        tl.store(out.saved + 2, 0.0, mask=mask)


@triton.jit
def reduce_batch(
    out,
    work,
    loss_sum,  # of this program's rows
    count,  # of this program's rows: counted rows, or for the mean the sum of their weights
    tally,  # of this program's rows; None without statistics
    scale,
    top_k,
    program,
    n_programs,
    n_rows,
    asks: tl.constexpr,
):
    """Writes the batch loss, if the reduction has one, the coefficients for the backward, and the counts, if asked for."""
    if asks.reduction == "none" and out.row_stats is None:  # nothing to add up
        _store_coefficient(out, scale, program == 0, asks)
    else:
        if asks.reduction == "max" or asks.reduction == "topk":
            # Row losses were stored by many threads, and are read by others of this CTA, or published by one thread's atomic.
            tl.debug_barrier()
        if work.partial is None:
            if tally is not None:
                _store_counts(out, tally)
            _write_loss(out, work, loss_sum.to(tl.float64), count.to(tl.float64), scale, top_k, n_rows, asks)
        else:
            tl.store(work.partial + n_programs + program, count)
            last_of_group = publish(out, work, loss_sum, tally, program, n_programs)
            # Triton would work out all sides of an `and`.
            if work.ticket is not None:  # noqa: SIM102
                if last_of_group:  # noqa: SIM102
                    if _finishes_last(work, program, n_programs, 2):
                        finish_batch(out, work, scale, top_k, n_programs, n_rows, asks)


@triton.jit
def finish_batch(out, work, scale, top_k, n_programs, n_rows, asks: tl.constexpr):
    """What is left to do when all programs, or all groups of many, have left their sums."""
    if work.tallies is not None:
        add_up_tallies(out, work, n_programs)
    loss_sum, count = sum_left(work.partial, n_programs), sum_left(work.partial + n_programs, n_programs)
    _write_loss(out, work, loss_sum, count, scale, top_k, n_rows, asks)


@triton.jit
def _write_loss(out, work, loss_sum, count, scale, top_k, n_rows, asks: tl.constexpr):
    """The batch loss and the coefficients for the backward, from float64 sums: exact counts, no error beyond the rows'."""
    dtype: tl.constexpr = out.saved.dtype.element_ty  # a loss in bfloat16 is rounded from float32: no target rounds float64
    scale = scale.to(tl.float64)
    if asks.reduction == "none":  # every row has its loss
        _store_coefficient(out, scale, True, asks)
    elif asks.reduction == "sum":
        tl.store(out.loss, (scale * loss_sum).to(dtype))
        _store_coefficient(out, scale, True, asks)
    elif asks.reduction == "mean":
        coefficient = mean_coefficient(scale, count)
        tl.store(out.loss, (coefficient * loss_sum).to(dtype))
        _store_coefficient(out, coefficient, True, asks)
    else:
        n_counted = count.to(tl.int64)
        k = _rows_to_select(n_counted, top_k, asks)
        if work.selection is not None:
            begin_selection(work.selection, k, n_counted)
        else:
            row_loss_ptr = out.saved + STATE + 2 * n_rows
            if asks.reduction == "max":
                threshold = largest(row_loss_ptr, n_rows)
            else:
                threshold = kth_largest(row_loss_ptr, k, n_rows)
            above_sum, n_above, n_tied = sum_above(row_loss_ptr, threshold, n_rows, 0, PARTIALS_BLOCK)
            store_selected(out, threshold, above_sum, n_above, n_tied, k, n_counted, scale)


@triton.jit
def begin_selection(selection_ptr, k, n_counted):
    """(4,) int64: the key of the k-th largest as far as it is known, the rank in what shares it, k, and the rows that count."""
    tl.store(selection_ptr, tl.zeros((), tl.int64))
    tl.store(selection_ptr + 1, k)
    tl.store(selection_ptr + 2, k)
    tl.store(selection_ptr + 3, n_counted)


@triton.jit
def store_selected(out, threshold, above_sum, n_above, n_tied, k, n_counted, scale):
    """The loss of the k rows above a threshold, or tied with it, and the coefficients for the backward."""
    dtype: tl.constexpr = out.saved.dtype.element_ty
    threshold_loss = loss_from_sortable_bits(threshold)
    share = (k - n_above).to(tl.float64)
    # Rows that do not count hold -inf, too; a row that counts has that loss under a negative weight, and they are no tie.
    n_tied = tl.minimum(n_tied, n_counted - n_above)
    # With every row selected the threshold may be infinite or 0; 0 * inf must not enter the sum.
    tied_sum = tl.where(share > 0, share * threshold_loss.to(tl.float64), 0.0)
    # Where no row counts, all are "above" a threshold that no row set, and their -inf must not enter the sum either.
    total = tl.where(n_counted > 0, above_sum + tied_sum, 0.0)
    k = k.to(tl.float64)
    tl.store(out.loss, (scale * (total / k)).to(dtype))  # 0 / 0 is nan where no row counts
    tl.store(out.saved, scale / k)
    tl.store(out.saved + 1, scale * (share / (n_tied.to(tl.float64) * k)))
    tl.store(out.saved + 2, threshold_loss)


@triton.jit
def _rows_to_select(n_counted, top_k, asks: tl.constexpr):
    if asks.reduction == "max":
        k = n_counted * 0 + 1
    elif asks.top_k_is_fraction:  # integers, so that the host's reference agrees to the last row
        k = tl.maximum((n_counted * top_k + HALF) >> FRACTION_BITS, 1)
    else:
        k = top_k.to(tl.int64)
    return tl.minimum(k, n_counted)
