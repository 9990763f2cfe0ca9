"""cross_entropy(): torch.nn.functional.cross_entropy's signature, the extras, and the choice of path."""

import os
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn import _reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fusedloss import backends, ops, reference
from fusedloss.autograd import CrossEntropyFunction, KnownCrossEntropyFunction, forward_only, kernel_inputs
from fusedloss.backends import cpu
from fusedloss.backends.outputs import contiguous_strides
from fusedloss.backends.triton import device_facts
from fusedloss.checks import Facts, InputFacts, autocast_dtype, check_class_indices, check_options, check_tensors
from fusedloss.known import KNOWN, KnownCall, is_worth_remembering, remember, same_kind
from fusedloss.ops import nobody_watches
from fusedloss.plan import Inputs, Options, Plan
from fusedloss.plan_cpu import cpu_plan
from fusedloss.plan_triton import DeviceFacts, triton_plan
from fusedloss.stats import LossStats

_CHECK_TARGETS = os.environ.get("FUSEDLOSS_CHECK_TARGETS", "0") not in ("", "0")


class Route(NamedTuple):
    """Which backend serves a call, why, and the dtype of the loss."""

    backend: str
    reason: str
    out_dtype: torch.dtype


def cross_entropy(
    input: Tensor,
    target: Tensor | tuple[Tensor, Tensor, float | Tensor],
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    top_k: int | float | None = None,
    scale: float | Tensor = 1.0,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_stats: bool = False,
) -> Any:  # Tensor, or (Tensor, LossStats) with return_stats: a union would fail the type checks of every caller
    r"""Softmax cross-entropy of logits, reduced over the batch: scale * reduce_n( -w[y_n] log softmax(x_n)[y_n] ).

    The positional parameters are those of `torch.nn.functional.cross_entropy`, with its semantics. Differences, all on
    purpose: sums are accumulated in float32 or better; an ignored row has gradient 0 even where its logits are NaN; on a
    GPU a class index out of range makes the loss and that row's gradient NaN instead of stopping the device (set
    FUSEDLOSS_CHECK_TARGETS=1 for an IndexError, at the price of a synchronisation).

    With all extras, z_n = softcap * tanh(logit_scale * x_n / softcap) (without softcap: logit_scale * x_n), and a row's loss is

        sample_weight_n * ( PyTorch's loss of z_n with weight and label_smoothing + z_loss * logsumexp(z_n)**2 )

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...); float16, bfloat16, float32 or float64, any strides.
        target: class indices (), (N,) or (N, d1, ...), int64 (uint8 for 1-D); or class probabilities of input's shape; or two
            labels of MixUp or CutMix, a tuple (target_a, target_b, lam) of class indices and the share of the first, a number
            or a tensor (), (N,) or of target_a's shape: the loss of the class probabilities
            lam * one_hot(target_a) + (1 - lam) * one_hot(target_b), which are never built: a class whose share is 0 does not
            enter, though its logit be -inf. A row with either label ignored counts for nothing.
        weight: (C,), a factor per class, in input's dtype.
        size_average: deprecated, overrides reduction as in PyTorch.
        ignore_index: rows with this class index count for nothing; may be any integer.
        reduce: deprecated, overrides reduction as in PyTorch.
        reduction: "none" one loss per row; "sum"; "mean", divided by the sum of w[y_n] over the counted rows (by the
            number of counted rows for probabilities and two labels), whatever sample_weight is; "max", the largest loss of a
            counted row, ties sharing the gradient evenly; "topk", the average of the top_k largest losses among the counted
            rows.
        label_smoothing: eps in [0, 1]: (1 - eps) of the loss plus eps times the average over all classes.
        top_k: for reduction "topk" only: an int (rows), or a float in (0, 1], a fraction of the counted rows, rounded to
            the nearest row and to at least one.
        scale: factor of the loss and of its gradient, multiplied inside the kernel: a number, or a 0-d floating point
            tensor, on any device, read there without synchronisation. With reduction="sum" it stands for every
            normalisation that is not PyTorch's mean: scale=1/number_of_targets_in_the_global_batch.
        sample_weight: a factor per row, floating point: (N,), or (N, d1, ...) like class indices.
        z_loss: factor of the squared log-sum-exp, which keeps logits from drifting.
        logit_scale: factor of the logits, a number. (One that is learned is a multiplication before the call.)
        softcap: positive bound of the logits, after logit_scale.
        return_stats: also return `fusedloss.LossStats`, made in the same launch.

    Returns:
        The loss in input's dtype (float32 for float16 and bfloat16 under autocast; promoted with probabilities as in
        PyTorch): 0-d, or the shape of the class indices for reduction "none". With return_stats (loss, stats).

    Raises:
        ValueError: batch sizes differ; unknown reduction; top_k missing, out of range or without "topk"; scale not 0-d;
            lam, softcap or the shape of sample_weight out of range.
        RuntimeError: shapes or dtypes do not fit; label_smoothing > 1; a backend was asked for that cannot serve.
        IndexError: a class index is out of range (CPU).
        NotImplementedError: input is not floating point.
        TypeError: an argument of the wrong Python type.

    References:
        Szegedy et al. 2016, arXiv:1512.00567 (label smoothing); Fan et al. 2017, arXiv:1705.08826 (average top-k);
        Zhang et al. 2018, arXiv:1710.09412 (MixUp); Yun et al. 2019, arXiv:1905.04899 (CutMix); Chowdhery et al. 2022,
        arXiv:2204.02311 (z-loss); Gemma Team 2024, arXiv:2408.00118 (softcap).
    """
    key = None  # with the tensors' kind, all that decides the way of a call (fusedloss/known.py)
    if (
        type(scale) is float
        and type(ignore_index) is int
        and size_average is reduce is top_k is sample_weight is None
        and not return_stats
        and type(target) is not tuple
        and not is_dynamo_compiling()
    ):
        key = (
            ignore_index,
            reduction,
            label_smoothing,
            z_loss,
            logit_scale,
            softcap,
            weight is None,
            backends.requested,
            torch.is_grad_enabled(),
            forward_ad._current_level,
            torch._C._len_torch_function_stack(),
            torch._C._len_torch_dispatch_stack(),
        )
        for call in KNOWN.get(key, ()):
            if call.takes(input, target) if weight is None else call.takes(input, target, weight):
                if call.needs_grad:
                    return KnownCrossEntropyFunction.apply(input, (target, weight, scale, call))
                return call.prepared.forward(input, target, weight, scale)[0]
    target, target_b, lam = _labels(target)
    lam_tensor = lam if isinstance(lam, Tensor) else None
    if has_torch_function_variadic(input, target, target_b, lam_tensor, weight, sample_weight):
        return handle_torch_function(
            cross_entropy,
            (input, target, target_b, lam_tensor, weight, sample_weight),
            input,
            target if target_b is None else (target, target_b, lam),
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
            top_k=top_k,
            scale=scale,
            sample_weight=sample_weight,
            z_loss=z_loss,
            logit_scale=logit_scale,
            softcap=softcap,
            return_stats=return_stats,
        )
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    options = check_options(
        reduction, ignore_index, label_smoothing, top_k, scale, z_loss, logit_scale, softcap, lam, return_stats
    )
    scale_tensor = scale if isinstance(scale, Tensor) else None
    inputs = Inputs(input, target, target_b, lam_tensor, weight, sample_weight, scale_tensor)
    return _serve(inputs, options, None if isinstance(label_smoothing, Tensor) else key)


