"""vocab_parallel_cross_entropy(): the classes of every row are sharded over ranks, as tensor parallel training leaves them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedloss import backends, reference, slices
from fusedloss.autograd import kernel_inputs
from fusedloss.backends import cpu
from fusedloss.checks import Facts, InputFacts, check_class_indices, check_options, check_tensors
from fusedloss.functional import cross_entropy
from fusedloss.plan import Extras, Inputs, Options, Reduction, Slice, accumulation_dtype
from fusedloss.route import autocast_is_on, dtype_of_loss
from fusedloss.serving import labels_of, per_row
from fusedloss.stats import LossStats

# PyTorch 2.14 renamed it and warns of the old name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor | tuple[Tensor, Tensor, float | Tensor],
    weight: Tensor | None = None,
    *,
    group: "dist.ProcessGroup | None" = None,
    first_class: int | None = None,
    n_classes: int | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    top_k: int | float | None = None,
    scale: float | Tensor = 1.0,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_stats: bool = False,
) -> Any:
    """The loss of logits whose classes are sharded over the ranks of a group; each rank gets the gradient of its own.

    It is `cross_entropy` of the logits concatenated along the classes, with one collective in the forward, of 3 numbers per row
    (5 with label smoothing or class probabilities, 6 with two labels), and none in the backward. Every rank merges the numbers in
    the order of the ranks, knows every row's loss, and reduces by itself: all ranks return the same bits.

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
        ignore_index, reduction, label_smoothing, top_k, scale, sample_weight, z_loss, logit_scale, softcap, return_stats: as in
            `cross_entropy`.

    Returns:
        The loss as `cross_entropy` returns it, the same on every rank; with return_stats (loss, LossStats).

    Raises:
        ValueError: n_classes cannot be told; input holds all classes on a group of several ranks (gathered by mistake).
        RuntimeError: a second derivative is asked for, which would need another collective.
        What `cross_entropy` raises for the whole rows, on every rank alike and before the collective.

    References:
        Shoeybi et al. 2019, arXiv:1909.08053, section 3 (vocabulary-parallel cross-entropy).
    """
    n_ranks, rank = _place(group)
    target, target_b, lam = labels_of(target)
    part = _slice(input, target, weight, rank, n_ranks, first_class, n_classes)
    n_local = max(0, min(input.shape[1], part.n_classes - part.first_class))
    extras = Extras(scale, sample_weight, top_k, return_stats, z_loss, logit_scale, softcap)
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
        sample_weight,
        scale if isinstance(scale, Tensor) else None,
    )
    out_dtype = _check(inputs, options, part)
    loss, stats = _call(inputs, options, part, group, out_dtype)
    return (loss, stats) if options.return_stats else loss


def _place(group: "dist.ProcessGroup | None") -> tuple[int, int]:
    """How many ranks share the classes, and which of them this process is."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1, 0
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"this process, rank {dist.get_rank()}, is no member of the group that shares the classes")
    return dist.get_world_size(group), rank


def _slice(
    input: Tensor, target: Any, weight: Tensor | None, rank: int, n_ranks: int, first_class: int | None, n_classes: int | None
) -> Slice:
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
    first_class = rank * n_local if first_class is None else first_class
    if n_classes < 1 or first_class < 0:
        raise ValueError(f"n_classes must be positive and first_class not negative, but got {n_classes} and {first_class}")
    if n_ranks > 1 and n_local == n_classes:
        raise ValueError(
            f"input holds all {n_classes} classes, but they are shared by {n_ranks} ranks: pass this rank's shard, or call "
            "cross_entropy on the gathered logits"
        )
    return Slice(first_class, n_classes)


def _check(inputs: Inputs, options: Options, part: Slice) -> torch.dtype:
    """Raises what PyTorch would for the whole rows, whatever the shard; returns the dtype of the loss."""

    def facts(name: str, tensor: Tensor | None) -> Any:
        return None if tensor is None else Facts.of(name, tensor)

    logits = Facts.of("input", inputs.logits)
    logits = logits._replace(shape=torch.Size((logits.shape[0], part.n_classes, *logits.shape[2:])))
    found = InputFacts(
        logits,
        facts("target", inputs.target),
        facts("target_b", inputs.target_b),
        facts("lam", inputs.lam),
        facts("weight", inputs.weight),
        facts("sample_weight", inputs.sample_weight),
    )
    autocast = autocast_is_on(inputs.logits)
    check_tensors(found, options, autocast)
    for name, fact in (("target", found.target), ("lam", found.lam), ("weight", found.weight)):
        if fact is not None and fact.needs_grad:
            raise NotImplementedError(f"vocab_parallel_cross_entropy has no gradient with respect to {name}")
    if not found.has_probabilities() and inputs.logits.device.type == "cpu":
        for labels in (inputs.target, inputs.target_b):
            if labels is not None:
                check_class_indices(labels, part.n_classes, options.ignore_index)
    return dtype_of_loss(found, autocast)


