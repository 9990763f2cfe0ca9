"""Losses as unsigned integers of the same order, which a radix selection finds digit by digit."""

import triton
import triton.language as tl


@triton.jit
def sortable_bits(loss):
    """Unsigned integers in the order of the losses; every NaN is the greatest, -0.0 equals 0.0."""
    loss += 0.0
    if loss.dtype == tl.float64:
        bits = loss.to(tl.int64, bitcast=True)
        key = tl.where(bits < 0, ~bits, bits | -0x8000000000000000).to(tl.uint64, bitcast=True)
        return tl.where(loss != loss, tl.full(loss.shape, 0xFFFFFFFFFFFFFFFF, tl.uint64), key)
    else:
        bits = loss.to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, ~bits, bits | -0x80000000).to(tl.uint32, bitcast=True)
        return tl.where(loss != loss, tl.full(loss.shape, 0xFFFFFFFF, tl.uint32), key)


@triton.jit
def key_from_int64(bits, dtype: tl.constexpr):
    """A key of losses of this dtype, from where keys of both sizes are kept."""
    return bits.to(tl.uint64, bitcast=True) if dtype == tl.float64 else bits.to(tl.uint32)


@triton.jit
def loss_from_sortable_bits(key):
    """The inverse of sortable_bits."""
    if key.dtype == tl.uint64:
        bits = key.to(tl.int64, bitcast=True)
        return tl.where(bits < 0, bits & 0x7FFFFFFFFFFFFFFF, ~bits).to(tl.float64, bitcast=True)
    else:
        bits = key.to(tl.int32, bitcast=True)
        return tl.where(bits < 0, bits & 0x7FFFFFFF, ~bits).to(tl.float32, bitcast=True)