def _serve(inputs: Inputs, options: Options, key: tuple[Any, ...] | None) -> Any:
    """The long way; key: by which the next such call may be known."""
    logits, scale = inputs.logits, inputs.scale
    route = _route(inputs, options)
    factor = None  # of the loss, outside the kernel
    if scale is not None:
        if scale.requires_grad and torch.is_grad_enabled():
            factor, inputs = scale, inputs._replace(scale=None)
        elif scale.device != logits.device:
            inputs = inputs._replace(scale=scale.to(logits.device, non_blocking=True))
    loss, stats = _call(inputs, options, route)
    if key is not None:
        _remember(key, inputs, options, route, loss)
    if factor is not None:
        loss = loss * factor.to(loss)
    return (loss, stats) if options.return_stats else loss


def _remember(key: tuple[Any, ...], inputs: Inputs, options: Options, route: Route, loss: Tensor) -> None:
    """Has the next call like this one go straight to its backend: contiguous logits, class indices, weights or not."""
    logits, target, weight = inputs.logits, inputs.target, inputs.weight
    if route.backend == "reference" or (_CHECK_TARGETS and route.backend != "cpu"):
        return
    if logits.dim() < 2 or inputs.has_probabilities() or inputs.target_b is not None:
        return
    if logits.stride() != contiguous_strides(logits.shape) or not target.is_contiguous():
        return
    if not nobody_watches(*inputs) or not is_worth_remembering(key, logits):
        return
    needs_grad = logits.requires_grad and torch.is_grad_enabled()
    prepared = ops.prepare(kernel_inputs(inputs), options, route.out_dtype, needs_grad, route.backend, logits.shape)
    takes = same_kind(logits, target) if weight is None else same_kind(logits, target, weight)
    takes_dloss = same_kind(loss.detach())
    if prepared is not None and takes is not None and takes_dloss is not None:
        remember(key, KnownCall(takes, takes_dloss, needs_grad, options, route.out_dtype, route.backend, prepared))


