"""The loss as a composition of PyTorch operators: the oracle of the tests, and the path of what the kernels do not cover.

Per-row losses are torch.nn.functional.cross_entropy's, computed in float32 for float16 and bfloat16 logits. The
reductions are spelled out here, because two of them are ours: the maximum, and the average of the k largest losses
(Fan et al. 2017, "Learning with Average Top-k Loss", arXiv:1705.08826).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedloss.plan import Options

TORCHS = F.cross_entropy  # PyTorch's own, whatever `patch_torch` puts in its place

# A fraction of the rows counts in units of 2**-32, so that host and GPU agree on k to the last row.
FRACTION_BITS = 32


def cross_entropy(
    logits: Tensor,  # (N, C) or (N, C, d1, ...)
    target: Tensor,  # class indices (N,) or (N, d1, ...), or probabilities of the logits' shape
    weight: Tensor | None,  # (C,)
    options: Options,
    scale: Tensor | None,  # 0-d, on top of options.scale
    out_dtype: torch.dtype,
) -> Tensor:
    """Returns the loss in out_dtype: 0-d, or the target's (N, d1, ...) for reduction "none"."""
    compute_dtype = torch.promote_types(out_dtype, torch.float32)
    logits = logits.to(compute_dtype)
    weight = weight.to(compute_dtype) if weight is not None else None
    if target.shape == logits.shape:
        rows = _row_losses(logits, target.to(compute_dtype), weight, options)
        counted = torch.ones_like(rows, dtype=torch.bool)
        # Class weights are not in the denominator of the mean. Without a class PyTorch divides by no row.
        row_weights = torch.full_like(rows, min(1, logits.shape[1]))
    else:
        target = target.to(torch.long)
        counted = target != options.ignore_index
        # An ignored row has no gradient even where its logits are NaN: 0 * NaN would be NaN.
        logits = logits.masked_fill(~counted.unsqueeze(1), 0.0)
        outside = ((target < 0) | (target >= logits.shape[1])) & counted
        if not _raises_index_error(logits.device):  # PyTorch would stop the device: these rows are read as another class
            target = target.masked_fill(outside, 0 if logits.shape[1] else options.ignore_index)
        rows = _row_losses(logits, target, weight, options)
        if not _raises_index_error(logits.device):  # and NaN, their gradients too: 1 leaves the others as they are
            rows = rows * torch.where(outside, torch.nan, 1.0)
        row_weights = _row_weights(logits, target, weight, counted)
    factor = options.scale if scale is None else options.scale * scale.to(compute_dtype)
    return (factor * _reduce(rows, counted, row_weights, options)).to(out_dtype)


def _raises_index_error(device: torch.device) -> bool:
    return device.type == "cpu"


def _row_losses(logits: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    return TORCHS(
        logits,
        target,
        weight,
        ignore_index=options.ignore_index,
        reduction="none",
        label_smoothing=options.label_smoothing,
    )


def _row_weights(logits: Tensor, target: Tensor, weight: Tensor | None, counted: Tensor) -> Tensor:
    if weight is None:
        return counted.to(logits.dtype)
    return torch.where(counted, weight.detach()[target.masked_fill(~counted, 0)], 0)


def _reduce(rows: Tensor, counted: Tensor, row_weights: Tensor, options: Options) -> Tensor:
    if options.reduction == "none":
        return rows
    if options.reduction == "sum":
        return rows.sum()
    if options.reduction == "mean":
        denominator = row_weights.sum()
        # Without weight PyTorch's mean is nan, also where label smoothing gives the rows a loss: not inf.
        return rows.sum() / denominator.masked_fill(denominator == 0, torch.nan)
    return average_of_largest(rows.flatten(), counted.flatten(), options)


def average_of_largest(rows: Tensor, counted: Tensor, options: Options) -> Tensor:
    """Average of the k largest entries of rows (n_rows,) among the counted; nan where none is counted.

    Rows that tie with the k-th share what is left of the k evenly, as torch's `max()` does for k = 1. A NaN is the largest.
    """
    n_counted = counted.sum()
    k = rows_to_select(n_counted, options)
    if rows.numel() == 0:
        return rows.sum() / k
    order = rows.detach().masked_fill(~counted, -torch.inf)
    threshold = order.sort(descending=True).values.gather(0, (k - 1).clamp(min=0).view(1))
    unknown = order.isnan()
    above = counted & ((order > threshold) | (unknown & ~threshold.isnan()))
    tied = counted & ((order == threshold) | (unknown & threshold.isnan()))
    share = (k - above.sum()).to(rows.dtype) / tied.sum()  # int / int would be float32 in a float64 problem
    selected = torch.where(above, rows, 0).sum() + share * torch.where(tied, rows, 0).sum()
    return selected / k


def rows_to_select(n_counted: Tensor, options: Options) -> Tensor:
    """k of "topk" (1 for "max"), never more than the counted rows: 0-d int64. A fraction is rounded to the nearest, from 1 up."""
    if options.reduction == "max":
        return n_counted.clamp(max=1)
    if options.top_k:
        return n_counted.clamp(max=options.top_k)
    fixed = round(options.top_k_fraction * 2**FRACTION_BITS)
    k = (n_counted * fixed + 2 ** (FRACTION_BITS - 1)) >> FRACTION_BITS
    return torch.minimum(k.clamp(min=1), n_counted)
