"""The passes of a loss fused with the last linear layer: rows in chunks, so that the logits of one chunk are all that exist.

gradient_pass   logits = x W^T + b          the loss of the chunk's rows, sum_n a_n loss_n, whose gradient takes the logits' place
                dx      = dlogits W
                dW     += dlogits^T x
                db     += sum of dlogits    3 matmuls per row; those of frozen parts are left out
row_pass        logits = x W^T + b          a loss per row; 1 matmul. On a CPU of a block of classes at a time

"sum" and "mean" are one gradient pass in the forward: a_n is known beforehand, the mean's denominator by a look at the targets.
"none", "max" and "topk" are a row pass, then a gradient pass in the backward over the rows whose loss, or entropy, has an
upstream gradient: max and topk select few. Rows without one, and ignored rows, are left out of the matmuls (on a GPU, where the
host would have to wait for their number, only if the caller says compact; else they are multiplied as zeros).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fusedloss import ops
from fusedloss.backends.outputs import N_ROW_STATS
from fusedloss.checks import check_class_indices
from fusedloss.entropy import add_gradient
from fusedloss.linear_blocks import losses_of_blocks, multiply
from fusedloss.linear_checks import Chunking
from fusedloss.plan import Inputs, Options, accumulation_dtype, counted_rows
from fusedloss.plan_linear import Chunks, chunks_of, class_ranges, leaves_rows_out, sums_in_float32

Rows = slice | Tensor  # of a chunk: a range, or indices


class LinearInputs(NamedTuple):
    """The tensors of a call: a linear layer, its input, and what `plan.Inputs` has besides the logits."""

    input: Tensor  # (n_rows, n_features)
    linear_weight: Tensor  # (n_classes, n_features)
    linear_bias: Tensor | None  # (n_classes,)
    target: Tensor  # (n_rows,), or probabilities (n_rows, n_classes)
    target_b: Tensor | None = None  # (n_rows,)
    lam: Tensor | None = None  # (n_rows,)
    weight: Tensor | None = None  # (n_classes,)
    sample_weight: Tensor | None = None  # (n_rows,)
    scale: Tensor | None = None  # 0-d

    def has_probabilities(self) -> bool:
        """Of tensors that were checked, and have one row of the input per row."""
        return self.target.dim() == 2

    def counted(self, ignore_index: int) -> Tensor | None:
        """(n_rows,) bool, which rows are not ignored; None: probabilities ignore none."""
        if self.has_probabilities():
            return None
        return counted_rows(ignore_index, self.target, self.target_b)

    def loss_inputs(self, logits: Tensor, rows: Rows) -> Inputs:
        """What the loss of a chunk's logits is made of."""
        target, target_b, lam, sample_weight = (
            None if tensor is None else _take(tensor, rows)
            for tensor in (self.target, self.target_b, self.lam, self.sample_weight)
        )
        assert target is not None
        return Inputs(logits, target, target_b, lam, self.weight, sample_weight, self.scale)


class NeedsGrad(NamedTuple):
    """Which parts of the layer are not frozen."""

    input: bool
    weight: bool
    bias: bool


class Settings(NamedTuple):
    """How a call goes through its rows."""

    needs_grad: NeedsGrad
    chunking: Chunking
    backend: str


class GradientPass(NamedTuple):
    """What a gradient pass returns; "A" is the dtype of accumulation, float64 for float64 logits, else float32."""

    loss: Tensor  # 0-d, A
    dinput: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    row_stats: Tensor | None  # (3, n_rows), A: log-sum-exp, loss and entropy of every row; with return_stats
    n_correct: Tensor | None  # 0-d, int64; with return_stats

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.dinput, self.dweight, self.dbias


class RowPass(NamedTuple):
    """What a row pass returns."""

    row_losses: Tensor  # (n_rows,), A
    row_stats: Tensor | None
    n_correct: Tensor | None


Passed = TypeVar("Passed", GradientPass, RowPass)


