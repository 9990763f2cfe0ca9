"""The gradient of a loss that is affine in its softmax, by PyTorch's operators: differentiable itself, to any order.

A row's loss is -sum_c q_c log softmax(s x)_c, where q is its target distribution times the class weights and s is logit_scale. So

    dlogits_c = slope softmax_c - s factor q_c        slope = s factor sum_c q_c

where factor is all that multiplies the row's loss. This takes PyTorch's autograd a quarter of the operators that the derivative
of `reference.cross_entropy` takes. Other extras are not affine; what max and topk select is left to `reference`, too.
"""

import torch
from torch import Tensor

from fusedloss import reference
from fusedloss.plan import Inputs, Options
from fusedloss.world import nobody_watches


def is_affine(options: Options) -> bool:
    return options.reduction in ("none", "sum", "mean") and not options.non_default_numbers(besides=("logit_scale",))


def gradient(dloss: Tensor, inputs: Inputs, options: Options) -> Tensor:
    """Of logits (N, C, d1, ...), in their dtype. dloss: 0-d, or (N, d1, ...) for reduction "none"."""
    logits, labels = inputs.logits.to(reference.computed_in(inputs)), labels_of(inputs, options)
    if labels is not None and not _all_known_to_count(labels.counted):  # others have no derivative, though their logits be NaN
        logits = logits.masked_fill(~labels.counted.unsqueeze(1), 0.0)
    softmax = (logits if options.logit_scale == 1 else logits * options.logit_scale).softmax(1)
    return gradient_at(softmax, dloss, inputs, labels, options)[0].to(inputs.logits.dtype)


def _all_known_to_count(counted: Tensor) -> bool:
    """Asked where the answer costs nothing: masking the logits on a CPU, and their gradient, takes as long as two softmaxes."""
    return counted.is_cpu and nobody_watches(counted) and bool(counted.all())


def labels_of(inputs: Inputs, options: Options) -> reference.Labels | None:
    return None if inputs.has_probabilities() else reference.labels_of(inputs, options)


def gradient_at(
    softmax: Tensor, dloss: Tensor, inputs: Inputs, labels: reference.Labels | None, options: Options
) -> tuple[Tensor, Tensor]:
    """The gradient for logits of this softmax, and its slope (N, 1, d1, ...), in the softmax's dtype."""
    dtype, smoothing = softmax.dtype, options.label_smoothing
    weight = None if inputs.weight is None else inputs.weight.to(dtype)
    weight_of_class = 1 if weight is None else weight.view(-1, *[1] * (softmax.dim() - 2))
    factor = dloss.to(dtype) * (options.scale * options.logit_scale)
    if inputs.scale is not None:
        factor = factor * inputs.scale.to(dtype)
    if inputs.sample_weight is not None:
        factor = factor * inputs.sample_weight.to(dtype)
    if labels is None:
        q = weight_of_class * ((1 - smoothing) * inputs.target.to(dtype) + smoothing / softmax.shape[1])
        if options.reduction == "mean":
            factor = factor / q[:, 0].numel()
        factor = factor.expand(q[:, 0].shape).unsqueeze(1)
        slope = factor * q.sum(1, keepdim=True)
        return slope * softmax - factor * q, slope
    weights = [reference.weights_of_rows(softmax, label, weight, labels.counted) for label in labels.labels]
    if options.reduction == "mean":
        denominator = (weights[0] if inputs.target_b is None else labels.counted.to(dtype)).sum()
        factor = factor / denominator.masked_fill(denominator == 0, torch.nan)
    factor = torch.where(labels.counted, factor, 0).unsqueeze(1)  # whatever the upstream gradient is
    if labels.outside is not None:
        factor = factor * torch.where(labels.outside, torch.nan, 1.0).unsqueeze(1)
    if inputs.target_b is not None:
        lam = options.lam if inputs.lam is None else inputs.lam.to(dtype)
        weights = [lam * weights[0], (1 - lam) * weights[1]]
    shares = [(1 - smoothing) * share.unsqueeze(1) for share in weights]
    slope = factor * (sum(shares) + smoothing * (1 if weight is None else weight.mean()))
    dlogits = slope * softmax
    if smoothing != 0:
        dlogits = dlogits - factor * (smoothing / softmax.shape[1] * weight_of_class)
    for label, share in zip(labels.labels, shares, strict=True):
        dlogits.scatter_add_(1, label.masked_fill(~labels.counted, 0).unsqueeze(1), -factor * share)
    return dlogits, slope
