"""What a kernel is given: the constants of its launch, decided once for calls alike, and the workspace of each."""

import struct
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedloss.backends.outputs import Outputs
from fusedloss.backends.triton.launching import Launch, interprets, ticket
from fusedloss.geometry import DeviceFacts, Geometry, Operands, operands, probabilities_strides
from fusedloss.kernels.constants import DIGIT_BITS, FRACTION_BITS, N_SELECTED_SUMS, N_SELECTION, N_STATISTICS, N_TALLY
from fusedloss.kernels.groups import Asks, Layout, RowShape, Shard, Strides, Terms, Work
from fusedloss.plan import NUMBERS, ClassShard, Cut, Inputs, Options
from fusedloss.plan_triton import SCALED_COLS, backward_cut, forward_cuts, holds_rows, scale_cut


class Launches(NamedTuple):
    """Of a forward, as plan_triton.ForwardCuts has them."""

    counting: Launch | None
    main: Launch
    n_partials: int
    finishing: Launch | None
    selection: tuple[Launch, ...]
    clears: bool


class Kind(NamedTuple):
    """What calls have in common whose launches are the same: all but the tensors themselves and two numbers."""

    shape: torch.Size
    strides: tuple[int, ...]
    gradient_strides: tuple[int, ...] | None
    probabilities_strides: tuple[int, ...] | None
    itemsize: int
    two_labels: bool
    options: Options  # without the numbers that are others in every step
    facts: DeviceFacts
    shard: ClassShard | None  # which classes the logits hold; None: all

    def operands(self) -> Operands:
        return operands(self.shape, self.strides, self.gradient_strides, self.probabilities_strides, self.itemsize)


def _kind(
    inputs: Inputs, gradient_strides: tuple[int, ...] | None, options: Options, facts: DeviceFacts, shard: ClassShard | None
) -> Kind:
    logits = inputs.logits
    return Kind(
        logits.shape,
        logits.stride(),
        gradient_strides,
        inputs.target.stride() if inputs.has_probabilities() else None,
        logits.element_size(),
        inputs.target_b is not None,
        options.kind(),
        facts,
        shard,
    )


def laid_out(inputs: Inputs) -> Inputs:
    """The same, with copies of tensors that the kernels do not take as they lie: all but the logits are contiguous, class
    probabilities have the strides of the logits or of their gradient."""
    logits, target, *others = inputs
    if not inputs.has_probabilities():
        target = target.contiguous()
    else:
        strides = probabilities_strides(logits, target)
        if target.stride() != strides:
            target = torch.empty_like(logits, dtype=target.dtype).copy_(target)
    return Inputs(logits, target, *[None if tensor is None else tensor.contiguous() for tensor in others])


def forward_launches(
    inputs: Inputs,
    gradient_strides: tuple[int, ...] | None,
    options: Options,
    saves: bool,
    facts: DeviceFacts,
    shard: ClassShard | None = None,
) -> Launches:
    """gradient_strides: of the gradient that a fused forward writes; saves: the caller gets `saved`; shard: what it publishes."""
    return _forward_launches(_kind(inputs, gradient_strides, options, facts, shard), saves)


def overwrites(inputs: Inputs, options: Options, facts: DeviceFacts) -> bool:
    """Whether a fused forward may write the gradient over the logits."""
    cut = forward_launches(inputs, inputs.logits.stride(), options, False, facts).main.cut
    # The interpreter launches what waits twice, and would read gradients the second time.
    return holds_rows(cut) and not (cut.n_slices > 1 and interprets())


def scale_launch(dlogits: Tensor, facts: DeviceFacts) -> Launch:
    """dlogits: a fused gradient, (N, C, d1, ...), whose d1, ... are as one; or (n,), as that of a bias."""
    rows = dlogits.flatten(2) if dlogits.dim() > 3 else dlogits if dlogits.dim() > 1 else dlogits.unsqueeze(0)
    return _scale_launch(rows.shape, rows.stride(), facts)


def backward_launch(
    inputs: Inputs, gradient_strides: tuple[int, ...], options: Options, facts: DeviceFacts, shard: ClassShard | None = None
) -> Launch:
    return _backward_launch(_kind(inputs, gradient_strides, options, facts, shard))


# Saves the decisions, half the host's time of a call; bounded by the number of kinds.
@lru_cache(maxsize=1024)
def _forward_launches(kind: Kind, saves: bool) -> Launches:
    t, options = kind.operands(), kind.options
    g = t.logits
    cuts = forward_cuts(t, options, kind.facts, kind.shard is not None, in_turn=interprets())
    asks = _asks(kind, saves, top_k_is_fraction=options.top_k == 0, statistics=options.return_stats)
    numbers = {"top_k": options.top_k or round(options.top_k_fraction * 2**FRACTION_BITS)}
    main = _logits_launch(cuts.main, kind, t, asks, numbers if t.dlogits is None else {})
    counting = finishing = None
    if cuts.finishing is not None:
        finishing = _launch(cuts.finishing, {"n_rows": g.n_rows, "n_partials": cuts.n_partials, "asks": asks, **numbers})
    if cuts.counting is not None:
        shared = {"n_rows": g.n_rows, "n_cols": g.n_cols, "asks": asks}
        counting = _launch(cuts.counting, {**shared, "BLOCK_ROWS": cuts.counting.shape.rows})
    *digits, selected = cuts.selection or (None,)
    steps = [_launch(cut, {"n_rows": g.n_rows, "shift": DIGIT_BITS * (len(digits) - 1 - i)}) for i, cut in enumerate(digits)]
    if selected is not None:
        steps.append(_launch(selected, {"n_rows": g.n_rows}))
    return Launches(counting, main, cuts.n_partials, finishing, tuple(steps), cuts.clears)


