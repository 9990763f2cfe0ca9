"""The end of a batch reduction as a launch of its own, for GPUs whose SMs have no L2 in common.

On an MI300X the SMs of a die share an L2, and eight dies the memory. A ticket (reduction.py) has all that a program has stored
visible to the one that draws the next: there it writes a whole L2 back and drops lines from it, once a program. Between launches
memory is put in order anyway. So the programs of a forward leave their sums, and this kernel adds them up. Tickets stay where
few programs draw them: in denominator_kernel, in a selection, and among the slices of a row, each of which still writes an L2
back for its row's counter.

    finish_kernel   the batch loss, the coefficients for the backward, the statistics' counts; where programs were many, each of
                    its own adds up a group of their sums, and the last one does the rest
"""

import triton
import triton.language as tl

from .denominator import coefficient_known
from .reduction import (
    MAX_UNGROUPED,
    N_GROUPS,
    add_up_group,
    add_up_tallies,
    draws_last,
    finish_batch,
    sum_left,
)
from .rowwise import load_scale


@triton.jit(do_not_specialize=["n_partials", "n_rows", "top_k"])
def finish_kernel(
    out,
    inputs,  # the scale, if it is a tensor
    work,  # in: partial, tallies; the ticket
    n_partials,  # programs of the launch before that have left sums
    n_rows,
    scale: "fp64",
    top_k: "i64",
    asks: tl.constexpr,
):
    """What reduction.py leaves to a forward's last program."""
    IS_FUSED: tl.constexpr = out.dlogits is not None
    last = True
    if n_partials > MAX_UNGROUPED:
        add_up_group(work, tl.program_id(0), n_partials, 1 if IS_FUSED else 2)
        last = draws_last(work.ticket, N_GROUPS)
    if last:
        factor = load_scale(inputs, scale, out.saved.dtype.element_ty)
        if IS_FUSED:
            _finish_fused(out, work, factor, n_partials, n_rows, asks)
        else:
            finish_batch(out, work, factor, top_k, n_partials, n_rows, asks)


@triton.jit
def _finish_fused(out, work, scale, n_partials, n_rows, asks: tl.constexpr):
    dtype: tl.constexpr = out.saved.dtype.element_ty
    g = coefficient_known(out, scale, n_rows, asks)
    tl.store(out.loss, (g * sum_left(work.partial, n_partials)).to(dtype))
    if work.tallies is not None:
        add_up_tallies(out, work, n_partials)
