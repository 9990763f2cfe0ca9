"""Selection among the losses of many rows, for "max" and "topk": a launch per digit of the threshold, and one for the sum.

A pass over the losses of a million pixels is a thousand journeys to L2, one after the other, for the last program of the forward
(reduction.py); for as many programs as there are SMs it is eight each. Every pass needs what the one before has found, hence a
launch of its own: programs of one launch that wait for each other must all run at once, which nobody can promise beside other
streams.

    digit_kernel      8 bits of the k-th largest key: the histograms of all programs, added as integers, and the last one's choice
    selected_kernel   sum and number of the losses above the threshold, and those that tie: the batch loss and its coefficients
"""

import triton
import triton.language as tl
from fusedloss.kernels.reduction import (
    N_DIGITS,
    PARTIALS_BLOCK,
    choose_digit,
    digit_histogram,
    draws_last,
    store_selected,
    sum_above,
    sum_partials,
)
from fusedloss.kernels.rowwise import STATE, load_scale

HISTOGRAM = tl.constexpr(512)  # place among the counters: they are zeros, and zeros again after every launch


@triton.jit
def _threshold(selection_ptr, dtype: tl.constexpr):
    """What is known of it, as a key of losses of this dtype."""
    bits = tl.load(selection_ptr)
    return bits.to(tl.uint64, bitcast=True) if dtype == tl.float64 else bits.to(tl.uint32)


@triton.jit(do_not_specialize=["shift"])
def digit_kernel(
    selection_ptr,  # (4,) int64 in and out, see begin_selection
    saved_ptr,  # (4 + 3 n_rows,), see rowwise.py: row losses
    ticket_ptr,  # () int32, then counters: those from HISTOGRAM on are the digits'
    shift,  # of the digit
    n_rows,
):
    """Finds one digit of the k-th largest loss."""
    dtype: tl.constexpr = saved_ptr.dtype.element_ty
    first, step = tl.program_id(0) * PARTIALS_BLOCK, tl.num_programs(0) * PARTIALS_BLOCK
    prefix, rank = _threshold(selection_ptr, dtype), tl.load(selection_ptr + 1)
    histogram = digit_histogram(saved_ptr + STATE + 2 * n_rows, prefix, shift, n_rows, first, step)
    digits = tl.arange(0, N_DIGITS)
    tl.atomic_add(ticket_ptr + HISTOGRAM + digits, histogram, mask=histogram != 0, sem="relaxed")
    tl.debug_barrier()  # many threads added, one of them will say that the program is done
    if draws_last(ticket_ptr, tl.num_programs(0)):
        histogram = tl.load(ticket_ptr + HISTOGRAM + digits, cache_modifier=".cg")
        tl.debug_barrier()  # all have read before one of them clears
        tl.store(ticket_ptr + HISTOGRAM + digits, 0)
        digit, n_above = choose_digit(histogram, rank)
        tl.store(selection_ptr, (prefix | (digit.to(prefix.dtype) << shift)).to(tl.int64))
        tl.store(selection_ptr + 1, rank - n_above)


@triton.jit(do_not_specialize=["scale_bits"])
def selected_kernel(
    loss_ptr,  # () out
    saved_ptr,  # (4 + 3 n_rows,): the coefficients at its head out; in: row losses
    sums_ptr,  # (3, n_programs) float64 workspace
    ticket_ptr,  # () int32
    selection_ptr,  # (4,) int64
    scale_ptr,  # () or None
    scale_bits: "i64",
    n_rows,
):
    """The loss of the selected rows, whose threshold is known."""
    dtype: tl.constexpr = saved_ptr.dtype.element_ty
    program, n_programs = tl.program_id(0), tl.num_programs(0)
    threshold = _threshold(selection_ptr, dtype)
    above_sum, n_above, n_tied = sum_above(
        saved_ptr + STATE + 2 * n_rows, threshold, n_rows, program * PARTIALS_BLOCK, n_programs * PARTIALS_BLOCK
    )
    tl.store(sums_ptr + program, above_sum)
    tl.store(sums_ptr + n_programs + program, n_above.to(tl.float64))
    tl.store(sums_ptr + 2 * n_programs + program, n_tied.to(tl.float64))
    if draws_last(ticket_ptr, n_programs):
        total = sum_partials(sums_ptr, n_programs)
        above = sum_partials(sums_ptr + n_programs, n_programs)
        tied = sum_partials(sums_ptr + 2 * n_programs, n_programs)
        k, n_counted = tl.load(selection_ptr + 2), tl.load(selection_ptr + 3)
        scale = load_scale(scale_ptr, scale_bits, dtype).to(tl.float64)
        store_selected(loss_ptr, saved_ptr, threshold, total, above.to(tl.int64), tied.to(tl.int64), k, n_counted, scale)