def _names_rows(run: Callable[..., Passed]) -> Callable[..., Passed]:
    """The same pass, whose IndexError names a row of the call: the kernel knows that of its chunk."""

    @functools.wraps(run)
    def named(inputs: LinearInputs, options: Options, *rest: Any, **keywords: Any) -> Passed:
        try:
            return run(inputs, options, *rest, **keywords)
        except IndexError as error:
            found = error
        check_class_indices(inputs.target, len(inputs.linear_weight), options.ignore_index, inputs.target_b)
        raise found

    return named


@_names_rows
@torch.no_grad()
def gradient_pass(
    inputs: LinearInputs,
    options: Options,
    settings: Settings,
    upstream: Tensor | None = None,  # (n_rows,): a gradient for each row's loss, which also selects the rows
    dentropy: Tensor | None = None,  # (n_rows,): with it, for each row's entropy
    keeps_workspace: bool = True,
) -> GradientPass:
    """The sum of the rows' losses, and its gradients. keeps_workspace: as `ops.forward` has it."""
    wanted = None
    if upstream is not None:
        wanted = upstream != 0 if dentropy is None else (upstream != 0) | (dentropy != 0)
        factors = upstream if inputs.sample_weight is None else upstream * inputs.sample_weight
        inputs = inputs._replace(sample_weight=factors)
    passed = _Chunked(inputs, options, settings, wanted)
    sums = _GradientSums(inputs, settings, passed)
    losses = [inputs.input.new_zeros((), dtype=passed.dtype)]
    if inputs.scale is not None:  # the mean of no rows has scale NaN, and is 0 * NaN
        losses[0] = losses[0] * inputs.scale.to(passed.dtype)
    for rows in passed.chunks():
        x = passed.rows_of_input(rows)
        loss_inputs = passed.with_logits(x, rows)
        of_entropies = None
        if dentropy is not None:  # before the logits are overwritten
            of_entropies = torch.zeros_like(loss_inputs.logits)
            add_gradient(of_entropies, _take(dentropy, rows), loss_inputs, options)
        outputs = ops.forward_overwriting(loss_inputs, passed.options, passed.dtype, settings.backend, keeps_workspace)
        if of_entropies is not None:
            outputs.dlogits.add_(of_entropies)
        losses.append(outputs.loss)
        sums.add(outputs.dlogits, x, rows)
        passed.keep_stats(outputs.row_stats, outputs.counts, rows)
    return GradientPass(torch.stack(losses).sum(), *sums.result(), passed.row_stats, passed.n_correct)


@_names_rows
@torch.no_grad()
def row_pass(inputs: LinearInputs, options: Options, settings: Settings, keeps_workspace: bool = True) -> RowPass:
    """A loss per row, 0 of ignored rows."""
    passed = _Chunked(inputs, options, settings, losses_only=True)
    row_losses = inputs.input.new_zeros(len(inputs.input), dtype=passed.dtype)
    for rows in passed.chunks():
        x = passed.rows_of_input(rows)
        if passed.sizes.block_classes < len(inputs.linear_weight):
            loss_inputs = inputs.loss_inputs(passed.logits, rows)
            outputs = losses_of_blocks(x, inputs.linear_weight, inputs.linear_bias, loss_inputs, options, passed.dtype)
        else:
            loss_inputs = passed.with_logits(x, rows)
            outputs = ops.forward(loss_inputs, options, passed.dtype, False, settings.backend, keeps_workspace)
        row_losses[rows] = outputs.loss
        passed.keep_stats(outputs.row_stats, outputs.counts, rows)
    return RowPass(row_losses, passed.row_stats, passed.n_correct)


