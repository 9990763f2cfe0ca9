"""The vocabulary of the kernels: what the host gives them and what they hand to each other, as named groups. No Triton here.

The host gives every kernel of logits the same things, in this order:

    out         fusedloss.backends.outputs.Outputs, a pointer for each tensor
    inputs      fusedloss.plan.Inputs, likewise: the call's own tensors
    work        Work: what the programs of a launch leave for each other
    layout      Layout: shape and strides
    n_rows      for which only forward_tile_kernel and backward_tile_kernel are specialised
    numbers     Terms, but for scale and lam: floats, which arrive as float32; where float64 is accumulated, their bits
    scale, lam  which are others in every call, float64
    asks        Asks: what the loss consists of; a kernel is compiled without the rest
    shape       TileShape or RowShape: how a program holds its rows

A pointer is None where a launch has no such tensor, and the kernel is compiled without it. Rules, each of which some version of
Triton needs: what a function returns holds tensors only, zeros for what `asks` leaves out. A group is built by keyword, and anew:
there is no _replace. `asks` and `shape` are handed on whole; a number of theirs gets a name, N: tl.constexpr = shape.n, before it
is a size or a bound of static_range.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple


class Work(NamedTuple):
    """None: nothing of the kind is needed, as by a single program, or where there is nothing to add up."""

    partial: Any = None  # (1 or 2, n_programs) sums of the programs, the second of a mean's weights (reduction.py)
    ticket: Any = None  # (1024,) int32: programs that are done, in counters of groups of them, too; None: finish.py does the rest
    tallies: Any = None  # (3, n_programs) int64: a Tally of each
    selection: Any = None  # (4,) int64, where launches of their own select among the rows (selection.py)
    sums: Any = None  # (3, n_programs) float64, theirs
    slices: Any = None  # (5, n_rows, n_places): statistics of the slices of rows (slices.py)
    arrived: Any = None  # (1 + n_rows,) int32: programs that have started; slices published of each row. May be ticket


class Strides(NamedTuple):
    """Of a tensor that has a value per logit, in elements; None, all three, where there is no such tensor."""

    outer: Any
    row: Any
    col: Any


class Shard(NamedTuple):
    """Which classes are here, where the others of a row are on other devices: n_cols of them, from first_class on. Class indices
    and class weights are those of whole rows, class probabilities lie beside the logits."""

    first_class: Any
    n_classes: Any  # of a whole row


class Layout(NamedTuple):
    """Rows are (n_rows / n_inner, n_inner): a block of a tensor has n_inner rows, `row` apart, and a row's classes lie `col`
    apart. The number of rows, which is another in many calls, is not here: a kernel is specialised for the numbers in a group."""

    n_inner: Any  # None: all rows are a single block, as those of (N, C)
    n_cols: Any
    logits: Strides
    dlogits: Strides
    probabilities: Strides
    shard: Any  # Shard; None: rows are whole


@dataclass(frozen=True)
class Asks:
    """What the caller asked for."""

    reduction: str
    ignore_index: int
    probabilities: bool  # the target is class probabilities: inputs.target is like the logits
    smoothing: bool
    z_loss: bool
    logit_scale: bool
    softcap: bool
    focal_gamma: bool
    two_labels: bool
    saves: bool = False  # forward: out.saved is handed to the caller, for a backward
    top_k_is_fraction: bool = False
    sharded: bool = False  # the rows have more classes than are here: layout.shard
    statistics: bool = False  # forward: of every row the caller wants to know more than its loss

    @property
    def every_class(self) -> bool:
        """Every class has a weight in the loss, not the target's alone."""
        return self.smoothing or self.probabilities

    @property
    def needs_total(self) -> bool:
        """W, the sum of the class weights, has a part in the loss, one number for all rows; shards publish it for each."""
        return self.smoothing and not (self.probabilities or self.sharded)

    @property
    def has_row_totals(self) -> bool:
        """A backward finds the W or A of each row."""
        return self.probabilities or (self.sharded and self.smoothing)

    @property
    def shifts_to_max(self) -> bool:
        """smooth_sum is relative to the maximum, not to any logit: sums whose w_c have another total merge only so."""
        return self.probabilities or self.sharded

    @property
    def transforms(self) -> bool:
        return self.logit_scale or self.softcap

    @property
    def weighs_the_mean(self) -> bool:
        """The mean is divided by the sum of the targets' class weights, not by the number of rows."""
        return self.reduction == "mean" and not (self.probabilities or self.two_labels)


