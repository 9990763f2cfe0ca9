"""The torch.autograd.Functions of a loss fused with the last linear layer.

SummedLoss   forward  a gradient pass    backward  its gradients, scaled by dloss
RowLosses    forward  a row pass         backward  a gradient pass with dloss as the rows' factors, and the entropies' gradient
both                                     backward  under create_graph: PyTorch's layer, then the reference

The gradients that the forward made are saved as autograd saves tensors, so that hooks and checkpointing see them. They belong to
the graph until the graph is freed: then they are scaled in place and handed out, before that copies.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedloss import linear_ops, ops, reference
from fusedloss.autograd import keeps_graph
from fusedloss.backends.outputs import ENTROPY
from fusedloss.linear_passes import LinearInputs, NeedsGrad
from fusedloss.plan import Inputs, Options, accumulation_dtype
from fusedloss.world import kernels_see

_N_TENSORS = len(LinearInputs._fields)


class SummedLoss(torch.autograd.Function):
    """The sum of the rows' losses, 0-d in the dtype of accumulation; with statistics also (3, n_rows) and 0-d."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        inputs = LinearInputs(*arguments[:_N_TENSORS])
        options, settings = arguments[_N_TENSORS:]
        outputs = linear_ops.gradient_pass(inputs, options, settings)
        ctx.save_for_backward(*inputs, *outputs.gradients())
        ctx.call = options, settings
        ctx.set_materialize_grads(False)
        if not options.return_stats:
            return outputs.loss
        ctx.mark_non_differentiable(outputs.row_stats, outputs.n_correct)
        return outputs.loss, outputs.row_stats, outputs.n_correct

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *dstats: None) -> tuple[Tensor | None, ...]:
        if dloss is None:
            return _padded([None] * 3)
        options, settings = ctx.call
        tensors = ctx.saved_tensors
        inputs, gradients = LinearInputs(*tensors[:_N_TENSORS]), tensors[_N_TENSORS:]
        if torch.is_grad_enabled() or not kernels_see(dloss):
            return _differentiable(inputs, options, settings.needs_grad, dloss)
        if torch.compiler.is_compiling():  # which owns the buffers of its graphs, and may have to run the backward again
            return _padded(None if gradient is None else dloss * gradient for gradient in gradients)
        if keeps_graph():
            gradients = tuple(None if gradient is None else gradient.clone() for gradient in gradients)
        for gradient in gradients:
            if gradient is not None:
                ops.scale_gradient(gradient, dloss, settings.backend)
        return _padded(gradients)


class RowLosses(torch.autograd.Function):
    """The rows' losses without scale, (n_rows,) in the dtype of accumulation; with statistics also (3, n_rows), of which the
    entropies have a gradient, and 0-d."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        inputs = LinearInputs(*arguments[:_N_TENSORS])
        options, settings = arguments[_N_TENSORS:]
        outputs = linear_ops.row_pass(inputs, options, settings)
        ctx.save_for_backward(*inputs)
        ctx.call = options, settings
        ctx.set_materialize_grads(False)
        if not options.return_stats:
            return outputs.row_losses
        ctx.mark_non_differentiable(outputs.n_correct)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *dstats: Tensor | None) -> tuple[Tensor | None, ...]:
        options, settings = ctx.call
        inputs, dentropy = LinearInputs(*ctx.saved_tensors), None
        if dstats and dstats[0] is not None:
            dentropy = dstats[0][ENTROPY]
            dloss = torch.zeros_like(dentropy) if dloss is None else dloss
        if dloss is None:
            return _padded([None] * 3)
        if torch.is_grad_enabled() or not kernels_see(dloss, dentropy):
            return _differentiable(inputs, options, settings.needs_grad, dloss, dentropy)
        options = options._replace(reduction="sum", return_stats=False)
        dloss, dentropy = dloss.resolve_neg(), None if dentropy is None else dentropy.resolve_neg()
        return _padded(linear_ops.gradient_pass(inputs, options, settings, dloss, dentropy).gradients())


def _differentiable(
    inputs: LinearInputs, options: Options, needs_grad: NeedsGrad, dloss: Tensor, dentropy: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """The gradients of PyTorch's own layer and the reference, which have derivatives of any order."""
    options = options._replace(return_stats=dentropy is not None)
    with torch.enable_grad():
        # Views, where the derivative ends: the input may be made of the weight, as of an embedding that is tied to it, whose
        # gradient would have the input's part twice.
        views = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs[:3]]
        wanted = [view for view, needed in zip(views, needs_grad, strict=True) if needed]
        loss_inputs = Inputs(F.linear(*views), *inputs[3:])  # type: ignore[arg-type]
        loss, stats = reference.cross_entropy(loss_inputs, options, accumulation_dtype(inputs.input.dtype))
        results, upstream = [loss], [dloss]
        if dentropy is not None:
            assert stats is not None
            results, upstream = [loss, stats.entropy], [dloss, dentropy]
        found = iter(torch.autograd.grad(results, wanted, upstream, create_graph=True))  # type: ignore[arg-type]
    return _padded(next(found) if needed else None for needed in needs_grad)


def _padded(gradients: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """With None for all arguments that have no gradient."""
    return *gradients, *[None] * (_N_TENSORS - 3 + 2)
