"""Calls the C++ kernel of kernels/cpu through ctypes.

Two bytes objects carry all arguments (kernels/cpu/problem.h): ctypes would take 3 us to convert as many one by one. What shapes,
strides, dtypes and options decide is packed once for all calls alike; a call packs its addresses.
"""

import ctypes
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from fusedloss import plan_cpu
from fusedloss.backends.outputs import Allocators, Outputs, allocate_forward, allocate_gradient, forward_allocators
from fusedloss.kernels.constants import FRACTION_BITS
from fusedloss.plan import Inputs, Options, accumulation_dtype

LIBRARY_NAME = "fusedloss_cpu.so"
ISA_NAMES = {"auto": 0, "baseline": 1, "avx2": 2, "avx512": 3, "avx512bf16": 4}

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_REDUCTIONS = {"none": 0, "sum": 1, "mean": 2, "max": 3, "topk": 4}
_INT64, _UINT8, _PROBABILITIES, _PROBABILITIES_AS_LOGITS = range(4)
_BITS = {2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}  # by the size of a floating point number
_ABI = 2
_CALL = struct.Struct("=12Q 2d q")
_KIND = struct.Struct("=4d 10q 3q 9q Q")


class Functions(NamedTuple):
    forward: Any
    backward: Any


class Kind(NamedTuple):
    """What only shapes, strides, dtypes and options decide: the same for all calls alike."""

    functions: Functions
    packed: bytes  # that part of a problem
    max_threads: int  # that are worth waking


@dataclass(frozen=True, eq=False)
class Library:
    """The loaded kernel and what its calls need."""

    functions: Functions
    holding_gil: Functions  # for problems that one thread solves before another could make use of the lock
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
    # A library from before this number has no such function.
    if not hasattr(library, "fusedloss_abi") or library.fusedloss_abi() != _ABI:
        return None, f"the compiled CPU kernel {path} is of another version: build it again"
    library.fusedloss_best_isa.restype = ctypes.c_int64
    requested = ISA_NAMES[os.environ.get("FUSEDLOSS_CPU_ISA", "auto")]
    best = library.fusedloss_best_isa()
    isa = list(ISA_NAMES)[min(requested, best) if requested else best]
    functions, holding_gil = _functions(library), _functions(ctypes.PyDLL(str(path)))
    return Library(functions, holding_gil, isa, requested, _gomp_parallel(), str(path)), None


def _functions(library: ctypes.CDLL) -> Functions:
    forward, backward = library.fusedloss_forward, library.fusedloss_backward
    forward.argtypes = backward.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
    forward.restype, backward.restype = ctypes.c_int64, None
    return Functions(forward, backward)


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
    inputs = _as_read(inputs)
    strides = None if dlogits is None else dlogits.stride()
    kind = _kind_of(inputs, strides, outputs.loss.dtype, options, save, fresh=dlogits is not inputs.logits)
    loss, saved, _, row_stats, counts = outputs
    bad_row = _run(kind.functions.forward, kind, loss, saved, dlogits, row_stats, counts, None, inputs, options)
    if bad_row:
        _raise_out_of_bounds(bad_row - 1, inputs.logits.shape[1], inputs.target, inputs.target_b)


def _raise_out_of_bounds(row: int, n_classes: int, *labels: Tensor | None) -> NoReturn:
    values = [label.reshape(-1)[row].item() for label in labels if label is not None]
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
        inputs = _as_read(inputs)
        kind = _kind_of(inputs, dlogits.stride(), None, options, True)
        _run(kind.functions.backward, kind, None, saved, dlogits, None, None, dloss.contiguous(), inputs, options)
    return dlogits


def scale_gradient(dlogits: Tensor, dloss: Tensor) -> None:  # dloss: 0-d
    """dlogits *= dloss."""
    if dloss.item() != 1:
        dlogits.mul_(dloss)


