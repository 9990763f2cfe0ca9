"""The batch reduction at the end of the forward: done by whichever program finishes last, in the same launch.

Each program stores two partial sums and draws a ticket from an atomic counter; the one that draws the last ticket adds all
partials in the order of the programs. So the result does not depend on the order in which programs ran, and no float is
ever added atomically. (The technique of CUDA's threadFenceReduction sample.) Where programs are many, groups of
them do so first.

"max" and "topk" keep every row's loss; the last program selects among them. The k-th largest is found by radix selection,
8 bits at a time from the top (Alabi et al. 2012, "Fast k-selection algorithms for graphics processing units"): 4 passes over
n_rows values in L2 for float32, whatever k is. Of many rows, the passes are launches of many programs (selection.py).
"""

import triton
import triton.language as tl

from . import constants
from .keys import loss_from_sortable_bits, sortable_bits
from .rowwise import STATE

PARTIALS_BLOCK = tl.constexpr(constants.PARTIALS_BLOCK)
MAX_UNGROUPED = tl.constexpr(constants.MAX_UNGROUPED)
N_GROUPS = tl.constexpr(constants.N_GROUPS)
DIGIT_BITS = tl.constexpr(constants.DIGIT_BITS)
N_DIGITS = tl.constexpr(1 << constants.DIGIT_BITS)
FRACTION_BITS = tl.constexpr(constants.FRACTION_BITS)
HALF = tl.constexpr(1 << (constants.FRACTION_BITS - 1))


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
def _finishes_last(partial_ptr, ticket_ptr, program, n_programs, N_SUMS: tl.constexpr):
    """Whether all other programs have finished. Of many, those of a group, every N_GROUPS-th, have added up their partials in the
    place of the first: 65536 partials would be 64 journeys to L2, one after the other, for a program that all others have left
    alone, and as many atomics on one address."""
    if n_programs > MAX_UNGROUPED:
        group = program & (N_GROUPS - 1)  # of a power of two
        n_members = (n_programs - 1 - group) // N_GROUPS + 1
        last = draws_last(ticket_ptr + 1 + group, n_members)
        if last:
            for i in tl.static_range(N_SUMS):
                group_ptr = partial_ptr + i * n_programs + group
                tl.store(group_ptr, sum_partials(group_ptr, n_members, N_GROUPS).to(partial_ptr.dtype.element_ty))
            last = draws_last(ticket_ptr, N_GROUPS)
    else:
        last = draws_last(ticket_ptr, n_programs)
    return last


@triton.jit
def _sum_left(partial_ptr, n_programs):
    """The sum of what _finishes_last has left."""
    return sum_partials(partial_ptr, tl.where(n_programs > MAX_UNGROUPED, N_GROUPS, n_programs))


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
def sum_over_programs(work, value, program, n_programs):
    """Sum of all programs' values, for the program that finishes last: (sum, whether this is the one)."""
    total = value.to(tl.float64)
    last = True
    if work.ticket is not None:
        tl.store(work.partial + program, value)
        last = _finishes_last(work.partial, work.ticket, program, n_programs, 1)
        if last:
            total = _sum_left(work.partial, n_programs)
    return total, last


@triton.jit
def mean_coefficient(scale, count):
    """scale / count; nan, as in PyTorch, where no row counts, or only rows of weight 0, to which smoothing may give a loss."""
    return scale / tl.where(count == 0, float("nan"), count)


@triton.jit
def store_stats(out, work, rows, exist, counted, correct, lse, loss, entropy, n_rows):
    """What a row leaves for count_rows, and for the caller: (3, n_rows) of lse, loss and entropy, 0 where it does not count."""
    tl.store(out.row_stats + rows, tl.where(counted, lse, 0.0), mask=exist)
    tl.store(out.row_stats + n_rows + rows, tl.where(counted, loss, 0.0), mask=exist)
    tl.store(out.row_stats + 2 * n_rows + rows, tl.where(counted, entropy, 0.0), mask=exist)
    tl.store(work.flags + rows, counted.to(tl.int8) + (counted & correct).to(tl.int8), mask=exist)
    tl.debug_barrier()  # many threads stored, one of them will say that the program is done


