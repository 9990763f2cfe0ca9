"""A call, from the arguments to the loss: known already; or checked, routed, and served by a kernel or by PyTorch's operators."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import _reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fusedloss import environment, known, ops, reference
from fusedloss.autograd import (
    CrossEntropyFunction,
    KnownCrossEntropyFunction,
    alike_lengths,
    forgets_logits,
    kernel_forward,
)
from fusedloss.backends.outputs import ENTROPY, N_ROW_STATS, RowStats
from fusedloss.backends.triton import device_facts
from fusedloss.checks import check_class_indices
from fusedloss.geometry import DeviceFacts
from fusedloss.option_checks import check_options
from fusedloss.plan import Extras, Inputs, Options, Plan
from fusedloss.plan_cpu import cpu_plan, fuses_rows
from fusedloss.plan_triton import triton_plan
from fusedloss.recover import forget_logits
from fusedloss.route import Route, route_of
from fusedloss.rows import expanded_to_rows, kernel_inputs
from fusedloss.stats import LossStats
from fusedloss.world import PLAIN, TRANSFORMED, Kind

_CHECK_TARGETS = environment.choice("FUSEDLOSS_CHECK_TARGETS", ("0", "1")) == "1"


def serve(
    public: Callable[..., Any],  # the function that was called
    input: Tensor,
    target: Any,
    weight: Tensor | None,
    scale: Any,  # float | Tensor; of a known call a float
    arguments: tuple[Any, ...],
) -> Any:
    """What `cross_entropy` returns for these arguments; the last are all others, those of PyTorch first, ignore_index the first
    of them, and then those after the scale, in the order of `Extras`."""
    key = None
    if not is_dynamo_compiling():
        key, call = known.find(input, target, weight, scale, arguments)
        if call is not None:
            if not call.needs_grad:
                loss, _, _, stats = call.prepared.forward(input, target, weight, scale)
                return loss if stats is None else (loss, _loss_stats(stats, input))
            loss = KnownCrossEntropyFunction.apply(input, (target, weight, scale, call))
            if call.forgets:
                forget_logits(loss)
            return (loss, _loss_stats(vars(loss.grad_fn).pop("stats"), input)) if call.options.return_stats else loss
    return _serve_unknown(public, key, input, target, weight, scale, arguments)


def _serve_unknown(
    public: Callable[..., Any],
    key: tuple[Any, ...] | None,  # by which the next such call may be known
    input: Tensor,
    target: Any,
    weight: Tensor | None,
    scale: float | Tensor,
    arguments: tuple[Any, ...],
) -> Any:
    ignore_index, size_average, reduce, reduction, label_smoothing, *others = arguments
    extras = Extras(scale, *others)
    labels, labels_b, lam = labels_of(target)
    tensors = (input, labels, labels_b, lam if isinstance(lam, Tensor) else None, weight, extras.sample_weight)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(  # by keyword, as PyTorch does: overrides look there
            public,
            tensors,
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
            **extras._asdict(),
        )
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    options = check_options(reduction, ignore_index, label_smoothing, extras, lam)
    inputs = Inputs(*tensors, scale if isinstance(scale, Tensor) else None)
    warns = size_average is not None or reduce is not None or reduction == "elementwise_mean"  # each time, as PyTorch
    if warns or isinstance(label_smoothing, Tensor):
        key = None
    loss, stats = serve_checked(inputs, options, extras.out_dtype, key)
    return (loss, stats) if options.return_stats else loss


def serve_checked(
    inputs: Inputs, options: Options, out_dtype: torch.dtype | None, key: tuple[Any, ...] | None = None
) -> tuple[Tensor, LossStats | None]:
    """The loss, and statistics where they are asked for; key: by which the next such call may be known."""
    route = route_of(inputs, options, out_dtype)
    if inputs.logits.dim() == 1:
        options = options.of_one_row()
    factor: Any  # of the loss, outside the kernel
    out_dtype = route.out_dtype
    if route.world.kind is Kind.COMPILED:
        inputs, options, factor = without_numbers(inputs, options)
        if factor is not None:  # the sum of float16 losses may overflow before it is scaled
            route = route._replace(out_dtype=torch.promote_types(route.out_dtype, torch.float32))
    else:
        inputs, factor = with_scale_apart(inputs)
    options = with_strategy(options, inputs, route)
    loss, stats = compute(inputs, options, route)
    if key is not None:
        _remember(key, inputs, options, route, loss)
    if factor is not None:
        loss = (loss * (factor.to(loss) if isinstance(factor, Tensor) else factor)).to(out_dtype)
    return loss, stats


def with_strategy(options: Options, inputs: Inputs, route: Route) -> Options:
    """The same, where a backend has a choice between strategies. A compiler has none: each other size would compile anew."""
    if route.backend == "cpu" and route.world.kind is not Kind.COMPILED and fuses_rows(inputs.logits, options):
        return options._replace(fuses_rows=True)
    return options


def without_numbers(inputs: Any, options: Options) -> tuple[Any, Options, float | Tensor | None]:
    """The same with no number that is another in every step: a compiler takes an operator's numbers for constants, and compiles
    anew for each. The scale becomes a factor of the loss, which is fused into what follows; the share of two labels a tensor."""
    factor = inputs.scale if inputs.scale is not None else options.scale
    if inputs.target_b is not None and inputs.lam is None:
        inputs = inputs._replace(lam=inputs.target.new_ones((), dtype=torch.float64) * options.lam)
    unscaled = type(factor) is float and factor == 1
    return inputs._replace(scale=None), options._replace(scale=1.0, lam=1.0), None if unscaled else factor


def labels_of(target: Any) -> tuple[Tensor, Tensor | None, float | Tensor]:
    """The target, or the two labels and the share of the first."""
    if isinstance(target, (tuple, list)) and len(target) == 3:  # a list: what a DataLoader makes of tuples
        labels, labels_b, lam = target
        return labels, labels_b, lam
    return target, None, 1.0


def _remember(key: tuple[Any, ...], inputs: Inputs, options: Options, route: Route, loss: Tensor) -> None:
    """Has the next call like this one go straight to its backend."""
    logits, target, weight = inputs.logits, inputs.target, inputs.weight
    # Never remembered: calls with tensors that `same_kind` does not test, and statistics that have a gradient.
    if inputs.target_b is not None or inputs.sample_weight is not None or options.reduction == "topk":
        return
    if options.differentiates_entropy():
        return
    # Nor under a mode that is disabled for a while (torch._C.DisableTorchFunction): it would not see the next call.
    if known.n_function_modes() != 0:
        return
    is_known_kind = route.world is PLAIN or (route.world is TRANSFORMED and route.backend == "torch")
    if not is_known_kind or route.backend not in ("cpu", "triton", "torch") or (_CHECK_TARGETS and route.backend != "cpu"):
        return
    varies = route.backend == "cpu" and known.varies(key, logits)  # a launch is cut for a number of rows
    if not known.is_worth_remembering(key, logits, target, varies):
        return
    needs_grad = route.backend != "torch" and logits.requires_grad and torch.is_grad_enabled()
    prepared: ops.Prepared | reference.TorchLoss | None = reference.TorchLoss(options)
    if route.backend != "torch":
        taken = kernel_inputs(inputs, route.backend)
        prepared = ops.prepare(taken, options, route.out_dtype, needs_grad, route.backend, inputs, varies)
    if prepared is None:
        return
    fused = needs_grad and options.fuses_gradient(logits.dtype)
    forgets = fused and forgets_logits(options, logits)
    tensors = (known.FIRST, logits, target) if weight is None else (known.FIRST, logits, target, weight)
    lengths = alike_lengths(logits, options) if prepared.any_batch else None
    takes, takes_dloss = known.same_kind(*tensors, any_batch=lengths is not None), known.same_kind(loss.detach())
    if takes is None or takes_dloss is None:
        return
    names = (() if fused and not forgets else ("logits",)) + (("target",) if weight is None else ("target", "weight"))
    settings = (needs_grad, options, route.out_dtype, route.backend, names, forgets)
    known.remember(key, known.KnownCall(takes, lengths, takes_dloss, *settings, prepared))


def compute(inputs: Inputs, options: Options, route: Route) -> tuple[Tensor, LossStats | None]:
    """The loss, and statistics where they are asked for, by the route chosen."""
    if route.backend == "torch":
        return reference.torch_loss(inputs, options), None
    if route.backend == "sharded":
        from fusedloss import dtensor  # takes a second

        return dtensor.cross_entropy(inputs, options, route.out_dtype)
    if inputs.logits.dim() == 1:
        loss, stats = compute(inputs.as_one_row(), options, route)
        if stats is not None:
            stats = stats.of_rows(())
        return loss.reshape(()), stats
    if inputs.lam is not None or inputs.sample_weight is not None:
        inputs = inputs._replace(
            lam=expanded_to_rows(inputs.lam, inputs.logits), sample_weight=expanded_to_rows(inputs.sample_weight, inputs.logits)
        )
    if route.backend == "reference":
        return reference.cross_entropy(inputs, options, route.out_dtype)
    if not inputs.has_probabilities():
        check_if_asked(inputs.target, inputs.target_b, inputs.logits.shape[1], options, route)
    needs_grad = inputs.logits.requires_grad and torch.is_grad_enabled()
    if needs_grad and route.world.kind is not Kind.COMPILED:
        result = CrossEntropyFunction.apply(inputs.logits, inputs, options, route.out_dtype, route.backend)
        loss = result[0] if options.return_stats else result
        if loss.grad_fn.has_gradient and loss.grad_fn.place is None:
            forget_logits(loss)
    else:
        result = kernel_forward(inputs, options, route.out_dtype, needs_grad, route.backend)
    if not options.return_stats:
        return result, None
    loss, row_stats, counts = result
    return loss, _loss_stats((row_stats, counts), inputs.logits)


def _loss_stats(stats: RowStats, logits: Tensor) -> LossStats:
    row_stats, counts = stats
    rows = () if logits.dim() == 1 else (logits.shape[0], *logits.shape[2:])
    row_stats = row_stats.view(N_ROW_STATS, *rows)
    if row_stats.requires_grad:
        lse, row_loss, _ = row_stats.detach().unbind()
        entropy = row_stats[ENTROPY]  # autograd forbids to edit what unbind() returns
    else:
        lse, row_loss, entropy = row_stats.unbind()
    n_counted, n_correct, worst = counts.unbind()
    return LossStats(lse, row_loss, n_counted, n_correct, worst, entropy)


def check_if_asked(target: Tensor, target_b: Tensor | None, n_classes: int, options: Options, route: Route) -> None:
    """Raises IndexError for a class index out of range, if FUSEDLOSS_CHECK_TARGETS says so; the CPU always checks."""
    if _CHECK_TARGETS and route.backend != "cpu":
        check_class_indices(target, n_classes, options.ignore_index, target_b)


def with_scale_apart(inputs: Any) -> tuple[Any, Tensor | None]:
    """The same with the scale on the device of the first tensor. A scale that has a gradient of its own is returned apart, as a
    factor of the loss."""
    scale, device = inputs.scale, inputs[0].device
    if scale is None:
        return inputs, None
    if scale.requires_grad and torch.is_grad_enabled():
        return inputs._replace(scale=None), scale
    if scale.device != device:
        inputs = inputs._replace(scale=scale.to(device, non_blocking=device.type != "cpu"))
    return inputs, None


def checked(
    input: Tensor,
    target: Any,
    weight: Tensor | None,
    size_average: bool | None,
    ignore_index: int,
    reduce: bool | None,
    reduction: str,
    label_smoothing: float,
    *,
    requested: str | None = None,
    **extras: Any,
) -> tuple[Inputs, Options, Route]:
    """What `cross_entropy` makes of these arguments, and the way it would take; requested: as `route_of` has it."""
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    labels, labels_b, lam = labels_of(target)
    extra = Extras(**extras)
    options = check_options(reduction, ignore_index, label_smoothing, extra, lam)
    scale = extra.scale if isinstance(extra.scale, Tensor) else None
    lam_tensor = lam if isinstance(lam, Tensor) else None
    inputs = Inputs(input, labels, labels_b, lam_tensor, weight, extra.sample_weight, scale)
    route = route_of(inputs, options, extra.out_dtype, requested)
    return with_scale_apart(inputs)[0], options.of_one_row() if input.dim() == 1 else options, route


def planned(device: DeviceFacts | None, **arguments: Any) -> Plan:
    """What `plan` returns for these arguments of `cross_entropy`."""
    inputs, options, route = checked(**arguments)
    input = inputs.logits
    if route.backend in ("torch", "reference", "sharded"):
        return Plan(route.backend, route.reason)
    if input.dim() == 1:
        inputs = inputs.as_one_row()
    needs_grad = input.requires_grad and torch.is_grad_enabled()
    if route.backend == "cpu":
        plan = cpu_plan(route.reason, inputs.logits, with_strategy(options, inputs, route), needs_grad)
    else:
        plan = triton_plan(route.reason, inputs, options, needs_grad, device or device_facts(input.device))
    return replace(plan, keeps_logits=plan.strategy == "fused" and not forgets_logits(options, input))
