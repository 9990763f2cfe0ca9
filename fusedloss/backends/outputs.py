"""Allocates what the operators return, for every backend and for tracing with fake tensors."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedloss.kernels.constants import STATE
from fusedloss.plan import ROW_REDUCTIONS, Inputs, Options, accumulation_dtype


class Outputs(NamedTuple):
    """What a forward returns; "A" is the dtype of accumulation, float64 for float64 logits, else float32."""

    loss: Any  # Tensor: 0-d, or (n_rows,) for reduction "none"
    saved: Any  # Tensor | None, A: what the backward reads, and the row losses that "max" and "topk" select among (rowwise.py)
    dlogits: Any  # Tensor | None, like the logits: the gradient for an upstream gradient of 1; fused strategy
    row_stats: Any  # Tensor | None, A, (3, n_rows): log-sum-exp, loss and entropy of every row; with return_stats
    counts: Any  # Tensor | None, int64, (3,): rows counted, rows correct, index of the worst; with return_stats


NO_OUTPUTS = Outputs(*(None,) * 5)
RowStats = tuple[Tensor, Tensor]  # row_stats and counts
NO_STATS = None, None
TEMPLATE_NUMBERS = 256  # of an output that is made like a template, at most
N_ROW_STATS, ENTROPY = 3, 2  # rows of Outputs.row_stats, and which is the entropy


class Sizes(NamedTuple):
    """Sizes of a forward's outputs; None: this output is not made."""

    loss: tuple[int, ...]
    saved: int | None
    has_gradient: bool
    row_stats: tuple[int, int] | None


def kept(options: Options, needs_grad: bool, dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether the forward keeps `saved`, and whether it makes the gradient."""
    fused = needs_grad and options.fuses_gradient(dtype)
    return (needs_grad and not fused) or options.reduction in ROW_REDUCTIONS, fused


def output_sizes(inputs: Inputs, options: Options, needs_grad: bool) -> Sizes:
    """For inputs as the kernels take them."""
    logits = inputs.logits
    n_rows = logits.shape[0] * math.prod(logits.shape[2:])
    keeps_rows, fused = kept(options, needs_grad, logits.dtype)
    return Sizes(
        (n_rows,) if options.reduction == "none" else (),
        STATE + (3 + inputs.has_probabilities()) * n_rows if keeps_rows else None,
        fused,
        (N_ROW_STATS, n_rows) if options.return_stats else None,
    )


def n_statistics(inputs: Inputs, options: Options) -> int:
    """How many numbers a shard publishes for a row (`fusedloss.shards.ShardStats`)."""
    of_loss = 3
    if inputs.target_b is not None:
        of_loss = 6
    elif options.label_smoothing > 0 or inputs.has_probabilities():
        of_loss = 5
    return of_loss + options.return_stats


def allocate_forward(inputs: Inputs, options: Options, out_dtype: torch.dtype, needs_grad: bool) -> Outputs:
    """The forward's outputs, for inputs as the kernels take them."""
    logits = inputs.logits
    loss, saved, has_gradient, row_stats = output_sizes(inputs, options, needs_grad)
    accumulate = accumulation_dtype(logits.dtype)
    return Outputs(
        logits.new_empty(loss, dtype=out_dtype),
        None if saved is None else logits.new_empty((saved,), dtype=accumulate),
        allocate_gradient(logits) if has_gradient else None,
        None if row_stats is None else logits.new_empty(row_stats, dtype=accumulate),
        None if row_stats is None else logits.new_empty((3,), dtype=torch.int64),
    )


@dataclass(frozen=True, eq=False)
class Allocators:
    """Make the outputs of calls alike, of contiguous logits, in half the time that asking them takes; None: there is no such."""

    loss: Callable[[], Tensor]
    saved: Callable[[], Tensor] | None
    dlogits: Callable[[], Tensor] | None
    stats: Callable[[], RowStats] | None


def forward_allocators(
    inputs: Inputs, options: Options, out_dtype: torch.dtype, needs_grad: bool, shape: torch.Size
) -> Allocators:
    """What `allocate_forward` allocates for these arguments, loss and gradient as the caller's logits of this shape have them."""
    device, dtype = inputs.logits.device, inputs.logits.dtype
    loss, saved, has_gradient, row_stats = output_sizes(inputs, options, needs_grad)
    return Allocators(
        allocator((shape[0], *shape[2:]) if loss else (), out_dtype, device),
        None if saved is None else allocator((saved,), accumulation_dtype(dtype), device),
        allocator(shape, dtype, device) if has_gradient else None,
        None if row_stats is None else _stats_allocator(row_stats, accumulation_dtype(dtype), device),
    )


def _stats_allocator(row_stats: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Callable[[], RowStats]:
    new_row_stats, new_counts = allocator(row_stats, dtype, device), allocator((3,), torch.int64, device)
    return lambda: (new_row_stats(), new_counts())


def allocator(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """Makes contiguous tensors of this shape."""
    # Like a template: a tenth less time. On a GPU it would hold memory, perhaps that of a graph's pool.
    if math.prod(shape) <= TEMPLATE_NUMBERS and device.type == "cpu":
        return partial(torch.empty_like, torch.empty(shape, dtype=dtype, device=device))
    return partial(torch.empty_strided, tuple(shape), contiguous_strides(shape), dtype=dtype, device=device)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Those of torch.empty(shape), which takes a size of 0 for 1."""
    return tuple(math.prod(max(size, 1) for size in shape[dim + 1 :]) for dim in range(len(shape)))


def allocate_gradient(logits: Tensor) -> Tensor:
    """A tensor like logits; dense logits pass on their strides, as PyTorch's gradients do."""
    return torch.empty_like(logits)
