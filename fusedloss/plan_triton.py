"""Which launches the Triton path makes for a call: pure functions of shapes, dtypes and device facts. They need no GPU.

The backend launches what is decided here, and `plan` counts it.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from fusedloss.cut_rows import backward_rows, forward_rows, fused_rows, may_meet, registers_of, takes_rows
from fusedloss.cut_tiles import cut_tiles
from fusedloss.geometry import DeviceFacts, Operands, operands, probabilities_strides, register_limit, warps
from fusedloss.kernels.constants import DIGIT_BITS, MAX_UNGROUPED, N_GROUPS, PARTIALS_BLOCK
from fusedloss.plan import ROW_REDUCTIONS, Block, Cut, Inputs, Options, Plan, spatial_dims_collapse

# Up to so many rows, every program of a fused mean reads all targets, 512 bytes, which saves a launch.
COUNTED_ROWS = 64
# Up to so many rows, the last program of a forward selects among their losses alone, for "max" and "topk"; of more, launches of
# many programs do (kernels/selection.py).
ROWS_SELECTED_ALONE = 16384
# Up to so many programs of a forward draw tickets on every GPU, for which the launch that saves them would take longer. Not fewer
# than COUNTED_ROWS: beyond these the mean's coefficient is in `saved`, where finish_kernel finds it.
TICKETS_ANYWHERE = 64
FINISH_THREADS = 256
SMALL_THREADS = 128  # of a program of a kernel that reads no logits, or only scales a gradient
SCALED_ELEMENTS = (
    4096  # of a fused gradient at a time; of the last ones each is accessed on its own, and 64 per thread would spill
)
SCALED_COLS = 128  # of a fused gradient at a time, where it is scaled row by row: rare, so that little code is best
DENOMINATOR_ROWS = 512  # not PARTIALS_BLOCK: loads of one shape get one layout, and two targets are a thread's 16 bytes, not four


class ForwardCuts(NamedTuple):
    """The launches of a forward, in order."""

    counting: Cut | None  # before the main one: the mean's denominator; it clears the slices' counters
    main: Cut
    n_partials: int  # sums that programs of the main launch leave
    finishing: Cut | None  # after it, where no last program of its own adds them up
    selection: tuple[Cut, ...] = ()  # where rows are too many for one program to select among
    clears: bool = False  # before all: the slices' counters, where no launch of ours does

    def kernels(self) -> tuple[str, ...]:
        """What is launched, by name."""
        before = ("zeros",) if self.clears else () if self.counting is None else (self.counting.kernel,)
        finishing = () if self.finishing is None else (self.finishing.kernel,)
        return (*before, self.main.kernel, *finishing, *(cut.kernel for cut in self.selection))


def holds_more(options: Options, itemsize: int) -> bool:
    """Whether a row shares the registers with more than its exponentials: smoothing's weights, a cap's tanh, statistics."""
    return options.label_smoothing > 0 or options.softcap > 0 or options.return_stats or (itemsize > 2 and options.has_extras())


def forward_cuts(t: Operands, options: Options, device: DeviceFacts, sharded: bool = False, in_turn: bool = False) -> ForwardCuts:
    """The launches of a forward; one that has a gradient to write is fused. sharded: the logits are a slice of the classes;
    in_turn: programs run one after another, in Triton's interpreter."""
    if t.dlogits is None:
        main = _forward_cut(t, options, device)
        adds_up = not sharded and (options.reduction != "none" or options.return_stats)
        return ForwardCuts(None, main, *_sums(main, adds_up, device), _selection_cuts(t, options.reduction, device))
    n_rows, is_mean = t.logits.n_rows, options.reduction == "mean" and t.probabilities is None
    main = _fused_cut(t, options, device)
    sums = _sums(main, True, device)
    if is_mean and main.kernel == "fused_row_kernel" and main.n_slices == 1 and n_rows <= COUNTED_ROWS:
        return ForwardCuts(None, replace(main, shape=replace(main.shape, counted_rows=COUNTED_ROWS)), *sums)
    if is_mean and main.kernel == "fused_tile_kernel" and main.n_programs > 1 and may_meet(main, device) and not in_turn:
        return ForwardCuts(None, replace(main, shape=replace(main.shape, meets=True)), *sums)
    if is_mean and main.n_programs > main.n_slices:  # of a single row there is nothing to count
        return ForwardCuts(_denominator_cut(n_rows, device), main, *sums)
    return ForwardCuts(None, main, *sums, clears=main.n_slices > 1)


def _sums(main: Cut, adds_up: bool, device: DeviceFacts) -> tuple[int, Cut | None]:
    """How many sums a forward's programs leave, and the launch that adds them up, if it is one of its own."""
    n_partials = main.n_programs // main.n_slices if adds_up else 1
    if not device.flushes_l2 or n_partials <= TICKETS_ANYWHERE:
        return n_partials, None
    n_programs = N_GROUPS if n_partials > MAX_UNGROUPED else 1
    return n_partials, Cut("finish_kernel", n_programs, warps(FINISH_THREADS, device), Block(PARTIALS_BLOCK, 1))