def _labels(target: Any) -> tuple[Tensor, Tensor | None, float | Tensor]:
    """The target, or the two labels and the share of the first."""
    if isinstance(target, tuple) and len(target) == 3:
        return target
    return target, None, 1.0


def _route(inputs: Inputs, options: Options) -> Route:
    """Checks the tensors and chooses the path."""
    logits, target, target_b, lam, weight, sample_weight, _ = inputs
    facts = InputFacts(
        Facts.of("input", logits),
        Facts.of("target", target),
        None if target_b is None else Facts.of("target_b", target_b),
        None if lam is None else Facts.of("lam", lam),
        None if weight is None else Facts.of("weight", weight),
        None if sample_weight is None else Facts.of("sample_weight", sample_weight),
    )
    # All but values decides: once per kind of call, unless somebody traces it, with sizes that are symbols.
    choose = _checked_route if nobody_watches(logits) else _checked_route.__wrapped__
    return choose(facts, options.kind(), backends.requested, _transform(), _autocast(logits))


@lru_cache(maxsize=1024)
def _checked_route(facts: InputFacts, options: Options, requested: str, transform: str | None, autocast: bool) -> Route:
    check_tensors(facts, options, autocast)
    out_dtype = _out_dtype(facts, autocast)
    device = facts.logits.device.type
    if requested == "reference":
        return Route("reference", "asked for by backend('reference') or FUSEDLOSS_BACKEND", out_dtype)
    name = {"cuda": "triton", "cpu": "cpu"}.get(device) if requested == "auto" else requested
    if name is None:
        return Route("reference", f"no kernel serves device {device!r}", out_dtype)
    uncovered = _not_covered(name, facts, options, out_dtype) or transform
    if requested != "auto":
        if uncovered:
            raise RuntimeError(f"backend {requested!r} was asked for, but {uncovered}")
        return Route(name, f"asked for by backend({requested!r}) or FUSEDLOSS_BACKEND", out_dtype)
    if uncovered:
        return Route("reference", uncovered, out_dtype)
    return Route(name, "the logits are on a GPU" if name == "triton" else f"the logits are on the CPU ({cpu.ISA})", out_dtype)


def _not_covered(name: str, facts: InputFacts, options: Options, out_dtype: torch.dtype) -> str | None:
    logits, target, _, lam, weight, sample_weight = facts
    if name == "cpu":
        if cpu.MISSING is not None:
            return cpu.MISSING
        if logits.device.type not in ("cpu", "meta"):
            return f"the CPU kernel does not serve device {logits.device.type!r}"
    if facts.has_probabilities():
        if target.needs_grad or (weight is not None and weight.needs_grad):
            return "the gradient to class probabilities, or to their weight, has no kernel"
        if out_dtype == torch.float64 and logits.dtype != torch.float64:
            return "class probabilities or weights in float64 have no kernel for other logits"
        if options.return_stats:
            return "statistics of class probabilities have no kernel"
    if any(value is not None and value.needs_grad for value in (lam, sample_weight)):
        return "the gradient to sample_weight, or to the share of two labels, has no kernel"
    if facts.n_classes() == 0:
        return "there are no classes"
    return None


def _transform() -> str | None:
    """What differentiates, batches or records the call in a way that no kernel knows."""
    if torch.compiler.is_compiling():
        return None  # torch.compile traces neither of them
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch.jit.is_tracing():
        return "torch.jit.trace is recording, which sees no kernel"
    return None