def _call(
    inputs: Inputs, options: Options, part: Slice, group: "dist.ProcessGroup | None", out_dtype: torch.dtype
) -> tuple[Tensor, LossStats | None]:
    logits = inputs.logits
    row_shape = (logits.shape[0], *logits.shape[2:])
    lam = per_row(inputs.lam, logits)
    of_rows = options._replace(reduction="none", scale=1.0, return_stats=False)
    rows, lse, correct = _SlicedRowLosses.apply(
        logits, inputs._replace(lam=lam, sample_weight=None, scale=None), of_rows, part, group
    )
    if inputs.has_probabilities():
        counted, row_weights = torch.ones_like(rows, dtype=torch.bool), torch.ones_like(rows)
    else:
        described = slices.describe_rows(kernel_inputs(inputs._replace(lam=None, sample_weight=None)), options, part, rows.dtype)
        counted, row_weights = described.counted, described.counted.to(rows.dtype)
        if inputs.target_b is None and described.k_t is not None:
            row_weights = torch.where(counted, described.k_t, 0)
    if inputs.sample_weight is not None:
        factor = per_row(inputs.sample_weight, logits)
        assert factor is not None
        rows = factor.reshape(-1).to(rows.dtype).masked_fill(~counted, 0) * rows
    scale = options.scale if inputs.scale is None else options.scale * inputs.scale.to(rows.device, rows.dtype)
    loss = (scale * reference.reduce_rows(rows, counted, row_weights, options)).to(out_dtype)
    if options.reduction == "none":
        loss = loss.view(row_shape)
    if not options.return_stats:
        return loss, None
    dtype = accumulation_dtype(logits.dtype)
    detached = rows.detach()
    return loss, LossStats(
        lse=lse.to(dtype).view(row_shape),
        row_loss=detached.to(dtype).view(row_shape),
        n_counted=counted.sum(),
        n_correct=correct.sum(),
        worst=reference.worst_row(detached, counted),
    )


class _SlicedRowLosses(torch.autograd.Function):
    """Loss, log-sum-exp and whether the target is the largest, of every row (n_rows,), from this rank's slice of them."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, inputs: Inputs, options: Options, part: Slice, group: "dist.ProcessGroup | None"
    ) -> tuple[Tensor, Tensor, Tensor]:
        local = _local(kernel_inputs(inputs._replace(logits=logits)), part)
        backend = _backend(local)
        published = backend.slice_statistics(local, options, part)
        n_ranks, (n_statistics, n_rows) = dist.get_world_size(group), published.shape
        gathered = published.new_empty((n_ranks * n_statistics, n_rows))
        _all_gather(gathered, published, group=group)
        stats = slices.merge(gathered.view(n_ranks, n_statistics, n_rows).to(torch.float64))
        rows = slices.describe_rows(local, options, part, torch.float64)
        losses, lse = slices.row_losses(stats, rows, options, part)
        ctx.call = backend, float(rows.weight_total), options, part
        ctx.present = [tensor is not None for tensor in local]
        merged = torch.stack([tensor for tensor in stats if tensor is not None]).to(published.dtype)
        ctx.save_for_backward(logits, merged, *(tensor for tensor in local[1:] if tensor is not None))
        correct = slices.is_correct(stats, rows, local, options)
        ctx.mark_non_differentiable(lse, correct)
        return losses, lse, correct

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("vocab_parallel_cross_entropy has no second derivative (create_graph=True)")
        logits, merged, *saved = ctx.saved_tensors
        rest = iter(saved)
        tensors: list[Any] = [next(rest) if present else None for present in ctx.present[1:]]
        inputs = Inputs(kernel_inputs(Inputs(logits, logits)).logits, *tensors)
        backend, *call = ctx.call
        dlogits = backend.slice_gradient(dlosses.to(merged.dtype), inputs, merged, *call)
        return dlogits.view(logits.shape), None, None, None, None


def _backend(inputs: Inputs) -> Any:
    """What makes a slice's statistics and gradient: a kernel, or PyTorch's operators."""
    logits = inputs.logits
    if backends.requested in ("auto", "cpu") and logits.device.type == "cpu" and cpu.MISSING is None and logits.shape[1] > 0:
        return cpu
    return slices


def _local(inputs: Inputs, part: Slice) -> Inputs:
    """Class probabilities of all classes, cut to those of the logits."""
    if not inputs.has_probabilities():
        return inputs
    return inputs._replace(target=inputs.target[:, part.first_class : part.first_class + inputs.logits.shape[1]])
