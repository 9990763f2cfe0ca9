"""The question the project began with: mean or sum? Every claim of the answers, as a test."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from budget import approximation
from paths import Path
from problems import make_logits, make_target, make_weight
from torch import Tensor, nn

import fusedloss

STEPS, BATCH, FEATURES, CLASSES = 50, 8, 6, 10


def _value_and_gradient(**options: Any) -> tuple[Tensor, Tensor]:
    logits = make_logits(BATCH, CLASSES).requires_grad_()
    target = make_target(BATCH, n_classes=CLASSES)
    loss = fusedloss.cross_entropy(logits, target, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), gradient


def test_claim_1_sum_is_batch_times_mean(path: Path) -> None:
    """L_sum = B L_mean, and the derivative likewise. B is a power of two: equal to the last bit."""
    total, total_gradient = _value_and_gradient(reduction="sum")
    mean, mean_gradient = _value_and_gradient()
    torch.testing.assert_close(total, BATCH * mean, rtol=approximation(total), atol=0)  # 0, but for a GPU's division
    torch.testing.assert_close(total_gradient, BATCH * mean_gradient, rtol=1e-6 + approximation(total), atol=0)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "max"])
@pytest.mark.parametrize("c", [4.0, -0.5, 0.0, 3.0])
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["number", "tensor"])
def test_claim_1_constants_pass_through(path: Path, kind: Callable[[float], Any], c: float, reduction: str) -> None:
    """d(cL)/dx = c dL/dx."""
    loss, gradient = _value_and_gradient(reduction=reduction)
    scaled, scaled_gradient = _value_and_gradient(reduction=reduction, scale=kind(c))
    rtol = 1e-6 + approximation(loss)
    torch.testing.assert_close(scaled, c * loss, rtol=rtol, atol=0)
    torch.testing.assert_close(scaled_gradient, c * gradient, rtol=rtol, atol=0)


def _train(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    penalty: float = 0.0,
    batch: int = BATCH,
) -> tuple[Tensor, Tensor]:
    """Fits a linear layer for STEPS steps in float64: its weight before and after."""
    torch.manual_seed(0)
    layer = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)
    start = layer.weight.detach().clone()
    optimizer = make_optimizer(layer.parameters())
    for step in range(STEPS):
        inputs = make_logits(batch, FEATURES, dtype=torch.float64, seed=100 + step)
        target = make_target(batch, n_classes=CLASSES, seed=200 + step)
        optimizer.zero_grad()
        loss = loss_of(layer(inputs), target) + penalty / 2 * layer.weight.square().sum()
        loss.backward()
        optimizer.step()
    return start, layer.weight.detach()


def _sgd(**options: Any) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, **options)


def _mean(logits: Tensor, target: Tensor) -> Tensor:
    return fusedloss.cross_entropy(logits, target)


def _sum(logits: Tensor, target: Tensor) -> Tensor:
    return fusedloss.cross_entropy(logits, target, reduction="sum")


def test_claim_2_same_steps_at_a_rate_divided_by_the_batch(path: Path) -> None:
    start, with_mean = _train(_mean, _sgd(lr=0.5))
    _, with_sum = _train(_sum, _sgd(lr=0.5 / BATCH))
    assert (with_mean - start).abs().max() > 0.1
    torch.testing.assert_close(with_sum, with_mean, rtol=1e-9, atol=1e-12)


def test_claim_2_not_at_the_same_rate(any_path: Path) -> None:
    _, with_mean = _train(_mean, _sgd(lr=0.05))
    _, with_sum = _train(_sum, _sgd(lr=0.05))
    assert (with_sum - with_mean).abs().max() > 0.1


def test_claim_3_the_regularisers_coefficient_takes_the_batch_too(any_path: Path) -> None:
    """In the loss (L2) or in the optimizer (weight decay): lambda with the mean is B lambda with the sum."""
    _, with_mean = _train(_mean, _sgd(lr=0.5), penalty=0.1)
    _, with_sum = _train(_sum, _sgd(lr=0.5 / BATCH), penalty=BATCH * 0.1)
    torch.testing.assert_close(with_sum, with_mean, rtol=1e-9, atol=1e-12)
    _, untouched = _train(_sum, _sgd(lr=0.5 / BATCH), penalty=0.1)
    assert (untouched - with_mean).abs().max() > 0.01
    _, decayed_mean = _train(_mean, _sgd(lr=0.5, weight_decay=0.1))
    _, decayed_sum = _train(_sum, _sgd(lr=0.5 / BATCH, weight_decay=BATCH * 0.1))
    torch.testing.assert_close(decayed_sum, decayed_mean, rtol=1e-9, atol=1e-12)


def test_claim_4_scaling_the_loss_is_scaling_the_rate(any_path: Path) -> None:
    """The linear scaling rule by `scale=`; with weight decay the two part (Goyal et al. 2017, section 3, remark 1)."""

    def doubled(logits: Tensor, target: Tensor) -> Tensor:
        return fusedloss.cross_entropy(logits, target, scale=2.0)

    _, scaled_loss = _train(doubled, _sgd(lr=0.25))
    _, scaled_rate = _train(_mean, _sgd(lr=0.5))
    torch.testing.assert_close(scaled_loss, scaled_rate, rtol=1e-9, atol=1e-12)
    _, scaled_loss = _train(doubled, _sgd(lr=0.25, weight_decay=0.1))
    _, scaled_rate = _train(_mean, _sgd(lr=0.5, weight_decay=0.1))
    assert (scaled_loss - scaled_rate).abs().max() > 0.01


def test_claim_4_adam_does_not_see_the_scale(any_path: Path) -> None:
    _, with_mean = _train(_mean, lambda parameters: torch.optim.Adam(parameters, lr=0.01, eps=0))
    _, with_sum = _train(_sum, lambda parameters: torch.optim.Adam(parameters, lr=0.01, eps=0))
    torch.testing.assert_close(with_sum, with_mean, rtol=1e-6, atol=1e-9)


def test_claim_5_the_maximum_moves_only_its_worst_example(path: Path) -> None:
    loss, gradient = _value_and_gradient(reduction="max")
    rows, _ = _value_and_gradient(reduction="none")
    moved = gradient.abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == [rows.argmax().item()]
    assert loss.item() == rows.max().item()


def test_accumulation_mean_of_means_is_wrong_and_the_sum_by_the_global_count_is_right(path: Path) -> None:
    """Micro-batches with unequal counts: the bug that LLM trainers fixed in October 2024. The count stays on the device."""
    logits, target = make_logits(12, CLASSES, dtype=torch.float64), make_target(12, n_classes=CLASSES)
    target[:5] = -100
    whole = fusedloss.cross_entropy(logits, target)
    per_item = 1 / (target != -100).sum().double()
    parts = [(logits[:6], target[:6]), (logits[6:], target[6:])]
    right = sum(fusedloss.cross_entropy(x, y, reduction="sum", scale=per_item) for x, y in parts)
    wrong = sum(fusedloss.cross_entropy(x, y, scale=0.5) for x, y in parts)
    assert right.item() == pytest.approx(whole.item(), rel=1e-12)
    assert wrong.item() != pytest.approx(whole.item(), rel=0.05)


def test_accumulation_with_class_weights(path: Path) -> None:
    """With weights the mean's denominator is the sum of the weights, and so must be the global count."""
    logits, target = make_logits(12, CLASSES, dtype=torch.float64), make_target(12, n_classes=CLASSES)
    weight = make_weight(CLASSES, torch.float64)
    whole = fusedloss.cross_entropy(logits, target, weight)
    per_item = 1 / weight[target].sum()
    right = sum(
        fusedloss.cross_entropy(logits[rows], target[rows], weight, reduction="sum", scale=per_item)
        for rows in (slice(0, 5), slice(5, 12))
    )
    assert right.item() == pytest.approx(whole.item(), rel=1e-12)
