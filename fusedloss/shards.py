"""The loss of rows whose classes are spread over several places, from statistics of each shard.

A row's classes lie in shards; each shard s publishes of its transformed logits z

    max_s                       the largest
    rest_s = sum exp(z - max_s) over its classes, but for the target where it lies here
    x_t                         the target's logit where it lies here, else 0 (x_b: the second of two labels'; of class
                                probabilities see logits_of_likeliest)
    weight_total_s, smooth_sum_s = sum a_c, sum a_c (max_s - z_c)    with class probabilities; of w_c with label smoothing
    G_s = sum exp(z - max_s) (max_s - z), as rest_s                  for statistics; always the last

and with m = max of max_s the whole row has

    rest = sum_s rest_s exp(max_s - m),   x_t = sum_s x_t,   weight_total = sum_s weight_total_s
    smooth_sum = sum_s smooth_sum_s + weight_total_s (m - max_s),   G = sum_s (G_s + rest_s (m - max_s)) exp(max_s - m)

from which loss, gradient and entropy follow exactly as from one shard: kernels/rowwise.py has the derivation, and the letters.

The kernels make the statistics of a shard and its gradient; this file has both in PyTorch's operators too, for devices without a
kernel, and what is done with a row's statistics, which is a negligible part of the work.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedloss import reference
from fusedloss.backends.outputs import n_statistics
from fusedloss.plan import ClassShard, Inputs, Options, accumulation_dtype, counted_rows

NUMBERS = ("z_loss", "logit_scale", "softcap")  # of plan.NUMBERS those whose formulas are here


class ShardStats(NamedTuple):
    """Statistics of rows, each (n_rows,) in the dtype of accumulation: of one shard, or merged of the whole row."""

    max: Tensor
    rest: Tensor
    x_t: Tensor
    weight_total: Any = None  # Tensor | None: with label smoothing or class probabilities
    smooth_sum: Any = None
    x_b: Any = None  # Tensor | None: of two labels
    gap_sum: Any = None  # Tensor | None: for the entropy

    def of_loss(self) -> list[Tensor]:
        """What the backward reads."""
        return [values for values in self[:-1] if values is not None]


class Rows(NamedTuple):
    """What the call says of every row, (n_rows,); not of its logits."""

    counted: Tensor  # bool
    outside: Tensor  # bool: a counted row with a class index out of range
    k_t: Any  # Tensor | None: the targets' class weights times their shares; None for probabilities
    k_b: Any
    weight_total: Tensor | float  # sum of all class weights


def describe_rows(inputs: Inputs, options: Options, shard: ClassShard, dtype: torch.dtype) -> Rows:
    """For labels (n_rows,), or class probabilities; all numbers in dtype."""
    if inputs.has_probabilities():
        shape = (inputs.target.shape[0], *inputs.target.shape[2:])
        counted = torch.ones(math.prod(shape), dtype=torch.bool, device=inputs.target.device)
        return Rows(counted, ~counted, None, None, shard.n_classes)
    labels = [label.long() for label in (inputs.target, inputs.target_b) if label is not None]
    weight = None if inputs.weight is None else inputs.weight.to(dtype)
    counted = counted_rows(options.ignore_index, *labels)
    outside = torch.stack([((label < 0) | (label >= shard.n_classes)) & counted for label in labels]).any(0)
    factors = []
    for label in labels:
        readable = label.masked_fill(~counted | outside, 0)
        factors.append(torch.ones_like(label, dtype=dtype) if weight is None else weight[readable])
    if len(labels) == 2:
        share = torch.full_like(factors[0], options.lam) if inputs.lam is None else inputs.lam.to(dtype)
        # One label twice: its whole share counts for the first, whose gradient does not cancel.
        share = share.masked_fill(labels[0] == labels[1], 1)
        factors = [share * factors[0], (1 - share) * factors[1]]
    weight_total = float(shard.n_classes) if weight is None else reference.total(weight)
    return Rows(counted, outside, factors[0], factors[1] if len(factors) == 2 else None, weight_total)


def merge(shards: Tensor, has_entropy: bool, is_soft: bool = False) -> ShardStats:
    """Merges (n_shards, n_statistics, n_rows) into statistics of whole rows; the order of the sums is that of the shards."""
    *of_loss, last = shards.unbind(1)
    stats = ShardStats(*of_loss)._replace(gap_sum=last) if has_entropy else ShardStats(*shards.unbind(1))
    largest = stats.max.amax(0)
    shift = _finite(largest)
    factors = torch.exp(stats.max - shift).masked_fill(stats.max == largest, 1)  # inf - inf would be NaN, too
    merged = ShardStats(largest, (stats.rest * factors).sum(0), stats.x_t.amax(0) if is_soft else stats.x_t.sum(0))
    if stats.gap_sum is not None:
        gaps = stats.gap_sum + stats.rest * (shift - _finite(stats.max))
        merged = merged._replace(gap_sum=torch.where(factors == 0, 0, gaps * factors).sum(0))
    if stats.weight_total is not None and stats.smooth_sum is not None:
        moved = torch.where(stats.weight_total == 0, 0, stats.weight_total * (shift - _finite(stats.max)))
        smooth_sum = (stats.smooth_sum + moved).sum(0)
        merged = merged._replace(weight_total=stats.weight_total.sum(0), smooth_sum=smooth_sum)
    return merged if stats.x_b is None else merged._replace(x_b=stats.x_b.sum(0))


def _finite(largest: Tensor) -> Tensor:
    """All classes of a row may be -inf, and -inf - -inf would be NaN."""
    return largest.masked_fill(largest == -torch.inf, 0.0)


def log_sum(stats: ShardStats, is_soft: bool) -> Tensor:
    """log(sum_c exp(z_c - max)) of whole rows."""
    if is_soft:
        return stats.rest.log()
    e_t = torch.exp(stats.x_t - _finite(stats.max))
    # Where the target is not the largest, that one has put 1 into rest.
    return torch.log1p(torch.where(stats.x_t == stats.max, stats.rest, (stats.rest - 1) + e_t))


def row_losses(stats: ShardStats, rows: Rows, options: Options, shard: ClassShard) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of whole rows; 0 where a row is not counted, NaN where its class index is out of range."""
    log_d = log_sum(stats, rows.k_t is None)
    lse = stats.max + log_d
    every: Any = None
    if stats.smooth_sum is not None and stats.weight_total is not None:
        every = stats.weight_total * ((stats.max - _finite(stats.max)) + log_d) + stats.smooth_sum
    if rows.k_t is None:
        losses = every
    else:
        losses = _weighted(rows.k_t, (stats.max - stats.x_t) + log_d, rows.k_b is not None)
        if rows.k_b is not None:
            losses = losses + _weighted(rows.k_b, (stats.max - stats.x_b) + log_d, True)
        if options.label_smoothing > 0:
            losses = (1 - options.label_smoothing) * losses + options.label_smoothing / shard.n_classes * every
    assert losses is not None
    if options.z_loss != 0:
        losses = losses + options.z_loss * lse.square()
    losses = losses.masked_fill(rows.outside, torch.nan)
    return torch.where(rows.counted, losses, 0), torch.where(rows.counted, lse, 0)


