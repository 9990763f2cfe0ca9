"""A call of linear_cross_entropy, from the arguments to the loss: checked, routed, served in chunks or by PyTorch's layer."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fusedloss import backends, distributed, linear_ops, reference
from fusedloss.backends.outputs import ENTROPY
from fusedloss.backends.triton import device_facts
from fusedloss.checks import Facts
from fusedloss.geometry import DeviceFacts
from fusedloss.linear_autograd import RowLosses, SummedLoss
from fusedloss.linear_checks import Chunking, check_chunking, check_dtypes, check_layer, check_targets, logits_shape
from fusedloss.linear_passes import LinearInputs, NeedsGrad, Settings
from fusedloss.option_checks import check_options
from fusedloss.plan import ROW_REDUCTIONS, Extras, Inputs, Options, are_probabilities
from fusedloss.plan_linear import LinearPlan, chunks_of, leaves_rows_out, overwrites, sums_in_float32
from fusedloss.route import Route, autocast_is_on, facts_of, route_with, without_strides
from fusedloss.serving import check_if_asked, labels_of, serve_checked, with_scale_apart, without_numbers
from fusedloss.stats import LossStats
from fusedloss.world import Kind, is_strided, world_of


def serve(public: Callable[..., Any], input: Tensor, linear_weight: Tensor, target: Any, **arguments: Any) -> Any:
    """What `linear_cross_entropy`, which is `public`, returns for these arguments."""
    labels, labels_b, lam = labels_of(target)
    lam_tensor = lam if isinstance(lam, Tensor) else None
    others = (arguments["linear_bias"], arguments["weight"], arguments["sample_weight"])
    tensors = (input, linear_weight, labels, labels_b, lam_tensor, *others)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(public, tensors, input, linear_weight, target, **arguments)
    loss, stats = _serve(input.shape[:-1], *_checked(input, linear_weight, target, **arguments))
    return (loss, stats) if arguments["return_stats"] else loss


def planned(device: DeviceFacts | None, **arguments: Any) -> LinearPlan:
    """What `plan` returns for these arguments of `linear_cross_entropy`."""
    inputs, options, chunking, out_dtype = _checked(**arguments)
    dtype, route = _route(inputs, options, out_dtype)
    needs_grad = NeedsGrad(*map(_needs_grad, inputs[:3]))
    shape, n_rows = logits_shape(inputs.input, inputs.linear_weight), inputs.input.shape[:-1].numel()
    if route.backend in ("torch", "reference"):
        held = shape.numel() * dtype.itemsize * (2 if any(needs_grad) else 1)
        return LinearPlan(route.backend, route.reason, "unfused", n_rows, 1, 1 + sum(needs_grad[:2]), held)
    fused = options.fuses_gradient(dtype)
    n_classes = shape[-1]
    soft = _as_rows(inputs).has_probabilities()
    cut = n_rows, n_classes, dtype, route.backend, chunking.chunk_rows
    backward = chunks_of(*cut)  # makes gradients, in the forward where it is fused
    forward = backward if fused and any(needs_grad) else chunks_of(*cut, losses_only=not soft)
    held = max(sizes.n_logits() for sizes in ((forward, backward) if any(needs_grad) else (forward,))) * dtype.itemsize
    if route.backend == "triton" and any(needs_grad):
        facts = device or device_facts(inputs.input.device)
        held *= 1 if overwrites(backward.chunk_rows, n_classes, dtype, soft, options, facts) else 2
    if needs_grad.weight and sums_in_float32(dtype, backward.n_chunks, chunking.float32_sum):
        held += inputs.linear_weight.numel() * 4
    strategy, matmuls = "forward only", 1.0
    if any(needs_grad):
        strategy = "fused" if fused else "recompute"
        again = 0.0 if fused else 1.0
        share = 1.0  # of the rows, that the backward looks at
        if options.reduction in ROW_REDUCTIONS and leaves_rows_out(route.backend, chunking.compact):
            share = reference.rows_to_select(torch.tensor(n_rows), options).item() / max(1, n_rows)
        matmuls += share * (again + sum(needs_grad[:2]))
    return LinearPlan(route.backend, route.reason, strategy, forward.chunk_rows, forward.n_chunks, matmuls, held)


def _checked(
    input: Tensor,
    linear_weight: Tensor,
    target: Any,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
    options: Any,
    chunk_rows: int | None,
    compact: bool,
    **extras: Any,
) -> tuple[LinearInputs, Options, Chunking, torch.dtype | None]:
    """The arguments sorted, once each is right by itself and the layer fits its input; (N, d1, ..., F) as (n_rows, F)."""
    asked = Extras(**extras)
    labels, labels_b, lam = labels_of(target)
    lam_tensor = lam if isinstance(lam, Tensor) else None
    check_layer(input, linear_weight, linear_bias)
    check_targets(input, linear_weight, labels, labels_b, lam_tensor, asked.sample_weight, ignore_index)
    chunking = check_chunking(options, chunk_rows, compact)
    checked = check_options(reduction, -100 if ignore_index is None else ignore_index, label_smoothing, asked, lam)
    scale = asked.scale if isinstance(asked.scale, Tensor) else None
    inputs = LinearInputs(input, linear_weight, linear_bias, labels, labels_b, lam_tensor, weight, asked.sample_weight, scale)
    return _as_rows(inputs) if input.dim() > 2 else inputs, checked, chunking, asked.out_dtype


def _serve(
    batch: torch.Size, inputs: LinearInputs, options: Options, chunking: Chunking, out_dtype: torch.dtype | None
) -> tuple[Tensor, LossStats | None]:
    dtype, route = _route(inputs, options, out_dtype)
    if route.backend in ("torch", "reference"):
        loss, stats = serve_checked(_with_logits(inputs), options, out_dtype)
    else:
        factor: Any = None  # of the loss, outside its chunks
        if route.world.kind is Kind.COMPILED:
            inputs, options, factor = without_numbers(inputs, options)
        inputs, differentiable = _as_read(_as_rows(inputs), dtype)
        factor = differentiable if factor is None else factor
        if not inputs.has_probabilities():
            check_if_asked(inputs.target, inputs.target_b, len(inputs.linear_weight), options, route)
        settings = Settings(NeedsGrad(*map(_needs_grad, inputs[:3])), chunking, route.backend)
        fused = any(settings.needs_grad) and options.fuses_gradient(dtype)
        loss, stats = (_summed if fused else _from_rows)(inputs, options, settings)
        if factor is not None:
            loss = loss * (factor.to(loss) if isinstance(factor, Tensor) else factor)
        loss = loss.to(route.out_dtype)
    if options.reduction == "none":
        loss = loss.reshape(batch + loss.shape[1:])  # of a linear_weight (C, d1, ..., F) there are (N, d1, ...)
    if stats is not None:
        stats = stats.of_rows(batch + stats.lse.shape[1:])
    return loss, stats


def _needs_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _as_rows(inputs: LinearInputs) -> LinearInputs:
    """With input (F,) or (N, d1, ..., F) as (n_rows, F), and one value per row of all that goes with it."""
    x, target = inputs.input.reshape(-1, inputs.input.shape[-1]), inputs.target
    soft = are_probabilities(target.shape, logits_shape(inputs.input, inputs.linear_weight), inputs.target_b is not None)
    lam, sample_weight = (
        None if values is None else values.reshape(-1).expand(len(x)) for values in (inputs.lam, inputs.sample_weight)
    )
    return inputs._replace(
        input=x,
        target=target.reshape(-1, target.shape[-1]) if soft else target.reshape(-1),
        target_b=None if inputs.target_b is None else inputs.target_b.reshape(-1),
        lam=lam,
        sample_weight=sample_weight,
    )


def _route(inputs: LinearInputs, options: Options, out_dtype: torch.dtype | None) -> tuple[torch.dtype, Route]:
    """Checks the tensors and chooses the path; first the dtype of the logits."""
    x, device = inputs.input, inputs.input.device
    for tensor in inputs:
        if tensor is not None and not is_strided(tensor):  # the layer and the loss are PyTorch's, and so are their errors
            return x.dtype, Route("torch", without_strides(tensor), x.dtype, world_of(*inputs))
    dtype = check_dtypes(*inputs[:3], autocast_is_on(x))
    logits = Facts(logits_shape(x, inputs.linear_weight), dtype, device, any(map(_needs_grad, inputs[:3])))
    facts, has_scale = facts_of(logits, *inputs[3:-1]), inputs.scale is not None
    route = route_with(facts, options, out_dtype, has_scale, world_of(*inputs), backends.requested)
    if inputs.linear_weight.dim() > 2 and route.backend not in ("torch", "reference"):
        route = route._replace(backend="reference", reason="a linear_weight (C, d1, ..., F) has no fused path")
    return dtype, route


def _with_logits(inputs: LinearInputs) -> Inputs:
    """The inputs of `cross_entropy`, for which the logits are stored."""
    x, linear_weight, linear_bias, *loss_tensors = inputs
    bias = linear_bias.flatten() if linear_bias is not None and linear_bias.dim() > 1 else linear_bias
    flat = linear_weight if linear_weight.dim() == 2 else linear_weight.reshape(-1, linear_weight.shape[-1])
    logits = F.linear(x, flat, bias)
    return Inputs(logits.reshape(logits_shape(x, linear_weight)), *loss_tensors)  # type: ignore[arg-type]


def _as_read(inputs: LinearInputs, dtype: torch.dtype) -> tuple[LinearInputs, Tensor | None]:
    """The tensors as matmuls and kernels read them; and the factor of the loss that has a gradient of its own, if any."""
    inputs, factor = with_scale_apart(inputs)
    linear_bias = inputs.linear_bias
    inputs = inputs._replace(
        input=inputs.input.to(dtype),
        linear_weight=inputs.linear_weight.to(dtype),
        linear_bias=None if linear_bias is None else linear_bias.to(dtype),
    )
    inputs = LinearInputs(*(None if tensor is None else tensor.resolve_neg() for tensor in inputs))  # type: ignore[arg-type]
    return inputs, factor


def _summed(inputs: LinearInputs, options: Options, settings: Settings) -> tuple[Tensor, LossStats | None]:
    """The loss of "sum" and "mean", whose gradients are made with it."""
    if options.reduction == "mean":
        share = 1 / _denominator(inputs, options)
        inputs = inputs._replace(scale=share if inputs.scale is None else share * inputs.scale)
    result = SummedLoss.apply(*inputs, options._replace(reduction="sum"), settings)
    if not options.return_stats:
        return result, None
    loss, row_stats, n_correct = result
    return loss, _statistics(row_stats, n_correct, inputs, options)


def _from_rows(inputs: LinearInputs, options: Options, settings: Settings) -> tuple[Tensor, LossStats | None]:
    """The loss from the losses of the rows: every reduction."""
    scale, inputs = inputs.scale, inputs._replace(scale=None)
    of_rows = options._replace(reduction="none", scale=1.0)
    row_stats = n_correct = None
    if any(settings.needs_grad):
        rows = RowLosses.apply(*inputs, of_rows, settings)
        if options.return_stats:
            rows, row_stats, n_correct = rows
    else:
        rows, row_stats, n_correct = linear_ops.row_pass(inputs, of_rows, settings)
    if options.reduction == "none":
        loss = rows
    elif options.reduction in ROW_REDUCTIONS:
        loss = reference.average_of_largest(rows, _counted(inputs, options), options)
    else:
        total = reference.total(rows)
        loss = total if options.reduction == "sum" else total / _denominator(inputs, options)
    if options.scale != 1:
        loss = loss * options.scale
    if scale is not None:
        loss = loss * scale
    return loss, _statistics(row_stats, n_correct, inputs, options) if row_stats is not None else None


def _counted(inputs: LinearInputs, options: Options) -> Tensor:
    counted = inputs.counted(options.ignore_index)
    return torch.ones_like(inputs.target[:, 0], dtype=torch.bool) if counted is None else counted


def _denominator(inputs: LinearInputs, options: Options) -> Tensor:
    """What the mean divides by, 0-d; nan where no row counts, as PyTorch's mean is then."""
    if inputs.target_b is None:
        total = distributed.denominator(inputs.target, options.ignore_index, inputs.weight)
    else:
        total = _counted(inputs, options).sum(dtype=torch.float64)
    return total.masked_fill(total == 0, torch.nan)


def _statistics(row_stats: Tensor, n_correct: Any, inputs: LinearInputs, options: Options) -> LossStats:
    lse, row_loss, entropy = row_stats.detach().unbind()
    counted = _counted(inputs, options)
    if options.differentiates_entropy():
        entropy = row_stats[ENTROPY]  # autograd forbids to edit what unbind() returns
    return LossStats(lse, row_loss, counted.sum(), n_correct, reference.worst_row(row_loss, counted), entropy)
