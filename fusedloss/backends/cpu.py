"""Calls the C++ kernel of kernels/cpu through ctypes.

Two bytes objects carry all arguments (kernels/cpu/problem.h): ctypes would take 3 us to convert as many one by one. What shapes,
strides, dtypes and options decide is packed once for all calls alike; a call packs its addresses, each of them checked against
the memory that is there.
"""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from fusedloss.backends.cpu_abi import CALL, NO_EXTRAS, Library, load
from fusedloss.backends.cpu_call import Prepacked, address, as_read, prepack, run
from fusedloss.backends.outputs import (
    NO_OUTPUTS,
    STATE,
    Outputs,
    allocate_forward,
    allocate_gradient,
    contiguous_strides,
    kept,
    n_statistics,
)
from fusedloss.plan import Inputs, Options, Slice, accumulation_dtype

_ON_CPU = partial(torch.empty, device=torch.device("cpu"))
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
    bad_row = run(False, kind, outputs._replace(dlogits=dlogits), None, inputs, options)
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
        run(True, kind, outputs, dloss.contiguous(), inputs, options)
    return dlogits


def slice_statistics(inputs: Inputs, options: Options, part: Slice) -> Tensor:
    """What a slice publishes of its rows, as `slices.slice_statistics` has it."""
    inputs, logits = _as_read(inputs), inputs.logits
    n_rows = logits.numel() // logits.shape[1]
    stats = logits.new_empty((n_statistics(inputs, options), n_rows), dtype=accumulation_dtype(logits.dtype))
    if logits.numel() > 0:
        kind = prepack(inputs, None, None, options, _library())
        bad_row = run(False, kind, NO_OUTPUTS, None, inputs, options, part, stats)
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
        run(True, kind, outputs, drows.contiguous(), inputs, options, part, stats)
    return dlogits


def scale_gradient(dlogits: Tensor, dloss: Tensor) -> None:  # dloss: 0-d
    """dlogits *= dloss, but a row of zeros, as an ignored one is, stays so whatever dloss is."""
    factor = dloss.item()
    if not math.isfinite(factor):
        dloss = torch.where(dlogits.any(min(1, dlogits.dim() - 1), keepdim=True), dloss, 0)
    if factor != 1:
        dlogits.mul_(dloss)


@dataclass(frozen=True, eq=False)
class Prepared:
    """The forward of calls alike, on logits with class indices or probabilities, and weights or not, that the kernel reads as the
    caller has them."""

    kind: Prepacked
    any_batch: bool  # calls with another number of examples are alike
    n_examples: int  # if not
    new_loss: Callable[[], Tensor]  # 0-d
    losses: tuple[int, ...] | None  # of an example; None: the loss is 0-d
    saved_per_example: int  # 0: nothing is saved
    makes_gradient: bool
    out_dtype: torch.dtype
    saved_dtype: torch.dtype
    weight_bytes: int
    rest: bytes  # of the kernel's arguments
    bits_at: Callable[[int], Any]  # of a loss, as an integer at an address
    one: int  # the bits of 1

    def forward(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss, what the backward reads and the gradient for an upstream gradient of 1; as `Outputs` has them."""
        kind, saved, dlogits = self.kind, None, None
        n_examples = logits.shape[0] if self.any_batch else self.n_examples
        loss = self.new_loss() if self.losses is None else _ON_CPU((n_examples, *self.losses), dtype=self.out_dtype)
        if self.saved_per_example:
            saved = _ON_CPU((STATE + n_examples * self.saved_per_example,), dtype=self.saved_dtype)
        if self.makes_gradient:
            dlogits = torch.empty_like(logits)
        logits_at, target_at = logits.data_ptr(), target.data_ptr()
        # Memory that was freed begins at 0; address() asks for more than that, and takes 2 % of a small step for each tensor.
        if not (logits_at and target_at) or logits.storage_offset() or target.storage_offset():
            logits_at = address(logits, kind.logits.of(n_examples))
            target_at = address(target, kind.target.of(n_examples))
        n_threads, functions = 1, kind.library.holding_gil
        if n_examples >= kind.examples_of_two_threads:
            n_threads, functions = kind.n_threads(n_examples), kind.library.functions
        call = CALL.pack(  # as in run(), but of fewer tensors and without names, which would take 3 % of a small step
            loss.data_ptr(),
            0 if saved is None else saved.data_ptr(),
            0 if dlogits is None else dlogits.data_ptr(),
            logits_at,
            target_at,
            0 if weight is None else address(weight, self.weight_bytes),
            scale,
            n_threads,
            n_examples,
        )
        bad_row = functions.forward(call, self.rest)
        if bad_row:
            _raise_out_of_bounds(bad_row - 1, kind.n_cols, target)
        return loss, saved, dlogits

    def scale_gradient(self, dlogits: Tensor, dloss: Tensor) -> None:
        """dlogits *= dloss."""
        at = dloss.data_ptr()
        if not at or dloss.storage_offset() or self.bits_at(at).value != self.one:  # item() takes 3 % of a small step
            scale_gradient(dlogits, dloss)


def prepare(inputs: Inputs, options: Options, out_dtype: torch.dtype, needs_grad: bool, as_given: Inputs) -> Prepared | None:
    """What `forward` decides for these arguments, or None where it has to convert a tensor first, or there is nothing to do.
    as_given: the inputs as the caller has them."""
    logits = as_given.logits
    if 1 in logits.shape and logits.stride() != contiguous_strides(logits.shape):  # strides that say nothing: a gradient's differ
        return None
    if logits.numel() == 0 or not all(map(_is_same, _as_read(inputs), as_given)):
        return None
    soft, saves, makes_gradient = inputs.has_probabilities(), *kept(options, needs_grad, logits.dtype)
    strides, is_dense = None, True
    if makes_gradient:
        strides, dlogits = allocate_gradient(inputs.logits).stride(), allocate_gradient(logits)
        is_dense = dlogits.stride() == logits.stride()
        rows = dlogits.unsqueeze(0) if dlogits.dim() == 1 else dlogits.flatten(2) if dlogits.dim() > 3 else dlogits
        if rows.data_ptr() != dlogits.data_ptr() or rows.stride() != strides:
            return None
    kind = prepack(inputs, strides, out_dtype, options, _library())
    bits_at, one = _BITS[out_dtype.itemsize].from_address, torch.ones((), dtype=out_dtype, device="cpu")
    return Prepared(
        kind,
        any_batch=logits.dim() > 1
        # Else the gradient's strides would depend on the number of examples.
        and (not makes_gradient or (is_dense and logits.stride(0) == math.prod(logits.shape[1:])))
        and (soft or as_given.target.stride() == contiguous_strides(as_given.target.shape)),
        n_examples=logits.shape[0] if logits.dim() > 1 else 1,
        new_loss=partial(torch.empty_strided, (), (), dtype=out_dtype, device=logits.device),
        losses=tuple(logits.shape[2:]) if options.reduction == "none" and logits.dim() > 1 else None,
        saved_per_example=(3 + soft) * kind.per_example if saves else 0,
        makes_gradient=makes_gradient,
        out_dtype=out_dtype,
        saved_dtype=accumulation_dtype(logits.dtype),
        weight_bytes=0 if inputs.weight is None else inputs.weight.nbytes,
        rest=NO_EXTRAS + kind.packed,
        bits_at=bits_at,
        one=bits_at(one.data_ptr()).value,
    )


def _is_same(read: Tensor | None, given: Tensor | None) -> bool:
    if read is None or given is None:
        return read is given
    return read.dtype == given.dtype and read.data_ptr() == given.data_ptr()


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
