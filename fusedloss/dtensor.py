"""cross_entropy of a DTensor whose classes are sharded: the ranks of that mesh dimension share the rows, as in `sharded`.

Imported with the first DTensor: torch.distributed.tensor takes a second.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fusedloss import shards
from fusedloss.backends.outputs import contiguous_strides
from fusedloss.plan import ClassShard, Inputs, Options
from fusedloss.sharded import check_whole_rows, denominator, sharded_cross_entropy
from fusedloss.stats import LossStats

CLASS_DIM = 1


def not_covered(inputs: Inputs, options: Options) -> str | None:
    """Why PyTorch's own path serves a DTensor; None where its classes are sharded in a way that one collective serves."""
    logits = inputs.logits
    if not isinstance(logits, DTensor):
        return "the logits are no DTensor, and another tensor is"
    if torch.compiler.is_compiling():
        return "torch.compile traces PyTorch's operators on a DTensor"
    class_dims = [dim for dim, place in enumerate(logits.placements) if place == Shard(CLASS_DIM)]
    if logits.dim() < 2 or len(class_dims) != 1:
        return f"of the placements {logits.placements} not exactly one shards the classes"
    others = [place for place in logits.placements if place != Shard(CLASS_DIM)]
    if any(place not in (Replicate(), Shard(0)) for place in others) or others.count(Shard(0)) > 1:
        return f"the placements {logits.placements} do more than shard the classes, and perhaps the batch"
    of_rows = [Shard(0) if place == Shard(0) else Replicate() for place in logits.placements]
    shards_batch = Shard(0) in of_rows
    if shards_batch and (options.reduction not in ("none", "sum", "mean") or options.return_stats):
        return f"reduction {options.reduction!r}, or statistics, of a batch that is sharded, too"
    if unknown := options.non_default_numbers(besides=shards.NUMBERS):
        return f"{unknown[0]} on a DTensor"
    if inputs.has_probabilities():
        return "class probabilities of a DTensor"
    for name, tensor in inputs._asdict().items():
        if tensor is None or name == "logits":
            continue
        expected = [Replicate()] * len(of_rows) if name in ("weight", "scale") else of_rows
        if isinstance(tensor, DTensor):
            if list(tensor.placements) != expected or tensor.device_mesh != logits.device_mesh:
                return f"{name} has placements {tensor.placements}, where {tuple(expected)} goes with the logits'"
        elif Shard(0) in expected:
            return f"{name} is no DTensor, and the batch is sharded"
    return None


def cross_entropy(inputs: Inputs, options: Options, out_dtype: torch.dtype) -> tuple[Tensor, LossStats | None]:
    """The loss as a DTensor; for a sharded batch partial sums, or the rows' losses sharded as the batch is."""
    logits: Any = inputs.logits
    mesh, placements = logits.device_mesh, logits.placements
    class_dim = placements.index(Shard(CLASS_DIM))
    _, offsets = compute_local_shape_and_global_offset(logits.shape, mesh, placements)
    shard, group = ClassShard(offsets[CLASS_DIM], logits.shape[CLASS_DIM]), mesh.get_group(class_dim)
    tensors: list[Any] = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in inputs]
    local = Inputs(*tensors)
    check_whole_rows(local, options, shard)
    batch_dims = [dim for dim, place in enumerate(placements) if place == Shard(0)]
    if options.reduction == "mean" and batch_dims:
        total = denominator(local, options, shard)
        dist.all_reduce(total, group=mesh.get_group(batch_dims[0]))
        factor = torch.where(total == 0, torch.nan, 1 / total)
        options = options._replace(reduction="sum")
        local = local._replace(scale=factor if local.scale is None else factor * local.scale)
    loss, stats = sharded_cross_entropy(local, options, shard, group, out_dtype)
    of_batch: Placement = Shard(0) if options.reduction == "none" else Partial()
    found = [of_batch if dim in batch_dims else Replicate() for dim in range(mesh.ndim)]
    shape = torch.Size((logits.shape[0], *logits.shape[2:]) if options.reduction == "none" else ())  # else it takes even shards
    return DTensor.from_local(loss, mesh, found, run_check=False, shape=shape, stride=contiguous_strides(shape)), stats
