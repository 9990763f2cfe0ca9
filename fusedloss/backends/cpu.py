"""Calls the C++ kernel of kernels/cpu.

Its functions take tensors (kernels/cpu/python.cpp). What shapes, strides, dtypes and options decide is packed once for all calls
alike, and handed over as one bytes object.
"""

from typing import NoReturn

import torch
from torch import Tensor

from fusedloss.backends.cpu_abi import Library, load
from fusedloss.backends.cpu_call import as_read, bytes_spanned, check_memory, prepack, run
from fusedloss.backends.outputs import NO_OUTPUTS, Outputs, allocate_forward, allocate_gradient, n_statistics
from fusedloss.plan import ClassShard, Inputs, Options, accumulation_dtype

# At import: a call has no time for it, and torch.compile reads a constant.
LIBRARY, MISSING = load(lambda tensor: check_memory(tensor, bytes_spanned(tensor)))
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


def overwrites(inputs: Inputs, options: Options) -> bool:
    """Whether `forward_overwriting` uses the memory of the logits; of any, as `prepack` knows them not to be fresh."""
    return True


def forward_overwriting(inputs: Inputs, options: Options, out_dtype: torch.dtype, keeps_workspace: bool = True) -> Outputs:
    """The same for reduction "sum" or "mean", and any dtype; the gradient takes the place of the logits."""
    outputs = allocate_forward(inputs, options, out_dtype, False)
    _forward(outputs, inputs.logits, inputs, options)
    return outputs._replace(dlogits=inputs.logits)


def _forward(outputs: Outputs, dlogits: Tensor | None, inputs: Inputs, options: Options) -> None:
    inputs = all_as_read(inputs)
    strides = None if dlogits is None else dlogits.stride()
    kind = prepack(inputs, strides, outputs.loss.dtype, options, library(), fresh=dlogits is not inputs.logits)
    bad_row = run(False, kind, outputs._replace(dlogits=dlogits), None, inputs, options)
    if bad_row:
        raise_out_of_bounds(bad_row - 1, inputs.logits.shape[1], inputs.target, inputs.target_b)


def raise_out_of_bounds(row: int, n_classes: int, *labels: Tensor | None) -> NoReturn:
    values = [label.reshape(-1)[row].item() for label in labels if label is not None]
    value = next((value for value in values if not 0 <= value < n_classes), values[0])  # values[0]: it has changed since
    raise IndexError(f"Target {value} is out of bounds. (n_classes {n_classes}, in row {row})")


def backward(
    dloss: Tensor,  # of the loss's shape
    inputs: Inputs,
    saved: Tensor,
    options: Options,
) -> Tensor:
    """The gradient of the logits."""
    dlogits = allocate_gradient(inputs.logits)
    if dlogits.numel() > 0:
        dloss = as_read(dloss, dloss.dtype if dloss.dtype in (saved.dtype, dlogits.dtype) else saved.dtype)
        inputs = all_as_read(inputs)
        kind = prepack(inputs, dlogits.stride(), dloss.dtype, options, library())
        outputs = NO_OUTPUTS._replace(saved=saved, dlogits=dlogits)
        run(True, kind, outputs, dloss, inputs, options)
    return dlogits


def shard_statistics(inputs: Inputs, options: Options, shard: ClassShard) -> Tensor:
    """What a shard publishes of its rows, as `shards.shard_statistics` has it."""
    inputs, logits = all_as_read(inputs), inputs.logits
    n_rows = logits.numel() // logits.shape[1]
    stats = logits.new_empty((n_statistics(inputs, options), n_rows), dtype=accumulation_dtype(logits.dtype))
    if logits.numel() > 0:
        kind = prepack(inputs, None, None, options, library())
        bad_row = run(False, kind, NO_OUTPUTS, None, inputs, options, shard, stats)
        if bad_row:
            raise_out_of_bounds(bad_row - 1, shard.n_classes, inputs.target, inputs.target_b)
    return stats


def shard_gradient(
    drows: Tensor, inputs: Inputs, stats: Tensor, weight_total: float | Tensor, options: Options, shard: ClassShard
) -> Tensor:
    """The gradient of a shard's logits, as `shards.shard_gradient` has it."""
    dlogits = allocate_gradient(inputs.logits)
    if dlogits.numel() > 0:
        inputs = all_as_read(inputs)
        kind = prepack(inputs, dlogits.stride(), None, options, library())
        head = stats.new_tensor([1.0, 0.0, 0.0, float(weight_total)])
        outputs = NO_OUTPUTS._replace(saved=head, dlogits=dlogits)
        run(True, kind, outputs, as_read(drows, drows.dtype), inputs, options, shard, stats)
    return dlogits


def scale_gradient(dlogits: Tensor, dloss: Tensor) -> None:  # dloss: 0-d, or a number for each row
    """dlogits *= dloss, but a row of zeros, as an ignored one is, stays so whatever dloss is; and a number 0 for it makes any row
    zeros."""
    check_memory(dloss, bytes_spanned(dloss))  # PyTorch's operators do not look
    if dloss.dim() == 0 and dloss.item() == 1:
        return
    # As the kernel multiplies the rows of a known call.
    factors = dloss if dloss.dim() == 0 else dloss.unsqueeze(1).to(accumulation_dtype(dlogits.dtype))
    if not dloss.isfinite().all():
        factors = torch.where(dlogits.any(min(1, dlogits.dim() - 1), keepdim=True), factors, 0)
    dlogits.mul_(factors)
    if dloss.dim() > 0:
        dlogits.masked_fill_(factors == 0, 0)


def library() -> Library:
    if LIBRARY is None:
        raise RuntimeError(MISSING)
    return LIBRARY


def all_as_read(inputs: Inputs) -> Inputs:
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
