"""Allocates what the operators return, for every backend and for tracing with fake tensors."""

import torch
from torch import Tensor

from fusedloss.plan import ROW_REDUCTIONS, fuses_gradient

STATE = 4  # scalars at the head of `saved`; kernels/rowwise.py describes the buffer


def allocate_forward(
    logits: Tensor,  # (N, C) or (N, C, S)
    reduction: str,
    out_dtype: torch.dtype,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward's outputs: loss; `saved` in the dtype of accumulation; dlogits, (0,) where the strategy is not fused."""
    n_rows = logits.shape[0] * logits.shape[2:].numel()
    accumulate = torch.float64 if logits.dtype == torch.float64 else torch.float32
    keeps_rows = needs_grad or reduction in ROW_REDUCTIONS
    loss = logits.new_empty((n_rows,) if reduction == "none" else (), dtype=out_dtype)
    saved = logits.new_empty((STATE + 3 * n_rows if keeps_rows else STATE,), dtype=accumulate)
    if needs_grad and fuses_gradient(reduction, logits.dtype):
        return loss, saved, allocate_gradient(logits)
    return loss, saved, logits.new_empty((0,))


def allocate_gradient(logits: Tensor) -> Tensor:
    """A tensor like logits; dense logits pass on their strides, as PyTorch's gradients do."""
    return torch.empty_like(logits)