def holds_rows(cut: Cut) -> bool:
    """Whether a fused launch has read all of its rows, the labels' logits included, before it writes: the gradient may then lie
    where the logits do. Slices of a row wait until all have read theirs; what does not fit on chip is read again later."""
    return bool(cut.shape.n_blocks > 0)


def _forward_cut(t: Operands, options: Options, device: DeviceFacts) -> Cut:
    more = holds_more(options, t.itemsize)
    if takes_rows(t):
        return forward_rows(t, more, device)
    return _with_all_registers(cut_tiles("forward_tile_kernel", t, more, device), device)


def _with_all_registers(cut: Cut, device: DeviceFacts) -> Cut:
    """With as many as one program on an SM can have: left to itself, ptxas would spill a few values to fit another."""
    return replace(cut, max_registers=register_limit(registers_of(cut.num_warps, 1), device))


def _fused_cut(t: Operands, options: Options, device: DeviceFacts) -> Cut:
    more = holds_more(options, t.itemsize)
    # The kernel of one program per row masks no row: an empty batch, which still needs a loss, is the tile kernel's.
    rows = fused_rows(t, more, options.has_extras(), device) if t.logits.n_rows > 0 and takes_rows(t) else None
    return cut_tiles("fused_tile_kernel", t, more, device) if rows is None else rows


def backward_cut(t: Operands, options: Options, device: DeviceFacts, sharded: bool = False) -> Cut:
    """The launch of the recompute strategy's backward; the gradient's strides may differ from the logits'."""
    if takes_rows(t):
        return backward_rows(t, device)
    tile = cut_tiles("backward_tile_kernel", t, holds_more(options, t.itemsize), device)
    return _with_all_registers(tile, device) if sharded else tile


def scale_cut(n_elements: int, device: DeviceFacts) -> Cut:
    """The multiplication of a fused gradient: few programs, since most launches return at once."""
    n_programs = max(1, min(4 * device.n_sms, -(-n_elements // (2 * SCALED_ELEMENTS))))  # each reads dloss, and most do no more
    return Cut("scale_gradient_kernel", n_programs, warps(SMALL_THREADS, device), Block(1, SCALED_ELEMENTS))


def _denominator_cut(n_rows: int, device: DeviceFacts) -> Cut:
    """The sum of the targets' weights, before a fused mean."""
    n_programs = max(1, min(device.n_sms, -(-n_rows // DENOMINATOR_ROWS)))
    cut = Cut("denominator_kernel", n_programs, warps(SMALL_THREADS, device), Block(DENOMINATOR_ROWS, 1))
    return _with_all_registers(cut, device)


def _selection_cuts(t: Operands, reduction: str, device: DeviceFacts) -> tuple[Cut, ...]:
    """The selection among the rows of a forward: one launch for each digit of a loss, and one that adds up."""
    n_rows = t.logits.n_rows
    if reduction not in ROW_REDUCTIONS or n_rows <= ROWS_SELECTED_ALONE:
        return ()
    n_programs, num_warps = min(device.n_sms, -(-n_rows // PARTIALS_BLOCK)), warps(SMALL_THREADS, device)
    registers = register_limit(registers_of(num_warps, 1), device)  # ptxas would spill to fit another program on an SM
    digit, selected = (
        Cut(kernel, n_programs, num_warps, Block(PARTIALS_BLOCK, 1), registers) for kernel in ("digit_kernel", "selected_kernel")
    )
    n_digits = (64 if t.itemsize == 8 else 32) // DIGIT_BITS
    return (digit,) * n_digits + (selected,)


def triton_plan(reason: str, inputs: Inputs, options: Options, needs_grad: bool, device: DeviceFacts) -> Plan:
    """The plan of the Triton path for logits (N, C) or (N, C, d1, ...)."""
    logits, soft = inputs.logits, inputs.has_probabilities()
    itemsize = logits.element_size()
    rows = logits if logits.dim() == 2 else logits.flatten(2)
    probabilities = None
    if soft:
        probabilities = probabilities_strides(rows, inputs.target if logits.dim() == 2 else inputs.target.flatten(2))
    of_forward = operands(rows.shape, rows.stride(), None, probabilities, itemsize)
    of_gradient = operands(rows.shape, rows.stride(), torch.empty_like(rows, device="meta").stride(), probabilities, itemsize)
    fused = needs_grad and options.fuses_gradient(logits.dtype)
    forward = forward_cuts(of_gradient if fused else of_forward, options, device)
    if fused:
        strategy, backward = "fused", scale_cut(logits.numel(), device)
        passes = 1 if forward.main.shape.n_blocks else 2  # what does not stay in registers is read again, from L2 or L1
    elif needs_grad:
        strategy, backward, passes = "recompute", backward_cut(of_gradient, options, device), 2
    else:
        strategy, backward, passes = "forward only", None, 1
    one_pass = logits.numel() * itemsize
    one_read = one_pass + (inputs.target.numel() * inputs.target.element_size() if soft else 0)
    return Plan(
        "triton",
        reason,
        strategy,
        forward.main,
        backward,
        copies_logits=logits.dim() > 3 and not spatial_dims_collapse(logits),
        read_bytes=passes * one_read,
        write_bytes=one_pass if needs_grad else 0,
        kernels=forward.kernels() + (() if backward is None else (backward.kernel,)),
    )
