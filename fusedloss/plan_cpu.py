"""How a problem is laid out and shared among threads by the CPU kernel: pure functions of shapes, dtypes and options."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fusedloss.plan import Options, Plan, fuses_gradient, spatial_dims_collapse

# Logits for which another thread is worth waking. Sharing 128 x 10 among two threads costs more than the work (5 us).
ELEMENTS_PER_THREAD = 16384


class Rows(NamedTuple):
    """Shapes and strides in elements as kernels/cpu/problem.h has them."""

    per_example: int
    one_block: bool  # the examples' rows are one sequence, with one stride
    n_cols: int
    strides: tuple[tuple[int, int, int], ...]  # of outer block, row and class; for each tensor


def rows(example: tuple[int, ...], *strides: tuple[int, ...] | None) -> Rows:
    """The rows of logits (N, C) or (N, C, S), for any N, and where they lie in tensors of that shape with these strides; None: no
    tensor. example: (C,) or (C, S)."""
    if len(example) == 1:
        places = [(0, of_tensor[0], of_tensor[1]) if of_tensor is not None else (0, 0, 0) for of_tensor in strides]
        return Rows(1, True, example[0], tuple(places))
    n_cols, per_example = example
    places = [(of_tensor[0], of_tensor[2], of_tensor[1]) if of_tensor is not None else (0, 0, 0) for of_tensor in strides]
    one_block = all(outer == per_example * row for outer, row, _ in places)  # as in channels_last
    return Rows(per_example, one_block, n_cols, tuple(places))


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
        copies_logits=logits.dim() > 3 and not spatial_dims_collapse(logits),
        read_bytes=one_pass,
        write_bytes=0,
        kernels=("fusedloss_forward",),
        threads=min(max_threads(logits.numel()), torch.get_num_threads()),
    )
    if not needs_grad:
        return plan
    if fuses_gradient(options.reduction, logits.dtype):
        return replace(plan, strategy="fused", write_bytes=one_pass)
    return replace(
        plan,
        strategy="recompute",
        read_bytes=2 * one_pass,
        write_bytes=one_pass,
        kernels=("fusedloss_forward", "fusedloss_backward"),
    )
