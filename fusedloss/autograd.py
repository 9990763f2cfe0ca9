"""The torch.autograd.Function of eager calls: what is saved and which gradients exist.

forward   loss, saved, dlogits = op.forward(logits, ...)   saved: per-row statistics and the reduction's coefficients
backward  dlogits, scaled by dloss                         fused strategy: every backward of first order
          op.forward(logits, ...), scaled by dloss         the same where hooks had the say over what is saved
          op.backward(dloss, logits, saved)                recompute strategy; the gradient of entropies is added to it
          affine.gradient, autograd.grad(reference)        under create_graph: differentiable to any order

A call holds one tensor of the logits' size, as PyTorch's loss holds their log-softmax: the fused gradient, or the logits. What
hooks are to keep, or to throw away, goes through save_for_backward: while checkpoints or other hooks are active no gradient is
made before it is asked for, and that is the logits alone.

The fused gradient belongs to the graph until the graph is freed: then it is scaled in place and handed out, before that a copy.
"""

import math
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from fusedloss import affine, ops, reference
from fusedloss.backends.outputs import ENTROPY
from fusedloss.known import KnownCall
from fusedloss.plan import Inputs, Options
from fusedloss.plan_cpu import ELEMENTS_PER_THREAD
from fusedloss.recover import KEPT_BYTES, recovered
from fusedloss.rows import kernel_inputs
from fusedloss.world import hooks_are_active, kernels_see, n_dispatch_modes, nobody_watches

Place = tuple[Tensor, int, Tensor | None]  # logits, their version at the forward; the gradient, where autograd does not save it


def _rows_shape(logits: Tensor) -> tuple[int, ...]:
    return (logits.shape[0], *logits.shape[2:])


def kernel_forward(
    inputs: Inputs, options: Options, out_dtype: torch.dtype, needs_grad: bool, backend: str
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The loss; with statistics also (3, n_rows) and (3,), as `ops.forward` has them. No gradient but the operator's own."""
    outputs = ops.forward(kernel_inputs(inputs, backend), options, out_dtype, needs_grad, backend)
    loss = outputs.loss
    if options.reduction == "none" and inputs.logits.dim() > 2:
        loss = loss.view(_rows_shape(inputs.logits))
    return (loss, outputs.row_stats, outputs.counts) if options.return_stats else loss


class CrossEntropyFunction(torch.autograd.Function):
    """What `kernel_forward` returns, and the loss's gradient with respect to the logits, which are inputs.logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, inputs: Inputs, options: Options, out_dtype: torch.dtype, backend: str) -> Any:
        fused, hooked = options.fuses_gradient(logits.dtype), hooks_are_active()
        needs_grad = not (fused and hooked)
        outputs = ops.forward(kernel_inputs(inputs, backend), options, out_dtype, needs_grad, backend)
        loss, dlogits = outputs.loss, outputs.dlogits
        if logits.dim() > 2 and options.reduction == "none":
            # Autograd forbids to edit a view that a Function made.
            loss = torch.ops.aten._unsafe_view.default(loss, _rows_shape(logits))
        has_gradient = fused and needs_grad
        ctx.call, ctx.has_gradient = (options, out_dtype, backend), has_gradient
        if has_gradient:
            ctx.place = None if forgets_logits(options, logits) else (logits, logits._version, None)
            save_gradient(ctx, dlogits.view(logits.shape), inputs)
        else:
            ctx.names = _present(inputs)
            ctx.hooked = (weakref.ref(logits.untyped_storage()), logits._version) if hooked else None
            ctx.save_for_backward(*(getattr(inputs, name) for name in ctx.names), *([] if fused else [outputs.saved]))
        ctx.set_materialize_grads(False)
        if not options.return_stats:
            return loss
        if options.differentiates_entropy():
            ctx.mark_non_differentiable(outputs.counts)
        else:
            ctx.mark_non_differentiable(outputs.row_stats, outputs.counts)
        return loss, outputs.row_stats, outputs.counts

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *dstats: Tensor | None) -> tuple[Tensor | None, ...]:
        dentropy = None
        if ctx.call[0].differentiates_entropy():
            dentropy = None if dstats[0] is None else dstats[0][ENTROPY]
        if dloss is None and dentropy is None:
            return None, None, None, None, None
        return _gradient(ctx, ctx.names, dloss, dentropy, *ctx.call), None, None, None, None


class KnownCrossEntropyFunction(torch.autograd.Function):
    """The same for a call like one that was served before: class indices or probabilities, weights or not."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rest: tuple[Tensor, Tensor | None, float, KnownCall]) -> Tensor:
        target, weight, scale, known = rest  # one by one they would cost a percent of a small step
        loss, saved, dlogits, stats = known.prepared.forward(logits, target, weight, scale)
        ctx.call, ctx.has_gradient = (known, scale), dlogits is not None
        ctx.materialize_grads = False  # what set_materialize_grads() does, which is a call more
        if dlogits is None or known.forgets:
            ctx.place = None
            last = saved if dlogits is None else dlogits
            if weight is None:  # with a tuple of one or of none, a percent of a small step
                ctx.save_for_backward(logits, target, last)
            else:
                ctx.save_for_backward(logits, target, weight, last)
        else:  # nobody's hooks are active: to have autograd save the gradient would take 3 % of a small step
            ctx.place = logits, logits._version, dlogits
            if weight is None:
                ctx.save_for_backward(target)
            else:
                ctx.save_for_backward(target, weight)
        if stats is not None:
            ctx.stats = stats  # as outputs of a Function they would take 10 us
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None) -> tuple[Tensor | None, ...]:
        if dloss is None:
            return None, None
        known, scale = ctx.call
        watched = torch.is_grad_enabled() or is_dynamo_compiling() or n_dispatch_modes() != 0
        is_plain = not watched and forward_ad._current_level < 0 and (known.takes_dloss(dloss) or nobody_watches(dloss))
        if is_plain and ctx.has_gradient and not keeps_graph():
            dlogits = _taken(ctx)
            known.prepared.scale_gradient(dlogits, dloss)
            return dlogits, None
        if is_plain and not ctx.has_gradient:
            logits, target, *weight, saved = ctx.saved_tensors
            return known.prepared.backward(dloss, logits, target, weight[0] if weight else None, saved), None
        options = known.options._replace(scale=scale)
        return _gradient(ctx, known.names, dloss, None, options, known.out_dtype, known.backend), None


