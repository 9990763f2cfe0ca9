"""A tile of several rows on chip, for the kernels that give a program BLOCK_ROWS rows: reading, statistics, gradient, writing.

A tile is held as a tuple of blocks of columns, (rows, BLOCK_COLS) each, so that n_cols = 150 is 19 blocks of 8, not one of 256.
Blocks of a single column, (rows,), give every thread rows of its own: classes are reduced without its neighbours, and what is
worked out once per row is worked out by one thread, not by all that share the row.

Packed rows (ROW_GROUP > 0) lie end to end. They are read and written as what they are in memory, one run of whole 16-byte groups,
even where no single row is: ROW_GROUP = 2 rows of 10 floats are 5 groups. A thread holds a run of ROW_GROUP rows, as tuples of
columns, and takes one row after the other; what follows once per row follows in ROW_GROUP "turns". Data changes hands in shared
memory between the 16 bytes that a thread reads and its run: Triton wants both halves of a tl.split in one thread.
"""

import triton
import triton.language as tl
from fusedloss.kernels.rowwise import class_factors, finite_max, through_transform, transform_logits


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
    """Values of rows (BLOCK_ROWS,) as a tuple: of the first row of each group, of the second, ..."""
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
    """The same values (ROWS,), each in one thread."""
    ROWS: tl.constexpr = rows.shape[0]
    if ROWS > 1:
        low, high = tl.split(tl.trans(tl.reshape(rows, (2, ROWS // 2))))
        rows = tl.reshape(tl.trans(tl.join(low, high)), (ROWS,))
    return rows


@triton.jit
def tile_rows(n_inner, BLOCK_ROWS: tl.constexpr, ROW_GROUP: tl.constexpr):
    """This program's outer block, its rows' indices there, which of them exist, and their indices among all rows."""
    if ROW_GROUP > 0:  # a single outer block
        outer = tl.zeros((), tl.int64)
        inner = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    else:
        tiles_per_outer = tl.maximum(tl.cdiv(n_inner, BLOCK_ROWS), 1)
        outer = (tl.program_id(0) // tiles_per_outer).to(tl.int64)  # int64: offsets pass 2**31
        inner = (tl.program_id(0) % tiles_per_outer) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return outer, inner, inner < n_inner, outer * n_inner + inner  # the last tile of an outer block is rarely full


@triton.jit
def load_tile_targets(target_ptr, rows, mask, ignore_index):
    """The class index of each row; ignore_index of rows that do not exist."""
    target = tl.load(target_ptr + rows, mask=mask, other=0).to(tl.int64)
    return tl.where(mask, target, ignore_index)  # not the load's `other`: -100 is 156 in uint8


@triton.jit
def _packed_places(
    ptr,
    n_rows,
    n_cols,
    ROW_GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    N_BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Where this program's packed rows lie, a line per thread's run or part of a row: (addresses, offsets from the first element,
    which of the line's PADDED places are its own, elements from the first to the tensor's end).
    """
    LINE: tl.constexpr = ROW_GROUP * N_BLOCKS
    first = tl.program_id(0) * BLOCK_ROWS
    line, lane = tl.arange(0, BLOCK_ROWS // ROW_GROUP * PARTS)[:, None], tl.arange(0, PADDED)[None, :]
    if PARTS == 1:
        offsets = line * LINE + lane
        inside = lane < LINE
    else:
        col = line % PARTS * LINE + lane
        offsets = line // PARTS * n_cols + col
        inside = (lane < LINE) & (col < n_cols)
    n_left = tl.minimum(n_rows - first, BLOCK_ROWS) * n_cols
    return ptr + first.to(tl.int64) * n_cols + offsets, offsets, inside, n_left


@triton.jit
def load_packed(
    ptr,  # logits, or class probabilities
    n_rows,
    n_cols,
    other,  # what columns beyond the last hold, and rows that do not exist
    ROW_GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PARTS: tl.constexpr,  # threads that share a row, and so many blocks of columns; more than 1 where ROW_GROUP is 1
    N_BLOCKS: tl.constexpr,  # columns of a thread's part of a row: block i has the i-th of every part
    PADDED: tl.constexpr,  # elements of a thread, to the next power of 2
):
    """Reads this program's packed rows: for each turn its blocks, (BLOCK_ROWS / ROW_GROUP, PARTS), or without the last axis."""
    ptrs, offsets, inside, n_left = _packed_places(ptr, n_rows, n_cols, ROW_GROUP, BLOCK_ROWS, PARTS, N_BLOCKS, PADDED)
    VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    # A mask that may end inside a 16-byte group would make every access narrow: that is for the last rows of an odd batch.
    if n_left == BLOCK_ROWS * n_cols:
        tile = tl.load(ptrs, mask=inside, other=other)
    elif n_left % VECTOR == 0:
        tile = tl.load(ptrs, mask=inside & (offsets < (n_left // VECTOR) * VECTOR), other=other)
    else:
        tile = tl.load(ptrs, mask=inside & (offsets < n_left), other=other)
    cells = _unzip(tl.trans(tile))
    held = ()
    for turn in tl.static_range(ROW_GROUP):
        blocks = ()
        for i in tl.static_range(N_BLOCKS):
            cell = cells[turn * N_BLOCKS + i]
            blocks = blocks + (tl.reshape(cell, (BLOCK_ROWS, PARTS)) if PARTS > 1 else cell,)
        held = held + (blocks,)
    return held


@triton.jit
def store_packed(
    dlogits_ptr,
    held,  # as load_packed has them
    n_rows,
    n_cols,
    ROW_GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    N_BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """The inverse of load_packed."""
    cells = ()
    for place in tl.static_range(PADDED):
        # What fills the tile up is never stored.
        block = held[place // N_BLOCKS][place % N_BLOCKS] if place < ROW_GROUP * N_BLOCKS else held[0][0]
        cells = cells + (tl.reshape(block, (BLOCK_ROWS // ROW_GROUP * PARTS,)) if PARTS > 1 else block,)
    tile = tl.trans(_zip(cells))
    ptrs, offsets, inside, n_left = _packed_places(dlogits_ptr, n_rows, n_cols, ROW_GROUP, BLOCK_ROWS, PARTS, N_BLOCKS, PADDED)
    VECTOR: tl.constexpr = 128 // dlogits_ptr.dtype.element_ty.primitive_bitwidth
    if n_left == BLOCK_ROWS * n_cols:
        tl.store(ptrs, tile, mask=inside)
    elif n_left % VECTOR == 0:
        tl.store(ptrs, tile, mask=inside & (offsets < (n_left // VECTOR) * VECTOR))
    else:
        tl.store(ptrs, tile, mask=inside & (offsets < n_left))


@triton.jit
def _columns(first, i: tl.constexpr, BLOCK_COLS: tl.constexpr, PART: tl.constexpr):
    """Indices of a block's columns, in the shape of the block; of a block of one column, which has no axis for it, the index.

    The columns of a block lie side by side, or are the i-th of every PART columns (packed rows); PART is 0 for the former.
    """
    if BLOCK_COLS == 1:
        cols = first + i
    elif PART > 0:
        cols = (first + i + PART * tl.arange(0, BLOCK_COLS))[None, :]
    else:
        cols = (first + i * BLOCK_COLS + tl.arange(0, BLOCK_COLS))[None, :]
    return cols


@triton.jit
def _spread(rows, BLOCK_COLS: tl.constexpr):
    """Values of rows in the shape of a block."""
    if BLOCK_COLS > 1:
        rows = rows[:, None]
    return rows


@triton.jit
def _block_ptrs(row_ptr, first, i: tl.constexpr, col_stride, BLOCK_COLS: tl.constexpr):
    """Addresses of a block: what is the same for all blocks plus a scalar. int64: classes may lie far apart."""
    ptrs = row_ptr
    if BLOCK_COLS > 1:
        ptrs = row_ptr[:, None] + (tl.arange(0, BLOCK_COLS).to(tl.int64) * col_stride)[None, :]
    return ptrs + tl.cast(first + i * BLOCK_COLS, tl.int64) * col_stride


@triton.jit
def load_blocks(
    row_ptr,  # (BLOCK_ROWS,) first logit of each row
    col_stride,
    read,  # (BLOCK_ROWS,)
    first,  # column
    n_cols,
    other,  # what columns beyond the last hold, and rows that are not read
    BLOCK_COLS: tl.constexpr,
    N_BLOCKS: tl.constexpr,
    ALL_COLS: tl.constexpr,  # the blocks are the whole row: only the last can end beyond it, and blocks of one column do not
):
    """Reads N_BLOCKS blocks of columns from `first` on, (BLOCK_ROWS, BLOCK_COLS) each."""
    blocks = ()
    for i in tl.static_range(N_BLOCKS):
        cols = _columns(first, i, BLOCK_COLS, 0)
        mask = _spread(read, BLOCK_COLS)
        if not ALL_COLS or (i == N_BLOCKS - 1 and BLOCK_COLS > 1):
            mask = mask & (cols < n_cols)
        ptrs = _block_ptrs(row_ptr, first, i, col_stride, BLOCK_COLS)
        blocks = blocks + (tl.load(ptrs, mask=mask, other=other),)
    return blocks


@triton.jit
def rows_on_chip(
    packed,  # this turn's blocks, of packed rows, which are read for all turns at once; else None
    row_ptr,
    col_stride,
    read,
    n_cols,
    other,
    BLOCK_COLS: tl.constexpr,
    N_BLOCKS: tl.constexpr,
):
    """The blocks of whole rows."""
    if packed is not None:
        return packed
    else:
        return load_blocks(row_ptr, col_stride, read, 0, n_cols, other, BLOCK_COLS, N_BLOCKS, True)


@triton.jit
def transform_blocks(
    blocks,
    first,
    n_cols,
    logit_scale,
    softcap,
    dtype: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PART: tl.constexpr,  # see _columns
):
    """The logits as the loss sees them, -inf beyond the last column."""
    if logit_scale is None and softcap is None:
        transformed = blocks
    else:
        transformed = ()
        for i in tl.static_range(len(blocks)):
            z = transform_logits(blocks[i].to(dtype), logit_scale, softcap)
            if BLOCK_COLS > 1:
                z = tl.where(_columns(first, i, BLOCK_COLS, PART) < n_cols, z, float("-inf"))
            transformed = transformed + (z,)
    return transformed


@triton.jit
def absorb_tile(
    blocks,  # of columns from `first` on
    first,
    n_cols,
    label,  # (BLOCK_ROWS,) int32 target; None: class probabilities
    probabilities,  # their blocks, like the logits'; None: a label
    weight_ptr,
    smoothing,
    row_max,
    rest,
    x_t,
    shift,
    smooth_sum,
    weight_total,  # (BLOCK_ROWS,) with probabilities, else the same for all rows
    BLOCK_COLS: tl.constexpr,
    PART: tl.constexpr,  # see _columns
    HAS_SMOOTHING: tl.constexpr,
):
    """One step of a tile's online softmax: statistics with these columns, and their exp(x - m), 0 at the target."""
    dtype: tl.constexpr = rest.dtype
    lane_max = blocks[0].to(dtype)
    for i in tl.static_range(1, len(blocks)):
        lane_max = tl.maximum(lane_max, blocks[i].to(dtype))
    new_max = tl.maximum(row_max, tl.max(lane_max, 1) if BLOCK_COLS > 1 else lane_max)
    finite = finite_max(new_max)
    exps = ()
    lane_sum = tl.zeros_like(lane_max)
    few_sum = tl.zeros_like(lane_max)
    lane_target = tl.zeros_like(lane_max)
    for i in tl.static_range(len(blocks)):
        x = blocks[i].to(dtype)
        e = tl.exp(x - _spread(finite, BLOCK_COLS))
        if label is not None:
            at_target = _columns(first, i, BLOCK_COLS, PART) == _spread(label, BLOCK_COLS)
            e = tl.where(at_target, 0.0, e)
            lane_target = tl.where(at_target, x, lane_target)
        # Eight to each other first: one by one, the small ones of 100 classes would be rounded to the last place of the largest.
        few_sum = e if i % 8 == 0 else few_sum + e
        if i % 8 == 7 or i == len(blocks) - 1:
            lane_sum += few_sum
        exps = exps + (e,)
    rest = rest * tl.exp(row_max - finite) + (tl.sum(lane_sum, 1) if BLOCK_COLS > 1 else lane_sum)
    if label is not None:
        x_t += tl.sum(lane_target, 1) if BLOCK_COLS > 1 else lane_target
    if HAS_SMOOTHING or probabilities is not None:
        if probabilities is not None:
            smooth_sum += weight_total * (finite - finite_max(row_max))
            shift = finite
        else:
            shift = tl.where(row_max == float("-inf"), finite, shift)  # the first maximum: any fixed logit of the row will do
        lane_smooth = tl.zeros_like(lane_max)
        lane_weight = tl.zeros_like(lane_max)
        for i in tl.static_range(len(blocks)):
            cols = _columns(first, i, BLOCK_COLS, PART)
            w = _column_weights(probabilities, i, weight_ptr, smoothing, cols, n_cols, rest.dtype)
            lane_smooth += tl.where(cols < n_cols, w * (_spread(shift, BLOCK_COLS) - blocks[i].to(dtype)), 0.0)
            if probabilities is not None:
                lane_weight += w
            else:
                weight_total += tl.sum(w) if BLOCK_COLS > 1 else w
        smooth_sum += tl.sum(lane_smooth, 1) if BLOCK_COLS > 1 else lane_smooth
        if probabilities is not None:
            weight_total += tl.sum(lane_weight, 1) if BLOCK_COLS > 1 else lane_weight
    return new_max, rest, x_t, shift, smooth_sum, weight_total, exps


@triton.jit
def tile_statistics(
    blocks,  # the whole rows, if they are on chip
    probabilities,  # of class probabilities: likewise
    row_ptr,  # (BLOCK_ROWS,) first logit of each row, read where they are not
    col_stride,
    probabilities_row_ptr,  # None: a label
    probabilities_col_stride,
    read,  # (BLOCK_ROWS,)
    n_cols,
    label,  # (BLOCK_ROWS,) int32 target; None: class probabilities
    weight_ptr,
    smoothing,
    logit_scale,
    softcap,
    dtype: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    N_BLOCKS: tl.constexpr,
    PART: tl.constexpr,  # see _columns
    HAS_SMOOTHING: tl.constexpr,
):
    """A tile's statistics, and where it is on chip its exp(x - m), 0 at the target."""
    row_max = tl.full(read.shape, float("-inf"), dtype)
    rest = tl.zeros(read.shape, dtype)
    x_t = tl.zeros(read.shape, dtype)
    shift = tl.zeros(read.shape, dtype)
    smooth_sum = tl.zeros(read.shape, dtype)
    weight_total = tl.zeros(read.shape if probabilities_row_ptr is not None else (), dtype)
    exps = ()
    if N_BLOCKS > 0:
        row_max, rest, x_t, shift, smooth_sum, weight_total, exps = absorb_tile(
            blocks, 0, n_cols, label, probabilities, weight_ptr, smoothing,
            row_max, rest, x_t, shift, smooth_sum, weight_total, BLOCK_COLS, PART, HAS_SMOOTHING,
        )  # fmt: skip
    else:
        for start in range(0, n_cols, BLOCK_COLS):
            block = load_blocks(row_ptr, col_stride, read, start, n_cols, float("-inf"), BLOCK_COLS, 1, False)
            block = transform_blocks(block, start, n_cols, logit_scale, softcap, dtype, BLOCK_COLS, PART)
            q = None
            if probabilities_row_ptr is not None:
                q = load_blocks(probabilities_row_ptr, probabilities_col_stride, read, start, n_cols, 0.0, BLOCK_COLS, 1, False)
            row_max, rest, x_t, shift, smooth_sum, weight_total, _exps = absorb_tile(
                block, start, n_cols, label, q, weight_ptr, smoothing,
                row_max, rest, x_t, shift, smooth_sum, weight_total, BLOCK_COLS, PART, HAS_SMOOTHING,
            )  # fmt: skip
    return row_max, rest, x_t, shift, smooth_sum, weight_total, exps


@triton.jit
def target_logit(
    blocks,  # the whole rows, if they are on chip
    row_ptr,  # (BLOCK_ROWS,) first logit of each row, read where they are not
    col_stride,
    read,  # (BLOCK_ROWS,)
    target,  # (BLOCK_ROWS,) int64
    logit_scale,
    softcap,
    dtype: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    N_BLOCKS: tl.constexpr,
    PART: tl.constexpr,  # see _columns
):
    """The logit of a class of each row, 0 where the target is no column."""
    if N_BLOCKS > 0:
        label = target.to(tl.int32)
        lane_target = tl.zeros(blocks[0].shape, dtype)
        for i in tl.static_range(N_BLOCKS):
            at_target = _columns(0, i, BLOCK_COLS, PART) == _spread(label, BLOCK_COLS)
            lane_target = tl.where(at_target, blocks[i].to(dtype), lane_target)
        x = tl.sum(lane_target, 1) if BLOCK_COLS > 1 else lane_target
    else:
        x = tl.load(row_ptr + target * col_stride, mask=read, other=0.0).to(dtype)
        x = transform_logits(x, logit_scale, softcap)
    return x


@triton.jit
def exponentials(blocks, finite, BLOCK_COLS: tl.constexpr):
    """exp(x - m) of blocks of columns."""
    exps = ()
    for i in tl.static_range(len(blocks)):
        exps = exps + (tl.exp(blocks[i].to(finite.dtype) - _spread(finite, BLOCK_COLS)),)
    return exps


@triton.jit
def _column_weights(probabilities, i: tl.constexpr, weight_ptr, smoothing, cols, n_cols, dtype: tl.constexpr):
    """w, or with probabilities a, of each column of a block; 0 beyond the last."""
    if probabilities is not None:
        return class_factors(probabilities[i], cols, cols < n_cols, weight_ptr, smoothing, n_cols, dtype)
    elif weight_ptr is not None:
        return tl.load(weight_ptr + cols, mask=cols < n_cols, other=0.0).to(dtype)
    else:
        return tl.cast(cols < n_cols, dtype)


@triton.jit
def tile_gradient(
    exps,  # exp(x - m) of blocks of columns from `first` on
    blocks,  # x, read with softcap
    first,
    n_cols,
    label,  # (BLOCK_ROWS,) int32 target; None: class probabilities
    probabilities,  # their blocks; None: a label
    live,  # (BLOCK_ROWS,) rows that have a gradient
    weight_ptr,
    smoothing,
    p_factor,
    at_target,
    smooth_factor,
    label_b,  # None: there is one label
    at_b,
    logit_scale,
    softcap,
    dtype: tl.constexpr,  # rounded at once: a wide value takes a register until the tile is stored
    BLOCK_COLS: tl.constexpr,
    PART: tl.constexpr,  # see _columns
    HAS_SMOOTHING: tl.constexpr,
):
    """The gradients of the blocks."""
    gradients = ()
    for i in tl.static_range(len(exps)):
        cols = _columns(first, i, BLOCK_COLS, PART)
        # A row that is not live may have been read with its neighbours, NaN and all.
        dlogits = tl.where(_spread(live, BLOCK_COLS), exps[i], 0.0) * _spread(p_factor, BLOCK_COLS)
        if label_b is not None:
            dlogits = tl.where(cols == _spread(label_b, BLOCK_COLS), _spread(at_b, BLOCK_COLS), dlogits)
        if label is not None:
            dlogits = tl.where(cols == _spread(label, BLOCK_COLS), _spread(at_target, BLOCK_COLS), dlogits)
        if HAS_SMOOTHING or probabilities is not None:
            w = _column_weights(probabilities, i, weight_ptr, smoothing, cols, n_cols, dlogits.dtype)
            if probabilities is not None:
                w = tl.where(_spread(live, BLOCK_COLS), w, 0.0)
            dlogits -= _spread(smooth_factor, BLOCK_COLS) * w
        x = blocks[i]
        if softcap is not None:
            x = tl.where(_spread(live, BLOCK_COLS), x, 0.0)
        dlogits = through_transform(dlogits, x, logit_scale, softcap)
        gradients = gradients + (dlogits.to(dtype),)
    return gradients


@triton.jit
def store_blocks(
    dlogits_row_ptr,  # (BLOCK_ROWS,) first gradient of each row
    dlogits_col_stride,
    gradients,
    mask,  # (BLOCK_ROWS,)
    first,
    n_cols,
    BLOCK_COLS: tl.constexpr,
    ALL_COLS: tl.constexpr,  # as in load_blocks
):
    """The inverse of load_blocks."""
    for i in tl.static_range(len(gradients)):
        cols = _columns(first, i, BLOCK_COLS, 0)
        store_mask = _spread(mask, BLOCK_COLS)
        if not ALL_COLS or (i == len(gradients) - 1 and BLOCK_COLS > 1):
            store_mask = store_mask & (cols < n_cols)
        ptrs = _block_ptrs(dlogits_row_ptr, first, i, dlogits_col_stride, BLOCK_COLS)
        tl.store(ptrs, gradients[i], mask=store_mask)
