"""Calls the C++ kernel of kernels/cpu through ctypes.

One bytes object carries all arguments (kernels/cpu/problem.h): packing 32 fields takes 1 us and the call 0.5, where ctypes would
take 3 to convert as many arguments one by one.
"""

import ctypes
import os
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedloss import plan_cpu
from fusedloss.backends.outputs import Outputs, allocate_forward, allocate_gradient
from fusedloss.plan import Inputs, Options
from fusedloss.reference import FRACTION_BITS

LIBRARY_NAME = "fusedloss_cpu.so"
ISA_NAMES = {"auto": 0, "baseline": 1, "avx2": 2, "avx512": 3, "avx512bf16": 4}

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_REDUCTIONS = {"none": 0, "sum": 1, "mean": 2, "max": 3, "topk": 4}
_INT64, _UINT8, _PROBABILITIES = range(3)
_PROBLEM = struct.Struct("=7Q 2d 11q 3q 9q Q")


class Library(NamedTuple):
    """The loaded kernel and what its calls need."""

    forward: Any
    backward: Any
    isa: str
    requested_isa: int
    gomp_parallel: int
    path: str


def _load() -> tuple[Library | None, str | None]:
    """The library, or why there is none."""
    path = _find()
    if path is None:
        return None, "the compiled CPU kernel is missing: it was not built, for want of a C++ compiler at installation perhaps"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"the compiled CPU kernel does not load: {error}"
    library.fusedloss_problem_bytes.restype = ctypes.c_int64
    if library.fusedloss_problem_bytes() != _PROBLEM.size:
        return None, f"the compiled CPU kernel {path} is of another version: build it again"
    library.fusedloss_forward.argtypes = library.fusedloss_backward.argtypes = (ctypes.c_char_p,)
    library.fusedloss_forward.restype = library.fusedloss_best_isa.restype = ctypes.c_int64
    library.fusedloss_backward.restype = None
    requested = ISA_NAMES[os.environ.get("FUSEDLOSS_CPU_ISA", "auto")]
    best = library.fusedloss_best_isa()
    isa = list(ISA_NAMES)[min(requested, best) if requested else best]
    return Library(library.fusedloss_forward, library.fusedloss_backward, isa, requested, _gomp_parallel(), str(path)), None


def _find() -> Path | None:
    spec = find_spec("fusedloss.kernels")
    folders = spec.submodule_search_locations if spec is not None else None
    return next((path for folder in folders or () if (path := Path(folder, "cpu", LIBRARY_NAME)).exists()), None)


def _gomp_parallel() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that torch has loaded, 0 without one; kernels/cpu/threads.h says why."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError):
        return 0


# At import: a call has no time for it, and torch.compile reads a constant.
LIBRARY, MISSING = _load()
ISA = LIBRARY.isa if LIBRARY is not None else "none"  # instruction set in use


def forward(
    inputs: Inputs,
    options: Options,
    out_dtype: torch.dtype,
    needs_grad: bool,
    keeps_workspace: bool = True,  # there is none here
) -> Outputs:
    """Every row's loss, their reduction and, where the plan fuses, the gradient for an upstream gradient of 1."""
    outputs = allocate_forward(inputs, options, out_dtype, needs_grad)
    _forward(outputs.loss, outputs.saved, outputs.dlogits, inputs, options, needs_grad)
    return outputs


def forward_overwriting(inputs: Inputs, options: Options, out_dtype: torch.dtype) -> Tensor:
    """The loss, for reduction "sum" or "mean"; the gradient takes the place of the logits."""
    outputs = allocate_forward(inputs, options, out_dtype, False)
    _forward(outputs.loss, outputs.saved, inputs.logits, inputs, options, False)
    return outputs.loss


def _forward(loss: Tensor, saved: Tensor, dlogits: Tensor | None, inputs: Inputs, options: Options, save: bool) -> None:
    if inputs.scale is not None:
        options = options._replace(scale=options.scale * inputs.scale.item())
    bad_row = _call(_library().forward, loss, saved, dlogits, inputs, None, options, save)
    if bad_row:
        raise IndexError(f"Target {inputs.target.reshape(-1)[bad_row - 1].item()} is out of bounds.")


def backward(
    dloss: Tensor,  # (n_rows,) or (1,)
    inputs: Inputs,
    saved: Tensor,
    options: Options,
) -> Tensor:
    """The gradient of the logits."""
    dlogits = allocate_gradient(inputs.logits)
    if dlogits.numel() > 0:
        dloss = dloss.to(saved.dtype).contiguous()
        _call(_library().backward, None, saved, dlogits, inputs, dloss, options, True)
    return dlogits


def scale_gradient(dlogits: Tensor, dloss: Tensor) -> None:  # dloss: 0-d
    """dlogits *= dloss."""
    if dloss.item() != 1:
        dlogits.mul_(dloss)


def _library() -> Library:
    if LIBRARY is None:
        raise RuntimeError(MISSING)
    return LIBRARY


def _call(
    function: Any,
    loss: Tensor | None,
    saved: Tensor,
    dlogits: Tensor | None,
    inputs: Inputs,
    dloss: Tensor | None,
    options: Options,
    save: bool,
) -> int:
    logits, target, _, _, weight, _, _ = inputs
    if target.dim() == logits.dim():
        target_kind, probabilities = _PROBABILITIES, target.to(saved.dtype)
        target = probabilities
    else:
        target_kind, probabilities = (_UINT8 if target.dtype == torch.uint8 else _INT64), None
        target = target.contiguous()
    if weight is not None:
        weight = weight.to(saved.dtype).contiguous()
    n_elements = logits.numel()
    rows = plan_cpu.rows(logits, dlogits, probabilities)
    packed = _PROBLEM.pack(
        loss.data_ptr() if loss is not None else 0,
        saved.data_ptr(),
        dlogits.data_ptr() if dlogits is not None else 0,
        logits.data_ptr(),
        target.data_ptr(),
        weight.data_ptr() if weight is not None else 0,
        dloss.data_ptr() if dloss is not None else 0,
        options.scale,
        options.label_smoothing,
        options.ignore_index,
        options.top_k or round(options.top_k_fraction * 2**FRACTION_BITS),
        options.top_k == 0,
        _DTYPES[logits.dtype],
        _DTYPES[loss.dtype] if loss is not None else 0,
        target_kind,
        _REDUCTIONS[options.reduction],
        save,
        _library().requested_isa,
        plan_cpu.threads(n_elements, torch.get_num_threads()),
        n_elements * logits.element_size() if dlogits is not None and dlogits is not logits else 0,
        rows.n_outer,
        rows.n_inner,
        rows.n_cols,
        *rows.strides,
        _library().gomp_parallel,
    )
    return function(packed)
