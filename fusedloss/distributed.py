"""One mean over many calls: the factor of the sum when a batch is spread over micro-batches, ranks, or both."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedloss import reference
from fusedloss.plan import counted_rows
from fusedloss.vocab_parallel import vocab_parallel_cross_entropy as vocab_parallel_cross_entropy

Labels = Tensor | tuple[Tensor, Tensor, float | Tensor]


def global_scale(
    target: Labels | Sequence[Labels],
    ignore_index: int = -100,
    group: "dist.ProcessGroup | None" = None,
    *,
    weight: Tensor | None = None,
) -> Tensor:
    r"""The `scale` with which `reduction="sum"` on each rank is the mean over all ranks: n_ranks / sum of w[y] over all targets.

    DistributedDataParallel averages gradients over the ranks. Of per-rank means that is the mean over the whole batch only if
    each rank counts equally many targets; of per-rank sums times this factor it always is, because the factor holds the
    global count, and n_ranks, which the averaging divides out again. The same for gradient accumulation: pass the targets
    of all micro-batches, then use the factor for each of them. Every rank of the group must call it, equally often: the
    counts are all-reduced on the targets' device, and the host does not wait for them.

        scale = global_scale(target)  # or global_scale([target for _, target in micro_batches])
        cross_entropy(model(images), target, reduction="sum", scale=scale).backward()

    Args:
        target: this rank's targets as `cross_entropy` takes them, two labels and a share included, or a sequence with those of
            each micro-batch.
        ignore_index: targets with this class index are ignored.
        group: the ranks that gradients are averaged over; by default all. Without an initialised process group: this process.
        weight: (C,), the class weights given to `cross_entropy`; they do not count for class probabilities, as in the mean.

    Returns:
        0-d float64 tensor on the targets' device (float32 on "mps"), the same on every rank. Infinite if nothing at all is
        counted: the loss is nan, as PyTorch's mean is, and its gradient 0.

    Raises:
        ValueError: an empty sequence of targets.

    References:
        Goyal et al. 2017, arXiv:1706.02677, section 3, remark 3: normalise by the total minibatch, not by the worker's.
    """
    targets: Sequence[Any] = [target] if isinstance(target, Tensor) or _are_two_labels(target) else list(target)
    if not targets:
        raise ValueError("global_scale() needs the targets of at least one micro-batch")
    total = torch.stack([denominator(part, ignore_index, weight) for part in targets]).sum()
    n_ranks = 1
    if dist.is_available() and dist.is_initialized():
        n_ranks = dist.get_world_size(group)
        dist.all_reduce(total, group=group)
    return n_ranks / total


def _are_two_labels(target: Any) -> bool:
    """(target_a, target_b, lam), and no three micro-batches: class indices are no floating point numbers, shares are."""
    if not isinstance(target, (tuple, list)) or len(target) != 3:
        return False
    *labels, lam = target
    is_share = lam.is_floating_point() if isinstance(lam, Tensor) else not isinstance(lam, (tuple, list))
    return is_share and not any(isinstance(label, (tuple, list)) or label.is_floating_point() for label in labels)


def denominator(target: Any, ignore_index: int, weight: Tensor | None) -> Tensor:
    """What PyTorch's mean divides by, 0-d: as a float, because float32 counts only to 2**24 and integers do not divide."""
    if _are_two_labels(target):  # class weights do not count, as for probabilities
        a, b, _ = target
        dtype = torch.float32 if a.device.type == "mps" else torch.float64
        return counted_rows(ignore_index, a, b).sum(dtype=dtype)
    dtype = torch.float32 if target.device.type == "mps" else torch.float64
    if target.is_floating_point():  # class probabilities: (C,) or (N, C, d1, ...)
        n_classes = target.shape[min(1, target.dim() - 1)]
        return torch.full((), target.numel() // max(n_classes, 1), dtype=dtype, device=target.device)
    counted = counted_rows(ignore_index, target)
    if weight is None:
        return counted.sum(dtype=dtype)
    # A class out of range makes the loss itself fail, or nan on a GPU; here it must only not be read.
    target = target.long()  # 300 classes are 44 to bytes
    inside = (target >= 0) & (target < len(weight))
    weights = weight.detach().to(target.device, dtype)[torch.where(inside, target, 0)]
    return reference.total(torch.where(counted, weights, 0))
