"""Allocates what the operators return, for every backend and for tracing with fake tensors."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedloss.plan import ROW_REDUCTIONS, Inputs, Options, fuses_gradient

STATE = 4  # scalars at the head of `saved`; kernels/rowwise.py describes the buffer


class Outputs(NamedTuple):
    """What a forward returns; "A" is the dtype of accumulation, float64 for float64 logits, else float32."""

    loss: Tensor  # 0-d, or (n_rows,) for reduction "none"
    saved: Tensor  # A: what the backward needs, and what launches hand on to each other
    dlogits: Any  # Tensor | None, like the logits: the gradient for an upstream gradient of 1; fused strategy
    row_stats: Any  # Tensor | None, A, (2, n_rows): log-sum-exp and loss of every row; with return_stats
    counts: Any  # Tensor | None, int64, (3,): rows counted, rows correct, index of the worst; with return_stats


def allocate_forward(inputs: Inputs, options: Options, out_dtype: torch.dtype, needs_grad: bool) -> Outputs:
    """The forward's outputs, for inputs as the kernels take them."""
    logits = inputs.logits
    n_rows = logits.shape[0] if logits.dim() == 2 else logits.shape[0] * logits.shape[2]
    accumulate = torch.float64 if logits.dtype == torch.float64 else torch.float32
    fused = needs_grad and fuses_gradient(options.reduction, logits.dtype)
    n_saved = STATE
    if options.reduction in ROW_REDUCTIONS or needs_grad:
        n_saved += (3 + inputs.has_probabilities) * n_rows
    return Outputs(
        loss=logits.new_empty((n_rows,) if options.reduction == "none" else (), dtype=out_dtype),
        saved=logits.new_empty((n_saved,), dtype=accumulate),
        dlogits=allocate_gradient(logits) if fused else None,
        row_stats=logits.new_empty((2, n_rows), dtype=accumulate) if options.return_stats else None,
        counts=logits.new_empty((3,), dtype=torch.int64) if options.return_stats else None,
    )


def allocate_gradient(logits: Tensor) -> Tensor:
    """A tensor like logits; dense logits pass on their strides, as PyTorch's gradients do."""
    return torch.empty_like(logits)
