"""Calls the C++ kernel of kernels/cpu through ctypes.

Two bytes objects carry all arguments (kernels/cpu/problem.h): ctypes would take 3 us to convert as many one by one. What shapes,
strides, dtypes and options decide is packed once for all calls alike; a call packs its addresses.
"""

import ctypes
import math
import os
import struct
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedloss import plan_cpu
from fusedloss.backends.outputs import Outputs, allocate_forward, allocate_gradient
from fusedloss.plan import Inputs, Options, accumulation_dtype
from fusedloss.reference import FRACTION_BITS

LIBRARY_NAME = "fusedloss_cpu.so"
ISA_NAMES = {"auto": 0, "baseline": 1, "avx2": 2, "avx512": 3, "avx512bf16": 4}

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_REDUCTIONS = {"none": 0, "sum": 1, "mean": 2, "max": 3, "topk": 4}
_INT64, _UINT8, _PROBABILITIES, _PROBABILITIES_AS_LOGITS = range(4)
_CALL = struct.Struct("=12Q 2d")
_KIND = struct.Struct("=4d 11q 3q 9q Q")


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
    if library.fusedloss_problem_bytes() != _CALL.size + _KIND.size:
        return None, f"the compiled CPU kernel {path} is of another version: build it again"
    library.fusedloss_forward.argtypes = library.fusedloss_backward.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
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
    _forward(outputs, outputs.dlogits, inputs, options, needs_grad and outputs.dlogits is None)
    return outputs


def forward_overwriting(inputs: Inputs, options: Options, out_dtype: torch.dtype) -> Tensor:
    """The loss, for reduction "sum" or "mean"; the gradient takes the place of the logits."""
    outputs = allocate_forward(inputs, options, out_dtype, False)
    _forward(outputs, inputs.logits, inputs, options, False)
    return outputs.loss


def _forward(outputs: Outputs, dlogits: Tensor | None, inputs: Inputs, options: Options, save: bool) -> None:
    loss, saved, _, row_stats, counts = outputs
    bad_row = _call(_library().forward, loss, saved, dlogits, row_stats, counts, inputs, None, options, save)
    if bad_row:
        n_classes, labels = inputs.logits.shape[1], (inputs.target, inputs.target_b)
        values = [label.reshape(-1)[bad_row - 1].item() for label in labels if label is not None]
        raise IndexError(f"Target {next(t for t in values if not 0 <= t < n_classes)} is out of bounds.")


def backward(
    dloss: Tensor,  # of the loss's shape
    inputs: Inputs,
    saved: Tensor,
    options: Options,
) -> Tensor:
    """The gradient of the logits."""
    dlogits = allocate_gradient(inputs.logits)
    if dlogits.numel() > 0:
        if dloss.dtype != saved.dtype:  # a call of to() costs what the kernel takes for 1000 logits
            dloss = dloss.to(saved.dtype)
        dloss = dloss.contiguous()
        _call(_library().backward, None, saved, dlogits, None, None, inputs, dloss, options, True)
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
    saved: Tensor | None,
    dlogits: Tensor | None,
    row_stats: Tensor | None,
    counts: Tensor | None,
    inputs: Inputs,
    dloss: Tensor | None,
    options: Options,
    save: bool,
) -> int:
    logits, target, target_b, lam, weight, sample_weight, scale = inputs
    has_probabilities = inputs.has_probabilities()
    accumulate = accumulation_dtype(logits.dtype)
    if not has_probabilities:
        target = target.contiguous()
    elif target.dtype != logits.dtype:
        target = target.to(accumulate)
    # In a variable until the kernel has run: what was converted lives no longer.
    target_b = None if target_b is None else target_b.contiguous()
    lam = None if lam is None else lam.to(accumulate).contiguous()
    weight = None if weight is None else weight.to(accumulate).contiguous()
    sample_weight = None if sample_weight is None else sample_weight.to(accumulate).contiguous()
    library = _library()
    kind = _kind(
        logits.shape,
        logits.stride(),
        None if dlogits is None else dlogits.stride(),
        target.stride() if has_probabilities else None,
        logits.dtype,
        None if loss is None else loss.dtype,
        target.dtype,
        options.kind(),
        save,
        dlogits is not logits,
        torch.get_num_threads(),
        library.requested_isa,
        library.gomp_parallel,
    )
    call = _CALL.pack(
        0 if loss is None else loss.data_ptr(),
        0 if saved is None else saved.data_ptr(),
        0 if dlogits is None else dlogits.data_ptr(),
        0 if row_stats is None else row_stats.data_ptr(),
        0 if counts is None else counts.data_ptr(),
        logits.data_ptr(),
        target.data_ptr(),
        0 if target_b is None else target_b.data_ptr(),
        0 if lam is None else lam.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if sample_weight is None else sample_weight.data_ptr(),
        0 if dloss is None else dloss.data_ptr(),
        options.scale if scale is None else options.scale * scale.item(),
        options.lam,
    )
    return function(call, kind)


@lru_cache(maxsize=1024)
def _kind(
    shape: tuple[int, ...],
    logits_strides: tuple[int, ...],
    dlogits_strides: tuple[int, ...] | None,
    probabilities_strides: tuple[int, ...] | None,
    logits_dtype: torch.dtype,
    loss_dtype: torch.dtype | None,
    target_dtype: torch.dtype,
    options: Options,
    save: bool,
    fresh: bool,
    available_threads: int,
    requested_isa: int,
    gomp_parallel: int,
) -> bytes:
    """The part of a problem that only shapes, strides, dtypes and options decide."""
    n_elements = math.prod(shape)
    rows = plan_cpu.rows(shape, logits_strides, dlogits_strides, probabilities_strides)
    if probabilities_strides is None:
        target_kind = _UINT8 if target_dtype == torch.uint8 else _INT64
    else:
        target_kind = _PROBABILITIES if target_dtype == accumulation_dtype(logits_dtype) else _PROBABILITIES_AS_LOGITS
    return _KIND.pack(
        options.label_smoothing,
        options.z_loss,
        options.logit_scale,
        options.softcap,
        options.ignore_index,
        options.top_k or round(options.top_k_fraction * 2**FRACTION_BITS),
        options.top_k == 0,
        _DTYPES[logits_dtype],
        _DTYPES[loss_dtype] if loss_dtype is not None else 0,
        target_kind,
        _REDUCTIONS[options.reduction],
        save,
        requested_isa,
        plan_cpu.threads(n_elements, available_threads),
        n_elements * logits_dtype.itemsize if dlogits_strides is not None and fresh else 0,
        rows.n_outer,
        rows.n_inner,
        rows.n_cols,
        *rows.strides,
        gomp_parallel,
    )