def row_entropies(stats: ShardStats, rows: Rows) -> Tensor:
    """Entropy of whole rows; 0 where a row is not counted, NaN where its class index is out of range."""
    d, gap_sum = stats.rest, stats.gap_sum
    if rows.k_t is not None:
        e_t = torch.exp(stats.x_t - _finite(stats.max))
        d, gap_sum = d + e_t, gap_sum + torch.where(e_t == 0, 0, e_t * (stats.max - stats.x_t))
    entropies = (log_sum(stats, rows.k_t is None) + gap_sum / d).masked_fill(rows.outside, torch.nan)
    return torch.where(rows.counted, entropies, 0)


def _weighted(factor: Tensor, loss: Tensor, skips_zero: bool) -> Tensor:
    """Of two labels, one without a share does not enter, though its logit be -inf."""
    return torch.where((factor == 0) & (loss == torch.inf), 0, factor * loss) if skips_zero else factor * loss


def is_correct(stats: ShardStats, rows: Rows, inputs: Inputs, options: Options) -> Tensor:
    """Whether a counted row's target, the label with the larger share of two, or the class of the largest probability, has the
    largest logit."""
    found = stats.x_t == stats.max
    if stats.x_b is not None:
        share = torch.full_like(stats.max, options.lam) if inputs.lam is None else inputs.lam
        same: Any = inputs.target == inputs.target_b
        share = share.masked_fill(same, 1)
        found = (found & (share >= 0.5)) | ((stats.x_b == stats.max) & (share <= 0.5))
    holds_nan = stats.rest.isnan() & (stats.max < torch.inf)  # infinite logits make it NaN, too
    return rows.counted & ~rows.outside & ~holds_nan & found


