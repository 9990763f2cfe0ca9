"""Packed rows in 16-byte accesses whatever a row is: a tile's run of rows as it lies, and its classes by gathers on chip.

Of 100 classes of bfloat16 a thread's part of a row is whole groups of 8 bytes, of odd numbers of classes single elements, and
kernels/tile.py accesses memory so. Here data changes hands once more. Emulated, 101 classes ask for 2.17 passes instead of 3.36,
and take 66 instructions per logit instead of 38; 37 classes 2.15 instead of 3.77, and 45 instead of 35. `gpu_tune.py` puts the
two functions in the place of those of that name, so that a GPU may say which is faster.
"""

import triton
import triton.language as tl
from fusedloss.kernels.tile import _packed_places


@triton.jit
def _run(ptr, n_rows, n_cols, RUN: tl.constexpr, VECTOR: tl.constexpr, shape: tl.constexpr):
    """This program's rows as they lie, 16 bytes a line: (addresses, places from the first element, elements to the last)."""
    first = tl.program_id(0).to(tl.int64) * shape.rows * n_cols  # rows are so many that this is a multiple
    places = (tl.arange(0, RUN // VECTOR) * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
    n_left = tl.maximum(tl.minimum(n_rows - tl.program_id(0) * shape.rows, shape.rows), 0) * n_cols  # as _packed_places has it
    return ptr + tl.multiple_of(first, VECTOR) + places, places, n_left


@triton.jit
def _load_lines(ptr, n_rows, n_cols, other, shape: tl.constexpr):
    """This program's packed rows, (lines, padded). other: beyond the last column, and in other rows: of where there are any, the
    last place of the run is beyond these rows, too."""
    VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    RUN: tl.constexpr = triton.next_power_of_2(shape.rows * shape.cols * shape.n_blocks)
    run_ptr, in_run, n_left = _run(ptr, n_rows, n_cols, RUN, VECTOR, shape)
    if n_left % VECTOR == 0:
        run = tl.load(run_ptr, mask=in_run < (n_left // VECTOR) * VECTOR, other=other)
    else:
        run = tl.load(run_ptr, mask=in_run < n_left, other=other)
    _, where, inside, _ = _packed_places(ptr, n_rows, n_cols, shape)
    starts, places = where  # in two steps: Triton 3.6 takes no tuple in a tuple
    offsets = starts + places
    offsets = tl.where(inside & (offsets < n_left), offsets, RUN - 1)
    values = tl.gather(tl.reshape(run, (RUN,)), tl.reshape(offsets, (offsets.shape[0] * offsets.shape[1],)), 0)
    return tl.reshape(values, offsets.shape)


@triton.jit
def _store_lines(ptr, values, n_rows, n_cols, shape: tl.constexpr):
    """The inverse of _load_lines."""
    VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    RUN: tl.constexpr = triton.next_power_of_2(shape.rows * shape.cols * shape.n_blocks)
    LINE: tl.constexpr = shape.n_turns * shape.n_blocks
    N_VALUES: tl.constexpr = values.shape[0] * values.shape[1]
    run_ptr, in_run, n_left = _run(ptr, n_rows, n_cols, RUN, VECTOR, shape)
    if shape.is_wide:
        start = (tl.arange(0, RUN // VECTOR) * VECTOR)[:, None]  # a row is longer than 16 bytes: one division for all of them
        row = start // n_cols
        col = start - row * n_cols + tl.arange(0, VECTOR)[None, :]
        line = row * shape.cols + tl.where(col >= n_cols, shape.cols, 0)
        col = tl.where(col >= n_cols, col - n_cols, col)
    else:
        line, col = tl.zeros_like(in_run), in_run
    place = line * shape.padded + col + (col.to(tl.uint32) // LINE).to(tl.int32) * (shape.padded - LINE)
    place = tl.minimum(tl.reshape(place, (RUN,)), N_VALUES - 1)
    run = tl.reshape(tl.gather(tl.reshape(values, (N_VALUES,)), place, 0), in_run.shape)
    if n_left % VECTOR == 0:
        tl.store(run_ptr, run, mask=in_run < (n_left // VECTOR) * VECTOR)
    else:
        tl.store(run_ptr, run, mask=in_run < n_left)
