"""The loss of rows whose classes are sharded over the ranks of a group: one collective in the forward, none in the backward."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedloss import backends, ops, reference, shards
from fusedloss.backends import cpu, triton
from fusedloss.checks import Facts, InputFacts, check_class_indices, check_tensors
from fusedloss.entropy import add_gradient
from fusedloss.kernels.constants import MAX_ROWS
from fusedloss.plan import ClassShard, Inputs, Options, accumulation_dtype
from fusedloss.route import TOO_MANY_ROWS, autocast_is_on, dtype_of_loss
from fusedloss.rows import expanded_to_rows, kernel_inputs, rows_of
from fusedloss.stats import LossStats
from fusedloss.world import has_values, kernels_see

# PyTorch 2.14 renamed it and warns of the old name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def check_whole_rows(inputs: Inputs, options: Options, shard: ClassShard) -> torch.dtype:
    """Raises what PyTorch would for the whole rows, whatever the shard; returns the dtype of the loss."""

    def facts(name: str, tensor: Tensor | None) -> Any:
        return None if tensor is None else Facts.of(name, tensor)

    logits = Facts.of("input", inputs.logits)
    logits = logits._replace(shape=torch.Size((logits.shape[0], shard.n_classes, *logits.shape[2:])))
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
            raise NotImplementedError(f"the loss of sharded classes has no gradient with respect to {name}")
    if not found.has_probabilities() and inputs.logits.device.type == "cpu":
        check_class_indices(inputs.target, shard.n_classes, options.ignore_index, inputs.target_b)
    return dtype_of_loss(found, autocast)


def sharded_cross_entropy(
    inputs: Inputs, options: Options, shard: ClassShard, group: "dist.ProcessGroup | None", out_dtype: torch.dtype
) -> tuple[Tensor, LossStats | None]:
    # No dispatcher looks at the tensors on the way to the kernel.
    inputs = Inputs(*(None if tensor is None else tensor.resolve_neg() for tensor in inputs))  # type: ignore[arg-type]
    if reference.computed_in(inputs) == torch.float64:  # of float32 logits with float64 probabilities, too, as whole rows are
        inputs = inputs._replace(logits=inputs.logits.double())
    logits = inputs.logits
    row_shape = (logits.shape[0], *logits.shape[2:])
    lam = expanded_to_rows(inputs.lam, logits)
    of_rows = options._replace(reduction="none", scale=1.0)
    rows, lse, correct, entropy = _SlicedRowLosses.apply(
        logits, inputs._replace(lam=lam, sample_weight=None, scale=None), of_rows, shard, group
    )
    counted, row_weights = _counted(inputs, options, shard, rows.dtype)
    if inputs.sample_weight is not None:
        factor = expanded_to_rows(inputs.sample_weight, logits)
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
    entropy = entropy.to(dtype).view(row_shape)
    return loss, LossStats(
        lse=lse.to(dtype).view(row_shape),
        row_loss=detached.to(dtype).view(row_shape),
        n_counted=counted.sum(),
        n_correct=correct.sum(),
        worst=reference.worst_row(detached, counted),
        entropy=entropy if options.differentiates_entropy() else entropy.detach(),
    )


def _counted(inputs: Inputs, options: Options, shard: ClassShard, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Which rows count, and what each adds to the denominator of the mean; both (n_rows,)."""
    rows = shards.describe_rows(inputs._replace(lam=None, sample_weight=None).with_rows_flat(), options, shard, dtype)
    if rows.k_t is None or inputs.target_b is not None:
        return rows.counted, rows.counted.to(dtype)
    return rows.counted, torch.where(rows.counted, rows.k_t, 0)


def denominator(inputs: Inputs, options: Options, shard: ClassShard) -> Tensor:
    """What the mean of these rows divides by, 0-d."""
    return reference.total(_counted(inputs, options, shard, torch.float64)[1])