class _Chunked:
    """Goes through the rows that are not left out, and keeps what is gathered on the way."""

    def __init__(
        self,
        inputs: LinearInputs,
        options: Options,
        settings: Settings,
        wanted: Tensor | None = None,
        losses_only: bool = False,
    ) -> None:
        x, linear_weight = inputs.input, inputs.linear_weight
        self.inputs, self.options = inputs, options
        self.dtype = accumulation_dtype(x.dtype)
        counted = inputs.counted(options.ignore_index)
        if wanted is not None:
            counted = wanted if counted is None else counted & wanted
        self.index: Tensor | None = None  # of the rows that are left, None: all
        self.counted: Tensor | None = None  # which of them count, None: all
        if counted is not None and not leaves_rows_out(settings.backend, settings.chunking.compact):
            self.counted = counted
        elif counted is not None and not counted.all():
            self.index = counted.nonzero().squeeze(1)
        n_rows = len(x) if self.index is None else len(self.index)
        losses_only = losses_only and not inputs.has_probabilities()
        self.sizes = chunks_of(n_rows, len(linear_weight), x.dtype, settings.backend, settings.chunking.chunk_rows, losses_only)
        self.logits = x.new_empty((self.sizes.chunk_rows, self.sizes.block_classes))
        self.row_stats = x.new_zeros((N_ROW_STATS, len(x)), dtype=self.dtype) if options.return_stats else None
        self.n_correct = x.new_zeros((), dtype=torch.int64) if options.return_stats else None

    def chunks(self) -> Iterator[Rows]:
        for start in range(0, self.sizes.n_rows, max(1, self.sizes.chunk_rows)):
            rows = slice(start, min(start + self.sizes.chunk_rows, self.sizes.n_rows))
            yield rows if self.index is None else self.index[rows]

    def rows_of_input(self, rows: Rows) -> Tensor:
        x = _take(self.inputs.input, rows)
        if self.counted is not None:  # 0 times what an ignored row holds would be NaN
            x = x.masked_fill(~_take(self.counted, rows).unsqueeze(1), 0)
        return x

    def with_logits(self, x: Tensor, rows: Rows) -> Inputs:
        """The inputs of the chunk's loss."""
        logits = multiply(x, self.inputs.linear_weight, self.inputs.linear_bias, self.logits[: len(x)])
        return self.inputs.loss_inputs(logits, rows)

    def keep_stats(self, row_stats: Tensor | None, counts: Tensor | None, rows: Rows) -> None:
        if self.row_stats is not None and self.n_correct is not None:
            assert row_stats is not None
            assert counts is not None
            self.row_stats[:, rows] = row_stats
            self.n_correct += counts[1]


class _GradientSums:
    """The gradients of the layer and its input, to which each chunk adds."""

    def __init__(self, inputs: LinearInputs, settings: Settings, passed: _Chunked) -> None:
        x, self.linear_weight, bias = inputs.input, inputs.linear_weight, inputs.linear_bias
        needs_grad = settings.needs_grad
        sizes: Chunks = passed.sizes
        self.ranges = class_ranges(len(self.linear_weight), x.dtype, settings.backend)
        self.is_first = True
        self.dinput = self.dweight = self.dbias = self.float32_sum = None
        if needs_grad.input:
            self.dinput = torch.empty_like(x) if passed.index is None else torch.zeros_like(x)
        if needs_grad.weight:
            self.dweight = torch.empty_like(self.linear_weight)
            if sums_in_float32(self.dweight.dtype, sizes.n_chunks, settings.chunking.float32_sum):
                self.float32_sum = torch.zeros_like(self.linear_weight, dtype=passed.dtype)
            elif sizes.n_chunks == 0:
                self.dweight.zero_()
        if needs_grad.bias and bias is not None:
            self.dbias = torch.zeros_like(bias, dtype=passed.dtype)

    def add(self, dlogits: Tensor, x: Tensor, rows: Rows) -> None:
        if self.dinput is not None:
            if isinstance(rows, slice):
                torch.mm(dlogits, self.linear_weight, out=self.dinput[rows])
            else:
                self.dinput.index_copy_(0, rows, dlogits @ self.linear_weight)
        if self.dweight is not None:
            for classes in self.ranges:
                part, dweight = dlogits[:, classes].t(), self.dweight[classes]
                if self.is_first or self.float32_sum is not None:
                    torch.mm(part, x, out=dweight)
                else:
                    torch.addmm(dweight, part, x, out=dweight)
            if self.float32_sum is not None:
                self.float32_sum += self.dweight
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=self.dbias.dtype)
        self.is_first = False

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.dweight is not None and self.float32_sum is not None:
            self.dweight.copy_(self.float32_sum)
        return self.dinput, self.dweight, None if self.dbias is None else self.dbias.to(self.linear_weight.dtype)


def _take(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)
