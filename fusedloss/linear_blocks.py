"""The losses of rows whose logits are made a block of classes at a time: no more of a row exists than its statistics need."""

import torch
from torch import Tensor

from fusedloss import reference, shards
from fusedloss.backends import cpu
from fusedloss.backends.outputs import NO_OUTPUTS, Outputs
from fusedloss.plan import ClassShard, Inputs, Options


def multiply(x: Tensor, linear_weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """The logits x W^T + b."""
    if bias is None:
        return torch.mm(x, linear_weight.t(), out=out)
    return torch.addmm(bias, x, linear_weight.t(), out=out)


def losses_of_blocks(
    x: Tensor, linear_weight: Tensor, bias: Tensor | None, inputs: Inputs, options: Options, dtype: torch.dtype
) -> Outputs:
    """The losses of rows that count, of class indices, by the C++ kernel.

    inputs: of the loss; the logits are memory for those of a block of classes, (rows of x at least, classes).
    """
    n_classes, memory, sample_weight = len(linear_weight), inputs.logits, inputs.sample_weight
    inputs = inputs._replace(sample_weight=None)
    published = []
    for first in range(0, n_classes, memory.shape[1]):
        classes = slice(first, min(first + memory.shape[1], n_classes))
        logits = memory.view(-1)[: len(x) * (classes.stop - first)].view(len(x), -1)
        multiply(x, linear_weight[classes], None if bias is None else bias[classes], logits)
        inputs = inputs._replace(logits=logits)
        published.append(cpu.shard_statistics(inputs, options, ClassShard(first, n_classes)))
    stats = shards.merge(torch.stack(published).double(), options.return_stats)
    rows = shards.describe_rows(inputs, options, ClassShard(0, n_classes), torch.float64)
    losses, lse = shards.row_losses(stats, rows, options, ClassShard(0, n_classes))
    if sample_weight is not None:
        losses = losses * sample_weight
    outputs = NO_OUTPUTS._replace(loss=losses.to(dtype))
    if not options.return_stats:
        return outputs
    correct = shards.is_correct(stats, rows, inputs, options)
    counts = torch.stack([rows.counted.sum(), correct.sum(), reference.worst_row(losses, rows.counted)])
    row_stats = torch.stack([lse, losses, shards.row_entropies(stats, rows)])
    return outputs._replace(row_stats=row_stats.to(dtype), counts=counts)
