"""Calls alike of the C++ kernel: what they have in common is decided once, and a call is left with its tensors."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedloss.backends.cpu import all_as_read, library, raise_out_of_bounds
from fusedloss.backends.cpu_abi import Functions
from fusedloss.backends.cpu_call import Prepacked, as_read, bytes_spanned, converted, prepack
from fusedloss.backends.outputs import (
    N_ROW_STATS,
    NO_STATS,
    STATE,
    Allocators,
    RowStats,
    contiguous_strides,
    forward_allocators,
    kept,
)
from fusedloss.plan import Inputs, Options, accumulation_dtype

ALONE = 1, True  # a thread, for which Python's others wait
_ON_CPU = partial(torch.empty_strided, device=torch.device("cpu"))  # torch.empty() takes half as long again


class Conversion(NamedTuple):
    """What `cpu_call.converted` is to make of a tensor."""

    dtype: torch.dtype
    n_bytes: int


class PerExample(NamedTuple):
    """What outputs take for each example, where calls with any number of them are alike."""

    losses: tuple[int, ...] | None  # None: the loss is 0-d
    loss_strides: tuple[int, ...]  # with that of the examples
    n_saved: int  # 0: nothing is saved
    n_stats: int  # rows; 0: there are no statistics
    out_dtype: torch.dtype
    saved_dtype: torch.dtype

    def allocate(self, n_examples: int, new: Allocators) -> tuple[Tensor, Tensor | None, RowStats | None]:
        """Loss, saved and statistics; new: what makes those of another number of examples."""
        saved = stats = None
        if self.losses is None:
            loss = new.loss()
        else:
            loss = _ON_CPU((n_examples, *self.losses), self.loss_strides, dtype=self.out_dtype)
        if self.n_saved:
            saved = _ON_CPU((STATE + n_examples * self.n_saved,), (1,), dtype=self.saved_dtype)
        if self.n_stats:
            n_rows = n_examples * self.n_stats
            row_stats = _ON_CPU((N_ROW_STATS, n_rows), (n_rows, 1), dtype=self.saved_dtype)
            stats = row_stats, _ON_CPU((3,), (1,), dtype=torch.int64)
        return loss, saved, stats


@dataclass(frozen=True, eq=False)
class Prepared:
    """Forward and backward of calls alike, on logits with class indices or probabilities, and weights or not."""

    run: Functions
    kind: Prepacked
    packed: bytes  # kind.packed, at hand
    backward_packed: bytes
    conversions: tuple[Conversion | None, ...] | None  # of logits, target and weight; None: all are read where they lie
    makes_gradient: bool
    new_gradient: Callable[[Tensor], Tensor]  # for these logits
    per_example: PerExample | None  # None: calls with another number of examples are not alike
    n_examples: int  # where per_example is None
    new: Allocators  # for n_examples
    examples_of_two_threads: int  # from so many on a second one is worth waking
    dloss_dtype: torch.dtype  # that the kernel reads

    @property
    def any_batch(self) -> bool:
        return self.per_example is not None

    def forward(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor | None, Tensor | None, RowStats | None]:
        """The loss, what the backward reads, the gradient for an upstream gradient of 1 and statistics; as `Outputs` has them."""
        dlogits = self.new_gradient(logits) if self.makes_gradient else None
        if self.conversions is not None:
            logits, target, weight = _converted(self.conversions, logits, target, weight)
        if self.per_example is None:
            n_examples, new = self.n_examples, self.new
            loss = new.loss()
            saved = None if new.saved is None else new.saved()
            stats = None if new.stats is None else new.stats()
        else:
            n_examples = logits.shape[0]
            loss, saved, stats = self.per_example.allocate(n_examples, self.new)
        row_stats, counts = stats or NO_STATS
        n_threads, holds_gil = ALONE if n_examples < self.examples_of_two_threads else self.kind.workers(n_examples)
        bad_row = self.run.forward(  # as cpu_call.run() does, but without names, which would take 3 % of a small step
            self.packed,
            holds_gil,
            loss,
            saved,
            dlogits,
            row_stats,
            counts,
            logits,
            target,
            weight,
            None,
            scale,
            n_threads,
            n_examples,
        )
        if bad_row:
            raise_out_of_bounds(bad_row - 1, self.kind.n_cols, target)
        return loss, saved, dlogits, stats

    def backward(self, dloss: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, saved: Tensor) -> Tensor:
        """The gradient of the logits; saved: the forward's, the scale in it."""
        dlogits = self.new_gradient(logits)
        n_examples = self.n_examples if self.per_example is None else dlogits.shape[0]
        if self.conversions is not None:
            logits, target, weight = _converted(self.conversions, logits, target, weight)
        dloss = as_read(dloss, self.dloss_dtype)
        n_threads, holds_gil = ALONE if n_examples < self.examples_of_two_threads else self.kind.workers(n_examples)
        self.run.backward(
            self.backward_packed,
            holds_gil,
            None,
            saved,
            dlogits,
            None,
            None,
            logits,
            target,
            weight,
            dloss,
            1.0,
            n_threads,
            n_examples,
        )
        return dlogits

    def scale_gradient(self, dlogits: Tensor, dloss: Tensor) -> None:
        """dlogits *= dloss, of each row its own; a row of zeros stays so."""
        n_examples = self.n_examples if self.per_example is None else dlogits.shape[0]
        dloss = as_read(dloss, dloss.dtype)
        n_threads, holds_gil = ALONE if n_examples < self.examples_of_two_threads else self.kind.workers(n_examples)
        self.run.scale_gradient(
            self.packed, holds_gil, None, None, dlogits, None, None, None, None, None, dloss, 1.0, n_threads, n_examples
        )


