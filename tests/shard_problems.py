"""The loss of rows whose classes lie in several shards, without ranks: statistics of each shard, merged, and its gradient."""

from types import ModuleType
from typing import Any

import torch
from budget import assert_within_budget
from oracle import exact_loss
from problems import make_logits, make_probabilities, make_target, make_weight
from torch import Tensor

import fusedloss
from fusedloss import shards
from fusedloss.autograd import kernel_inputs
from fusedloss.plan import ClassShard, Inputs, Options


def shard_call(logits: Tensor, target: Any, weight: Tensor | None, shard: ClassShard, **options: Any) -> tuple[Inputs, Options]:
    """A call as a backend takes it; logits: those of the shard."""
    target_b = lam = None
    if isinstance(target, tuple):
        target, target_b, lam = target
        if not isinstance(lam, Tensor):
            options["lam"], lam = lam, None
    elif target.is_floating_point():
        target = target[:, shard.first_class : shard.first_class + logits.shape[1]].contiguous()
    return kernel_inputs(Inputs(logits, target, target_b, lam, weight)), Options(reduction="none", **options)


def shard_calls(
    logits: Tensor, target: Any, weight: Tensor | None, widths: tuple[int, ...], **options: Any
) -> tuple[list[ClassShard], list[tuple[Inputs, Options]]]:
    """The shards, and the call of each."""
    class_shards = [ClassShard(sum(widths[:i]), logits.shape[1]) for i in range(len(widths))]
    held = [shard.contiguous() for shard in logits.split(widths, 1)] if len(widths) > 1 else [logits]
    return class_shards, [
        shard_call(own, target, weight, shard, **options) for own, shard in zip(held, class_shards, strict=True)
    ]


def sharded_entropies(
    backend: ModuleType, logits: Tensor, target: Any, weight: Tensor | None, widths: tuple[int, ...], **options: Any
) -> Tensor:
    """Entropy of every row, (n_rows,) in float64."""
    class_shards, calls = shard_calls(logits, target, weight, widths, return_stats=True, **options)
    published = [backend.shard_statistics(*call, shard) for call, shard in zip(calls, class_shards, strict=True)]
    rows = shards.describe_rows(calls[0][0], calls[0][1], class_shards[0], torch.float64)
    return shards.row_entropies(shards.merge(torch.stack(published).double(), True), rows)


def sharded_rows(
    backend: ModuleType,
    logits: Tensor,
    target: Any,
    weight: Tensor | None,
    widths: tuple[int, ...],
    dlosses: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Loss of every row, in the shape of dlosses and in float64, and the gradient of the logits."""
    class_shards, calls = shard_calls(logits, target, weight, widths, **options)
    published = [backend.shard_statistics(*call, shard) for call, shard in zip(calls, class_shards, strict=True)]
    stats = shards.merge(torch.stack(published).double(), False)
    rows = shards.describe_rows(calls[0][0], calls[0][1], class_shards[0], torch.float64)
    losses, _ = shards.row_losses(stats, rows, calls[0][1], class_shards[0])
    merged = torch.stack([values for values in stats if values is not None]).to(published[0].dtype)
    drows = dlosses.reshape(-1).to(merged.dtype)
    gradients = [
        backend.shard_gradient(drows, inputs, merged, rows.weight_total, given, shard)
        for (inputs, given), shard in zip(calls, class_shards, strict=True)
    ]
    gradient = torch.cat(gradients, 1).reshape(logits.shape)
    return losses.reshape(dlosses.shape), gradient


def make_sharded_problem(
    shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype
) -> tuple[Tensor, Any, Tensor | None]:
    """Logits whose ignored rows are NaN."""
    logits, target = make_logits(*shape, dtype=dtype), make_target(shape[0], *shape[2:], n_classes=shape[1], ignored=-100)
    weight = make_weight(shape[1], dtype) if options.pop("weight", False) else None
    kind = options.pop("target", "index")
    if kind == "probabilities":
        return logits, make_probabilities(*shape, dtype=dtype), weight
    logits.masked_fill_((target == -100).unsqueeze(1), torch.nan)
    if kind == "two labels":
        other = target.flip(0)
        other.view(-1)[1] = target.view(-1)[1]
        other = other.masked_fill(other == -100, 0)
        return logits, (target, other, torch.linspace(0, 1, target.numel(), dtype=dtype).reshape(target.shape)), weight
    return logits, target, weight


def check_shards(
    backend: ModuleType, shape: tuple[int, ...], widths: tuple[int, ...], dtype: torch.dtype, **options: Any
) -> None:
    """Fails unless rows in shards are as exact as whole rows, whose kernel is the one that the `with` block around asks for."""
    __tracebackhide__ = True
    logits, target, weight = make_sharded_problem(shape, options, dtype)
    dlosses = torch.linspace(0, 1, logits.numel() // shape[1]).reshape(shape[0], *shape[2:])  # 0: such a row is not read
    ours, gradient = sharded_rows(backend, logits, target, weight, widths, dlosses, **options)
    whole = logits.clone().requires_grad_()
    losses = fusedloss.cross_entropy(whole, target, weight, reduction="none", **options)
    (whole_gradient,) = torch.autograd.grad((losses * dlosses).sum(), whole)
    exact = logits.double().nan_to_num(0.0).requires_grad_()  # the same: rows with NaN do not count
    wide = (*target[:2], target[2].double()) if isinstance(target, tuple) else target
    expected = exact_loss(exact, wide, weight, reduction="none", **options)
    (exact_gradient,) = torch.autograd.grad((expected * dlosses).sum(), exact)
    roundings = 16 if dtype == torch.float64 else 4  # of the float64 oracle, which sums thousands of exponentials
    assert_within_budget(ours.to(dtype), losses.detach(), expected, "loss", roundings)
    assert_within_budget(gradient, whole_gradient, exact_gradient, "gradient", roundings)