# The same for a backward.
@lru_cache(maxsize=1024)
def _backward_launch(kind: Kind) -> Launch:
    t = kind.operands()
    cut = backward_cut(t, kind.options, kind.facts, kind.shard is not None)
    return _logits_launch(cut, kind, t, _asks(kind), {})


# The same for the scaling of a fused gradient.
@lru_cache(maxsize=1024)
def _scale_launch(shape: torch.Size, strides: tuple[int, ...], facts: DeviceFacts) -> Launch:
    n, none = shape.numel(), Strides(None, None, None)
    g, cut = operands(shape, strides, None, None, 1).logits, scale_cut(n, facts)
    layout = Layout(_n_inner(g), g.n_cols, none, _strides(g), none, None)
    return _launch(cut, {"n": n, "n_rows": g.n_rows, "layout": layout, "BLOCK": cut.shape.cols, "ROW_BLOCK": SCALED_COLS})


def _asks(kind: Kind, saves: bool = False, top_k_is_fraction: bool = False, statistics: bool = False) -> Asks:
    options = kind.options
    asked = options.non_default_numbers()
    return Asks(
        options.reduction,
        options.ignore_index,
        probabilities=kind.probabilities_strides is not None,
        smoothing=options.label_smoothing > 0,
        **{name: name in asked for name in NUMBERS},
        two_labels=kind.two_labels,
        saves=saves,
        top_k_is_fraction=top_k_is_fraction,
        sharded=kind.shard is not None,
        statistics=statistics,
    )


def _logits_launch(cut: Cut, kind: Kind, t: Operands, asks: Asks, numbers: dict[str, Any]) -> Launch:
    """Of a kernel that has the logits: what all of these are given."""
    options, g = kind.options, t.logits
    shape = replace(cut.shape, waits=not interprets()) if isinstance(cut.shape, RowShape) else cut.shape
    shard = None if kind.shard is None else Shard(*kind.shard)
    layout = Layout(_n_inner(g), g.n_cols, _strides(g), _strides(t.dlogits), _strides(t.probabilities), shard)
    return _launch(
        cut,
        {
            "layout": layout,
            "n_rows": g.n_rows,
            "numbers": _terms(asks, options, kind.itemsize == 8),
            **numbers,
            "asks": asks,
            "shape": shape,
        },
    )


def _terms(asks: Asks, options: Options, in_float64: bool) -> Terms:
    """The numbers of the loss that are the same in calls alike, as kernels take them (groups.py)."""
    asked = {name: getattr(options, name) for name in options.non_default_numbers()}
    if asks.smoothing:
        asked["smoothing"] = options.label_smoothing
    if in_float64:  # integers: Triton makes one kernel more where all of a number's last 4 bits are 0
        asked = {name: struct.unpack("q", struct.pack("d", number))[0] for name, number in asked.items()}
    return Terms(**{name: asked.get(name) for name in Terms._fields})


def _n_inner(g: Geometry) -> int | None:
    return None if g.n_outer == 1 else g.n_inner


def _strides(g: Geometry | None) -> Strides:
    return Strides(None, None, None) if g is None else Strides(g.outer_stride, g.row_stride, g.col_stride)


def _launch(cut: Cut, constants: dict[str, Any]) -> Launch:
    options = {"num_warps": cut.num_warps}
    if cut.max_registers is not None:
        options["maxnreg"] = cut.max_registers
    return Launch(cut, {**constants, **options})


def workspace(launches: Launches, out: Outputs, keeps_workspace: bool) -> Work:
    """What the programs of a forward leave for each other, and for the launches that follow."""
    main, saved, device = launches.main, out.saved, out.saved.device
    fused, is_cut = out.dlogits is not None, main.cut.n_slices > 1
    n_rows, n_partials, selection = main.n_rows, launches.n_partials, launches.selection
    counters = ticket(device, keeps_workspace) if n_partials > 1 or (is_cut and not fused) else None
    return Work(
        saved.new_empty((1 if fused and not main.cut.meets else 2, n_partials)) if n_partials > 1 else None,
        counters,
        saved.new_empty((N_TALLY, n_partials), dtype=torch.int64) if n_partials > 1 and out.row_stats is not None else None,
        saved.new_empty((N_SELECTION,), dtype=torch.int64) if selection else None,
        saved.new_empty((N_SELECTED_SUMS, selection[-1].cut.n_programs), dtype=torch.float64) if selection else None,
        new_slices(main, saved) if is_cut else None,
        (saved.new_empty((1 + n_rows,), dtype=torch.int32) if fused else counters) if is_cut else None,
    )


def new_slices(launch: Launch, saved: Tensor) -> Tensor:
    """Where the slices of rows publish their statistics."""
    return saved.new_empty((N_STATISTICS, launch.n_rows, launch.cut.shape.n_places))


def counting_workspace(counting: Launch, work: Work, out: Outputs, keeps_workspace: bool) -> Work:
    n_programs = counting.cut.n_programs
    if n_programs == 1:
        return Work(arrived=work.arrived)
    partial = out.saved.new_empty((1, n_programs))
    return Work(partial, ticket(out.saved.device, keeps_workspace), arrived=work.arrived)