def _autocast(logits: Tensor) -> bool:
    if not torch._C._is_any_autocast_enabled():  # the cheap question
        return False
    device_type = logits.device.type
    # The second would raise for a device without autocast, such as "meta".
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _out_dtype(facts: InputFacts, autocast: bool) -> torch.dtype:
    dtype = autocast_dtype(facts.logits.dtype, autocast)
    if facts.has_probabilities():
        dtype = torch.promote_types(dtype, autocast_dtype(facts.target.dtype, autocast))
        if facts.weight is not None:
            dtype = torch.promote_types(dtype, autocast_dtype(facts.weight.dtype, autocast))
    return dtype


def _call(inputs: Inputs, options: Options, route: Route) -> tuple[Tensor, LossStats | None]:
    if inputs.logits.dim() == 1:
        loss, stats = _call(_as_one_row(inputs), options, route)
        if stats is not None:
            stats = stats._replace(lse=stats.lse.reshape(()), row_loss=stats.row_loss.reshape(()))
        return loss.reshape(()), stats
    if inputs.lam is not None or inputs.sample_weight is not None:
        inputs = inputs._replace(
            lam=_per_row(inputs.lam, inputs.logits), sample_weight=_per_row(inputs.sample_weight, inputs.logits)
        )
    if route.backend == "reference":
        return reference.cross_entropy(inputs, options, route.out_dtype)
    if _CHECK_TARGETS and route.backend != "cpu" and not inputs.has_probabilities():  # the CPU always checks
        for target in (inputs.target, inputs.target_b):
            if target is not None:
                check_class_indices(target, inputs.logits.shape[1], options.ignore_index)
    if inputs.logits.requires_grad and torch.is_grad_enabled():
        result = CrossEntropyFunction.apply(*inputs, options, route.out_dtype, route.backend)
    else:
        result = forward_only(inputs, options, route.out_dtype, route.backend)
    if not options.return_stats:
        return result, None
    loss, row_stats, counts = result
    lse, row_loss = row_stats.view(2, inputs.logits.shape[0], *inputs.logits.shape[2:])
    return loss, LossStats(lse, row_loss, *counts.unbind())


def _as_one_row(inputs: Inputs) -> Inputs:
    """(C,) as (1, C)."""
    logits, target, target_b, lam, weight, sample_weight, scale = inputs
    has_probabilities = target_b is None and target.shape == logits.shape
    return Inputs(
        logits.unsqueeze(0),
        target.reshape(1, -1) if has_probabilities else target.reshape(1),
        None if target_b is None else target_b.reshape(1),
        None if lam is None else lam.reshape(1),
        weight,
        None if sample_weight is None else sample_weight.reshape(1),
        scale,
    )


def _per_row(values: Tensor | None, logits: Tensor) -> Tensor | None:
    """One value per example as one per row, (N, d1, ...)."""
    if values is None:
        return None
    rows = logits.shape[:1] + logits.shape[2:]
    if 0 < values.dim() < len(rows):
        values = values.reshape(-1, *[1] * (len(rows) - 1))
    return values.expand(rows)


def plan(
    input: Tensor,
    target: Tensor | tuple[Tensor, Tensor, float | Tensor],
    weight: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    device: DeviceFacts | None = None,
    **options: Any,
) -> Plan:
    """Tells which path `cross_entropy(input, target, weight, **options)` takes, why, and what it costs; runs nothing.

    Args:
        input, target, weight, sample_weight: as for `cross_entropy`; meta tensors do, with backend("triton") for the GPU's plan.
        device: facts of the GPU, those of an H100 where there is none.
        **options: the other keyword arguments of `cross_entropy`.

    Returns:
        A frozen `fusedloss.plan.Plan`; `print` it.

    Raises:
        What `cross_entropy` would raise for these shapes, dtypes and options.
    """
    target, target_b, lam = _labels(target)
    checked = check_options(**options, lam=lam)
    inputs = Inputs(input, target, target_b, lam if isinstance(lam, Tensor) else None, weight, sample_weight)
    route = _route(inputs, checked)
    if route.backend == "reference":
        return Plan("reference", route.reason)
    if input.dim() == 1:
        inputs = _as_one_row(inputs)
    needs_grad = input.requires_grad and torch.is_grad_enabled()
    if route.backend == "cpu":
        return cpu_plan(route.reason, inputs.logits, checked, needs_grad)
    return triton_plan(route.reason, inputs, checked, needs_grad, device or device_facts(input.device))
