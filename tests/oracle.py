"""What the loss is, from torch.nn.functional.cross_entropy alone: independent of fusedloss.reference."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def torch_loss(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, *, scale: Any = 1.0, top_k: Any = None, **options: Any
) -> Tensor:
    """`fusedloss.cross_entropy` in PyTorch's own terms, in the dtype of the logits."""
    reduction = options.pop("reduction", "mean")
    if reduction not in ("max", "topk"):
        return F.cross_entropy(logits, target, weight, reduction=reduction, **options) * scale
    rows = F.cross_entropy(logits, target, weight, reduction="none", **options).flatten()
    if target.shape != logits.shape:
        rows = rows[target.flatten() != options.get("ignore_index", -100)]
    if rows.numel() == 0:
        return rows.sum() * torch.nan
    if reduction == "max":
        return rows.max() * scale
    k = max(1, math.floor(top_k * rows.numel() + 0.5)) if isinstance(top_k, float) else min(top_k, rows.numel())
    return rows.topk(k).values.mean() * scale


def exact_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    """The same in float64."""
    if target.is_floating_point():
        target = target.double()
    return torch_loss(logits.double(), target, weight.double() if weight is not None else None, **options)
