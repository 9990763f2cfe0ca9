"""Several rows on chip: where a tile of rows lies in memory, reading and writing it. What is done with it is in tile_softmax.py.

A tile is held as a tuple of blocks of columns, (rows, cols) each, so that n_cols = 150 is 19 blocks of 8, not one of 256.
Blocks of a single column, (rows,), give every thread rows of its own: classes are reduced without its neighbours, and what is
worked out once per row is worked out by one thread, not by all that share the row.

Packed rows lie end to end. They are read and written as what they are in memory, one run of whole 16-byte groups, even where no
single row is: row_group = 2 rows of 10 floats are 5 groups. Each thread owns row_group consecutive rows, as tuples of columns,
and handles them in row_group turns, one row per turn. Data changes hands in shared memory between the 16 bytes that a thread
reads and its run: Triton wants both halves of a tl.split in one thread.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .label import load_target, load_targets_from


class Rows(NamedTuple):
    """The rows of a tile, (rows,) each but the first."""

    outer: Any  # () their block of the tensor
    inner: Any  # index there
    exist: Any  # the last tile of a block is rarely full
    index: Any  # among all rows


class Lines(NamedTuple):
    """Where the rows of a tile lie in a tensor."""

    ptr: Any  # (rows,) the first class of each
    col_stride: Any


class Sources(NamedTuple):
    """What a tile is read from: with class indices the second is the first again."""

    logits: Lines
    probabilities: Lines


class Held(NamedTuple):
    """Packed rows, which are read for all turns at once: for each turn its blocks. Of other rows ()."""

    x: Any
    q: Any  # class probabilities


@triton.jit
def _unzip(tile):
    """The lines of a tile (N, ROWS), each (ROWS,). Threads lie along the rows, the last axis, so that splitting moves no data."""
    N: tl.constexpr = tile.shape[0]
    ROWS: tl.constexpr = tile.shape[1]
    if N == 1:
        lines = (tl.reshape(tile, (ROWS,)),)
    else:
        evens, odds = tl.split(tl.permute(tl.reshape(tile, (N // 2, 2, ROWS)), (0, 2, 1)))
        evens, odds = _unzip(evens), _unzip(odds)
        lines = ()
        for i in tl.static_range(N // 2):
            lines = lines + (evens[i], odds[i])
    return lines


@triton.jit
def _zip(lines):
    """The inverse of _unzip."""
    N: tl.constexpr = len(lines)
    ROWS: tl.constexpr = lines[0].shape[0]
    if N == 1:
        tile = tl.reshape(lines[0], (1, ROWS))
    else:
        pairs = tl.join(_zip(lines[::2]), _zip(lines[1::2]))
        tile = tl.reshape(tl.permute(pairs, (0, 2, 1)), (N, ROWS))
    return tile


@triton.jit
def by_turn(rows, N_TURNS: tl.constexpr):
    """Values of rows (rows,) as a tuple: of the first row of each group, of the second, ..."""
    if N_TURNS > 1:
        turns = _unzip(tl.trans(tl.reshape(rows, (rows.shape[0] // N_TURNS, N_TURNS))))
    else:
        turns = (rows,)
    return turns


@triton.jit
def by_row(turns):
    """The inverse of by_turn."""
    if len(turns) > 1:
        rows = tl.reshape(tl.trans(_zip(turns)), (len(turns) * turns[0].shape[0],))
    else:
        rows = turns[0]
    return rows


@triton.jit
def one_thread_each(rows):
    """Drops copies: afterwards exactly one thread holds each row's value, so that a row's arithmetic is done once."""
    ROWS: tl.constexpr = rows.shape[0]
    if ROWS > 1:
        low, high = tl.split(tl.trans(tl.reshape(rows, (2, ROWS // 2))))
        rows = tl.reshape(tl.trans(tl.join(low, high)), (ROWS,))
    return rows


@triton.jit
def tile_rows(layout, n_rows, shape: tl.constexpr):
    """This program's rows."""
    ROWS: tl.constexpr = shape.rows
    n_inner = n_rows if layout.n_inner is None else layout.n_inner
    if shape.is_packed:  # a single block of rows
        outer = tl.zeros((), tl.int64)
        inner = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    else:
        n_inner = _multiple(n_inner, shape) if shape.rows_contiguous else n_inner
        tiles_per_outer = tl.maximum(tl.cdiv(n_inner, ROWS), 1)
        outer = (tl.program_id(0) // tiles_per_outer).to(tl.int64)  # int64: offsets pass 2**31
        inner = (tl.program_id(0) % tiles_per_outer) * ROWS + tl.arange(0, ROWS)
    return Rows(outer=outer, inner=inner, exist=inner < n_inner, index=outer * n_inner + inner)


@triton.jit
def _multiple(value, shape: tl.constexpr):
    """The same value, as a multiple of shape.vector that the compiler can see.

    Triton looks at an argument's divisibility by 16 only: 1000 columns of bfloat16 are whole 16-byte groups, but without the
    proof each would be loaded on its own. Masks need it too: they must be constant over a group.
    """
    VECTOR: tl.constexpr = shape.vector
    return (value // VECTOR) * VECTOR


@triton.jit
def tile_cols(layout, shape: tl.constexpr):
    """n_cols, as a multiple where that is what allows wide accesses."""
    n_cols = layout.n_cols
    if shape.is_packed and not shape.is_wide:
        n_cols = shape.n_blocks
    elif shape.is_packed or not shape.rows_contiguous:
        n_cols = _multiple(n_cols, shape)
    return n_cols


@triton.jit
def tile_lines(ptr, strides, rows, shape: tl.constexpr):
    """Where a tile's rows lie in a tensor."""
    row_stride, col_stride = strides.row, strides.col
    if shape.rows_contiguous:
        col_stride = _multiple(col_stride, shape)
    else:
        row_stride = _multiple(row_stride, shape)
    ptrs = ptr + rows.outer * _multiple(strides.outer, shape) + rows.inner.to(tl.int64) * row_stride
    return Lines(ptr=ptrs, col_stride=col_stride)


@triton.jit
def tile_sources(inputs, layout, rows, asks: tl.constexpr, shape: tl.constexpr):
    logits = tile_lines(inputs.logits, layout.logits, rows, shape)
    probabilities = tile_lines(inputs.target, layout.probabilities, rows, shape) if asks.probabilities else logits
    return Sources(logits=logits, probabilities=probabilities)


@triton.jit
def load_turn_targets(turn_rows, rows, problem, asks: tl.constexpr, shape: tl.constexpr):
    """The class indices of each turn's rows; with class probabilities anything."""
    targets = turn_rows
    if not asks.probabilities:
        if shape.is_packed:
            first = tl.program_id(0) * shape.rows
            target = load_targets_from(first, problem.inputs.target, rows.index, problem.n_rows, asks)
        else:
            target = load_target(problem.inputs.target, rows.index, rows.exist, asks)
        targets = by_turn(target, shape.n_turns)
    return targets


@triton.jit
def load_held(inputs, n_rows, n_cols, asks: tl.constexpr, shape: tl.constexpr):
    """Reads packed rows, those before n_rows."""
    x = _load_packed(inputs.logits, n_rows, n_cols, float("-inf"), shape) if shape.is_packed else ()
    q = _load_packed(inputs.target, n_rows, n_cols, 0.0, shape) if shape.is_packed and asks.probabilities else ()
    return Held(x=x, q=q)


@triton.jit
def _packed_places(ptr, n_rows, n_cols, shape: tl.constexpr):
    """Where this program's packed rows lie, a line per thread's run or part of a row: (addresses, offsets from the first element
    as a sum of two, which of the line's padded places are its own, elements from the first to the tensor's end)."""
    LINE: tl.constexpr = shape.n_turns * shape.n_blocks
    ROWS: tl.constexpr = shape.rows
    first = tl.program_id(0) * ROWS
    line, lane = tl.arange(0, shape.turn_rows * shape.cols)[:, None], tl.arange(0, shape.padded)[None, :]
    if shape.is_wide:
        starts, places = line // shape.cols * n_cols, line % shape.cols * LINE + lane
        inside = (lane < LINE) & (places < n_cols)
    else:
        starts, places = line * LINE, lane
        inside = lane < LINE
    # None of a backward that reads none, whose n_rows is 0: -first * n_cols may pass -2**31.
    n_left = tl.maximum(tl.minimum(n_rows - first, ROWS), 0) * n_cols
    return ptr + first.to(tl.int64) * n_cols + (starts + places), (starts, places), inside, n_left


@triton.jit
def _before(offsets, n, shape: tl.constexpr):
    """Which offsets are less than n."""
    starts, places = offsets
    if shape.is_wide:
        before = starts + places < n
    else:  # nothing that the addresses also need: it would be worked out with them, where no mask is needed
        before = places < n - starts
    return before


@triton.jit
def _load_lines(ptr, n_rows, n_cols, other, shape: tl.constexpr):
    """This program's packed rows, (lines, padded). other: beyond the last column, and in other rows."""
    VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    ptrs, offsets, inside, n_left = _packed_places(ptr, n_rows, n_cols, shape)
    # A mask that may end inside a 16-byte group would make every access narrow: that is for the last rows of an odd batch.
    if n_left == shape.rows * n_cols:
        values = tl.load(ptrs, mask=inside, other=other)
    elif n_left % VECTOR == 0:
        values = tl.load(ptrs, mask=inside & _before(offsets, (n_left // VECTOR) * VECTOR, shape), other=other)
    else:
        values = tl.load(ptrs, mask=inside & _before(offsets, n_left, shape), other=other)
    return values


@triton.jit
def _store_lines(ptr, values, n_rows, n_cols, shape: tl.constexpr):
    """The inverse of _load_lines."""
    VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    ptrs, offsets, inside, n_left = _packed_places(ptr, n_rows, n_cols, shape)
    if n_left == shape.rows * n_cols:
        tl.store(ptrs, values, mask=inside)
    elif n_left % VECTOR == 0:
        tl.store(ptrs, values, mask=inside & _before(offsets, (n_left // VECTOR) * VECTOR, shape))
    else:
        tl.store(ptrs, values, mask=inside & _before(offsets, n_left, shape))


@triton.jit
def _load_packed(ptr, n_rows, n_cols, other, shape: tl.constexpr):
    """For each turn its blocks: (turn_rows, cols), or without the last axis."""
    N_BLOCKS: tl.constexpr = shape.n_blocks
    N_TURNS: tl.constexpr = shape.n_turns
    ROWS: tl.constexpr = shape.rows
    COLS: tl.constexpr = shape.cols
    cells = _unzip(tl.trans(_load_lines(ptr, n_rows, n_cols, other, shape)))
    turns = ()
    for turn in tl.static_range(N_TURNS):
        blocks = ()
        for i in tl.static_range(N_BLOCKS):
            cell = cells[turn * N_BLOCKS + i]
            blocks = blocks + (tl.reshape(cell, (ROWS, COLS)) if COLS > 1 else cell,)
        turns = turns + (blocks,)
    return turns


@triton.jit
def store_packed(ptr, turns, n_rows, n_cols, shape: tl.constexpr):
    """The inverse of _load_packed."""
    N_BLOCKS: tl.constexpr = shape.n_blocks
    PADDED: tl.constexpr = shape.padded
    LINES: tl.constexpr = shape.turn_rows * shape.cols
    cells = ()
    for place in tl.static_range(PADDED):
        # Padding, masked when the tile is stored.
        block = turns[place // N_BLOCKS][place % N_BLOCKS] if place < shape.n_turns * N_BLOCKS else turns[0][0]
        cells = cells + (tl.reshape(block, (LINES,)) if shape.is_wide else block,)
    _store_lines(ptr, tl.trans(_zip(cells)), n_rows, n_cols, shape)


@triton.jit
def columns(first, i: tl.constexpr, shape: tl.constexpr):
    """Indices of a block's columns, in the shape of the block: side by side, or the i-th of every part of a packed row."""
    COLS: tl.constexpr = shape.cols
    if COLS == 1:
        cols = first + i
    elif shape.is_packed:
        cols = (first + i + shape.n_blocks * tl.arange(0, COLS))[None, :]
    else:
        cols = (first + i * COLS + tl.arange(0, COLS))[None, :]
    return cols


@triton.jit
def spread(rows, shape: tl.constexpr):
    """Values of rows in the shape of a block."""
    if shape.is_wide:
        rows = rows[:, None]
    return rows


@triton.jit
def _block_places(lines, mask, first, i: tl.constexpr, n_cols, MAY_END: tl.constexpr, shape: tl.constexpr):
    """Addresses of a block and its mask. MAY_END: columns beyond the last may be among them. int64: classes may lie far apart."""
    COLS: tl.constexpr = shape.cols
    ptrs, mask = lines.ptr, spread(mask, shape)
    if COLS > 1:
        ptrs = ptrs[:, None] + (tl.arange(0, COLS).to(tl.int64) * lines.col_stride)[None, :]
    if MAY_END:
        mask = mask & (columns(first, i, shape) < n_cols)
    return ptrs + tl.cast(first + i * COLS, tl.int64) * lines.col_stride, mask


@triton.jit
def load_block(lines, read, first, n_cols, other, shape: tl.constexpr):
    """A single block of columns from `first` on."""
    ptrs, mask = _block_places(lines, read, first, 0, n_cols, True, shape)
    return tl.load(ptrs, mask=mask, other=other)


@triton.jit
def load_blocks(lines, read, n_cols, other, shape: tl.constexpr):
    """All blocks of these rows; () where they do not fit."""
    N_BLOCKS: tl.constexpr = shape.n_blocks
    blocks = ()
    for i in tl.static_range(N_BLOCKS):
        ptrs, mask = _block_places(lines, read, 0, i, n_cols, i == N_BLOCKS - 1 and shape.is_wide, shape)
        blocks = blocks + (tl.load(ptrs, mask=mask, other=other),)
    return blocks


@triton.jit
def store_block(lines, block, exist, first, n_cols, shape: tl.constexpr):
    ptrs, mask = _block_places(lines, exist, first, 0, n_cols, True, shape)
    tl.store(ptrs, block, mask=mask)


@triton.jit
def store_blocks(lines, blocks, exist, n_cols, shape: tl.constexpr):
    """The inverse of load_blocks."""
    for i in tl.static_range(len(blocks)):
        ptrs, mask = _block_places(lines, exist, 0, i, n_cols, i == len(blocks) - 1 and shape.is_wide, shape)
        tl.store(ptrs, blocks[i], mask=mask)
