"""Loss and gradient of fusedloss against PyTorch in the same dtype, both measured against float64."""

from typing import Any

import torch
from budget import assert_within_budget
from oracle import exact_loss, torch_loss
from torch import Tensor

import fusedloss


def check_against_torch(
    logits: Tensor,
    target: Any,  # a tensor, or (target_a, target_b, lam)
    weight: Tensor | None = None,
    *,
    dloss: Tensor | float = 1.0,
    roundings: int = 1,
    **options: Any,
) -> None:
    """Fails unless value and gradient of one call are within the budget; `dloss` is the upstream gradient."""
    __tracebackhide__ = True
    ours = logits.detach().requires_grad_()  # the caller's own strides
    theirs = logits.detach().clone().requires_grad_()
    exact = logits.detach().double().requires_grad_()
    loss = fusedloss.cross_entropy(ours, target, weight, **options)
    torchs = torch_loss(theirs, target, weight, **options)
    expected = exact_loss(exact, target, weight, **options)
    assert_within_budget(loss, torchs, expected, "loss", roundings)
    (gradient,) = torch.autograd.grad((loss * dloss).sum(), ours)
    (torch_gradient,) = torch.autograd.grad((torchs * dloss).sum(), theirs)
    (exact_gradient,) = torch.autograd.grad((expected * dloss).sum(), exact)
    assert_within_budget(gradient, torch_gradient, exact_gradient, "gradient", roundings)
