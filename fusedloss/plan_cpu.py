"""How a problem is laid out and shared among threads by the CPU kernel: pure functions of shapes, dtypes and options."""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fusedloss.plan import Options, Plan, spatial_dims_collapse

# Logits for which another thread is worth waking. Sharing 128 x 10 among two threads costs more than the work (5 us).
ELEMENTS_PER_THREAD = 16384
# Images are read without a copy if a line has at least MIN_LINE pixels, the widest vector, or if there are at most MAX_LINES
# lines: each costs at least one vector. Where neither pixels nor classes are neighbours in memory, they are if they fit the L1
# cache: 2 x 21 x 128 x 128, each number in a cache line of its own, took up to twice as long as with a copy.
MIN_LINE, MAX_LINES, MAX_SCATTERED = 16, 128, 8192
MIN_ROW = 64  # classes from which on a row is read alone (kMinRowCols)


class Rows(NamedTuple):
    """Shapes and strides in elements as kernels/cpu/problem.h has them."""

    per_example: int
    n_middle: int
    one_block: bool  # the examples' rows are one sequence, with one stride
    n_cols: int
    strides: tuple[tuple[int, int, int, int], ...]  # outer, middle, row and class; for each tensor


def rows(example: tuple[int, ...], *strides: tuple[int, ...] | None) -> Rows:
    """The rows of logits (N, C), (N, C, S) or (N, C, H, W), for any N, and where they lie in tensors of that shape with these
    strides; None: no tensor. example: (C,), (C, S) or (C, H, W)."""
    n_cols, *sizes = example
    places = tuple(_places(of_tensor) if of_tensor is not None else (0, 0, 0, 0) for of_tensor in strides)
    per_example, n_middle = math.prod(sizes), sizes[0] if len(sizes) == 2 else 1
    one_block = n_middle == 1 and all(outer == per_example * row for outer, _, row, _ in places)  # as in channels_last
    return Rows(per_example, n_middle, one_block or not sizes, n_cols, places)


def _places(strides: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Outer, middle, row and class, as kernels/cpu/problem.h has them."""
    if len(strides) == 2:
        return 0, 0, strides[0], strides[1]
    return strides[0], strides[2] if len(strides) == 4 else 0, strides[-1], strides[1]


def reads_planes(logits: Tensor, *probabilities: Tensor) -> bool:
    """Whether the kernel takes (N, C, H, W) as it lies, though no one stride leads through the pixels of a plane."""
    tensors = (logits, *probabilities)
    if logits.dim() != 4 or all(spatial_dims_collapse(tensor) for tensor in tensors):
        return False
    are_few = not torch.compiler.is_compiling() and logits.numel() <= MAX_SCATTERED  # each other size would compile anew
    are_rows = all(tensor.stride(1) == 1 for tensor in tensors)
    if are_rows and logits.shape[1] >= MIN_ROW:
        return True
    if logits.shape[3] < MIN_LINE and not (are_few and logits.shape[0] * logits.shape[2] <= MAX_LINES):
        return False
    return are_few or are_rows or all(tensor.stride(3) == 1 for tensor in tensors)


def fuses_rows(logits: Tensor, options: Options) -> bool:
    """Whether a loss of rows, which are few, makes its gradient in the forward: to recompute it would take as long again."""
    return options.reduction == "none" and not options.return_stats and logits.numel() <= ELEMENTS_PER_THREAD


def max_threads(n_elements: int) -> int:
    """Threads worth waking for a problem of so many logits; the result is the same whatever their number."""
    return max(1, n_elements // ELEMENTS_PER_THREAD)


def cpu_plan(reason: str, logits: Tensor, options: Options, needs_grad: bool) -> Plan:
    """The plan of the CPU kernel for logits (N, C) or (N, C, d1, ...)."""
    one_pass = logits.numel() * logits.element_size()
    plan = Plan(
        "cpu",
        reason,
        "forward only",
        copies_logits=logits.dim() > 3 and not (spatial_dims_collapse(logits) or reads_planes(logits)),
        read_bytes=one_pass,
        write_bytes=0,
        kernels=("fusedloss_forward",),
        threads=min(max_threads(logits.numel()), torch.get_num_threads()),
    )
    if not needs_grad:
        return plan
    if options.fuses_gradient(logits.dtype):
        return replace(plan, strategy="fused", write_bytes=one_pass)
    return replace(
        plan,
        strategy="recompute",
        read_bytes=2 * one_pass,
        write_bytes=one_pass,
        kernels=("fusedloss_forward", "fusedloss_backward"),
    )