def logits_of_likeliest(inputs: Inputs, largest: Tensor, options: Options) -> Tensor:
    """(n_rows,): the largest logit of this shard's classes that have the row's largest probability (N, ...), or -inf. It takes
    the place of x_t, for statistics of class probabilities."""
    z = transformed(inputs.logits, options)[0]
    return z.masked_fill(inputs.target != largest.unsqueeze(1), -torch.inf).amax(1).flatten()


def shard_statistics(inputs: Inputs, options: Options, shard: ClassShard) -> Tensor:
    """What a shard publishes, (n_statistics, n_rows), in PyTorch's operators; inputs as the kernels take them."""
    z = transformed(inputs.logits, options)[0]
    shape = (z.shape[0], *z.shape[2:])
    if z.shape[1] == 0:  # nothing but padding
        empty = z.new_zeros(n_statistics(inputs, options), math.prod(shape))
        empty[0] = -torch.inf
        return empty
    largest = z.amax(1)
    shift = _finite(largest).unsqueeze(1)
    e, a = torch.exp(z - shift), _per_class(inputs, options, shard, z.dtype)
    found = [largest, e.sum(1), z.new_zeros(shape)]
    positions = _positions(inputs, options, shard)
    logits_of = [torch.where(here, z.gather(1, at).squeeze(1), 0) for here, at in positions]
    if positions:
        here, at = positions[0]
        found[1] = e.scatter(1, at, e.gather(1, at).masked_fill(here.unsqueeze(1), 0)).sum(1)
        found[2] = logits_of[0]
    if a is not None:
        found += [a.expand_as(z).sum(1), (a * (shift - z)).sum(1)]
    elif inputs.target_b is not None:
        found += [z.new_zeros(shape)] * 2
    found += logits_of[1:]
    if options.return_stats:
        gaps = torch.where(e == 0, 0, e * (shift - z))
        for here, at in positions[:1]:
            gaps = gaps.scatter(1, at, gaps.gather(1, at).masked_fill(here.unsqueeze(1), 0))
        found.append(gaps.sum(1))
    return torch.stack(found).flatten(1)


