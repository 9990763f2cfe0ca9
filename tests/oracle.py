"""What the loss is, from PyTorch's own operators alone: independent of fusedloss.reference."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def torch_loss(
    logits: Tensor,
    target: Any,  # a tensor, or (target_a, target_b, lam)
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    scale: Any = 1.0,
    top_k: Any = None,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    focal_gamma: float = 0.0,
    **options: Any,
) -> Tensor:
    """`fusedloss.cross_entropy` in PyTorch's own terms, in the dtype of the logits."""
    if logit_scale != 1:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    plain = sample_weight is None and z_loss == focal_gamma == 0 and not isinstance(target, tuple)
    if plain and reduction in ("none", "sum", "mean"):
        return F.cross_entropy(logits, target, weight, reduction=reduction, **options) * scale
    rows, counted, denominator = _rows(logits, target, weight, **options)
    if focal_gamma > 0:
        rows = rows * _focal_factor(_rows(logits, target, None, **options)[0], focal_gamma)
    if z_loss != 0:
        rows = rows + z_loss * logits.logsumexp(min(1, logits.dim() - 1)) ** 2
    if sample_weight is not None:
        rows = rows * _per_row(sample_weight.to(rows.dtype), rows)
    rows = rows.where(counted, 0)
    if reduction == "none":
        return rows * scale
    if reduction == "sum":
        return rows.sum() * scale
    if reduction == "mean":
        return (rows.sum() / denominator.where(denominator != 0, torch.nan)).to(rows.dtype) * scale
    rows = rows[counted]
    if rows.numel() == 0:
        return rows.sum() * torch.nan
    if reduction == "max":
        return rows.max() * scale
    k = max(1, math.floor(top_k * rows.numel() + 0.5)) if isinstance(top_k, float) else min(top_k, rows.numel())
    return rows.topk(k).values.mean() * scale


def _rows(
    logits: Tensor, target: Any, weight: Tensor | None, *, ignore_index: int = -100, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of every row, whether it counts, and the denominator of the mean."""
    n_classes = logits.shape[min(1, logits.dim() - 1)]
    options: dict[str, Any] = {"reduction": "none", "label_smoothing": label_smoothing}
    if isinstance(target, tuple):
        a, b, lam = target
        counted = (a != ignore_index) & (b != ignore_index)
        lam = _per_row(torch.as_tensor(lam, dtype=logits.dtype), a)
        one_hots = (F.one_hot(labels.long().where(counted, 0), n_classes) for labels in (a, b))
        share = sum(part[..., None] * one_hot for part, one_hot in zip((lam, 1 - lam), one_hots, strict=True))
        share = share.movedim(-1, 1) if logits.dim() > 1 else share.reshape(n_classes)
        rows, denominator = F.cross_entropy(logits, share, weight, **options), counted.sum()
        counted = counted.reshape(rows.shape)
    elif target.shape == logits.shape:
        rows = F.cross_entropy(logits, target, weight, **options)
        counted = torch.ones_like(rows, dtype=torch.bool)
        denominator = counted.sum()
    else:
        rows = F.cross_entropy(logits, target, weight, ignore_index=ignore_index, **options)
        counted = (target != ignore_index).reshape(rows.shape)
        class_weight = weight if weight is not None else logits.new_ones(n_classes)
        denominator = class_weight[target.long().reshape(rows.shape).where(counted, 0)].where(counted, 0).sum()
    return rows, counted, denominator


def _focal_factor(nll: Tensor, gamma: float) -> Tensor:
    """(1 - exp(-nll))^gamma; without the infinite slopes at nll of 0 and infinity, where factor and loss have no gradient."""
    p = (-nll).exp()
    edge = (p == 0) | (p == 1)
    return torch.where(edge, 1 - p, (1 - p.where(~edge, 0.5)) ** gamma)


def _per_row(values: Tensor, rows: Tensor) -> Tensor:
    """One value, or one per example, as one per row."""
    if 0 < values.dim() < rows.dim():
        values = values.reshape(-1, *[1] * (rows.dim() - 1))
    return values.reshape(rows.shape) if values.numel() == rows.numel() else values.expand(rows.shape)


def exact_loss(logits: Tensor, target: Any, weight: Tensor | None = None, **options: Any) -> Tensor:
    """The same in float64."""
    if isinstance(target, Tensor) and target.is_floating_point():
        target = target.double()
    return torch_loss(logits.double(), target, weight.double() if weight is not None else None, **options)