@triton.jit
def count_rows(out, work, n_rows):
    """out.counts: rows that count, those whose target is the largest logit, and the first with the largest loss, or -1."""
    lanes = tl.arange(0, PARTIALS_BLOCK)
    # A lane's own rows fit int32. With a single warp a thread has 32 lanes, and int64 would spill.
    n_counted = tl.zeros((PARTIALS_BLOCK,), tl.int32)
    n_correct = tl.zeros((PARTIALS_BLOCK,), tl.int32)
    worst_key = sortable_bits(tl.zeros((PARTIALS_BLOCK,), out.row_stats.dtype.element_ty)) * 0
    worst_block = tl.full((PARTIALS_BLOCK,), -1, tl.int32)
    for start in range(0, n_rows, PARTIALS_BLOCK):
        rows = start + lanes
        mask = rows < n_rows
        flags = tl.load(work.flags + rows, mask=mask, other=0, cache_modifier=".cg")
        loss = tl.load(out.row_stats + n_rows + rows, mask=mask, other=0.0, cache_modifier=".cg")
        n_counted += (flags > 0).to(tl.int32)
        n_correct += (flags > 1).to(tl.int32)
        key = tl.where(flags > 0, sortable_bits(loss), worst_key * 0)  # no loss has the key 0
        # A lane meets its rows in order: the first of equal ones.
        worst_block = tl.where(key > worst_key, (rows // PARTIALS_BLOCK).to(tl.int32), worst_block)
        worst_key = tl.maximum(worst_key, key)
    worst = tl.where(worst_block < 0, -1, worst_block.to(tl.int64) * PARTIALS_BLOCK + lanes)
    first = tl.min(tl.where(worst_key == tl.max(worst_key, 0), worst, n_rows), 0)
    tl.store(out.counts, tl.sum(n_counted.to(tl.int64), 0))
    tl.store(out.counts + 1, tl.sum(n_correct.to(tl.int64), 0))
    tl.store(out.counts + 2, first)


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
            if out.row_stats is not None:
                count_rows(out, work, n_rows)
            _write_loss(out, work, loss_sum.to(tl.float64), count.to(tl.float64), scale, top_k, n_rows, asks)
        else:
            tl.store(work.partial + program, loss_sum)
            tl.store(work.partial + n_programs + program, count)
            if _finishes_last(work.partial, work.ticket, program, n_programs, 2):
                if out.row_stats is not None:
                    count_rows(out, work, n_rows)
                total, counted = _sum_left(work.partial, n_programs), _sum_left(work.partial + n_programs, n_programs)
                _write_loss(out, work, total, counted, scale, top_k, n_rows, asks)


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
                threshold = _largest(row_loss_ptr, n_rows)
            else:
                threshold = _kth_largest(row_loss_ptr, k, n_rows)
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


@triton.jit
def _row_keys(row_loss_ptr, start, n_rows):
    index = start + tl.arange(0, PARTIALS_BLOCK)
    mask = index < n_rows
    # Rows that do not count hold -inf, the least key: k never reaches them. So does the ragged end, which is masked besides.
    loss = tl.load(row_loss_ptr + index, mask=mask, other=float("-inf"), cache_modifier=".cg")
    return loss, sortable_bits(loss), mask


@triton.jit
def _largest(row_loss_ptr, n_rows):
    _, largest, _ = _row_keys(row_loss_ptr, 0, n_rows)
    for start in range(PARTIALS_BLOCK, n_rows, PARTIALS_BLOCK):
        _, key, _ = _row_keys(row_loss_ptr, start, n_rows)
        largest = tl.maximum(largest, key)
    return tl.max(largest, 0)


@triton.jit
def digit_histogram(row_loss_ptr, prefix, shift, n_rows, first, step):
    """How often each digit, the 8 bits from `shift` on, occurs in keys that share the bits above it with prefix: in blocks of
    rows that begin at `first` and every `step` rows from there."""
    histogram = tl.zeros((N_DIGITS,), tl.int32)
    for start in range(first, n_rows, step):
        _, key, mask = _row_keys(row_loss_ptr, start, n_rows)
        same = (((key ^ prefix) >> shift) >> DIGIT_BITS) == 0  # in two steps: a shift by the full width is undefined
        digit = ((key >> shift) & (N_DIGITS - 1)).to(tl.int32)
        histogram += tl.histogram(digit, N_DIGITS, mask=mask & same)
    return histogram


@triton.jit
def choose_digit(histogram, rank):
    """The digit that has the rank-th largest key, and how many keys have a larger one."""
    at_least = tl.sum(histogram, 0) - tl.cumsum(histogram, 0) + histogram
    above = at_least - histogram
    chosen = (above < rank) & (at_least >= rank)  # exactly one digit
    return tl.sum(tl.where(chosen, tl.arange(0, N_DIGITS), 0), 0), tl.sum(tl.where(chosen, above, 0), 0)


@triton.jit
def _kth_largest(row_loss_ptr, k, n_rows):
    """Key of the k-th largest loss, k >= 1: its digits are found from the top, each from a histogram of the rows that share the
    digits above it."""
    N_BITS: tl.constexpr = row_loss_ptr.dtype.element_ty.primitive_bitwidth
    prefix = tl.max(sortable_bits(tl.zeros((1,), row_loss_ptr.dtype.element_ty)), 0) * 0  # an unsigned zero of the key's width
    rank = k
    for i in tl.static_range(N_BITS // DIGIT_BITS):
        shift = N_BITS - DIGIT_BITS * (i + 1)
        digit, n_above = choose_digit(digit_histogram(row_loss_ptr, prefix, shift, n_rows, 0, PARTIALS_BLOCK), rank)
        rank -= n_above
        prefix = prefix | (digit.to(prefix.dtype) << shift)
    return prefix


@triton.jit
def sum_above(row_loss_ptr, threshold, n_rows, first, step):
    """Sum and number of the losses above the threshold, and how many equal it; blocks as in digit_histogram."""
    total = tl.zeros((PARTIALS_BLOCK,), tl.float64)
    n_above = tl.zeros((PARTIALS_BLOCK,), tl.int32)  # of a lane: see count_rows
    n_tied = tl.zeros((PARTIALS_BLOCK,), tl.int32)
    for start in range(first, n_rows, step):
        loss, key, mask = _row_keys(row_loss_ptr, start, n_rows)
        above = mask & (key > threshold)
        total += tl.where(above, loss.to(tl.float64), 0.0)
        n_above += above.to(tl.int32)
        n_tied += (mask & (key == threshold)).to(tl.int32)
    return tl.sum(total, 0), tl.sum(n_above.to(tl.int64), 0), tl.sum(n_tied.to(tl.int64), 0)