# Whether retain_graph or create_graph was asked for. Private: without it the gradient is copied as if it had been.
keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def forgets_logits(options: Options, logits: Tensor) -> bool:
    """Whether a call that made its gradient keeps nothing of the logits but their place in the graph: `forget_logits` is to be
    called. PyTorch's composition of a loss that is not affine in its softmax keeps them, too; small ones are kept rather than
    forgotten, which takes as long as their loss."""
    return logits.numel() * logits.element_size() > KEPT_BYTES and affine.is_affine(options)


def alike_lengths(logits: Tensor, options: Options) -> range:
    """The numbers of examples, these logits' among them, for which `forgets_logits` and `fuses_rows` have one answer."""
    most = ELEMENTS_PER_THREAD if options.reduction == "none" else KEPT_BYTES // logits.element_size()
    last = most // max(1, math.prod(logits.shape[1:]))
    return range(last + 1) if logits.shape[0] <= last else range(last + 1, sys.maxsize)


def save_gradient(ctx: Any, dlogits: Tensor, inputs: Inputs) -> None:
    """What the backward of a call reads that has its gradient."""
    ctx.names = _present(inputs if ctx.place is None else inputs._replace(logits=None))  # type: ignore[arg-type]
    ctx.save_for_backward(*(getattr(inputs, name) for name in ctx.names), dlogits)


def _present(inputs: Inputs) -> tuple[str, ...]:
    """Names of the inputs that are not None. None is not saved: what draws the graph reads the shape of every saved tensor."""
    return tuple(name for name, tensor in zip(Inputs._fields, inputs, strict=True) if tensor is not None)


def _made(ctx: Any, place: Place | None) -> Tensor:
    """The gradient that the forward made."""
    saved = ctx.saved_tensors  # raises if one was edited since, although the gradient needs it no more: as PyTorch, always
    dlogits = None if place is None else place[2]
    return saved[-1] if dlogits is None else dlogits


def _taken(ctx: Any) -> Tensor:
    """Takes the gradient off ctx, for the backward that frees the graph. `pop` is atomic: of two threads one gets it. Nothing
    else holds it then, so that AccumulateGrad keeps it without a copy."""
    place = ctx.__dict__.pop("place", _taken)
    if place is _taken:
        _ = ctx.saved_tensors  # raises, once the graph is freed
        raise RuntimeError("Trying to backward through the graph a second time, in another thread at the same time")
    return _made(ctx, place)


def _read(ctx: Any, of: Callable[[Tensor], Tensor]) -> Tensor:
    """What `of` makes of the gradient, which it must not change. A backward that frees the graph releases the gradient, but under
    a compiler, which owns the buffers of its graphs."""
    if torch.compiler.is_compiling():
        return of(_made(ctx, ctx.place))
    if not keeps_graph():
        return of(_taken(ctx))
    made = of(_made(ctx, vars(ctx).get("place")))
    if "place" not in vars(ctx):  # who took the gradient may have scaled it while it was read
        raise RuntimeError("Another thread freed the graph during a backward that keeps it")
    return made