@dataclass(frozen=True)
class TileShape:
    """How a program holds its tile of several rows (tile.py)."""

    rows: int
    cols: int  # of a block
    n_blocks: int  # that are the whole row; 0: a block at a time, and a gradient reads the rows again
    row_group: int = 0  # packed rows that are whole 16-byte groups together; 0: rows may lie anywhere
    padded: int = 1  # elements of a packed row group, or of a thread's part of a packed row, to the next power of 2
    vector: int = 1  # all strides and the contiguous size are multiples of it; at most 16 bytes
    rows_contiguous: bool = False  # the row strides are 1: neighbouring rows, not classes, lie side by side
    meets: bool = False  # fused mean: programs wait for each other, until all have summed the weights of their rows

    @property
    def is_packed(self) -> bool:
        return self.row_group > 0

    @property
    def n_turns(self) -> int:
        """A thread of packed rows has row_group of them, and takes one after the other."""
        return max(1, self.row_group)

    @property
    def turn_rows(self) -> int:
        return self.rows // self.n_turns

    @property
    def is_wide(self) -> bool:
        """Blocks have an axis of columns, along which threads lie."""
        return self.cols > 1


@dataclass(frozen=True)
class RowShape:
    """How a program holds its row, or its slice of one (row.py)."""

    cols: int  # of a block
    group: int  # elements in 16 or 32 bytes that every row consists of; 1: some row starts or ends inside of 16 bytes
    n_slices: int = 1  # programs that share a row
    n_blocks: int = 0  # fused: blocks of a slice, which stay in registers between loss and gradient
    counted_rows: int = 0  # fused mean: at least as many as there are rows: every program sums the denominator itself
    waits: bool = True  # fused: for the other slices; not where programs run one after another

    @property
    def rows(self) -> int:
        return 1

    @property
    def is_ragged(self) -> bool:
        return self.group == 1

    @property
    def n_places(self) -> int:
        """Of its slices' statistics, a power of two, so that those of a row lie in as few sectors as they can."""
        return 1 << (self.n_slices - 1).bit_length()

    @property
    def slice_cols(self) -> int:
        return self.cols * self.n_blocks


class Terms(NamedTuple):
    """The numbers of the loss, in the dtype of accumulation. As they are given, None: the loss has no such number."""

    scale: Any
    lam: Any
    smoothing: Any
    z_loss: Any
    logit_scale: Any
    softcap: Any
    focal_gamma: Any


class Problem(NamedTuple):
    """What all rows have in common."""

    inputs: Any
    terms: Terms
    n_rows: Any
    n_cols: Any
    shard: Any


class Tally(NamedTuple):
    """What statistics count of rows, those of a program or all."""

    counted: Any
    correct: Any
    worst_key: Any  # of the largest loss among the counted (keys.py); 0, which no loss has: none counts
    worst: Any  # the first row that has it


class Label(NamedTuple):
    """What rows have for a target: a class, two of them, or neither, but probabilities."""

    target: Any  # a column; of a shard, -1 where the class is not here
    counted: Any
    valid: Any  # it counts, and its classes exist
    weight: Any  # of the class, times its share
    target_b: Any
    weight_b: Any
    lam: Any


class RowStats(NamedTuple):
    """What a row's loss and gradient follow from, beside its label (rowwise.py)."""

    max: Any  # m
    rest: Any
    x_t: Any
    x_b: Any
    shift: Any
    smooth_sum: Any  # sum_c w_c (shift - x_c), or of a_c
    weight_total: Any  # W, or A
    gap_sum: Any  # G, for statistics


class Factors(NamedTuple):
    """Of a row's gradient."""

    live: Any  # the row has a gradient
    p: Any  # of exp(x_c - m)
    at_target: Any  # the target's own gradient, before s_t
    at_b: Any  # the second label's own, likewise
    smooth: Any  # of w_c, or a_c