@dataclass(frozen=True, eq=False)
class PreparedLoss(Prepared):
    """The same where one thread makes a loss and nothing else, of logits that are read where they lie: an evaluation of few rows.
    With all of Prepared's questions ten logits would take 5 % more time."""

    def forward(self, logits: Tensor, target: Tensor, weight: Tensor | None, scale: float) -> tuple[Tensor, None, None, None]:
        loss = self.new.loss()
        bad_row = self.run.forward(
            self.packed, True, loss, None, None, None, None, logits, target, weight, None, scale, 1, self.n_examples
        )
        if bad_row:
            raise_out_of_bounds(bad_row - 1, self.kind.n_cols, target)
        return loss, None, None, None


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
    gradient = _without_memory(inputs.logits)
    strides, as_given_strides = gradient.stride(), gradient.view(shape).stride()
    kind = prepack(read, strides if makes_gradient else None, out_dtype, options, library())
    saved_dtype = accumulation_dtype(logits.dtype)
    dloss_dtype = out_dtype if out_dtype in (logits.dtype, saved_dtype) else saved_dtype
    backward_kind = prepack(read, strides, dloss_dtype, options, library())
    any_batch = (
        varies
        and logits.dim() > 1
        and not converts
        # Else the gradient's strides would depend on the number of examples.
        and (not needs_grad or (as_given_strides == logits.stride() and logits.stride(0) == math.prod(shape[1:])))
        and (soft or as_given.target.stride() == contiguous_strides(as_given.target.shape))
    )
    n_examples = shape[0] if logits.dim() > 1 else 1
    per_example = PerExample(
        losses=tuple(shape[2:]) if options.reduction == "none" else None,
        loss_strides=contiguous_strides((1, *shape[2:])),
        n_saved=(3 + soft) * kind.per_example if saves else 0,
        n_stats=kind.per_example if options.return_stats else 0,
        out_dtype=out_dtype,
        saved_dtype=saved_dtype,
    )
    makes_more = makes_gradient or saves or options.return_stats
    loss_alone = not (makes_more or converts or any_batch) and n_examples < kind.examples_of_two_threads
    return (PreparedLoss if loss_alone else Prepared)(
        library().functions,
        kind,
        kind.packed,
        backward_kind.packed,
        conversions if converts else None,
        makes_gradient,
        _gradient_allocator(logits, as_given_strides),
        per_example if any_batch else None,
        n_examples,
        forward_allocators(read, options, out_dtype, needs_grad, shape),
        kind.examples_of_two_threads,
        dloss_dtype,
    )


def _without_memory(logits: Tensor) -> Tensor:
    """What torch.empty_like makes, for its strides: the memory of another gradient may be more than there is."""
    return torch.empty_like(logits, device="meta")


def _gradient_allocator(logits: Tensor, strides: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Makes a gradient with these strides for logits like these."""
    if _without_memory(logits).stride() == strides:  # as most are: it takes a sixth less time
        return torch.empty_like
    return lambda like: _ON_CPU(like.shape, strides, dtype=like.dtype)


def _converted(conversions: tuple[Conversion | None, ...], *tensors: Any) -> Iterator[Any]:
    """The tensors, copied where the kernel cannot read them as they lie."""
    for tensor, conversion in zip(tensors, conversions, strict=True):
        yield tensor if conversion is None else converted(tensor, *conversion)


def _conversion(read: Tensor | None, given: Tensor | None) -> Conversion | None:
    if read is None or given is None or (read.dtype == given.dtype and read.data_ptr() == given.data_ptr()):
        return None
    return Conversion(read.dtype, bytes_spanned(given))
