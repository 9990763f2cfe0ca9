"""Calls the C++ kernel of kernels/cpu through ctypes.

Two bytes objects carry all arguments (kernels/cpu/problem.h): ctypes would take 3 us to convert as many one by one. What shapes,
strides, dtypes and options decide is packed once for all calls alike; a call packs its addresses, each of them checked against
the memory that is there.
"""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from fusedloss.backends.cpu_abi import CALL, NO_EXTRAS, Library, load
from fusedloss.backends.cpu_call import Prepacked, address, as_read, prepack, run
from fusedloss.backends.outputs import (
    NO_OUTPUTS,
    Allocators,
    Outputs,
    allocate_forward,
    allocate_gradient,
    forward_allocators,
    n_statistics,
)
from fusedloss.plan import Inputs, Options, Slice, accumulation_dtype

_BITS = {2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}  # by the size of a floating point number

# At import: a call has no time for it, and torch.compile reads a constant.
LIBRARY, MISSING = load()
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
    _forward(outputs, outputs.dlogits, inputs, options)
    return outputs


def forward_overwriting(inputs: Inputs, options: Options, out_dtype: torch.dtype) -> Outputs:
    """The same for reduction "sum" or "mean", and any dtype; the gradient takes the place of the logits."""
    outputs = allocate_forward(inputs, options, out_dtype, False)
    _forward(outputs, inputs.logits, inputs, options)
    return outputs._replace(dlogits=inputs.logits)


def _forward(outputs: Outputs, dlogits: Tensor | None, inputs: Inputs, options: Options) -> None:
    inputs = _as_read(inputs)
    strides = None if dlogits is None else dlogits.stride()
    kind = prepack(inputs, strides, outputs.loss.dtype, options, _library(), fresh=dlogits is not inputs.logits)
    bad_row = run(kind.functions.forward, kind, outputs._replace(dlogits=dlogits), None, inputs, options)
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
        kind = prepack(inputs, dlogits.stride(), None, options, _library())
        outputs = NO_OUTPUTS._replace(saved=saved, dlogits=dlogits)
        run(kind.functions.backward, kind, outputs, dloss.contiguous(), inputs, options)
    return dlogits


def slice_statistics(inputs: Inputs, options: Options, part: Slice) -> Tensor:
    """What a slice publishes of its rows, as `slices.slice_statistics` has it."""
    inputs, logits = _as_read(inputs), inputs.logits
    n_rows = logits.numel() // logits.shape[1]
    stats = logits.new_empty((n_statistics(inputs, options), n_rows), dtype=accumulation_dtype(logits.dtype))
    if logits.numel() > 0:
        kind = prepack(inputs, None, None, options, _library())
        bad_row = run(kind.functions.forward, kind, NO_OUTPUTS, None, inputs, options, part, stats)
        if bad_row:
            _raise_out_of_bounds(bad_row - 1, part.n_classes, inputs.target, inputs.target_b)
    return stats


def slice_gradient(
    drows: Tensor, inputs: Inputs, stats: Tensor, weight_total: float | Tensor, options: Options, part: Slice
) -> Tensor:
    """The gradient of a slice's logits, as `slices.slice_gradient` has it."""
    dlogits = allocate_gradient(inputs.logits)
    if dlogits.numel() > 0:
        inputs = _as_read(inputs)
        kind = prepack(inputs, dlogits.stride(), None, options, _library())
        head = stats.new_tensor([1.0, 0.0, 0.0, float(weight_total)])
        outputs = NO_OUTPUTS._replace(saved=head, dlogits=dlogits)
        run(kind.functions.backward, kind, outputs, drows.contiguous(), inputs, options, part, stats)
    return dlogits


def scale_gradient(dlogits: Tensor, dloss: Tensor) -> None:  # dloss: 0-d
    """dlogits *= dloss, but a row of zeros, as an ignored one is, stays so whatever dloss is."""
    factor = dloss.item()
    if not math.isfinite(factor):
        dloss = torch.where(dlogits.any(1, keepdim=True), dloss, 0)
    if factor != 1:
        dlogits.mul_(dloss)


@dataclass(frozen=True, eq=False)
class Prepared:
    """The forward of calls alike, on contiguous logits with class indices, and weights or not, as the caller has them."""

    new: Allocators
    kind: Prepacked
    weight_bytes: int
    rest: bytes  # of the kernel's arguments
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
        logits_at, target_at = logits.data_ptr(), target.data_ptr()
        # Memory that was freed begins at 0; address() asks for more than that, and takes 2 % of a small step for each tensor.
        if not (logits_at and target_at) or logits.storage_offset() or target.storage_offset():
            logits_at, target_at = address(logits, kind.logits_bytes), address(target, kind.target_bytes)
        call = CALL.pack(  # as in run(), but of fewer tensors and without names, which would take 3 % of a small step
            loss.data_ptr(),
            0 if saved is None else saved.data_ptr(),
            0 if dlogits is None else dlogits.data_ptr(),
            logits_at,
            target_at,
            0 if weight is None else address(weight, self.weight_bytes),
            scale,
            1 if kind.max_threads == 1 else min(kind.max_threads, torch.get_num_threads()),
        )
        bad_row = kind.functions.forward(call, self.rest)
        if bad_row:
            _raise_out_of_bounds(bad_row - 1, logits.shape[1], target)
        return loss, saved, dlogits

    def scale_gradient(self, dlogits: Tensor, dloss: Tensor) -> None:
        """dlogits *= dloss."""
        at = dloss.data_ptr()
        if not at or dloss.storage_offset() or self.bits_at(at).value != self.one:  # item() takes 3 % of a small step
            scale_gradient(dlogits, dloss)


def prepare(inputs: Inputs, options: Options, out_dtype: torch.dtype, needs_grad: bool, shape: torch.Size) -> Prepared | None:
    """What `forward` decides for these arguments, or None where it has to convert a tensor first. shape: the caller's logits'."""
    if any(read is not given for read, given in zip(_as_read(inputs), inputs, strict=True)):
        return None
    new = forward_allocators(inputs, options, out_dtype, needs_grad, shape)
    fused = new.dlogits is not None
    kind = prepack(inputs, inputs.logits.stride() if fused else None, out_dtype, options, _library())
    bits_at, one = _BITS[out_dtype.itemsize].from_address, torch.ones((), dtype=out_dtype, device="cpu")
    return Prepared(
        new,
        kind,
        0 if inputs.weight is None else inputs.weight.nbytes,
        NO_EXTRAS + kind.packed,
        bits_at,
        bits_at(one.data_ptr()).value,
    )


def _library() -> Library:
    if LIBRARY is None:
        raise RuntimeError(MISSING)
    return LIBRARY


def _as_read(inputs: Inputs) -> Inputs:
    """The same in dtypes and layouts that the kernel reads, whatever is so already as it is."""
    logits, target, target_b, lam, weight, sample_weight, scale = inputs
    accumulate = accumulation_dtype(logits.dtype)
    if not inputs.has_probabilities():
        target = as_read(target, target.dtype)
    elif target.dtype not in (logits.dtype, accumulate):
        target = as_read(target, accumulate)
    return Inputs(
        logits,
        target,
        None if target_b is None else as_read(target_b, target.dtype),
        None if lam is None else as_read(lam, accumulate),
        None if weight is None else as_read(weight, accumulate),
        None if sample_weight is None else as_read(sample_weight, accumulate),
        scale,
    )
