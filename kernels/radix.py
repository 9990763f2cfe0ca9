"""Radix selection among the losses of rows (Alabi et al. 2012, "Fast k-selection algorithms for graphics processing units"): the
k-th largest is found 8 bits at a time from the top, in 4 passes over n_rows values in L2 for float32, whatever k is.
"""

import triton
import triton.language as tl

from . import constants
from .keys import sortable_bits

PARTIALS_BLOCK = tl.constexpr(constants.PARTIALS_BLOCK)
DIGIT_BITS = tl.constexpr(constants.DIGIT_BITS)
N_DIGITS = tl.constexpr(1 << constants.DIGIT_BITS)


@triton.jit
def _row_keys(row_loss_ptr, start, n_rows):
    index = start + tl.arange(0, PARTIALS_BLOCK)
    mask = index < n_rows
    # Rows that do not count hold -inf, the least key: k never reaches them. So does the ragged end, which is masked besides.
    loss = tl.load(row_loss_ptr + index, mask=mask, other=float("-inf"), cache_modifier=".cg")
    return loss, sortable_bits(loss), mask


@triton.jit
def largest(row_loss_ptr, n_rows):
    _, keys, _ = _row_keys(row_loss_ptr, 0, n_rows)
    key = tl.max(keys, 0)
    for start in range(PARTIALS_BLOCK, n_rows, PARTIALS_BLOCK):
        _, keys, _ = _row_keys(row_loss_ptr, start, n_rows)
        key = tl.maximum(key, tl.max(keys, 0))
    return key


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
def kth_largest(row_loss_ptr, k, n_rows):
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
    total = tl.zeros((), tl.float64)
    n_above, n_tied = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    for start in range(first, n_rows, step):
        loss, key, mask = _row_keys(row_loss_ptr, start, n_rows)
        above = mask & (key > threshold)
        # Per block: kept per lane, of which a single warp has 32 a thread, they would be 128 registers of every program.
        total += tl.sum(tl.where(above, loss.to(tl.float64), 0.0), 0)
        n_above += tl.sum(above.to(tl.int32), 0)
        n_tied += tl.sum((mask & (key == threshold)).to(tl.int32), 0)
    return total, n_above, n_tied