def shard_gradient(
    drows: Tensor, inputs: Inputs, merged: Tensor, weight_total: float | Tensor, options: Options, shard: ClassShard
) -> Tensor:
    """The gradient of a shard's logits in PyTorch's operators.

    drows: (n_rows,), the gradient of the row losses; merged: (n_statistics, n_rows), of whole rows; weight_total: the sum of all
    class weights, n_classes without them.
    """
    g, stats = drows, ShardStats(*merged.unbind())
    z, derivative = transformed(inputs.logits, options)
    rows = describe_rows(inputs, options, shard, z.dtype)
    shape = (z.shape[0], 1, *z.shape[2:])

    def per_row(values: Tensor) -> Tensor:
        return values.reshape(shape)

    is_soft = rows.k_t is None
    d = stats.rest if is_soft else stats.rest + torch.exp(stats.x_t - _finite(stats.max))
    keep = 1 - options.label_smoothing if not is_soft else 1.0
    others = torch.zeros_like(g) if stats.weight_total is None else stats.weight_total
    if not is_soft:
        others = others * (options.label_smoothing / shard.n_classes)
        if rows.k_b is not None:
            others = others + keep * rows.k_b
    if options.z_loss != 0:
        others = others + 2 * options.z_loss * (stats.max + log_sum(stats, is_soft))
    live = rows.counted & (g != 0)
    g_t = torch.zeros_like(g) if rows.k_t is None else g * (keep * rows.k_t)
    p = torch.exp(z - per_row(_finite(stats.max))) / per_row(d)
    without_target = per_row(g * others) * p
    a = _per_class(inputs, options, shard, z.dtype)
    if a is not None:
        without_target = without_target - per_row(g) * (a if is_soft else a * (options.label_smoothing / shard.n_classes))
    dz = without_target + per_row(g_t) * p
    for label, (here, at) in enumerate(_positions(inputs, options, shard)):
        if label == 0:  # the target's probability less 1 is -rest / d, without cancellation
            own = without_target.gather(1, at) - per_row(g_t * (stats.rest / d))
        else:
            own = dz.gather(1, at) - per_row(g * keep * rows.k_b)
        dz = dz.scatter(1, at, torch.where(here.unsqueeze(1), own, dz.gather(1, at)))
    dz = torch.where(per_row(live), dz * derivative, 0)
    dz = torch.where(per_row(rows.outside & live), torch.nan, dz)
    return dz.to(inputs.logits.dtype)


def transformed(logits: Tensor, options: Options) -> tuple[Tensor, Tensor | float]:
    """The logits scaled, then capped, in the dtype of accumulation; and the derivative."""
    z = logits.to(accumulation_dtype(logits.dtype)) * options.logit_scale
    if options.softcap == 0:
        return z, options.logit_scale
    t = torch.tanh(z / options.softcap)
    return options.softcap * t, options.logit_scale * (1 - t * t)


def _per_class(inputs: Inputs, options: Options, shard: ClassShard, dtype: torch.dtype) -> Tensor | None:
    """a of this shard's classes, or w for labels, broadcasting with its logits; None where no class but the target's counts."""
    logits = inputs.logits
    weight = None
    if inputs.weight is not None:
        weight = inputs.weight[shard.first_class : shard.first_class + logits.shape[1]].to(dtype)
        weight = weight.view(1, -1, *[1] * (logits.dim() - 2))
    if inputs.has_probabilities():
        a = inputs.target.to(dtype) * (1 - options.label_smoothing) + options.label_smoothing / shard.n_classes
        return a if weight is None else a * weight
    if options.label_smoothing == 0:
        return None
    return (
        weight
        if weight is not None
        else torch.ones((1, logits.shape[1], *[1] * (logits.dim() - 2)), dtype=dtype, device=logits.device)
    )


def _positions(inputs: Inputs, options: Options, shard: ClassShard) -> list[tuple[Tensor, Tensor]]:
    """Whether a label lies in this shard, (N, ...), and its place there, (N, 1, ...); of each label."""
    logits = inputs.logits
    if inputs.has_probabilities() or logits.shape[1] == 0:
        return []
    shape, labels = logits[:, 0].shape, [label for label in (inputs.target, inputs.target_b) if label is not None]
    counted = counted_rows(options.ignore_index, *labels)
    places = []
    for label in labels:
        at = (label.long() - shard.first_class).reshape(shape)
        here = counted.reshape(shape) & (at >= 0) & (at < logits.shape[1])
        places.append((here, at.masked_fill(~here, 0).unsqueeze(1)))
    return places
