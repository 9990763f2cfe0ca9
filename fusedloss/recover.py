"""Logits again from their gradient, for derivatives of second order.

A call that has made its gradient in the forward keeps that, and not the logits: PyTorch's loss keeps one tensor of their size.
Only create_graph=True asks for more. A row's gradient is affine in its softmax (affine.py), so the gradient gives the softmax.
Its logarithm is as good as the logits: the loss and its derivatives are the same for both.
"""

from typing import Any

import torch
from torch import Tensor

from fusedloss.affine import gradient_at, labels_of
from fusedloss.plan import Inputs, Options
from fusedloss.reference import computed_in

KEPT_BYTES = 2**20  # of logits; larger ones are forgotten


def forget_logits(loss: Tensor) -> None:
    """Leaves of the logits, the first tensor saved for `loss`, only their place in the graph."""
    loss.grad_fn._raw_saved_tensors[0].register_hooks(_forgotten, _place)  # type: ignore[union-attr]


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
    dtype = computed_in(inputs)
    zeros = torch.zeros(dlogits.shape, dtype=dtype, device=dlogits.device)
    at_zeros, slope = gradient_at(zeros, zeros.new_ones(()), inputs, labels_of(inputs, options), options)
    # Where a row does not count, nor does its softmax.
    softmax = torch.where((slope == 0) | slope.isnan(), 1 / dlogits.shape[1], (dlogits.detach().to(dtype) - at_zeros) / slope)
    values = softmax.clamp(min=torch.finfo(dtype).tiny).log() / options.logit_scale
    return _ValuesAt.apply(inputs.logits, values)
