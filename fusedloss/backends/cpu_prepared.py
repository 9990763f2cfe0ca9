"""Calls alike of the C++ kernel: what they have in common is decided once, and a call is left with its addresses."""

import ctypes
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedloss.backends.cpu import all_as_read, library, raise_out_of_bounds, scale_gradient
from fusedloss.backends.cpu_abi import CALL, EXTRAS, NO_EXTRAS, Extras, Functions
from fusedloss.backends.cpu_call import Prepacked, address, bytes_spanned, converted, prepack
from fusedloss.backends.outputs import N_ROW_STATS, STATE, RowStats, allocate_gradient, contiguous_strides, kept
from fusedloss.plan import Inputs, Options, accumulation_dtype

_ON_CPU = partial(torch.empty_strided, device=torch.device("cpu"))  # torch.empty() takes half as long again
# Memory that was freed begins at 0, and a tensor in it at its offset, which is less than this. Where the memory of a process lies
# lower, as on some machines, `address` is asked for every tensor.
_PAST_FREED = 2**44
_BITS = {2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}  # by the size of a floating point number
_DLOSS = 8 * Extras._fields.index("dloss")
_BEFORE_DLOSS, _AFTER_DLOSS = NO_EXTRAS[:_DLOSS], NO_EXTRAS[_DLOSS + 8 :]


class Conversion(NamedTuple):
    """What `cpu_call.converted` is to make of a tensor."""

    dtype: torch.dtype
    n_bytes: int


@dataclass(frozen=True, eq=False)
class Prepared:
    """Forward and backward of calls alike, on logits with class indices or probabilities, and weights or not."""

    kind: Prepacked
    backward_kind: Prepacked
    conversions: tuple[Conversion | None, ...] | None  # of logits, target and weight; None: all are read where they lie
    any_batch: bool  # calls with another number of examples are alike
    n_examples: int  # where any_batch is False, as the next two
    workers: tuple[int, Functions] | None  # if one thread serves the call whatever torch's number of threads is
    new_gradient: Callable[[], Tensor]
    new_loss: Callable[[], Tensor]  # 0-d
    losses: tuple[int, ...] | None  # of an example; None: the loss is 0-d
    loss_strides: tuple[int, ...]  # of losses
    saved_per_example: int  # 0: nothing is saved
    makes_gradient: bool
    out_dtype: torch.dtype
    saved_dtype: torch.dtype
    dloss_dtype: torch.dtype  # that the kernel reads
    rest: bytes | None  # of the kernel's arguments; None: addresses of statistics are among them
    after_dloss: bytes  # of the backward's
    bits_at: Callable[[int], Any]  # of a loss, as an integer at an address
    one: int  # the bits of 1

    def forward(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor | None, Tensor | None, RowStats | None]:
        """The loss, what the backward reads, the gradient for an upstream gradient of 1 and statistics; as `Outputs` has them."""
        kind, saved, dlogits, stats, rest = self.kind, None, None, None, self.rest
        if self.conversions is not None:
            logits, target, weight = _converted(self.conversions, logits, target, weight)
        n_examples = logits.shape[0] if self.any_batch else self.n_examples
        if self.losses is None:
            loss = self.new_loss()
        else:
            loss = _ON_CPU((n_examples, *self.losses), self.loss_strides, dtype=self.out_dtype)
        if self.saved_per_example:
            saved = _ON_CPU((STATE + n_examples * self.saved_per_example,), (1,), dtype=self.saved_dtype)
        if self.makes_gradient:
            dlogits = torch.empty_like(logits) if self.any_batch else self.new_gradient()
        if rest is None:
            n_rows = n_examples * kind.per_example
            stats = _ON_CPU((N_ROW_STATS, n_rows), (n_rows, 1), dtype=self.saved_dtype), _ON_CPU((3,), (1,), dtype=torch.int64)
            rest = EXTRAS.pack(*Extras(row_stats=address(stats[0], 0), counts=address(stats[1], 0))) + kind.packed
        logits_at, target_at = logits.data_ptr(), target.data_ptr()
        if logits_at < _PAST_FREED or target_at < _PAST_FREED:  # address() takes 2 % of a small step for each tensor
            logits_at = address(logits, kind.logits.of(n_examples))
            target_at = address(target, kind.target.of(n_examples))
        n_threads, functions = self.workers or kind.workers(n_examples)
        call = CALL.pack(  # as in run(), but of fewer tensors and without names, which would take 3 % of a small step
            loss.data_ptr(),
            0 if saved is None else saved.data_ptr(),
            0 if dlogits is None else dlogits.data_ptr(),
            logits_at,
            target_at,
            0 if weight is None else address(weight, weight.nbytes),
            scale,
            n_threads,
            n_examples,
        )
        bad_row = functions.forward(call, rest)
        if bad_row:
            raise_out_of_bounds(bad_row - 1, kind.n_cols, target)
        return loss, saved, dlogits, stats

    def backward(self, dloss: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, saved: Tensor) -> Tensor:
        """The gradient of the logits; saved: the forward's, the scale in it."""
        if self.conversions is not None:
            logits, target, weight = _converted(self.conversions, logits, target, weight)
        kind, n_examples = self.backward_kind, logits.shape[0] if self.any_batch else self.n_examples
        dlogits = torch.empty_like(logits) if self.any_batch else self.new_gradient()
        if dloss.dtype != self.dloss_dtype or not dloss.is_contiguous():
            dloss = converted(dloss, self.dloss_dtype, bytes_spanned(dloss))
        saved_at, dloss_at, logits_at, target_at = saved.data_ptr(), dloss.data_ptr(), logits.data_ptr(), target.data_ptr()
        if min(saved_at, dloss_at, logits_at, target_at) < _PAST_FREED:
            saved_at, dloss_at = address(saved, saved.nbytes), address(dloss, dloss.nbytes)
            logits_at, target_at = address(logits, kind.logits.of(n_examples)), address(target, kind.target.of(n_examples))
        n_threads, functions = self.workers or kind.workers(n_examples)
        call = CALL.pack(
            0,
            saved_at,
            dlogits.data_ptr(),
            logits_at,
            target_at,
            0 if weight is None else address(weight, weight.nbytes),
            1.0,
            n_threads,
            n_examples,
        )
        functions.backward(call, _BEFORE_DLOSS + dloss_at.to_bytes(8, sys.byteorder) + self.after_dloss)
        return dlogits

    def scale_gradient(self, dlogits: Tensor, dloss: Tensor) -> None:
        """dlogits *= dloss."""
        at = dloss.data_ptr()
        if at < _PAST_FREED or self.bits_at(at).value != self.one:  # item() takes 3 % of a small step
            scale_gradient(dlogits, dloss)