class _SlicedRowLosses(torch.autograd.Function):
    """Loss, log-sum-exp, whether the target is the largest, and with statistics the entropy, of every row (n_rows,), from this
    rank's shard of them."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, inputs: Inputs, options: Options, shard: ClassShard, group: "dist.ProcessGroup | None"
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        whole = kernel_inputs(inputs._replace(logits=logits))
        local, is_soft = _local(whole, shard), whole.has_probabilities()
        backend = _backend(local)
        if not has_values(logits):  # PyTorch's operators know shapes and dtypes
            backend = shards
        published = backend.shard_statistics(local, options, shard)
        if is_soft and options.return_stats:
            published[2] = shards.logits_of_likeliest(local, whole.target.amax(1), options) if logits.shape[1] else -torch.inf
        gathered, makes_up_rows = _gathered(published, shard, logits.shape[1], group)
        stats = shards.merge(gathered.to(torch.float64), options.return_stats, is_soft)
        rows = shards.describe_rows(local, options, shard, torch.float64)
        if logits.device.type != "cpu":
            rows = rows._replace(outside=rows.counted & (rows.outside | ~makes_up_rows))
        losses, lse = shards.row_losses(stats, rows, options, shard)
        ctx.call = backend, rows.weight_total, options._replace(return_stats=False), shard
        ctx.has_entropy = options.return_stats
        ctx.set_materialize_grads(False)
        ctx.present = [tensor is not None for tensor in local]
        merged = torch.stack(stats.of_loss()).to(published.dtype)
        entropy, of_entropy = None, []
        if options.return_stats:
            entropy = shards.row_entropies(stats, rows)
            of_entropy = [shards.log_sum(stats, rows.k_t is None), entropy]
        ctx.save_for_backward(logits, merged, *of_entropy, *(tensor for tensor in local[1:] if tensor is not None))
        correct = shards.is_correct(stats, rows, local, options)
        ctx.mark_non_differentiable(lse, correct)
        return losses, lse, correct, entropy

    @staticmethod
    def backward(
        ctx: Any, dlosses: Tensor | None, dlse: None, dcorrect: None, dentropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the loss of sharded classes has no second derivative (create_graph=True)")
        if dlosses is None and dentropy is None:
            return None, None, None, None, None
        logits, merged, *saved = ctx.saved_tensors
        log_d, entropy, saved = (*saved[:2], saved[2:]) if ctx.has_entropy else (None, None, saved)
        rest = iter(saved)
        tensors: list[Any] = [next(rest) if present else None for present in ctx.present[1:]]
        backend, weight_total, options, shard = ctx.call

        def gradient(logits: Tensor, drows: Tensor, dentropy: Tensor | None) -> Tensor:
            inputs = Inputs(rows_of(logits), *tensors)
            dlogits: Tensor = backend.shard_gradient(drows, inputs, merged, weight_total, options, shard)
            if dentropy is not None:
                whole_rows = (merged[0], log_d.to(merged.dtype), entropy.to(merged.dtype))
                add_gradient(dlogits, dentropy, inputs, options, whole_rows)
            return dlogits.view(logits.shape)

        zeros = torch.zeros_like(merged[0])
        drows, dentropy = (None if values is None else values.to(merged.dtype) for values in (dlosses, dentropy))
        if kernels_see(drows, dentropy):
            return gradient(logits, zeros if drows is None else drows, dentropy), None, None, None, None
        # No kernel serves them, but the gradient is linear in both; unrounded, as it is not yet of its size.
        wide, rows = logits.to(merged.dtype), (logits.shape[0], *logits.shape[2:])
        dlogits = torch.zeros_like(wide)
        if drows is not None:
            dlogits = dlogits + ops.scaled(gradient(wide, zeros + 1, None), drows.reshape(rows))
        if dentropy is not None:
            dlogits = dlogits + ops.scaled(gradient(wide, zeros, zeros + 1), dentropy.reshape(rows))
        return dlogits.to(logits.dtype), None, None, None, None


def _gathered(published: Tensor, shard: ClassShard, n_local: int, group: "dist.ProcessGroup | None") -> tuple[Tensor, Tensor]:
    """Every rank's statistics, (n_ranks, n_statistics, n_rows), and whether the shards make up the rows, 0-d.

    Raises:
        ValueError: they do not, and are on the CPU.
    """
    n_ranks, dtype = dist.get_world_size(group), torch.int64 if published.dtype == torch.float64 else torch.int32
    place = [published.new_full((1,), number, dtype=dtype) for number in (shard.first_class, n_local, shard.n_classes)]
    own = torch.cat([published.flatten(), *(number.view(published.dtype) for number in place)])  # the bits of an integer
    gathered = own.new_empty(n_ranks * len(own))
    _all_gather(gathered, own, group=group)
    gathered = gathered.view(n_ranks, -1)
    places = gathered[:, -3:].contiguous().view(dtype).long()
    makes_up_rows = _make_up_rows(places)
    if published.device.type == "cpu" and has_values(makes_up_rows) and not makes_up_rows:
        held = ", ".join(f"{width} from {first} on of {n_classes}" for first, width, n_classes in places.tolist())
        raise ValueError(
            f"the shards do not make up the rows: the ranks hold {held}; of unequal ones pass first_class, n_classes"
        )
    return gathered[:, :-3].view(n_ranks, *published.shape), makes_up_rows


def _make_up_rows(places: Tensor) -> Tensor:
    """Whether every class lies on one rank, 0-d; places: (n_ranks, 3), first class, classes there, classes of a row."""
    first, width, n_classes = places.unbind(1)
    end = first + width
    before_end = (width * (first < end.unsqueeze(1))).sum(1)
    return ((before_end == end) | (width == 0)).all() & (n_classes == width.sum()).all()


def _backend(inputs: Inputs) -> Any:
    """What makes a shard's statistics and gradient: a kernel, or PyTorch's operators.

    Raises RuntimeError if a kernel is asked for and cannot serve.
    """
    requested, device = backends.requested, inputs.logits.device.type
    if requested == "reference" or inputs.logits.shape[1] == 0:
        return shards
    if requested == "triton" or (requested == "auto" and device == "cuda"):
        if inputs.logits.numel() // inputs.logits.shape[1] <= MAX_ROWS:
            return triton
        if requested == "triton":
            raise RuntimeError(f"backend 'triton' was asked for, but {TOO_MANY_ROWS}")
        return shards
    if device == "cpu" and cpu.MISSING is None:
        return cpu
    if requested == "cpu" and device != "meta":
        missing = cpu.MISSING or f"the CPU kernel does not serve device {device!r}"
        raise RuntimeError(f"backend 'cpu' was asked for, but {missing}")
    return shards


def _local(inputs: Inputs, shard: ClassShard) -> Inputs:
    """Class probabilities of all classes, cut to those of the logits."""
    if not inputs.has_probabilities():
        return inputs
    return inputs._replace(target=inputs.target[:, shard.first_class : shard.first_class + inputs.logits.shape[1]])
