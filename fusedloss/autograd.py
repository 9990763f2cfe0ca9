"""The torch.autograd.Function: what is saved and which gradients exist.

forward   loss, saved, dlogits = op.forward(logits, ...)   saved: per-row statistics and the reduction's coefficients
backward  dlogits, scaled by dloss                         fused strategy, the first time: no saved tensor is touched
          the same from op.forward, run again              fused strategy, a second backward (retain_graph)
          op.backward(dloss, logits, saved)                recompute strategy
          autograd.grad(reference(logits))                 under create_graph: differentiable to any order

A fused gradient is kept on ctx, outside save_for_backward: it is handed out once and belongs to the caller from then on, who
may change it in place. The logits are saved besides (a reference, not a copy) but not read, so that a caller who edits them
in place after the forward is still served, as PyTorch does; only the other paths then meet autograd's version check.
"""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fusedloss import ops, reference
from fusedloss.known import KnownCall
from fusedloss.plan import Inputs, Options, fuses_gradient, spatial_dims_collapse


def kernel_inputs(inputs: Inputs) -> Inputs:
    """The same as the kernels take them: logits (N, C) or (N, C, S), a view wherever strides allow; one value per row."""
    logits = inputs.logits
    if logits.dim() == 2:
        return inputs
    return Inputs(
        _rows(logits),
        _rows(inputs.target) if inputs.has_probabilities() else inputs.target.reshape(-1),
        None if inputs.target_b is None else inputs.target_b.reshape(-1),
        None if inputs.lam is None else inputs.lam.reshape(-1),
        inputs.weight,
        None if inputs.sample_weight is None else inputs.sample_weight.reshape(-1),
        inputs.scale,
    )


def _rows(logits: Tensor) -> Tensor:
    """(N, C, S); `Plan.copies_logits` tells where strides do not allow a view."""
    if logits.dim() > 3 and not spatial_dims_collapse(logits):
        logits = logits.contiguous()
    return logits.flatten(2) if logits.dim() > 3 else logits


def _rows_shape(logits: Tensor) -> tuple[int, ...]:
    return (logits.shape[0], *logits.shape[2:])


def forward_only(
    inputs: Inputs, options: Options, out_dtype: torch.dtype, backend: str
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The loss, with nothing kept for a backward; with statistics also (2, n_rows) and (3,), as `ops.forward` has them."""
    outputs = ops.forward(kernel_inputs(inputs), options, out_dtype, False, backend)
    loss = outputs.loss
    if options.reduction == "none" and inputs.logits.dim() > 2:
        loss = loss.view(_rows_shape(inputs.logits))
    return (loss, outputs.row_stats, outputs.counts) if options.return_stats else loss


_NO_GRADIENTS = (None,) * 9  # of all arguments but the logits


class CrossEntropyFunction(torch.autograd.Function):
    """What `forward_only` returns, and the loss's gradient with respect to the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        target_b: Tensor | None,
        lam: Tensor | None,
        weight: Tensor | None,
        sample_weight: Tensor | None,
        scale: Tensor | None,
        options: Options,
        out_dtype: torch.dtype,
        backend: str,
    ) -> Any:
        inputs = Inputs(logits, target, target_b, lam, weight, sample_weight, scale)  # torch.compile traces no tuple of tensors
        outputs = ops.forward(kernel_inputs(inputs), options, out_dtype, True, backend)
        loss, dlogits = outputs.loss, outputs.dlogits
        fused = fuses_gradient(options.reduction, logits.dtype)
        ctx.save_for_backward(*inputs, outputs.saved)
        if logits.dim() > 2:
            if options.reduction == "none":
                loss = loss.view(_rows_shape(logits))
            elif fused:
                dlogits = dlogits.view(logits.shape)
        ctx.call, ctx.dlogits = (options, out_dtype, backend), dlogits if fused else None
        if not options.return_stats:
            return loss
        ctx.mark_non_differentiable(outputs.row_stats, outputs.counts)
        return loss, outputs.row_stats, outputs.counts

    @staticmethod
    def backward(ctx: Any, *dlosses: Tensor) -> tuple[Tensor | None, ...]:
        dloss = dlosses[0]  # the others are of statistics
        if ctx.dlogits is not None and not _is_differentiable(dloss):
            return _scaled_fused_gradient(ctx, dloss, ctx.call[2]), *_NO_GRADIENTS
        *tensors, saved = ctx.saved_tensors
        return _gradient(dloss, Inputs(*tensors), saved, *ctx.call), *_NO_GRADIENTS