def prepare(
    inputs: Inputs, options: Options, out_dtype: torch.dtype, needs_grad: bool, as_given: Inputs, varies: bool
) -> Prepared | None:
    """What `cpu.forward` decides for these arguments; None for calls that are not worth it, or not alike.
    as_given: the inputs as the caller has them; varies: calls with another number of examples should be alike, too."""
    logits, shape = as_given.logits, as_given.logits.shape
    if 1 in shape and logits.stride() != contiguous_strides(shape):  # strides that say nothing: a gradient's differ
        return None
    if logits.numel() == 0:
        return None
    read = all_as_read(inputs)
    pairs = (read.logits, logits), (read.target, as_given.target), (read.weight, as_given.weight)
    conversions = tuple(_conversion(*pair) for pair in pairs)
    converts = conversions != (None, None, None)
    soft, saves, makes_gradient = inputs.has_probabilities(), *kept(options, needs_grad, logits.dtype)
    gradient = allocate_gradient(inputs.logits)
    strides, as_given_strides = gradient.stride(), gradient.view(shape).stride()
    kind = prepack(read, strides if makes_gradient else None, out_dtype, options, library())
    saved_dtype = accumulation_dtype(logits.dtype)
    dloss_dtype = out_dtype if out_dtype in (logits.dtype, saved_dtype) else saved_dtype
    backward_kind = prepack(read, strides, dloss_dtype, options, library())
    bits_at, one = _BITS[out_dtype.itemsize].from_address, torch.ones((), dtype=out_dtype, device="cpu")
    any_batch = (
        varies
        and logits.dim() > 1
        and not converts
        # Else the gradient's strides would depend on the number of examples.
        and (not needs_grad or (as_given_strides == logits.stride() and logits.stride(0) == math.prod(shape[1:])))
        and (soft or as_given.target.stride() == contiguous_strides(as_given.target.shape))
    )
    n_examples = shape[0] if logits.dim() > 1 else 1
    return Prepared(
        kind,
        backward_kind,
        conversions if converts else None,
        any_batch=any_batch,
        n_examples=n_examples,
        workers=kind.workers(n_examples) if not any_batch and n_examples < kind.examples_of_two_threads else None,
        new_gradient=partial(torch.empty_strided, shape, as_given_strides, dtype=logits.dtype, device=logits.device),
        new_loss=partial(torch.empty_strided, (), (), dtype=out_dtype, device=logits.device),
        losses=tuple(shape[2:]) if options.reduction == "none" and logits.dim() > 1 else None,
        loss_strides=contiguous_strides((1, *shape[2:])),
        saved_per_example=(3 + soft) * kind.per_example if saves else 0,
        makes_gradient=makes_gradient,
        out_dtype=out_dtype,
        saved_dtype=saved_dtype,
        dloss_dtype=dloss_dtype,
        rest=None if options.return_stats else NO_EXTRAS + kind.packed,
        after_dloss=_AFTER_DLOSS + backward_kind.packed,
        bits_at=bits_at,
        one=bits_at(one.data_ptr()).value,
    )


def _converted(conversions: tuple[Conversion | None, ...], *tensors: Any) -> Iterator[Any]:
    """The tensors, copied where the kernel cannot read them as they lie."""
    for tensor, conversion in zip(tensors, conversions, strict=True):
        yield tensor if conversion is None else converted(tensor, *conversion)


def _conversion(read: Tensor | None, given: Tensor | None) -> Conversion | None:
    if read is None or given is None or (read.dtype == given.dtype and read.data_ptr() == given.data_ptr()):
        return None
    return Conversion(read.dtype, bytes_spanned(given))
