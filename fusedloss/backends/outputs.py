"""Allocates what the operators return, for every backend and for tracing with fake tensors."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedloss.plan import ROW_REDUCTIONS, Inputs, Options, accumulation_dtype, fuses_gradient

STATE = 4  # scalars at the head of `saved`; kernels/rowwise.py describes the buffer


class Outputs(NamedTuple):
    """What a forward returns; "A" is the dtype of accumulation, float64 for float64 logits, else float32."""

    loss: Tensor  # 0-d, or (n_rows,) for reduction "none"
    saved: Any  # Tensor | None, A: what the backward reads, and the row losses that "max" and "topk" select among
    dlogits: Any  # Tensor | None, like the logits: the gradient for an upstream gradient of 1; fused strategy
    row_stats: Any  # Tensor | None, A, (2, n_rows): log-sum-exp and loss of every row; with return_stats
    counts: Any  # Tensor | None, int64, (3,): rows counted, rows correct, index of the worst; with return_stats


def allocate_forward(inputs: Inputs, options: Options, out_dtype: torch.dtype, needs_grad: bool) -> Outputs:
    """The forward's outputs, for inputs as the kernels take them."""
    logits = inputs.logits
    n_rows = logits.shape[0] if logits.dim() == 2 else logits.shape[0] * logits.shape[2]
    accumulate = accumulation_dtype(logits.dtype)
    fused = needs_grad and fuses_gradient(options.reduction, logits.dtype)
    keeps_rows = (needs_grad and not fused) or options.reduction in ROW_REDUCTIONS
    n_saved = STATE + (3 + inputs.has_probabilities()) * n_rows
    return Outputs(
        logits.new_empty((n_rows,) if options.reduction == "none" else (), dtype=out_dtype),
        logits.new_empty((n_saved,), dtype=accumulate) if keeps_rows else None,
        allocate_gradient(logits) if fused else None,
        logits.new_empty((2, n_rows), dtype=accumulate) if options.return_stats else None,
        logits.new_empty((3,), dtype=torch.int64) if options.return_stats else None,
    )


def allocate_gradient(logits: Tensor) -> Tensor:
    """A tensor like logits; dense logits pass on their strides, as PyTorch's gradients do."""
    return torch.empty_like(logits)
