"""What is done with several rows on chip: statistics by an online softmax over their blocks, and the gradient of each block."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .groups import RowStats
from .label import is_here
from .rowwise import class_weights, finite_max, gap_terms, moved_gap_sum, through_transform, transform_logits
from .tile import columns, load_block, load_blocks, one_thread_each, spread, store_block, store_blocks


class Blocks(NamedTuple):
    """Rows on chip, in blocks of columns; () where they do not fit, or there is no such thing."""

    x: Any  # logits as the loss sees them
    q: Any  # class probabilities
    e: Any  # exp(x - m); of a forward 0 at the target


@triton.jit
def _is_column(label, first, i: tl.constexpr, shape: tl.constexpr):
    """Which of a block's columns is the one of each row's label (rows,), int32. Of packed rows the label moves, once for all
    blocks, as a thread has many blocks of a row or two: to have the columns of each would take an addition for each."""
    COLS: tl.constexpr = shape.cols
    if shape.is_packed and shape.is_wide:
        at = spread(label, shape) - (shape.n_blocks * tl.arange(0, COLS))[None, :] == first + i
    else:
        at = spread(label, shape) == columns(first, i, shape)
    return at


@triton.jit
def _sum_cols(block, shape: tl.constexpr):
    if shape.is_wide:
        block = tl.sum(block, 1)
    return block


@triton.jit
def row_blocks(held, turn: tl.constexpr, sources, read, other, problem, asks: tl.constexpr, shape: tl.constexpr):
    """The blocks of whole rows, logits and class probabilities. other: logits of rows that are not read."""
    if shape.is_packed:
        x = held.x[turn]
    else:
        x = load_blocks(sources.logits, read, problem.n_cols, other, shape)
    x = _transform_blocks(x, 0, problem, asks, shape)
    q = ()
    if asks.probabilities:
        if shape.is_packed:
            q = held.q[turn]
        else:
            q = load_blocks(sources.probabilities, read, problem.n_cols, 0.0, shape)
    return x, q


@triton.jit
def _transform_blocks(blocks, first, problem, asks: tl.constexpr, shape: tl.constexpr):
    """The logits as the loss sees them, -inf beyond the last column."""
    transformed = blocks
    if asks.transforms:
        transformed = ()
        for i in tl.static_range(len(blocks)):
            z = transform_logits(blocks[i].to(problem.terms.scale.dtype), problem.terms, asks)
            if shape.is_wide:
                z = tl.where(columns(first, i, shape) < problem.n_cols, z, float("-inf"))
            transformed = transformed + (z,)
    return transformed


@triton.jit
def _stream_block(sources, read, first, other, problem, asks: tl.constexpr, shape: tl.constexpr):
    """One block of rows that do not fit, from column `first` on, as row_blocks has them."""
    x = (load_block(sources.logits, read, first, problem.n_cols, other, shape),)
    x = _transform_blocks(x, first, problem, asks, shape)
    q = (load_block(sources.probabilities, read, first, problem.n_cols, 0.0, shape),) if asks.probabilities else ()
    return x, q


@triton.jit
def _absorb(stats, x, q, first, label, problem, asks: tl.constexpr, shape: tl.constexpr):
    """One step of the online softmax: statistics with these columns, and their exp(x - m), 0 at the target."""
    dtype: tl.constexpr = stats.rest.dtype
    lane_max = x[0].to(dtype)
    for i in tl.static_range(1, len(x)):
        lane_max = tl.maximum(lane_max, x[i].to(dtype))
    new_max = tl.maximum(stats.max, tl.max(lane_max, 1) if shape.is_wide else lane_max)
    finite = finite_max(new_max)
    exps = ()
    lane_sum = tl.zeros_like(lane_max)
    few_sum = tl.zeros_like(lane_max)
    lane_target = tl.zeros_like(lane_max)
    lane_gap = tl.zeros_like(lane_max)
    target = label.target.to(tl.int32)
    for i in tl.static_range(len(x)):
        x_i = x[i].to(dtype)
        e = tl.exp(x_i - spread(finite, shape))
        if not asks.probabilities:
            at_target = _is_column(target, first, i, shape)
            e = tl.where(at_target, 0.0, e)
            lane_target = tl.where(at_target, x_i, lane_target)
        if asks.statistics:
            lane_gap += gap_terms(e, spread(finite, shape), x_i)
        # Eight to each other first: one by one, the small ones of 100 classes would be rounded to the last place of the largest.
        few_sum = e if i % 8 == 0 else few_sum + e
        if i % 8 == 7 or i == len(x) - 1:
            lane_sum += few_sum
        exps = exps + (e,)
    rest = _sum_cols(lane_sum, shape)
    if shape.n_blocks == 0:  # there may have been other columns
        rest += stats.rest * tl.exp(stats.max - finite)
    gap_sum = stats.gap_sum
    if asks.statistics:
        gap_sum = moved_gap_sum(stats, finite) + _sum_cols(lane_gap, shape)
    x_t = stats.x_t
    if not asks.probabilities:
        x_t += _sum_cols(lane_target, shape)
    shift, smooth_sum, weight_total = stats.shift, stats.smooth_sum, stats.weight_total
    if asks.every_class:
        if asks.shifts_to_max:
            smooth_sum += weight_total * (finite - finite_max(stats.max))
            shift = finite
        else:
            shift = tl.where(stats.max == float("-inf"), finite, shift)  # the first maximum: any fixed logit of the row will do
        sums, weights = _tile_weighted_sums(x, q, first, shift, problem, dtype, asks, shape)
        smooth_sum += sums
        weight_total += weights
    stats = RowStats(
        max=new_max, rest=rest, x_t=x_t, x_b=stats.x_b, shift=shift, smooth_sum=smooth_sum, weight_total=weight_total,
        gap_sum=gap_sum,
    )  # fmt: skip
    return stats, exps


@triton.jit
def _tile_weighted_sums(x, q, first, shift, problem, dtype: tl.constexpr, asks: tl.constexpr, shape: tl.constexpr):
    """sum_c w_c (shift - x_c) and sum_c w_c over these columns; the second is the same for all rows, unlike sum_c a_c."""
    lane_smooth = tl.zeros(x[0].shape, dtype)
    lane_weight = tl.zeros(x[0].shape, dtype)
    total = tl.zeros((), dtype)
    for i in tl.static_range(len(x)):
        cols = columns(first, i, shape)
        w = class_weights(q[i] if asks.probabilities else None, cols, cols < problem.n_cols, problem, asks)
        lane_smooth += tl.where(cols < problem.n_cols, w * (spread(shift, shape) - x[i].to(dtype)), 0.0)
        if asks.probabilities:
            lane_weight += w
        else:
            total += tl.sum(w) if shape.is_wide else w
    if asks.probabilities:
        total = _sum_cols(lane_weight, shape)
    return _sum_cols(lane_smooth, shape), total


@triton.jit
def tile_statistics(held, turn: tl.constexpr, sources, read, label, problem, asks: tl.constexpr, shape: tl.constexpr):
    """Reads rows: their statistics, and what of them stays on chip."""
    x, q = row_blocks(held, turn, sources, read, float("-inf"), problem, asks, shape)
    zeros = tl.zeros(read.shape, problem.terms.scale.dtype)
    total = zeros if asks.probabilities else tl.zeros((), problem.terms.scale.dtype)
    stats = RowStats(
        max=zeros + float("-inf"), rest=zeros, x_t=zeros, x_b=zeros, shift=zeros, smooth_sum=zeros, weight_total=total,
        gap_sum=zeros,
    )  # fmt: skip
    exps = ()
    if shape.n_blocks > 0:
        stats, exps = _absorb(stats, x, q, 0, label, problem, asks, shape)
    else:
        for start in range(0, problem.n_cols, shape.cols):
            x_i, q_i = _stream_block(sources, read, start, float("-inf"), problem, asks, shape)
            stats, _exps = _absorb(stats, x_i, q_i, start, label, problem, asks, shape)
    if asks.two_labels:
        x_b = tile_label_logit(x, sources.logits, label.valid, label.target_b, problem.terms, asks, shape)
        stats = RowStats(
            max=stats.max, rest=stats.rest, x_t=stats.x_t, x_b=x_b, shift=stats.shift, smooth_sum=stats.smooth_sum,
            weight_total=stats.weight_total, gap_sum=stats.gap_sum,
        )  # fmt: skip
    return stats, Blocks(x=x, q=q, e=exps)


@triton.jit
def tile_label_logit(x, lines, read, target, terms, asks: tl.constexpr, shape: tl.constexpr):
    """The logit of a class of each row, 0 where the target is no column."""
    dtype: tl.constexpr = terms.scale.dtype
    if shape.n_blocks > 0:
        lane_target = tl.zeros(x[0].shape, dtype)
        for i in tl.static_range(len(x)):
            at_target = _is_column(target.to(tl.int32), 0, i, shape)
            lane_target = tl.where(at_target, x[i].to(dtype), lane_target)
        x_t = _sum_cols(lane_target, shape)
    else:
        here = is_here(target, read, asks)
        x_t = transform_logits(tl.load(lines.ptr + target * lines.col_stride, mask=here, other=0.0).to(dtype), terms, asks)
    return x_t


@triton.jit
def one_thread_per_row(stats, asks: tl.constexpr):
    """The statistics of a row, without copies: a wide tile of pixels leaves them in all threads that share a row."""
    return RowStats(
        max=one_thread_each(stats.max), rest=one_thread_each(stats.rest), x_t=one_thread_each(stats.x_t), x_b=stats.x_b,
        shift=stats.shift, smooth_sum=stats.smooth_sum, weight_total=stats.weight_total,
        gap_sum=one_thread_each(stats.gap_sum) if asks.statistics else stats.gap_sum,
    )  # fmt: skip


@triton.jit
def exponentials(x, row_max, shape: tl.constexpr):
    """exp(x - m) of blocks."""
    exps = ()
    for i in tl.static_range(len(x)):
        exps = exps + (tl.exp(x[i].to(row_max.dtype) - spread(row_max, shape)),)
    return exps


@triton.jit
def _gradient_column(target, live):
    """The column of a label in rows that have a gradient. Not the number that the statistics compare columns with: the compiler
    would keep what came of it, a bit for each logit, which takes more instructions than to compare again."""
    return tl.where(live, target.to(tl.int32), -1)


@triton.jit
def _block_gradient(
    e, x, q, first, i: tl.constexpr, label, factors, problem, dtype: tl.constexpr, asks: tl.constexpr, shape: tl.constexpr
):
    """The gradient of a block, from exp(x - m); rounded at once: a wide value takes a register until the tile is stored."""
    cols = columns(first, i, shape)
    live = spread(factors.live, shape)
    # A row that is not live may have been read with its neighbours, NaN and all.
    dz = tl.where(live, e, 0.0) * spread(factors.p, shape)
    if asks.two_labels:
        target_b = _gradient_column(label.target_b, factors.live)
        dz = tl.where(_is_column(target_b, first, i, shape), spread(factors.at_b, shape), dz)
    if not asks.probabilities:
        target = _gradient_column(label.target, factors.live)
        dz = tl.where(_is_column(target, first, i, shape), spread(factors.at_target, shape), dz)
    if asks.every_class:
        w = class_weights(q, cols, cols < problem.n_cols, problem, asks)
        if asks.probabilities:
            w = tl.where(live, w, 0.0)
        dz -= spread(factors.smooth, shape) * w
    if asks.softcap:
        x = tl.where(live, x, 0.0)
    return through_transform(dz, x, problem.terms, asks).to(dtype)


@triton.jit
def tile_gradients(
    dlogits, blocks, sources, read, exist, row_max, label, factors, problem, asks: tl.constexpr, shape: tl.constexpr
):
    """Stores the gradients of rows; those of packed rows are returned, for store_packed. row_max: finite."""
    dtype: tl.constexpr = dlogits.ptr.dtype.element_ty
    gradients = ()
    if shape.n_blocks > 0:
        for i in tl.static_range(len(blocks.x)):
            q = blocks.q[i] if asks.probabilities else None
            d = _block_gradient(blocks.e[i], blocks.x[i], q, 0, i, label, factors, problem, dtype, asks, shape)
            gradients = gradients + (d,)
        if not shape.is_packed:
            store_blocks(dlogits, gradients, exist, problem.n_cols, shape)
    else:
        for start in range(0, problem.n_cols, shape.cols):
            x, q = _stream_block(sources, read, start, 0.0, problem, asks, shape)
            q_i = q[0] if asks.probabilities else None
            e = exponentials(x, row_max, shape)
            d = _block_gradient(e[0], x[0], q_i, start, 0, label, factors, problem, dtype, asks, shape)
            store_block(dlogits, d, exist, start, problem.n_cols, shape)
    return gradients
