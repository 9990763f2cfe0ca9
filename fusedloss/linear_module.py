"""LinearCrossEntropyLoss: the last linear layer and its loss in one module, as torch.nn.LinearCrossEntropyLoss has them."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fusedloss.linear import linear_cross_entropy
from fusedloss.module import apply_to_scale
from fusedloss.plan import EXTRAS, Reduction, Target


class LinearCrossEntropyLoss(nn.Module):
    """A linear layer and the softmax cross-entropy of its outputs, which are never stored.

    Has the constructor, attributes, state_dict (`linear.weight`, `linear.bias`, `weight`) and repr of
    `torch.nn.LinearCrossEntropyLoss` (PyTorch 2.13), and the extras but focal_gamma; see `fusedloss.linear_cross_entropy`.

    Args:
        in_features: F, size of each row of the input.
        num_classes: C.
        out_features: (d1, ...) for K-dimensional loss, which stores the logits.
        bias: whether the layer has one.
        device, dtype: of the layer's parameters.
        reduction: "none", "sum", "mean", "max" or "topk".
        weight: (C,), a factor per class.
        ignore_index: class index whose rows are ignored; None: -100.
        label_smoothing: in [0, 1].
        options, chunk_rows, compact: how the rows are taken in chunks; see `fusedloss.linear_cross_entropy`.
        top_k, scale, z_loss, logit_scale, softcap, return_stats, out_dtype: as for `fusedloss.cross_entropy`.

    Raises:
        RuntimeError: weight is not (num_classes,), or label_smoothing not in [0, 1].
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: Reduction = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        top_k: int | float | None = EXTRAS.top_k,
        scale: float | Tensor = EXTRAS.scale,
        z_loss: float = EXTRAS.z_loss,
        logit_scale: float = EXTRAS.logit_scale,
        softcap: float | None = EXTRAS.softcap,
        return_stats: bool = EXTRAS.return_stats,
        out_dtype: torch.dtype | None = EXTRAS.out_dtype,
        chunk_rows: int | None = None,
        compact: bool = False,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if label_smoothing < 0 or label_smoothing > 1:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        super().__init__()
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.linear = nn.Linear(in_features, math.prod(out_features, start=num_classes), bias=bias, device=device, dtype=dtype)
        self.options = options
        self.top_k = top_k
        self.scale = scale
        self.z_loss = z_loss
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.return_stats = return_stats
        self.out_dtype = out_dtype
        self.chunk_rows = chunk_rows
        self.compact = compact

    def forward(
        self,
        input: Tensor,
        target: Target,
        *,
        scale: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Any:
        """Returns the loss of the layer's outputs against `target`; `scale` here takes the place of the constructor's."""
        bias = self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.reshape(self.num_classes, *self.out_features, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(self.num_classes, *self.out_features),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            top_k=self.top_k,
            scale=self.scale if scale is None else scale,
            sample_weight=sample_weight,
            z_loss=self.z_loss,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            return_stats=self.return_stats,
            out_dtype=self.out_dtype,
            chunk_rows=self.chunk_rows,
            compact=self.compact,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LinearCrossEntropyLoss":
        super()._apply(fn, recurse)
        apply_to_scale(self, fn)
        return self

    def extra_repr(self) -> str:
        """What `torch.nn.LinearCrossEntropyLoss` shows, and the extras that are set."""
        shown = {
            "in_features": self.linear.in_features,
            "num_classes": self.num_classes,
            "out_features": self.out_features,
            "bias": self.linear.bias is not None,
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "options": self.options,
        }
        for name, default in {**EXTRAS._asdict(), "chunk_rows": None, "compact": False}.items():
            value = getattr(self, name, default)
            if isinstance(value, Tensor) or value != default:
                shown[name] = value
        return ", ".join(f"{name}={value}" for name, value in shown.items())
