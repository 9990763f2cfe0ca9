"""The loss as a composition of PyTorch operators: the oracle of the tests, and the path of what the kernels do not cover.

Per-row losses are torch.nn.functional.cross_entropy's, computed in float32 for float16 and bfloat16 logits. The
reductions are spelled out here, because two of them are ours: the maximum, and the average of the k largest losses
(Fan et al. 2017, "Learning with Average Top-k Loss", arXiv:1705.08826).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedloss.kernels.constants import FRACTION_BITS
from fusedloss.plan import Inputs, Options, counted_rows
from fusedloss.stats import LossStats

TORCH_CROSS_ENTROPY = F.cross_entropy  # PyTorch's own, whatever `patch_torch` puts in its place

# More numbers than the first are cut among the threads by PyTorch's sum to one number; sums of blocks are not.
TORCH_GRAIN, SUM_BLOCK = 2**15, 2**12


def cross_entropy(inputs: Inputs, options: Options, out_dtype: torch.dtype) -> tuple[Tensor, LossStats | None]:
    """Returns the loss in out_dtype, 0-d, or (N, d1, ...) for reduction "none"; and its statistics where they are asked for."""
    compute_dtype = computed_in(inputs)
    logits = inputs.logits.to(compute_dtype)
    weight = inputs.weight.to(compute_dtype) if inputs.weight is not None else None
    if inputs.has_probabilities():
        logits = _transformed(logits, options)
        rows = _row_losses(logits, inputs.target.to(compute_dtype), weight, options)
        counted = torch.ones_like(rows, dtype=torch.bool)
        # Class weights are not in the denominator of the mean. Without a class PyTorch divides by no row.
        row_weights = torch.full_like(rows, min(1, logits.shape[1]))
    else:
        labels, counted, outside = labels_of(inputs, options)
        # An ignored row has no gradient even where its logits are NaN: 0 * NaN would be NaN.
        logits = _transformed(logits.masked_fill(~counted.unsqueeze(1), 0.0), options)
        if inputs.target_b is None:
            rows = _row_losses(logits, labels[0], weight, options)
            row_weights = weights_of_rows(logits, labels[0], weight, counted)
            if options.focal_gamma > 0:
                rows = rows * _focal_factor(_row_losses(logits, labels[0], None, options), options.focal_gamma)
        else:
            lam = inputs.lam.to(compute_dtype) if inputs.lam is not None else options.lam
            rows = _two_label_losses(logits, labels[0], labels[1], lam, weight, options)
            row_weights = counted.to(logits.dtype)  # as for probabilities
        if outside is not None:  # NaN, their gradients too: 1 leaves the others as they are
            rows = rows * torch.where(outside, torch.nan, 1.0)
    if options.z_loss != 0:
        rows = rows + torch.where(counted, options.z_loss * logits.logsumexp(1).square(), 0)
    if inputs.sample_weight is not None:
        rows = inputs.sample_weight.to(compute_dtype).masked_fill(~counted, 0.0) * rows
    factor = _number(options.scale, logits)
    if inputs.scale is not None:
        factor = factor * inputs.scale.to(compute_dtype)
    loss = (factor * reduce_rows(rows, counted, row_weights, options)).to(out_dtype)
    if not options.return_stats:
        return loss, None
    entropies = _entropies(logits if options.differentiates_entropy() else logits.detach(), counted)
    return loss, _stats(logits.detach(), rows.detach(), entropies, counted, inputs, options)


class Labels(NamedTuple):
    """Class indices, read once."""

    labels: list[Tensor]  # one, or two: int64, ignore_index where the row does not count
    counted: Tensor  # bool
    outside: Tensor | None  # rows with a class out of range, read as another class; None where PyTorch raises an IndexError


def labels_of(inputs: Inputs, options: Options) -> Labels:
    n_classes = inputs.logits.shape[1]
    labels = [label.to(torch.long) for label in (inputs.target, inputs.target_b) if label is not None]
    counted = counted_rows(options.ignore_index, *labels)
    if len(labels) == 2:
        labels = [label.masked_fill(~counted, options.ignore_index) for label in labels]  # the other may be the ignored
    outside = None
    if not _raises_index_error(inputs.logits.device):  # there PyTorch would stop the device
        outside = torch.stack([((label < 0) | (label >= n_classes)) & counted for label in labels]).any(0)
        readable = n_classes - 1 if options.ignore_index == 0 else 0
        labels = [label.masked_fill(outside, readable if n_classes else options.ignore_index) for label in labels]
    return Labels(labels, counted, outside)


def computed_in(inputs: Inputs) -> torch.dtype:
    """What rows are computed and summed in, whatever the loss is rounded to."""
    dtype = torch.promote_types(inputs.logits.dtype, torch.float32)
    if inputs.has_probabilities():
        for tensor in (inputs.target, inputs.weight):
            dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    return dtype


class TorchLoss(NamedTuple):
    """PyTorch's own loss, times the scale: of calls that ask for no other extra. Its sums and its NaN are PyTorch's, too."""

    options: Options
    any_batch: bool = False  # calls with another number of examples are another kind

    def forward(self, logits: Tensor, target: Tensor, weight: Tensor | None, scale: float) -> tuple[Tensor, None, None, None]:
        """As the Prepared of a backend, which autograd differentiates."""
        options = self.options
        loss = TORCH_CROSS_ENTROPY(
            logits, target, weight, None, options.ignore_index, None, options.reduction, options.label_smoothing
        )
        return loss if scale == 1 else _number(scale, loss) * loss, None, None, None


def torch_loss(inputs: Inputs, options: Options) -> Tensor:
    """PyTorch's own loss, as `TorchLoss` has it."""
    return TorchLoss(options).forward(inputs.logits, inputs.target, inputs.weight, options.scale)[0]


