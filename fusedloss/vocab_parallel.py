"""vocab_parallel_cross_entropy(): the classes of every row are sharded over ranks, as tensor parallel training leaves them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedloss.checks import Facts
from fusedloss.functional import cross_entropy
from fusedloss.option_checks import check_options, integer
from fusedloss.plan import EXTRAS, ClassShard, Extras, Inputs, Reduction, Target
from fusedloss.serving import labels_of
from fusedloss.sharded import check_whole_rows, sharded_cross_entropy
from fusedloss.world import Kind, world_of


def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Target,
    weight: Tensor | None = None,
    *,
    group: "dist.ProcessGroup | None" = None,
    first_class: int | None = None,
    n_classes: int | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    top_k: int | float | None = EXTRAS.top_k,
    scale: float | Tensor = EXTRAS.scale,
    sample_weight: Tensor | None = EXTRAS.sample_weight,
    z_loss: float = EXTRAS.z_loss,
    logit_scale: float = EXTRAS.logit_scale,
    softcap: float | None = EXTRAS.softcap,
    return_stats: bool = EXTRAS.return_stats,
    out_dtype: torch.dtype | None = EXTRAS.out_dtype,
) -> Any:  # Tensor, or (Tensor, LossStats) with return_stats
    """The loss of logits whose classes are sharded over the ranks of a group; each rank gets the gradient of its own.

    It is `cross_entropy` of the logits concatenated along the classes, with one collective in the forward, of 3 numbers per row
    (5 with label smoothing or class probabilities, 6 with two labels, one more with return_stats) and 3 per rank, and none in
    the backward. Every rank merges the numbers in the order of the ranks, knows every row's loss, and reduces by itself: all
    return the same bits. Under torch.compile a graph ends before the call and another begins behind it, so fullgraph=True fails.

        logits = hidden @ lm_head_shard.T  # (N, n_classes / n_ranks)
        loss = vocab_parallel_cross_entropy(logits, target)

    Args:
        input: (N, C_local) or (N, C_local, d1, ...), this rank's classes, from first_class on.
        target: as in `cross_entropy`, of all classes: global indices, or probabilities (N, n_classes, d1, ...), or two labels.
            The same on all ranks, as are all other arguments but input and first_class.
        weight: (n_classes,), a factor per class, of all classes.
        group: the ranks that share the classes; by default all. A group of one: `cross_entropy` of its shard.
        first_class: the class of the first local column; by default rank * C_local, for shards of equal size.
        n_classes: classes of a whole row. Columns beyond are padding, left out of the loss, with gradient 0. By default
            n_ranks * C_local; with first_class it must be given, unless weight or class probabilities tell it.
        ignore_index, reduction, label_smoothing, top_k, scale, sample_weight, z_loss, logit_scale, softcap, return_stats,
            out_dtype: as in `cross_entropy`.

    Returns:
        The loss as `cross_entropy` returns it, the same on every rank; with return_stats (loss, LossStats), whose entropy has
        a gradient with reduction "none", to this rank's logits, without a collective.

    Raises:
        ValueError: n_classes cannot be told; input holds all classes on a group of several ranks (gathered by mistake); a class
            lies on no rank, or on two (on a GPU the loss is NaN then, since the host does not wait).
        RuntimeError: a second derivative is asked for, which would need another collective.
        NotImplementedError: under torch.func, forward-mode differentiation, export; of a tensor subclass.
        What `cross_entropy` raises for the whole rows, on every rank alike and before the collective.

    References:
        Shoeybi et al. 2019, arXiv:1909.08053, section 3 (vocabulary-parallel cross-entropy).
    """
    place = group, first_class, n_classes
    extras = Extras(scale, sample_weight, top_k, return_stats, z_loss, logit_scale, softcap, out_dtype=out_dtype)
    # A compiler's graph ends here, and another begins behind it.
    serve = torch.compiler.disable(_serve) if torch.compiler.is_compiling() and _place(group)[0] > 1 else _serve
    return serve(input, target, weight, place, ignore_index, reduction, label_smoothing, extras)


def _serve(
    input: Tensor,
    target: Any,
    weight: Tensor | None,
    place: "tuple[dist.ProcessGroup | None, int | None, int | None]",  # group, first_class, n_classes
    ignore_index: int,
    reduction: Reduction,
    label_smoothing: float,
    extras: Extras,
) -> Any:
    group, first_class, n_classes = place
    n_ranks, rank = _place(group)
    target, target_b, lam = labels_of(target)
    shard = _shard(input, target, weight, rank, n_ranks, first_class, n_classes)
    n_local = max(0, min(input.shape[1], shard.n_classes - shard.first_class))
    options = check_options(reduction, ignore_index, label_smoothing, extras, lam)
    if n_ranks == 1:
        return cross_entropy(
            input if n_local == input.shape[1] else input[:, :n_local],
            target if target_b is None else (target, target_b, lam),
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            **extras._asdict(),
        )
    inputs = Inputs(
        input[:, :n_local] if n_local < input.shape[1] else input,
        target,
        target_b,
        lam if isinstance(lam, Tensor) else None,
        weight,
        extras.sample_weight,
        extras.scale if isinstance(extras.scale, Tensor) else None,
    )
    world = world_of(*inputs)
    if world.kind is Kind.COMPOSED:
        raise NotImplementedError(f"the loss of sharded classes is the kernels' alone, and {world.reason}")
    torch_dtype = check_whole_rows(inputs, options, shard)
    loss, stats = sharded_cross_entropy(inputs, options, shard, group, extras.out_dtype or torch_dtype)
    return (loss, stats) if options.return_stats else loss


def _place(group: "dist.ProcessGroup | None") -> tuple[int, int]:
    """How many ranks share the classes, and which of them this process is."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1, 0
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"this process, rank {dist.get_rank()}, is no member of the group that shares the classes")
    return dist.get_world_size(group), rank


def _shard(
    input: Tensor, target: Any, weight: Tensor | None, rank: int, n_ranks: int, first_class: int | None, n_classes: int | None
) -> ClassShard:
    for name, value in (("input", input), ("target", target)):
        Facts.of(name, value)  # raises where it is no tensor
    if input.dim() < 2:
        raise ValueError(f"input must be (N, C_local) or (N, C_local, d1, ...), but has shape {list(input.shape)}")
    n_local = input.shape[1]
    if n_classes is None:
        if target.is_floating_point() and target.dim() == input.dim():
            n_classes = target.shape[1]
        elif weight is not None and weight.dim() == 1:
            n_classes = len(weight)
        elif first_class is None:
            n_classes = n_ranks * n_local
        else:
            raise ValueError(
                f"n_classes must be given with first_class={first_class}: the other ranks' shards are not known here"
            )
    n_classes = integer("n_classes", n_classes)
    first_class = rank * n_local if first_class is None else integer("first_class", first_class)
    if n_classes < 1 or first_class < 0:
        raise ValueError(f"n_classes must be positive and first_class not negative, but got {n_classes} and {first_class}")
    if n_ranks > 1 and n_local == n_classes:
        raise ValueError(
            f"input holds all {n_classes} classes, but they are shared by {n_ranks} ranks: pass this rank's shard, or call "
            "cross_entropy on the gathered logits"
        )
    return ClassShard(first_class, n_classes)
