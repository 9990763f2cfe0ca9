"""Logits again from their gradient, for derivatives of second order.

A call that has made its gradient in the forward keeps that, and not the logits: PyTorch's loss keeps one tensor of their size.
Only create_graph=True asks for more. A row's gradient is affine in its softmax,

    g(p) = a (p - p0) + g(p0)        a from the gradients at two softmaxes that are known,

so the gradient gives p, and log p is as good as the logits: all losses without z-loss, focal factor and
softcap are the same for both.
"""

from typing import Any

import torch
from torch import Tensor

from fusedloss import reference
from fusedloss.plan import Inputs, Options

KEPT_BYTES = 2**20  # of logits; larger ones are forgotten


def forget_logits(loss: Tensor) -> None:
    """Leaves of the logits, the second tensor saved for `loss`, only their place in the graph."""
    loss.grad_fn._raw_saved_tensors[1].register_hooks(_forgotten, _place)  # type: ignore[union-attr]


def _forgotten(logits: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return logits.shape, logits.dtype, logits.device


def _place(facts: tuple[torch.Size, torch.dtype, torch.device]) -> Tensor:
    """A tensor of no memory, which autograd puts where the logits were; nobody reads it, and filling it would be a launch."""
    shape, dtype, device = facts
    return torch.empty((), dtype=dtype, device=device).expand(shape)


class _ValuesAt(torch.autograd.Function):
    """The values, at a tensor's place in the graph."""

    @staticmethod
    def forward(ctx: Any, place: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


def recovered(inputs: Inputs, options: Options, dlogits: Tensor) -> Tensor:
    """Logits (N, C, d1, ...) whose loss has the gradient dlogits, in the graph at the place of inputs.logits."""
    dtype = reference.computed_in(inputs)
    equal = torch.zeros(dlogits.shape, dtype=dtype, device=dlogits.device)
    first = equal.clone()
    first[:, 0] = 1
    n_classes = dlogits.shape[1]
    at_equal, at_first = (_gradient_at(logits, inputs, options, dtype) for logits in (equal, first))
    step = (first[:, :1] * options.logit_scale).exp() / ((first * options.logit_scale).exp().sum(1, keepdim=True)) - 1 / n_classes
    slope = (at_first - at_equal)[:, :1] / step
    softmax = 1 / n_classes + (dlogits.detach().to(dtype) - at_equal) / slope
    # Where a row does not count, nor does its softmax.
    softmax = torch.where((slope == 0) | slope.isnan() | (step == 0), 1 / n_classes, softmax)
    values = softmax.clamp(min=torch.finfo(dtype).tiny).log() / options.logit_scale
    return _ValuesAt.apply(inputs.logits, values)


def _gradient_at(logits: Tensor, inputs: Inputs, options: Options, dtype: torch.dtype) -> Tensor:
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        loss, _ = reference.cross_entropy(inputs._replace(logits=logits), options, dtype)
        return torch.autograd.grad(loss, logits)[0]
