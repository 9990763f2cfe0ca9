"""Which path serves a call, and why: decided from all but the tensors' values."""

import warnings
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fusedloss import backends
from fusedloss.backends import cpu
from fusedloss.checks import Facts, InputFacts, autocast_dtype, check_tensors
from fusedloss.kernels.constants import MAX_ROWS
from fusedloss.plan import Inputs, Options
from fusedloss.world import PLAIN, Kind, World, is_dtensor, is_strided, world_of

TOO_MANY_ROWS = f"the kernels for GPUs have 32 bits for the numbers of rows, which are more than {MAX_ROWS}"


class Route(NamedTuple):
    """The decision. backend: "triton", "cpu", "reference", "torch", which is torch.nn.functional.cross_entropy itself, or
    "sharded", the kernels on the shards of a DTensor."""

    backend: str
    reason: str
    out_dtype: torch.dtype  # the loss's
    world: World


def route_of(inputs: Inputs, options: Options, out_dtype: torch.dtype | None, requested: str | None = None) -> Route:
    """Checks the tensors and chooses the path. out_dtype: what the caller wants the loss's dtype to be; None: PyTorch's.
    requested: the backend; None: what `backends.backend` says."""
    requested = requested or backends.requested
    for tensor in inputs:
        if isinstance(tensor, Tensor) and not is_strided(tensor):
            return _unstrided(tensor, inputs, options, out_dtype, requested)
    logits = inputs.logits
    facts, world = facts_of(Facts.of("input", logits), *inputs[1:-1]), world_of(*inputs)
    if is_dtensor(logits) and requested == "auto":
        from fusedloss import dtensor  # takes a second

        uncovered = dtensor.not_covered(inputs, options)
        if uncovered is None:
            reason = "the classes of a DTensor are sharded: one collective merges the statistics of the shards"
            return Route("sharded", reason, out_dtype or dtype_of_loss(facts, autocast_is_on(logits)), world)
        world = world._replace(reason=f"{world.reason}; {uncovered}")
    return route_with(facts, options, out_dtype, inputs.scale is not None, world, requested)


def facts_of(
    logits: Facts,  # of logits that need not exist yet
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | None,
    weight: Tensor | None,
    sample_weight: Tensor | None,
) -> InputFacts:
    """What the checks and the choice of path ask of a call's tensors."""
    return InputFacts(
        logits,
        Facts.of("target", target),
        None if target_b is None else Facts.of("target_b", target_b),
        None if lam is None else Facts.of("lam", lam),
        None if weight is None else Facts.of("weight", weight),
        None if sample_weight is None else Facts.of("sample_weight", sample_weight),
    )


def route_with(
    facts: InputFacts, options: Options, out_dtype: torch.dtype | None, has_scale: bool, world: World, requested: str
) -> Route:
    """Checks the facts and chooses the path."""
    question = facts, options.kind(), out_dtype, has_scale, requested, world, autocast_is_on(facts.logits)
    if world is PLAIN or not torch.compiler.is_compiling():  # once per kind of call
        try:
            return _choose(*question)
        except TypeError:  # of sizes that are symbols there is no hash
            pass
    return _choose.__wrapped__(*question)


def without_strides(tensor: Tensor) -> str:
    return f"a {'quantised' if tensor.is_quantized else 'nested' if tensor.is_nested else tensor.layout} tensor has no strides"


def _unstrided(tensor: Tensor, inputs: Inputs, options: Options, out_dtype: torch.dtype | None, requested: str) -> Route:
    """Hands tensors without strides to PyTorch's loss, which mostly raises NotImplementedError."""
    reason = without_strides(tensor)
    others = inputs.target_b, inputs.lam, inputs.sample_weight, inputs.scale
    is_plain = options.reduction in ("none", "sum", "mean") and not options.has_extras() and out_dtype is None
    if requested != "auto" or not is_plain or any(other is not None for other in others):
        raise NotImplementedError(f"{reason}, and only PyTorch's own loss, without extras, could serve it")
    return Route("torch", reason, inputs.logits.dtype, World(Kind.COMPOSED, reason))


