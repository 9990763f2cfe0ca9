"""The torch.autograd.Function: what is saved and which gradients exist.

forward   loss, saved, dlogits = op.forward(logits, ...)   saved: per-row statistics and the reduction's coefficients
backward  dlogits, scaled by dloss                         fused strategy, the first time: no saved tensor is touched
          op.backward(dloss, logits, saved)                recompute strategy, and a second backward (retain_graph)
          autograd.grad(reference(logits))                 under create_graph: differentiable to any order

A fused gradient is kept on ctx, outside save_for_backward: it is handed out once and belongs to the caller from then on, who
may change it in place. The logits are saved besides (a reference, not a copy) but not read, so that a caller who edits them
in place after the forward is still served, as PyTorch does; only the two other paths then meet autograd's version check.
"""

from typing import Any

import torch
from torch import Tensor

from fusedloss import ops, reference
from fusedloss.plan import Options, fuses_gradient, spatial_dims_collapse


def _rows(logits: Tensor) -> Tensor:
    """Logits as (N, C) or (N, C, S), a view wherever strides allow; `Plan.copies_logits` tells where they do not."""
    if logits.dim() == 2:
        return logits
    if logits.dim() > 3 and not spatial_dims_collapse(logits):
        logits = logits.contiguous()
    return logits.flatten(2) if logits.dim() > 3 else logits


def _targets(target: Tensor, logits: Tensor) -> Tensor:
    """Class indices as (n_rows,); probabilities like the logits."""
    if target.dim() == logits.dim():
        return _rows(target)
    return target if target.dim() == 1 else target.reshape(-1)


def _loss_shape(logits: Tensor) -> tuple[int, ...]:
    return (logits.shape[0], *logits.shape[2:])


def forward_only(
    logits: Tensor,  # (N, C) or (N, C, d1, ...)
    target: Tensor,  # class indices (N,) or (N, d1, ...), or probabilities of the logits' shape
    weight: Tensor | None,  # (C,)
    scale: Tensor | None,  # 0-d
    options: Options,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """The loss, with nothing kept for a backward."""
    loss, _, _ = ops.forward(_rows(logits), _targets(target, logits), weight, scale, options, out_dtype, False, backend)
    return loss.view(_loss_shape(logits)) if options.reduction == "none" else loss


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
        loss, saved, dlogits = ops.forward(
            _rows(logits), _targets(target, logits), weight, scale, options, out_dtype, True, backend
        )
        ctx.save_for_backward(logits, target, weight, scale, saved)
        ctx.options, ctx.out_dtype, ctx.backend = options, out_dtype, backend
        if not fuses_gradient(options.reduction, logits.dtype):
            ctx.dlogits = None
        else:
            ctx.dlogits = dlogits if logits.dim() <= 3 else dlogits.view(logits.shape)
        return loss.view(_loss_shape(logits)) if options.reduction == "none" else loss

    @staticmethod
    def backward(ctx: Any, *dlosses: Tensor) -> tuple[Tensor | None, ...]:
        (dloss,) = dlosses
        # create_graph=True: the gradient itself must be differentiable. Under vmap (is_grads_batched) no kernel serves dloss.
        differentiable = torch.is_grad_enabled() or _is_batched(dloss)
        if ctx.dlogits is not None and not differentiable:
            return _scaled_fused_gradient(ctx, dloss), None, None, None, None, None, None
        logits, target, weight, scale, saved = ctx.saved_tensors
        if differentiable:
            with torch.enable_grad():
                loss = reference.cross_entropy(logits, target, weight, ctx.options, scale, ctx.out_dtype)
                (dlogits,) = torch.autograd.grad(loss, logits, dloss, create_graph=True)
        else:
            # A fused gradient was rounded before dloss came. So must this one be: two backwards add up to exactly twice one.
            fused = fuses_gradient(ctx.options.reduction, logits.dtype)
            upstream = torch.ones_like(dloss) if fused else dloss
            dlogits = ops.backward(
                upstream.reshape(-1), _rows(logits), _targets(target, logits), weight, saved, ctx.options, ctx.backend
            ).view(logits.shape)
            if fused:
                ops.scale_gradient(dlogits, dloss, ctx.backend)
        return dlogits, None, None, None, None, None, None


def _is_batched(dloss: Tensor) -> bool:
    # torch.func.vmap has one kind of batched tensor, autograd.grad(is_grads_batched=True) another.
    functorch = torch._C._functorch
    return not torch.compiler.is_compiling() and (functorch.is_batchedtensor(dloss) or functorch.is_legacy_batchedtensor(dloss))


def _scaled_fused_gradient(ctx: Any, dloss: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return ctx.dlogits * dloss  # the compiler owns the buffers of its graphs, and may have to run the backward again
    dlogits, ctx.dlogits = ctx.dlogits, None
    ops.scale_gradient(dlogits, dloss, ctx.backend)
    return dlogits