@dataclass(frozen=True, eq=False)
class Prepared:
    """The forward of calls alike, on contiguous logits with class indices, and weights or not, as the caller has them."""

    new: Allocators
    kind: Kind
    bits_at: Callable[[int], Any]  # of a loss, as an integer at an address
    one: int  # the bits of 1

    def forward(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss, what the backward reads and the gradient for an upstream gradient of 1; as `Outputs` has them."""
        new, kind = self.new, self.kind
        loss = new.loss()
        saved = None if new.saved is None else new.saved()
        dlogits = None if new.dlogits is None else new.dlogits()
        call = _CALL.pack(  # as in _run, which as a call of its own is 3 % of a small step
            loss.data_ptr(),
            0 if saved is None else saved.data_ptr(),
            0 if dlogits is None else dlogits.data_ptr(),
            0,
            0,
            logits.data_ptr(),
            target.data_ptr(),
            0,
            0,
            0 if weight is None else weight.data_ptr(),
            0,
            0,
            scale,
            1.0,
            1 if kind.max_threads == 1 else min(kind.max_threads, torch.get_num_threads()),
        )
        bad_row = kind.functions.forward(call, kind.packed)
        if bad_row:
            _raise_out_of_bounds(bad_row - 1, logits.shape[1], target)
        return loss, saved, dlogits

    def scale_gradient(self, dlogits: Tensor, dloss: Tensor) -> None:
        """dlogits *= dloss."""
        if self.bits_at(dloss.data_ptr()).value != self.one:  # item() takes 3 % of a small step
            dlogits.mul_(dloss)


def prepare(inputs: Inputs, options: Options, out_dtype: torch.dtype, needs_grad: bool, shape: torch.Size) -> Prepared | None:
    """What `forward` decides for these arguments, or None where it has to convert a tensor first. shape: the caller's logits'."""
    if any(read is not given for read, given in zip(_as_read(inputs), inputs, strict=True)):
        return None
    new = forward_allocators(inputs, options, out_dtype, needs_grad, shape)
    fused = new.dlogits is not None
    kind = _kind_of(inputs, inputs.logits.stride() if fused else None, out_dtype, options, needs_grad and not fused)
    bits_at, one = _BITS[out_dtype.itemsize].from_address, torch.ones((), dtype=out_dtype, device="cpu")
    return Prepared(new, kind, bits_at, bits_at(one.data_ptr()).value)


def _library() -> Library:
    if LIBRARY is None:
        raise RuntimeError(MISSING)
    return LIBRARY


def _as_read(inputs: Inputs) -> Inputs:
    """The same in dtypes and layouts that the kernel reads, whatever is so already as it is."""
    logits, target, target_b, lam, weight, sample_weight, scale = inputs
    accumulate = accumulation_dtype(logits.dtype)
    if not inputs.has_probabilities():
        target = target.contiguous()
    elif target.dtype != logits.dtype:
        target = target.to(accumulate)
    return Inputs(
        logits,
        target,
        None if target_b is None else target_b.contiguous(),
        None if lam is None else lam.to(accumulate).contiguous(),
        None if weight is None else weight.to(accumulate).contiguous(),
        None if sample_weight is None else sample_weight.to(accumulate).contiguous(),
        scale,
    )


def _run(
    function: Any,
    kind: Kind,
    loss: Tensor | None,
    saved: Tensor | None,
    dlogits: Tensor | None,
    row_stats: Tensor | None,
    counts: Tensor | None,
    dloss: Tensor | None,
    inputs: Inputs,
    options: Options,
) -> int:
    logits, target, target_b, lam, weight, sample_weight, scale = inputs
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
        1 if kind.max_threads == 1 else min(kind.max_threads, torch.get_num_threads()),
    )
    return function(call, kind.packed)


def _kind_of(
    inputs: Inputs,
    gradient_strides: tuple[int, ...] | None,
    loss_dtype: torch.dtype | None,
    options: Options,
    save: bool,
    fresh: bool = True,  # the gradient's memory, which nobody has touched
) -> Kind:
    logits, target = inputs.logits, inputs.target
    return _kind(
        logits.shape,
        logits.stride(),
        gradient_strides,
        target.stride() if inputs.has_probabilities() else None,
        logits.dtype,
        loss_dtype,
        target.dtype,
        options.kind(),
        save,
        fresh,
        _library(),
    )


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
    library: Library,
) -> Kind:
    n_elements = math.prod(shape)
    rows = plan_cpu.rows(shape, logits_strides, dlogits_strides, probabilities_strides)
    if probabilities_strides is None:
        target_kind = _UINT8 if target_dtype == torch.uint8 else _INT64
    else:
        target_kind = _PROBABILITIES if target_dtype == accumulation_dtype(logits_dtype) else _PROBABILITIES_AS_LOGITS
    packed = _KIND.pack(
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
        library.requested_isa,
        n_elements * logits_dtype.itemsize if dlogits_strides is not None and fresh else 0,
        rows.n_outer,
        rows.n_inner,
        rows.n_cols,
        *rows.strides,
        library.gomp_parallel,
    )
    max_threads = plan_cpu.max_threads(n_elements)
    return Kind(library.functions if max_threads > 1 else library.holding_gil, packed, max_threads)
