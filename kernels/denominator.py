"""What a row's loss has as its factor in the batch loss of a fused forward, which a mean has to know before its first gradient.

With class probabilities every row counts, and there is nothing to sum. Otherwise the weights of the rows' targets are summed:

    a single program        has all rows in its tile
    a few tiles             wait for each other, each with what its own targets weigh
    few long rows           every program looks at all targets
    else                    denominator_kernel, a launch of its own over the targets alone, leaves the coefficient in saved[0]
"""

import triton
import triton.language as tl

from . import constants
from .groups import Problem
from .label import load_target, load_targets_from, weight_in_mean
from .reduction import mean_coefficient, publish, sum_over_programs, sum_partials
from .rowwise import load_scale
from .slices import wait_for

MEETING_BITS = tl.constexpr(constants.MEETING_BITS)


@triton.jit(do_not_specialize=["n_rows"])
def denominator_kernel(
    out,  # saved[0]: the coefficient of a row's loss in the mean
    inputs,
    work,  # arrived is cleared for the launch that follows, where that cuts rows into slices
    scale: "fp64",
    n_rows,
    n_cols,
    asks: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Counts, or sums the weights of, every n_programs-th block of rows; the last program divides. Reads targets, not logits."""
    dtype: tl.constexpr = out.saved.dtype.element_ty
    problem = Problem(inputs=inputs, terms=(), n_rows=n_rows, n_cols=n_cols, shard=None)
    total = tl.zeros((BLOCK_ROWS,), dtype)
    for start in range(tl.program_id(0) * BLOCK_ROWS, n_rows, tl.num_programs(0) * BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        exist = rows < n_rows
        target = load_targets_from(start, inputs.target, rows, n_rows, asks)
        total += weight_in_mean(target, rows, exist, problem, asks, dtype)
        if work.arrived is not None:
            tl.store(work.arrived + 1 + rows, 0, mask=exist)
    if work.arrived is not None:
        tl.store(work.arrived, 0)
    count, program, n_programs = tl.sum(total, 0), tl.program_id(0), tl.num_programs(0)
    if publish(out, work, count, None, program, n_programs):
        denominator, last = sum_over_programs(out, work, count, program, n_programs)
        tl.store(out.saved, mean_coefficient(load_scale(inputs, scale, dtype), denominator), mask=last)


@triton.jit
def _sum_together(work, value, program, n_programs, COUNTS: tl.constexpr):
    """Sum of all programs' values, for each of them: they wait for each other, so all must run at once, as the plan has it.
    COUNTS: values are numbers of rows, whose sum the counter of programs can hold besides. It is that of a group, of which so few
    programs have none; the last program clears it."""
    counter = work.ticket + 1
    if COUNTS:
        n = tl.atomic_add(counter, (value.to(tl.int32) << MEETING_BITS) + 1, sem="relaxed")  # there is nothing else to publish
        while (n & ((1 << MEETING_BITS) - 1)) < n_programs:
            n = tl.atomic_add(counter, 0, sem="relaxed")
        total = (n >> MEETING_BITS).to(tl.float64)
    else:
        tl.store(work.partial + n_programs + program, value)
        n = tl.atomic_add(counter, 1, sem="acq_rel") + 1
        wait_for(counter, n, n_programs)
        total = sum_partials(work.partial + n_programs, n_programs)
    return total


@triton.jit
def coefficient_known(out, scale, n_rows, asks: tl.constexpr):
    """What a row's loss has as its factor in the batch loss, where that takes no counting, or denominator_kernel has counted."""
    dtype: tl.constexpr = scale.dtype
    if asks.reduction == "sum":
        g = scale
    elif asks.probabilities:
        g = mean_coefficient(scale, tl.zeros((), dtype) + n_rows)
    else:
        g = tl.load(out.saved)
    return g


@triton.jit
def coefficient_of_tile(out, work, turn_rows, targets, problem, asks: tl.constexpr, shape: tl.constexpr):
    """The same for a program that has several rows."""
    scale = problem.terms.scale
    dtype: tl.constexpr = scale.dtype
    if asks.reduction == "sum" or asks.probabilities:
        g = coefficient_known(out, scale, problem.n_rows, asks)
    elif work.partial is None or shape.meets:
        weights = tl.zeros(turn_rows[0].shape, dtype)
        for i in tl.static_range(len(turn_rows)):
            weights += weight_in_mean(targets[i], turn_rows[i], turn_rows[i] < problem.n_rows, problem, asks, dtype)
        count = tl.sum(weights, 0)
        if shape.meets:  # there are other programs
            is_number = problem.inputs.weight is None or asks.two_labels
            count = _sum_together(work, count, tl.program_id(0), tl.num_programs(0), is_number)
        g = mean_coefficient(scale, count).to(dtype)
    else:
        g = coefficient_known(out, scale, problem.n_rows, asks)
    return g


@triton.jit
def coefficient_of_row(out, work, label, part, problem, asks: tl.constexpr, shape: tl.constexpr):
    """The same for a program that has one row, or a slice of it."""
    ROWS: tl.constexpr = shape.counted_rows
    scale = problem.terms.scale
    dtype: tl.constexpr = scale.dtype
    if asks.reduction == "sum" or asks.probabilities:
        g = coefficient_known(out, scale, problem.n_rows, asks)
    elif work.partial is None:  # there is no other row
        g = mean_coefficient(scale, label.counted.to(dtype) if asks.two_labels else label.weight)
    elif ROWS > 0:
        rows = tl.arange(0, ROWS)
        exist = rows < problem.n_rows
        target = load_target(problem.inputs.target, rows, exist, asks)
        weights = weight_in_mean(target, rows, exist, problem, asks, dtype)
        g = mean_coefficient(scale, tl.sum(weights, 0))
    elif shape.n_slices > 1:
        # A row that does not count needs none, but its first slice may be the last of all, which multiplies their sum.
        g = tl.load(out.saved, mask=label.counted | (part == 0), other=0.0)
    else:
        g = coefficient_known(out, scale, problem.n_rows, asks)
    return g
