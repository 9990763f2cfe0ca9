"""Loss and gradient of fusedloss against PyTorch in the same dtype, both measured against float64."""

from typing import Any

import torch
from budget import approximation, assert_within_budget
from exact import exact_loss_and_gradient
from oracle import exact_loss, torch_loss
from torch import Tensor

import fusedloss

BOTH = fusedloss.cross_entropy, torch.nn.functional.cross_entropy  # ours, then PyTorch's


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
    loss = fusedloss.cross_entropy(ours, target, weight, **options)
    torchs = torch_loss(theirs, target, weight, **options)
    (gradient,) = torch.autograd.grad((loss * dloss).sum(), ours)
    (torch_gradient,) = torch.autograd.grad((torchs * dloss).sum(), theirs)
    expected, exact_gradient = _exact(logits.detach(), target, weight, dloss, options)
    assert_within_budget(loss, torchs, expected, "loss", roundings)
    # Of one class, each element is the difference of two equals, of which one may come from a division.
    terms = float(torch.as_tensor(dloss).abs().max()) if approximation(gradient) and not exact_gradient.any() else 0.0
    assert_within_budget(gradient, torch_gradient, exact_gradient, "gradient", roundings, terms)


def _exact(
    logits: Tensor, target: Any, weight: Tensor | None, dloss: Tensor | float, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64: PyTorch's, but for float64 itself. Of a row of 50,000 classes it sums the exponentials one by
    one, and is off by a thousand last places."""
    if logits.dtype != torch.float64:
        logits = logits.double().requires_grad_()
        loss = exact_loss(logits, target, weight, **options)
        (gradient,) = torch.autograd.grad((loss * dloss).sum(), logits)
        return loss, gradient
    exact = exact_loss_and_gradient(
        logits.cpu(),
        tuple(map(_on_cpu, target)) if isinstance(target, tuple) else target.cpu(),
        _on_cpu(weight),
        **{name: _on_cpu(value) for name, value in options.items()},
        dloss=torch.as_tensor(dloss).cpu(),
        resolution=1e-12,
    )
    return exact.loss, exact.gradient


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value
