"""What a row has for a target, whether it counts, and its weights: of class indices, of two labels, of class probabilities."""

import triton
import triton.language as tl

from .groups import Label


@triton.jit
def load_target(target_ptr, rows, exist, asks: tl.constexpr):
    """Class indices of rows; ignore_index of rows that do not exist."""
    if target_ptr.dtype.element_ty == tl.int64 and len(rows.shape) == 0:
        # Of a row alone: for a select here, ptxas takes 53 instructions more in some kernels. Of tiles it is the other way round.
        target = tl.load(target_ptr + rows, mask=exist, other=asks.ignore_index)
    else:  # uint8 156 stays 156, it is not -100, which is 156 as the load's `other`
        target = tl.where(exist, tl.load(target_ptr + rows, mask=exist, other=0).to(tl.int64), asks.ignore_index)
    return target


@triton.jit
def load_targets_from(first, target_ptr, rows, n_rows, asks: tl.constexpr):
    """The same of rows side by side from `first` on. Without a mask where all exist: no number of rows is known to the compiler
    to be a multiple of 16 bytes, and every access that such a mask may end would be narrow."""
    if first + rows.shape[0] <= n_rows:
        target = tl.load(target_ptr + rows).to(tl.int64)
    else:
        target = load_target(target_ptr, rows, rows < n_rows, asks)
    return target


@triton.jit
def all_classes(problem, asks: tl.constexpr):
    """Of a whole row."""
    n_classes = problem.n_cols
    if asks.sharded:
        n_classes = problem.shard.n_classes
    return n_classes


@triton.jit
def check_target(target, problem, asks: tl.constexpr):
    """Whether a row counts, and whether its class exists."""
    counted = target != asks.ignore_index
    # Without a sign a negative one is too large: one comparison of 64 bits, not two.
    return counted, counted & (target.to(tl.uint64, bitcast=True) < all_classes(problem, asks))


@triton.jit
def _column(target, problem):
    """The column of a class, -1 where it is in another shard."""
    col = target - problem.shard.first_class
    return tl.where((col >= 0) & (col < problem.n_cols), col, -1)


@triton.jit
def is_here(col, read, asks: tl.constexpr):
    """Whether a label's column may be used as an address, of rows that may be read."""
    if asks.sharded:
        read = read & (col >= 0)
    return read


@triton.jit
def load_target_weight(inputs, target, counted, valid, dtype: tl.constexpr):
    """w[t] of each row that counts, else 0."""
    if inputs.weight is not None:
        return tl.load(inputs.weight + target, mask=valid, other=0.0).to(dtype)
    return counted.to(dtype)


@triton.jit
def read_label(target, rows, exist, problem, asks: tl.constexpr):
    """The labels of rows, the first of which has been loaded; with class probabilities all that exist count."""
    dtype: tl.constexpr = problem.terms.lam.dtype
    none = tl.zeros(exist.shape, dtype)
    if asks.probabilities:
        label = Label(target=target, counted=exist, valid=exist, weight=none, target_b=target, weight_b=none, lam=none)
    else:
        counted, valid = check_target(target, problem, asks)
        weight = load_target_weight(problem.inputs, target, counted, valid, dtype)
        label = Label(target=target, counted=counted, valid=valid, weight=weight, target_b=target, weight_b=none, lam=none)
        if asks.two_labels:
            label = _with_second_label(label, rows, exist, problem, asks)
        if asks.sharded:
            label = Label(
                target=_column(label.target, problem), counted=label.counted, valid=label.valid, weight=label.weight,
                target_b=_column(label.target_b, problem), weight_b=label.weight_b, lam=label.lam,
            )  # fmt: skip
    return label


@triton.jit
def _with_second_label(first, rows, exist, problem, asks: tl.constexpr):
    """Both labels with their shares. Where they are the same class the first has all, and the second has the weight 0."""
    dtype: tl.constexpr = problem.terms.lam.dtype
    inputs = problem.inputs
    target_b = load_target(inputs.target_b, rows, exist, asks)
    counted_b, valid_b = check_target(target_b, problem, asks)
    counted, valid = first.counted & counted_b, first.valid & valid_b
    lam = problem.terms.lam
    if inputs.lam is not None:
        lam = tl.load(inputs.lam + rows, mask=exist, other=1.0).to(dtype)
    weight_a = tl.where(valid, lam * first.weight, 0.0)
    weight_b = (1.0 - lam) * load_target_weight(inputs, target_b, counted, valid, dtype)
    same = target_b == first.target
    return Label(
        target=first.target,
        counted=counted,
        valid=valid,
        weight=tl.where(same, weight_a + weight_b, weight_a),
        target_b=target_b,
        weight_b=tl.where(same, 0.0, weight_b),
        lam=lam + tl.zeros(exist.shape, dtype),
    )


@triton.jit
def weight_in_mean(target, rows, exist, problem, asks: tl.constexpr, dtype: tl.constexpr):
    """What each row, whose first label is loaded, adds to the mean's denominator; 0 for those that do not exist."""
    counted, valid = check_target(target, problem, asks)
    if asks.two_labels:
        target_b = load_target(problem.inputs.target_b, rows, exist, asks)
        counted_b, _ = check_target(target_b, problem, asks)
        weight = (counted & counted_b).to(dtype)
    else:
        weight = load_target_weight(problem.inputs, target, counted, valid, dtype)
    return weight


@triton.jit
def weighted(values, rows, label, inputs):
    """Values times the sample weights of rows that count: what the others have, NaN perhaps, must not enter."""
    if inputs.sample_weight is not None:
        values = values * tl.load(inputs.sample_weight + rows, mask=label.counted, other=0.0).to(values.dtype)
    return values
