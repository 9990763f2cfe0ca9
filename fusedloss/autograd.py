"""The torch.autograd.Function: what is saved and which gradients exist.

forward   loss, saved = op.forward(logits, ...)         saved: per-row statistics and the reduction's coefficients
backward  dlogits = op.backward(dloss, logits, saved)   first order: one kernel
          autograd.grad(reference(logits))              under create_graph: differentiable to any order
"""

from typing import Any

import torch
from torch import Tensor

from fusedloss import ops, reference
from fusedloss.plan import Options, spatial_dims_collapse


def _rows(logits: Tensor) -> Tensor:
    """Logits as (N, C) or (N, C, S), a view wherever strides allow; `Plan.copies_logits` tells where they do not."""
    if logits.dim() == 2:
        return logits
    if logits.dim() > 3 and not spatial_dims_collapse(logits):
        logits = logits.contiguous()
    return logits.flatten(2) if logits.dim() > 3 else logits


def forward_only(
    logits: Tensor,  # (N, C) or (N, C, d1, ...)
    target: Tensor,  # (N,) or (N, d1, ...)
    weight: Tensor | None,  # (C,)
    scale: Tensor | None,  # 0-d
    options: Options,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """The loss, with nothing kept for a backward."""
    loss, _ = ops.forward(_rows(logits), target.reshape(-1), weight, scale, options, out_dtype, False, backend)
    return loss.view(target.shape) if options.reduction == "none" else loss


class CrossEntropyFunction(torch.autograd.Function):
    """Gradient of the loss with respect to the logits; the other arguments are those of `forward_only`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        scale: Tensor | None,
        options: Options,
        out_dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        loss, saved = ops.forward(_rows(logits), target.reshape(-1), weight, scale, options, out_dtype, True, backend)
        ctx.save_for_backward(logits, target, weight, scale, saved)
        ctx.options, ctx.out_dtype, ctx.backend = options, out_dtype, backend
        return loss.view(target.shape) if options.reduction == "none" else loss

    @staticmethod
    def backward(ctx: Any, *dlosses: Tensor) -> tuple[Tensor | None, ...]:
        (dloss,) = dlosses
        logits, target, weight, scale, saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself must be differentiable
            with torch.enable_grad():
                loss = reference.cross_entropy(logits, target, weight, ctx.options, scale, ctx.out_dtype)
                (dlogits,) = torch.autograd.grad(loss, logits, dloss, create_graph=True)
        else:
            dlogits = ops.backward(
                dloss.reshape(-1), _rows(logits), target.reshape(-1), weight, saved, ctx.options, ctx.backend
            ).view(logits.shape)
        return dlogits, None, None, None, None, None, None
