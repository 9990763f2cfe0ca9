"""Calls like one that was served before, found again by one question to PyTorch.

The checks, the choice of path and the plan depend on all but the values of the tensors. Asking for all of that, tensor by tensor,
takes Python longer than the loss of a 128 x 10 batch takes; the test by which torch.compile knows a call again asks the same in a
quarter of a microsecond: type, dtype, device, sizes, strides, requires_grad and the dispatch keys, thus whether autocast or a
transform is active, or a tensor is a negative view. Modes, and what else a call depends on, are part of the key.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedloss import backends
from fusedloss.ops import Prepared
from fusedloss.plan import Options
from fusedloss.reference import TorchLoss
from fusedloss.world import PLAIN_TYPES, hooks_are_active, is_transformed, n_dispatch_modes

MAX_KEYS = 256
MAX_CALLS = 8  # of one key: each that is another costs a tenth of a microsecond
MAX_SEEN = 1024

# At hand, since asking for a name takes as long as the answer.
_is_grad_enabled = torch.is_grad_enabled
n_function_modes: Any = getattr(torch._C, "_len_torch_function_stack", None)  # private: without it no call is known again
_TensorGuards = getattr(torch._C._dynamo.guards, "TensorGuards", None)  # nor without this


@dataclass(frozen=True, eq=False)
class KnownCall:
    """What was decided for a call, which plain tensors made that nobody watched."""

    takes: Callable[..., bool]  # FIRST, logits, target and weight, if any
    lengths: range | None  # numbers of examples that are alike, the same of logits and target; None: that of the first call
    takes_dloss: Callable[[Tensor], bool]
    needs_grad: bool
    options: Options  # but the scale
    out_dtype: torch.dtype
    backend: str
    names: tuple[str, ...]  # of the tensors that are saved, besides what the kernel made
    forgets: bool  # whether logits are only saved for their place in the graph
    prepared: Prepared | TorchLoss  # the latter needs no backward: autograd differentiates it


# Compared before a call's tensors. Where a transform of torch.func is active it is of another kind, and they are not looked at: a
# batch of nested tensors has no sizes, and the comparison would end the process.
FIRST = torch.empty((), device="cpu")
KNOWN: dict[tuple[Any, ...], tuple[KnownCall, ...]] = {}  # by options and settings; only a cache: it may be emptied at any time
_seen: dict[tuple[Any, ...], int] = {}  # how often, by key, shape, strides and dtypes
_lengths: dict[tuple[Any, ...], int] = {}  # the first number of examples, by key, shape of an example, strides and dtype


def find(
    input: Tensor,
    target: Any,
    weight: Tensor | None,
    scale: Any,
    arguments: tuple[Any, ...],  # the others, ignore_index first
) -> tuple[tuple[Any, ...] | None, KnownCall | None]:
    """The key of such calls, with the tensors' kind all that decides the way of a call, None where they are not remembered; and
    what is known of this one. One function of few parameters: in parts it would take percents of a small step."""
    # True and 1.0 would be found as the key 1 is.
    if type(scale) is not float or type(arguments[0]) is not int:
        return None, None
    try:
        key = (
            arguments,
            weight is None,
            backends.requested,
            _is_grad_enabled(),
            forward_ad._current_level,
            n_function_modes(),
            n_dispatch_modes(),
        )
        calls = KNOWN.get(key)
        # What is no plain tensor is not known, and might see a question; nested ones end the process if asked for their strides.
        if calls is None or type(input) not in PLAIN_TYPES or type(target) not in PLAIN_TYPES:
            return key, None
        if input.is_nested or target.is_nested or (weight is not None and (type(weight) not in PLAIN_TYPES or weight.is_nested)):
            return key, None
        for call in calls:
            takes = call.takes  # Python calls a name faster than an attribute
            if not (takes(FIRST, input, target) if weight is None else takes(FIRST, input, target, weight)):
                continue
            if call.needs_grad and hooks_are_active():  # their way is another: the gradient is made when it is asked for
                return None, None
            if call.lengths is None or ((n_examples := input.shape[0]) in call.lengths and target.shape[0] == n_examples):
                return key, call
    except (TypeError, AttributeError, RuntimeError):
        # What cannot be looked up, which the checks see to; or a private name of torch is missing.
        return None, None
    return key, None


def is_worth_remembering(key: tuple[Any, ...], logits: Tensor, target: Tensor, any_batch: bool) -> bool:
    """Whether such a call comes again. Remembering one takes as long as serving it, so not for a shape that comes once; and where
    others are forgotten for it, at the powers of two only: many shapes in turn would do nothing but replace each other.
    any_batch: as a call with another number of examples, which came before."""
    call = (key, logits.shape[1:] if any_batch else logits.shape, logits.stride(), logits.dtype, target.dtype)
    if len(_seen) >= MAX_SEEN:
        _seen.clear()
    times = _seen[call] = _seen.get(call, 0) + 1
    if len(KNOWN.get(key, ())) < MAX_CALLS:
        return times > 1 or any_batch
    return times >= 16 and times & (times - 1) == 0


def varies(key: tuple[Any, ...], logits: Tensor) -> bool:
    """Whether calls alike came with another number of examples; of logits whose strides do not depend on it."""
    if logits.dim() < 2 or logits.stride(0) != math.prod(logits.shape[1:]):
        return False
    if len(_lengths) >= MAX_SEEN:
        _lengths.clear()
    return _lengths.setdefault((key, logits.shape[1:], logits.stride(), logits.dtype), logits.shape[0]) != logits.shape[0]


def remember(key: tuple[Any, ...], call: KnownCall) -> None:
    if len(KNOWN) >= MAX_KEYS:
        KNOWN.clear()
    others = KNOWN.get(key, ())[: MAX_CALLS - 1]
    KNOWN[key] = (call, *others)  # replaced as a whole: another thread may be looking through them


def same_kind(*tensors: Tensor, any_batch: bool = False) -> Callable[..., bool] | None:
    """A test whether others are such tensors, no two of them the same; None where PyTorch has none, or not for these.

    any_batch: those after the first, logits and target, may have another number of examples.
    """
    if _TensorGuards is None or any(type(tensor) not in PLAIN_TYPES for tensor in tensors):
        return None
    sizes: list[list[int | None]] = [list(tensor.shape) for tensor in tensors]
    if any_batch:
        sizes[1][0] = sizes[2][0] = None
    strides = [list(tensor.stride()) for tensor in tensors]
    try:
        check = _TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        if not check(*tensors):
            return None
        return _after_asking_for_shapes(check) if is_transformed() else check
    except (TypeError, AttributeError):  # other parameters, or methods
        return None


def _after_asking_for_shapes(check: Callable[..., bool]) -> Callable[..., bool]:
    """The same test of what a transform of torch.func made. Where a tensor has no sizes, Python raises."""

    def takes(*tensors: Tensor) -> bool:
        return bool([tensor.shape for tensor in tensors]) and check(*tensors)

    return takes
