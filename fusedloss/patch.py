"""patch_torch(): torch.nn.functional.cross_entropy replaced, so that other people's code uses this one without knowing it."""

import functools
import threading
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction as _Reduction  # noqa: F401  TorchScript compiles the wrapped function with this file's names
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fusedloss import functional, reference

_lock = threading.Lock()
_depth = 0  # how many patches are in force
_replaced = reference.TORCHS  # what the first of them replaced


def patch_torch() -> ExitStack:
    """Makes every call of `torch.nn.functional.cross_entropy` a call of `fusedloss.cross_entropy`, from now on or for a `with`.

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

    Returns:
        A context manager in force already; leaving it, or calling its `close()`, undoes this call, once.
    """
    global _depth, _replaced
    with _lock:
        if F.cross_entropy is not cross_entropy:
            _replaced, F.cross_entropy = F.cross_entropy, cross_entropy
        _depth += 1
    undo = ExitStack()
    undo.callback(_undo)
    return undo


def _undo() -> None:
    global _depth
    with _lock:
        _depth -= 1
        if _depth == 0 and F.cross_entropy is cross_entropy:  # else somebody else replaced it since, who may bring ours back
            F.cross_entropy = _replaced


def _overrides(value: object) -> bool:
    override = getattr(type(value), "__torch_function__", torch._C._disabled_torch_function_impl)
    return type(value) is not Tensor and override != torch._C._disabled_torch_function_impl


# wraps: name and module are PyTorch's, so that what pickles a reference to the function finds PyTorch's when it is loaded.
@functools.wraps(reference.TORCHS)
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
    options: tuple[Any, ...] = (size_average, ignore_index, reduce, reduction, label_smoothing)
    # Not for a mode such as `with torch.device(...)`: only for a tensor's own class, which may know PyTorch's function.
    if has_torch_function_variadic(input, target, weight) and any(map(_overrides, (input, target, weight))):
        return handle_torch_function(reference.TORCHS, (input, target, weight), input, target, weight, *options)
    return (functional.cross_entropy if _depth else reference.TORCHS)(input, target, weight, *options)