@lru_cache(maxsize=1024)
def _choose(
    facts: InputFacts,
    options: Options,
    requested_dtype: torch.dtype | None,
    has_scale: bool,
    requested: str,
    world: World,
    autocast: bool,
) -> Route:
    check_tensors(facts, options, autocast)
    torch_dtype = dtype_of_loss(facts, autocast)
    out_dtype = requested_dtype or torch_dtype
    if requested == "reference":
        return Route("reference", "asked for by backend('reference') or FUSEDLOSS_BACKEND", out_dtype, world)
    device = facts.logits.device.type
    name = {"cuda": "triton", "cpu": "cpu"}.get(device) if requested == "auto" else requested
    uncovered: str | None
    if name is None:
        uncovered = f"no kernel serves device {device!r}"
    else:
        uncovered = _not_covered(name, facts, options, torch_dtype)
        if world.kind is Kind.COMPOSED:
            uncovered = uncovered or world.reason
    if requested != "auto":
        if uncovered:
            raise RuntimeError(f"backend {requested!r} was asked for, but {uncovered}")
        return Route(requested, f"asked for by backend({requested!r}) or FUSEDLOSS_BACKEND", out_dtype, world)
    if uncovered:
        if uncovered == cpu.MISSING and not torch.compiler.is_compiling():  # whose compiler makes PyTorch's loss as fast
            _warn_of_missing_kernel()
        serves = out_dtype == torch_dtype and _torch_serves(facts, options, has_scale)
        return Route("torch" if serves else "reference", uncovered, out_dtype, world)
    reason = "the logits are on a GPU" if name == "triton" else f"the logits are on the CPU ({cpu.ISA})"
    return Route(str(name), reason, out_dtype, world)


@cache
def _warn_of_missing_kernel() -> None:
    warnings.warn(
        f"fusedloss: {cpu.MISSING}. Losses on the CPU are PyTorch's, at its speed. FUSEDLOSS_BACKEND=reference asks for "
        "PyTorch's operators, without this warning.",
        stacklevel=9,  # the caller of cross_entropy
    )


def _torch_serves(facts: InputFacts, options: Options, has_scale: bool) -> bool:
    """Whether no extra is asked for, but a scale, which is a factor of the loss."""
    if options.has_extras() or has_scale or facts.target_b is not None or facts.sample_weight is not None:
        return False
    return options.reduction in ("none", "sum", "mean")


def _not_covered(name: str, facts: InputFacts, options: Options, torch_dtype: torch.dtype) -> str | None:
    logits, target, _, lam, weight, sample_weight = facts
    if name == "cpu":
        if cpu.MISSING is not None:
            return cpu.MISSING
        if logits.device.type not in ("cpu", "meta"):
            return f"the CPU kernel does not serve device {logits.device.type!r}"
    if facts.has_probabilities():
        if target.needs_grad or (weight is not None and weight.needs_grad):
            return "the gradient to class probabilities, or to their weight, has no kernel"
        if torch_dtype == torch.float64 and logits.dtype != torch.float64:
            return "class probabilities or weights in float64 have no kernel for other logits"
        if options.return_stats:
            return "statistics of class probabilities have no kernel"
    if name == "triton" and _is_more(facts.n_rows(), MAX_ROWS):
        return TOO_MANY_ROWS
    if any(value is not None and value.needs_grad for value in (lam, sample_weight)):
        return "the gradient to sample_weight, or to the share of two labels, has no kernel"
    if facts.n_classes() == 0:
        return "there are no classes"
    return None


_some_autocast_is_on = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)  # private


def _is_more(n: int, most: int) -> bool:
    """Whether n is; not where a compiler knows n only when it runs, as of x[mask]."""
    if not torch.compiler.is_compiling():
        return n > most
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # loaded with a compiler only

    return bool(guard_or_false(n > most))


def autocast_is_on(tensor: Tensor | Facts) -> bool:
    """Whether autocast is active on its device."""
    if not _some_autocast_is_on():  # the cheap question
        return False
    device_type = tensor.device.type
    # The second would raise for a device without autocast, such as "meta".
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def dtype_of_loss(facts: InputFacts, autocast: bool) -> torch.dtype:
    """PyTorch's."""
    dtype = autocast_dtype(facts.logits.dtype, autocast)
    if facts.has_probabilities():
        dtype = torch.promote_types(dtype, autocast_dtype(facts.target.dtype, autocast))
        if facts.weight is not None:
            dtype = torch.promote_types(dtype, autocast_dtype(facts.weight.dtype, autocast))
    return dtype
