"""patch_torch(): PyTorch's functions replaced, so that other people's code uses these without knowing it."""

import functools
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction as _Reduction  # noqa: F401  TorchScript compiles the wrapped function with this file's names
from torch.overrides import handle_torch_function, has_torch_function_variadic  # noqa: F401  the second for TorchScript

from fusedloss import functional, linear, reference
from fusedloss.option_checks import check_out_dtype
from fusedloss.plan import EXTRAS
from fusedloss.serving import serve

_lock = threading.Lock()
_depth = 0  # how many patches are in force
_asked: dict[object, torch.dtype | None] = {}  # the dtype of the loss that each of them wants, by patch, the latest last
_extras: tuple[Any, ...] = EXTRAS[1:]  # all but the scale, with the dtype of the latest
_replaced: dict[str, Callable[..., Tensor]] = {}  # what the first of them replaced, by name
_TORCH_LINEAR: Any = getattr(F, "linear_cross_entropy", None)  # from PyTorch 2.13 on


def patch_torch(*, out_dtype: torch.dtype | None = None) -> ExitStack:
    """Makes every call of `torch.nn.functional.cross_entropy` a call of `fusedloss.cross_entropy`, from now on or for a `with`.

    Where PyTorch has `linear_cross_entropy` (2.13), every call of it is one of `fusedloss.linear_cross_entropy`, likewise.

        fusedloss.patch_torch()  # permanently

        with fusedloss.patch_torch():  # until the end of the block, also when it ends by an exception
            trainer.train()

    Reached is whatever looks the function up when it is called: `F.cross_entropy(...)`, and `torch.nn.CrossEntropyLoss`, whose
    forward does that, in modules built before, during and after. They stay what they are: a module pickled while patched is a
    plain `torch.nn.CrossEntropyLoss`. What torch.compile made of a call it makes anew when the patch comes or goes. Not reached
    are a name imported earlier (`from torch.nn.functional import cross_entropy`), losses written with `log_softmax` or
    `nll_loss`, tensors whose class has a `__torch_function__`, and torch.jit.script, which compiles PyTorch's.

    The patch is in force in all threads of this process and in forked ones; a spawned process calls `patch_torch` itself. Blocks
    may nest and overlap: the last to end brings PyTorch's function back. What fusedloss hands to PyTorch goes to the original.

    Args:
        out_dtype: as for `fusedloss.cross_entropy`: with torch.float32 every loss is as it was accumulated, where PyTorch rounds
            that of float16 and bfloat16 logits. Of nested blocks the one that began last decides.

    Returns:
        A context manager in force already; leaving it, or calling its `close()`, undoes this call, once.
    """
    global _depth, _extras
    check_out_dtype(out_dtype)
    undo = ExitStack()
    with _lock:
        for name, ours in _OURS.items():
            if getattr(F, name) is not ours:
                _replaced[name] = getattr(F, name)
                setattr(F, name, ours)
        _depth += 1
        _asked[undo] = out_dtype
        _extras = EXTRAS._replace(out_dtype=out_dtype)[1:]
    undo.callback(_undo, undo)
    return undo


def _undo(patch: ExitStack) -> None:
    global _depth, _extras
    with _lock:
        _depth -= 1
        del _asked[patch]
        _extras = EXTRAS._replace(out_dtype=next(reversed(_asked.values()), None))[1:]
        for name, ours in _OURS.items():
            if _depth == 0 and getattr(F, name) is ours:  # else somebody else replaced it since, who may bring ours back
                setattr(F, name, _replaced[name])


def _override(*values: object) -> bool:
    """Whether the class of one of them is a tensor's with a `__torch_function__` of its own."""
    disabled = torch._C._disabled_torch_function_impl
    return any(type(v) is not Tensor and getattr(type(v), "__torch_function__", disabled) != disabled for v in values)


# wraps: name and module are PyTorch's, so that what pickles a reference to the function finds PyTorch's when it is loaded.
@functools.wraps(reference.TORCH_CROSS_ENTROPY)
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    # Not for a mode such as `with torch.device(...)`: only for a tensor's own class, which may know PyTorch's function.
    if (type(input) is not Tensor or type(target) is not Tensor or weight is not None) and _override(input, target, weight):
        options = size_average, ignore_index, reduce, reduction, label_smoothing
        return handle_torch_function(reference.TORCH_CROSS_ENTROPY, (input, target, weight), input, target, weight, *options)
    if not _depth:
        return reference.TORCH_CROSS_ENTROPY(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    arguments = (ignore_index, size_average, reduce, reduction, label_smoothing) + _extras  # noqa: RUF005  a list would be made
    return serve(functional.cross_entropy, input, target, weight, EXTRAS.scale, arguments)


def linear_cross_entropy(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    tensors = (input, linear_weight, target, options.get("linear_bias"), options.get("weight"))
    if _override(*tensors):
        return handle_torch_function(_TORCH_LINEAR, tensors, input, linear_weight, target, **options)
    if not _depth:
        return _TORCH_LINEAR(input, linear_weight, target, **options)
    return linear.linear_cross_entropy(input, linear_weight, target, **options, out_dtype=_extras[-1])


_OURS: dict[str, Callable[..., Tensor]] = {"cross_entropy": cross_entropy}
if _TORCH_LINEAR is not None:
    linear_cross_entropy = _OURS["linear_cross_entropy"] = functools.wraps(_TORCH_LINEAR)(linear_cross_entropy)