def _number(value: float, like: Tensor) -> Tensor:
    """0-d: under torch.func.jacfwd a Python number times a 0-d tensor has a tangent of float64."""
    return torch.full((), value, dtype=like.dtype, device=like.device)


def _transformed(logits: Tensor, options: Options) -> Tensor:
    """The logits scaled, then capped (Gemma 2, arXiv:2408.00118)."""
    if options.logit_scale != 1:
        logits = logits * options.logit_scale
    if options.softcap > 0:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    return logits


def _raises_index_error(device: torch.device) -> bool:
    return device.type == "cpu"


def _row_losses(logits: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    return TORCH_CROSS_ENTROPY(
        logits,
        target,
        weight,
        ignore_index=options.ignore_index,
        reduction="none",
        label_smoothing=options.label_smoothing,
    )


def _focal_factor(nll: Tensor, gamma: float) -> Tensor:
    """(1 - p_t)^gamma (Lin et al. 2017, arXiv:1708.02002), from -log p_t.

    At the two ends it is 0 and 1, and the derivative there, which may be infinite, has no part in the gradient.
    """
    inside = (nll != 0) & (nll != torch.inf)
    u = -torch.expm1(-torch.where(inside, nll, 1))
    return torch.where(inside, u.pow(gamma), (nll != 0).to(nll.dtype))


def _two_label_losses(
    logits: Tensor, a: Tensor, b: Tensor, lam: Tensor | float, weight: Tensor | None, options: Options
) -> Tensor:
    log_p = logits.log_softmax(1)
    rows = logits.new_zeros(())
    for labels, share in ((a, lam), (b, 1 - lam)):
        nll = F.nll_loss(log_p, labels, reduction="none", ignore_index=options.ignore_index)
        factor = share * weights_of_rows(logits, labels, weight, labels != options.ignore_index)
        rows = rows + factor * nll.masked_fill((factor == 0) & nll.isinf(), 0)
    if options.label_smoothing > 0:
        every = log_p if weight is None else log_p * weight.view(-1, *[1] * (log_p.dim() - 2))
        rows = (1 - options.label_smoothing) * rows - options.label_smoothing / logits.shape[1] * every.sum(1)
        rows = rows.masked_fill(a == options.ignore_index, 0)
    return rows


def weights_of_rows(logits: Tensor, target: Tensor, weight: Tensor | None, counted: Tensor) -> Tensor:
    if weight is None:
        return counted.to(logits.dtype)
    inside = counted & (target >= 0) & (target < logits.shape[1])  # elsewhere the loss is NaN, or an IndexError already
    return torch.where(inside, weight.detach()[target.masked_fill(~inside, 0)], 0)


def reduce_rows(rows: Tensor, counted: Tensor, row_weights: Tensor, options: Options) -> Tensor:
    if options.reduction == "none":
        return rows
    if options.reduction == "sum":
        return total(rows)
    if options.reduction == "mean":
        denominator = total(row_weights)
        # Without weight PyTorch's mean is nan, also where label smoothing gives the rows a loss: not inf.
        return total(rows) / denominator.masked_fill(denominator == 0, torch.nan)
    return average_of_largest(rows.flatten(), counted.flatten(), options)


def total(values: Tensor) -> Tensor:
    """The sum of all, with the same bits for any number of threads: ranks that share a row may have unequally many."""
    if torch.compiler.is_compiling() or values.numel() <= TORCH_GRAIN:
        return values.sum()
    values = values.flatten()
    return F.pad(values, (0, -len(values) % SUM_BLOCK)).view(-1, SUM_BLOCK).sum(1).sum()


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
    selected = total(torch.where(above, rows, 0)) + share * total(torch.where(tied, rows, 0))
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


def _stats(logits: Tensor, rows: Tensor, entropies: Tensor, counted: Tensor, inputs: Inputs, options: Options) -> LossStats:
    if logits.shape[1] == 0:
        correct = torch.zeros_like(counted)
    elif inputs.has_probabilities():
        probabilities = inputs.target.to(logits.dtype)
        at_largest = probabilities.masked_fill(logits != logits.amax(1, keepdim=True), -torch.inf)
        correct = (at_largest == probabilities.amax(1, keepdim=True)).any(1)
    elif inputs.target_b is None:
        correct = _has_largest(logits, inputs.target, counted)
    else:
        lam = inputs.lam if inputs.lam is not None else torch.tensor(options.lam)
        correct_a = _has_largest(logits, inputs.target, counted)
        correct_b = _has_largest(logits, inputs.target_b, counted)
        correct = (correct_a & (lam >= 0.5)) | (correct_b & (lam <= 0.5))
    return LossStats(
        lse=torch.where(counted, logits.logsumexp(1), 0),
        row_loss=rows,
        n_counted=counted.sum(),
        n_correct=(counted & correct).sum(),
        worst=worst_row(rows.flatten(), counted.flatten()),
        entropy=entropies,
    )


def _entropies(logits: Tensor, counted: Tensor) -> Tensor:
    """-sum_c p_c log p_c of the counted rows; a logit of -inf has no part in it."""
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    return torch.where(counted, -(torch.where(p == 0, 0, log_p) * p).sum(1), 0)


def _has_largest(logits: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Whether the row's target has the largest logit; False where the index is out of range."""
    target = target.long()  # 300 classes are 44 to bytes
    inside = counted & (target >= 0) & (target < logits.shape[1])
    x_t = logits.gather(1, target.masked_fill(~inside, 0).unsqueeze(1))
    return inside & (x_t == logits.amax(1, keepdim=True)).squeeze(1)


def worst_row(rows: Tensor, counted: Tensor) -> Tensor:
    if rows.numel() == 0:
        return torch.full((), -1, device=rows.device)
    order = rows.masked_fill(~counted, -torch.inf)
    largest = order.max()  # NaN if there is one
    first = torch.where(
        counted & ((order == largest) | order.isnan()), torch.arange(len(rows), device=rows.device), len(rows)
    ).min()
    return torch.where(first < len(rows), first, -1)
