"""cross_entropy(): torch.nn.functional.cross_entropy's signature, the extras, and the choice of path."""

import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn import _reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fusedloss import backends, reference
from fusedloss.autograd import CrossEntropyFunction, forward_only
from fusedloss.backends import cpu
from fusedloss.backends.triton import device_facts
from fusedloss.checks import autocast_dtype, check_class_indices, check_options, check_tensors
from fusedloss.plan import Options, Plan
from fusedloss.plan_cpu import cpu_plan
from fusedloss.plan_triton import DeviceFacts, triton_plan

_CHECK_TARGETS = os.environ.get("FUSEDLOSS_CHECK_TARGETS", "0") not in ("", "0")


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    top_k: int | float | None = None,
    scale: float | Tensor = 1.0,
) -> Tensor:
    r"""Softmax cross-entropy of logits, reduced over the batch: scale * reduce_n( -w[y_n] log softmax(x_n)[y_n] ).

    The positional parameters are those of `torch.nn.functional.cross_entropy`, with its semantics. Differences, all on
    purpose: sums are accumulated in float32 or better; an ignored row has gradient 0 even where its logits are NaN; on a
    GPU a class index out of range makes the loss and that row's gradient NaN instead of stopping the device (set
    FUSEDLOSS_CHECK_TARGETS=1 for an IndexError, at the price of a synchronisation).

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...); float16, bfloat16, float32 or float64, any strides.
        target: class indices (), (N,) or (N, d1, ...), int64 (uint8 for 1-D); or class probabilities of input's shape.
        weight: (C,), a factor per class, in input's dtype.
        size_average: deprecated, overrides reduction as in PyTorch.
        ignore_index: rows with this class index count for nothing; may be any integer.
        reduce: deprecated, overrides reduction as in PyTorch.
        reduction: "none" one loss per row; "sum"; "mean", divided by the sum of w[y_n] over the counted rows (by the
            number of rows for probabilities); "max", the largest loss of a counted row, ties sharing the gradient
            evenly; "topk", the average of the top_k largest losses among the counted rows.
        label_smoothing: eps in [0, 1]: (1 - eps) of the loss plus eps times the average over all classes.
        top_k: for reduction "topk" only: an int (rows), or a float in (0, 1], a fraction of the counted rows, rounded to
            the nearest row and to at least one.
        scale: factor of the loss and of its gradient, multiplied inside the kernel: a number, or a 0-d floating point
            tensor, on any device, read there without synchronisation. With reduction="sum" it stands for every
            normalisation that is not PyTorch's mean: scale=1/number_of_targets_in_the_global_batch.

    Returns:
        The loss in input's dtype (float32 for float16 and bfloat16 under autocast; promoted with probabilities as in
        PyTorch): 0-d, or the shape of the class indices for reduction "none".

    Raises:
        ValueError: batch sizes differ; unknown reduction; top_k missing, out of range or without "topk"; scale not 0-d.
        RuntimeError: shapes or dtypes do not fit; label_smoothing > 1; a backend was asked for that cannot serve.
        IndexError: a class index is out of range (CPU).
        NotImplementedError: input is not floating point.
        TypeError: an argument of the wrong Python type.

    References:
        Szegedy et al. 2016, arXiv:1512.00567 (label smoothing); Fan et al. 2017, arXiv:1705.08826 (average top-k).
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            cross_entropy,
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
            top_k=top_k,
            scale=scale,
        )
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    options = check_options(reduction, ignore_index, label_smoothing, top_k, scale)
    if not isinstance(input, Tensor):
        raise TypeError(f"cross_entropy(): argument 'input' must be Tensor, not {type(input).__name__}")
    autocast = _autocast(input.device.type)
    check_tensors(input, target, weight, options, autocast)

    scale_tensor = scale if isinstance(scale, Tensor) else None
    if scale_tensor is not None and scale_tensor.requires_grad and torch.is_grad_enabled():
        unscaled = cross_entropy(
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            top_k=top_k,
        )
        return unscaled * scale_tensor.to(unscaled)

    out_dtype = _out_dtype(input, target, weight, autocast)
    name, _ = _choose(input, target, weight, out_dtype)
    if scale_tensor is not None and scale_tensor.device != input.device:
        scale_tensor = scale_tensor.to(input.device, non_blocking=True)
    if input.dim() == 1:
        one_row = target.reshape(1, -1) if target.shape == input.shape else target.reshape(1)
        loss = _dispatch(name, input.unsqueeze(0), one_row, weight, options, scale_tensor, out_dtype)
        return loss.reshape(())
    return _dispatch(name, input, target, weight, options, scale_tensor, out_dtype)


def _dispatch(
    name: str,
    input: Tensor,  # (N, C) or (N, C, d1, ...)
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    if name == "reference":
        return reference.cross_entropy(input, target, weight, options, scale, out_dtype)
    if _CHECK_TARGETS and name != "cpu":  # which always checks
        check_class_indices(target, input.shape[1], options.ignore_index)
    if input.requires_grad and torch.is_grad_enabled():
        return CrossEntropyFunction.apply(input, target, weight, scale, options, out_dtype, name)
    return forward_only(input, target, weight, scale, options, out_dtype, name)


def _choose(input: Tensor, target: Tensor, weight: Tensor | None, out_dtype: torch.dtype) -> tuple[str, str]:
    """The backend that serves these tensors, and why."""
    requested = backends.requested()
    if requested == "reference":
        return "reference", "asked for by backend('reference') or FUSEDLOSS_BACKEND"
    if requested != "auto":
        uncovered = _not_covered(requested, input, target, weight, out_dtype)
        if uncovered:
            raise RuntimeError(f"backend {requested!r} was asked for, but {uncovered}")
        return requested, f"asked for by backend({requested!r}) or FUSEDLOSS_BACKEND"
    name = {"cuda": "triton", "cpu": "cpu"}.get(input.device.type)
    if name is None:
        return "reference", f"no kernel serves device {input.device.type!r}"
    uncovered = _not_covered(name, input, target, weight, out_dtype)
    if uncovered:
        return "reference", uncovered
    return name, "the logits are on a GPU" if name == "triton" else f"the logits are on the CPU ({cpu.ISA})"


def _not_covered(name: str, input: Tensor, target: Tensor, weight: Tensor | None, out_dtype: torch.dtype) -> str | None:
    if name == "cpu":
        if cpu.MISSING is not None:
            return cpu.MISSING
        if input.device.type not in ("cpu", "meta"):
            return f"the CPU kernel does not serve device {input.device.type!r}"
    if input.shape == target.shape:
        if name != "cpu":
            return "class probabilities as target have no kernel yet"
        if torch.is_grad_enabled() and (target.requires_grad or (weight is not None and weight.requires_grad)):
            return "the gradient to class probabilities, or to their weight, has no kernel"
        if out_dtype == torch.float64 and input.dtype != torch.float64:
            return "class probabilities or weights in float64 have no kernel for other logits"
    if input.numel() == 0 and input.shape[1 if input.dim() > 1 else 0] == 0:
        return "there are no classes"
    if torch.compiler.is_compiling():
        return None  # torch.compile traces neither of the transforms below
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    if torch._C._is_fwd_grad_enabled() and unpack_dual(input).tangent is not None:
        return "forward-mode differentiation is active"
    return None


def _autocast(device_type: str) -> bool:
    # The first question is the cheap one; the last raises for a device without autocast, such as "meta".
    return (
        torch._C._is_any_autocast_enabled()
        and torch.amp.is_autocast_available(device_type)
        and torch.is_autocast_enabled(device_type)
    )


def _out_dtype(input: Tensor, target: Tensor, weight: Tensor | None, autocast: bool) -> torch.dtype:
    dtype = autocast_dtype(input.dtype, autocast)
    if input.shape == target.shape:
        dtype = torch.promote_types(dtype, autocast_dtype(target.dtype, autocast))
        if weight is not None:
            dtype = torch.promote_types(dtype, autocast_dtype(weight.dtype, autocast))
    return dtype


def plan(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    device: DeviceFacts | None = None,
    **options: Any,
) -> Plan:
    """Tells which path `cross_entropy(input, target, weight, **options)` takes, why, and what it costs; runs nothing.

    Args:
        input, target, weight: as for `cross_entropy`; meta tensors do, with backend("triton") for the GPU's plan.
        device: facts of the GPU, those of an H100 where there is none.
        **options: the other keyword arguments of `cross_entropy`.

    Returns:
        A frozen `fusedloss.plan.Plan`; `print` it.

    Raises:
        What `cross_entropy` would raise for these shapes, dtypes and options.
    """
    checked = check_options(
        options.pop("reduction", "mean"),
        options.pop("ignore_index", -100),
        options.pop("label_smoothing", 0.0),
        options.pop("top_k", None),
        options.pop("scale", 1.0),
    )
    if options:
        raise TypeError(f"plan() got an unexpected keyword argument {next(iter(options))!r}")
    autocast = _autocast(input.device.type)
    check_tensors(input, target, weight, checked, autocast)
    name, reason = _choose(input, target, weight, _out_dtype(input, target, weight, autocast))
    if name == "reference":
        return Plan("reference", reason)
    logits = input.unsqueeze(0) if input.dim() == 1 else input
    needs_grad = input.requires_grad and torch.is_grad_enabled()
    if name == "cpu":
        return cpu_plan(reason, logits, checked, needs_grad)
    return triton_plan(reason, logits, checked, needs_grad, device or device_facts(input.device))