def _gradient(
    ctx: Any,
    names: tuple[str, ...],  # of the tensors that are saved first
    dloss: Tensor | None,
    dentropy: Tensor | None,
    options: Options,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """dloss, dentropy: None where no loss was made of the rows' losses, or of their entropies (n_rows,)."""
    if dloss is None:
        assert dentropy is not None
        dloss = torch.zeros_like(dentropy, dtype=out_dtype)
    if ctx.has_gradient and not torch.is_grad_enabled():
        if torch.compiler.is_compiling() or not kernels_see(dloss):
            return _read(ctx, lambda dlogits: ops.scaled(dlogits, dloss))
        dlogits = _read(ctx, torch.clone) if keeps_graph() else _taken(ctx)
        ops.scale_gradient(dlogits, dloss, backend)
        return dlogits
    tensors = ctx.saved_tensors
    by_name = dict(zip(names, tensors[: len(names)], strict=True))
    if not ctx.has_gradient:
        _check_kept(ctx, by_name["logits"])
    if torch.is_grad_enabled() or not kernels_see(dloss, dentropy):
        place = vars(ctx).get("place")

        def from_made(made: Tensor | None) -> Tensor:
            if place is not None and place[1] != place[0]._version:
                _check_edit(place[0], ctx.next_functions[0][0], options)
            return _differentiable_gradient(place, dloss, dentropy, by_name, made, options, out_dtype)

        return _read(ctx, from_made) if ctx.has_gradient else from_made(None)
    inputs = Inputs(**by_name)
    if options.fuses_gradient(inputs.logits.dtype):
        dlogits = ops.forward(kernel_inputs(inputs, backend), options, out_dtype, True, backend).dlogits.view(inputs.logits.shape)
        ops.scale_gradient(dlogits, dloss, backend)
        return dlogits
    return ops.backward(dloss, kernel_inputs(inputs, backend), tensors[-1], options, backend, dentropy).view(inputs.logits.shape)


def _check_kept(ctx: Any, logits: Tensor) -> None:
    """Raises where hooks kept the logits in the memory where they lay, and they were edited: autograd does not look then."""
    storage, version = vars(ctx).get("hooked") or (None, 0)
    if storage is not None and storage() is logits.untyped_storage() and logits._version > version:
        raise _modified(logits, "which hooks kept in place")


def _modified(logits: Tensor, which: str) -> RuntimeError:
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: the logits of shape "
        f"{list(logits.shape)}, {which}"
    )


def _check_edit(logits: Tensor, node: Any, options: Options) -> None:
    """Raises where logits that were edited since the forward cannot be had again from their gradient (recover.py), or no longer
    have the place in the graph that they had, which was at this node."""
    moved = logits.grad_fn is not node if logits.grad_fn is not None else not logits.requires_grad
    if moved or not affine.is_affine(options):
        raise _modified(logits, "which a second derivative reads")


def _differentiable_gradient(
    kept: Place | None,
    dloss: Tensor,
    dentropy: Tensor | None,
    by_name: dict[str, Tensor],
    dlogits: Tensor | None,
    options: Options,
    out_dtype: torch.dtype,
) -> Tensor:
    """From PyTorch's operators: under create_graph the gradient must be differentiable itself, under vmap (is_grads_batched) no
    kernel serves dloss."""
    place, version, _ = kept or (by_name["logits"], None, None)
    inputs = Inputs(**{**by_name, "logits": place})
    if place.dim() == 1:
        with torch.enable_grad():  # a batched gradient is not, and goes back to the place through this view
            inputs = inputs.as_one_row()
        dlogits = None if dlogits is None else dlogits.unsqueeze(0)
    if dlogits is not None and version != place._version:  # forgotten, or edited since, as it may be
        inputs = inputs._replace(logits=recovered(inputs, options, dlogits))
    if dentropy is None and affine.is_affine(options):
        dloss = dloss.view(_rows_shape(inputs.logits)) if options.reduction == "none" else dloss
        return affine.gradient(dloss, inputs, options).view(place.shape)
    with torch.enable_grad():
        loss, stats = reference.cross_entropy(inputs, options._replace(return_stats=dentropy is not None), out_dtype)
        losses, upstream = [loss.reshape(dloss.shape)], [dloss]
        if dentropy is not None:
            assert stats is not None
            losses, upstream = [*losses, stats.entropy.reshape(dentropy.shape)], [*upstream, dentropy]
        return torch.autograd.grad(losses, place, upstream, create_graph=True)[0]