class KnownCrossEntropyFunction(torch.autograd.Function):
    """The same for a call like one that was served before: contiguous logits, class indices, weights or not."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rest: tuple[Tensor, Tensor | None, float, KnownCall]) -> Tensor:
        target, weight, scale, known = rest  # one by one they would cost a percent of a small step
        loss, saved, dlogits = known.prepared.forward(logits, target, weight, scale)
        if weight is None and saved is None:  # each another percent
            ctx.save_for_backward(logits, target)
        else:
            ctx.save_for_backward(logits, target, weight, saved)
        ctx.known, ctx.scale, ctx.dlogits = known, scale, dlogits
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        known = ctx.known
        if ctx.dlogits is not None:
            watched = torch.is_grad_enabled() or is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() != 0
            if not watched and known.takes_dloss(dloss):
                dlogits, ctx.dlogits = ctx.dlogits, None
                known.prepared.scale_gradient(dlogits, dloss)
                return dlogits, None
            if not _is_differentiable(dloss):
                return _scaled_fused_gradient(ctx, dloss, known.backend), None
        logits, target, *others = ctx.saved_tensors
        weight, saved = others or (None, None)  # saved: where no gradient was made
        inputs, options = Inputs(logits, target, weight=weight), known.options._replace(scale=ctx.scale)
        return _gradient(dloss, inputs, saved, options, known.out_dtype, known.backend), None


def _gradient(dloss: Tensor, inputs: Inputs, saved: Any, options: Options, out_dtype: torch.dtype, backend: str) -> Tensor:
    """The logits' gradient from what was saved: all but the first backward of the fused strategy."""
    logits = inputs.logits
    if _is_differentiable(dloss):
        with torch.enable_grad():
            loss, _ = reference.cross_entropy(inputs, options, out_dtype)
            return torch.autograd.grad(loss, logits, dloss, create_graph=True)[0]
    if fuses_gradient(options.reduction, logits.dtype):
        # Handed out already: the same bits once more, so that two backwards add up to exactly twice one.
        dlogits = ops.forward(kernel_inputs(inputs), options, out_dtype, True, backend).dlogits.view(logits.shape)
        ops.scale_gradient(dlogits, dloss, backend)
        return dlogits
    dlogits = ops.backward(dloss, kernel_inputs(inputs), saved, options, backend)
    return dlogits.view(logits.shape) if logits.dim() > 2 else dlogits


def _is_differentiable(dloss: Tensor) -> bool:
    """Whether a kernel's gradient would not do: under create_graph=True it must be differentiable itself, under vmap
    (is_grads_batched) no kernel serves dloss."""
    return torch.is_grad_enabled() or _is_batched(dloss)


def _is_batched(dloss: Tensor) -> bool:
    # torch.func.vmap has one kind of batched tensor, autograd.grad(is_grads_batched=True) another.
    functorch = torch._C._functorch
    return not torch.compiler.is_compiling() and (functorch.is_batchedtensor(dloss) or functorch.is_legacy_batchedtensor(dloss))


def _scaled_fused_gradient(ctx: Any, dloss: Tensor, backend: str) -> Tensor:
    if torch.compiler.is_compiling():
        return ctx.dlogits * dloss  # the compiler owns the buffers of its graphs, and may have to run the backward again
    dlogits, ctx.dlogits = ctx.dlogits, None
    ops.scale_gradient(dlogits, dloss, backend)
    return dlogits
