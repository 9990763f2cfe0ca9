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

from . import constants
from .keys import key_from_int64
from .radix import N_DIGITS, PARTIALS_BLOCK, choose_digit, digit_histogram, sum_above
from .reduction import draws_last, store_selected, sum_partials
from .rowwise import STATE, load_scale

HISTOGRAM = tl.constexpr(constants.HISTOGRAM)


@triton.jit(do_not_specialize=["shift", "n_rows"])
def digit_kernel(
    out,  # in: the row losses in saved
    work,  # selection, in and out, see begin_selection; the ticket, and the digits' counters from HISTOGRAM on
    shift,  # of the digit
    n_rows,
):
    """Finds one digit of the k-th largest loss."""
    dtype: tl.constexpr = out.saved.dtype.element_ty
    first, step = tl.program_id(0) * PARTIALS_BLOCK, tl.num_programs(0) * PARTIALS_BLOCK
    prefix, rank = key_from_int64(tl.load(work.selection), dtype), tl.load(work.selection + 1)
    histogram = digit_histogram(out.saved + STATE + 2 * n_rows, prefix, shift, n_rows, first, step)
    digits = tl.arange(0, N_DIGITS)
    counters = work.ticket + HISTOGRAM + digits  # zeros, and zeros again after every launch
    tl.atomic_add(counters, histogram, mask=histogram != 0, sem="relaxed")
    tl.debug_barrier()  # many threads added, one of them will say that the program is done
    if draws_last(work.ticket, tl.num_programs(0)):
        histogram = tl.load(counters, cache_modifier=".cg")
        tl.debug_barrier()  # all have read before one of them clears
        tl.store(counters, 0)
        digit, n_above = choose_digit(histogram, rank)
        tl.store(work.selection, (prefix | (digit.to(prefix.dtype) << shift)).to(tl.int64))
        tl.store(work.selection + 1, rank - n_above)


@triton.jit(do_not_specialize=["n_rows"])
def selected_kernel(
    out,  # the loss, and the coefficients at the head of saved; in: the row losses in saved
    inputs,  # the scale, if it is a tensor
    work,  # sums, the ticket, selection
    scale: "fp64",
    n_rows,
):
    """The loss of the selected rows, whose threshold is known."""
    dtype: tl.constexpr = out.saved.dtype.element_ty
    program, n_programs = tl.program_id(0), tl.num_programs(0)
    threshold = key_from_int64(tl.load(work.selection), dtype)
    above_sum, n_above, n_tied = sum_above(
        out.saved + STATE + 2 * n_rows, threshold, n_rows, program * PARTIALS_BLOCK, n_programs * PARTIALS_BLOCK
    )
    tl.store(work.sums + program, above_sum)
    tl.store(work.sums + n_programs + program, n_above.to(tl.float64))
    tl.store(work.sums + 2 * n_programs + program, n_tied.to(tl.float64))
    if draws_last(work.ticket, n_programs):
        total = sum_partials(work.sums, n_programs)
        above = sum_partials(work.sums + n_programs, n_programs)
        tied = sum_partials(work.sums + 2 * n_programs, n_programs)
        k, n_counted = tl.load(work.selection + 2), tl.load(work.selection + 3)
        scale = load_scale(inputs, scale, dtype).to(tl.float64)
        store_selected(out, threshold, total, above.to(tl.int64), tied.to(tl.int64), k, n_counted, scale)
