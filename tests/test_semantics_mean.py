"""Points 6 to 12, 31, 35 and 39 of PyTorch's semantics: ignored rows, weights, smoothing, what the mean divides by."""

from collections.abc import Callable

import pytest
import torch
from problems import make_logits, make_probabilities, make_target, make_weight
from torch import Tensor

Function = Callable[..., Tensor]


def _nll(logits: Tensor) -> Tensor:
    return -logits.double().log_softmax(1)


@pytest.mark.parametrize("spatial", [(), (3,)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_06_all_ignored(cross_entropy: Function, weighted: bool, smoothing: float, spatial: tuple[int, ...]) -> None:
    target = torch.full((4, *spatial), -100)
    weight = make_weight(5) if weighted else None
    for reduction, expected in (("mean", torch.nan), ("sum", 0.0), ("none", 0.0)):
        logits = make_logits(4, 5, *spatial).requires_grad_()
        loss = cross_entropy(logits, target, weight, reduction=reduction, label_smoothing=smoothing)
        torch.testing.assert_close(loss, torch.full_like(loss, expected), equal_nan=True)
        loss.sum().backward()
        assert logits.grad is not None
        assert (logits.grad == 0).all()


def test_07_mean_divides_by_the_counted_weights(cross_entropy: Function) -> None:
    logits, target = make_logits(6, 5), torch.tensor([0, 1, -100, 3, 4, 1])
    weight = torch.tensor([0.5, 2.0, 3.0, 4.0, 8.0])
    counted = torch.tensor([0, 1, 3, 4, 5])
    w = weight[target[counted]].double()
    rows = w * _nll(logits)[counted, target[counted]]
    loss = cross_entropy(logits, target, weight)
    assert loss.item() == pytest.approx((rows.sum() / w.sum()).item(), rel=1e-6)
    assert loss.item() != pytest.approx(cross_entropy(logits, target, weight, reduction="none").mean().item(), rel=0.01)


def test_07_39_zero_total_weight(cross_entropy: Function) -> None:
    logits = make_logits(3, 5).requires_grad_()
    loss = cross_entropy(logits, torch.tensor([0, 1, 2]), torch.zeros(5))
    assert loss.isnan()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isnan().all()


def test_39_zero_total_weight_with_smoothing(cross_entropy: Function) -> None:
    """Label smoothing gives a row of weight 0 a positive loss; divided by 0 that is nan, not inf."""
    for target in (torch.tensor([0]), torch.tensor([0, 1, 0])):
        logits = make_logits(len(target), 5).requires_grad_()
        loss = cross_entropy(logits, target, torch.tensor([0.0, 0.0, 0.5, 1.0, 0.5]), label_smoothing=0.3)
        loss.backward()
        assert loss.isnan()
        assert logits.grad is not None
        assert logits.grad.isnan().all()


def test_39_zero_total_weight_of_probabilities(cross_entropy: Function) -> None:
    assert cross_entropy(make_logits(3, 5), make_probabilities(3, 5), torch.zeros(5)).item() == 0


def test_39_zero_weight_times_infinity(cross_entropy: Function) -> None:
    logits = torch.tensor([[0.0, -torch.inf]])
    assert cross_entropy(logits, torch.tensor([1]), torch.tensor([1.0, 0.0]), reduction="sum").isnan()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-1, 2, 5, 255, -(2**40), 2**62])
def test_08_any_ignore_index(cross_entropy: Function, ignore_index: int, weighted: bool, smoothing: float) -> None:
    logits, weight = make_logits(4, 5), make_weight(5) if weighted else None
    options = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": smoothing}
    loss = cross_entropy(logits, torch.tensor([0, ignore_index, 3, ignore_index]), **options)
    kept = cross_entropy(logits[[0, 2]], torch.tensor([0, 3]), **options)
    assert loss.item() == pytest.approx(kept.item(), rel=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_09_smoothing_of_indices(cross_entropy: Function, weighted: bool) -> None:
    logits, target = make_logits(4, 5), torch.tensor([0, -100, 2, 4])
    w = make_weight(5, torch.float64) if weighted else torch.ones(5, dtype=torch.float64)
    counted = torch.tensor([0, 2, 3])
    nll, y = _nll(logits)[counted], target[counted]
    rows = 0.7 * w[y] * nll.gather(1, y.unsqueeze(1)).squeeze(1) + 0.3 / 5 * (w * nll).sum(1)
    weight = w.float() if weighted else None
    total = cross_entropy(logits, target, weight, reduction="sum", label_smoothing=0.3)
    mean = cross_entropy(logits, target, weight, label_smoothing=0.3)
    assert total.item() == pytest.approx(rows.sum().item(), rel=1e-6)
    assert mean.item() == pytest.approx((rows.sum() / w[y].sum()).item(), rel=1e-6)
    assert cross_entropy(logits, target, weight, reduction="none", label_smoothing=0.3)[1].item() == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("spatial", [(), (3,)])
def test_10_probabilities(cross_entropy: Function, spatial: tuple[int, ...], smoothing: float) -> None:
    logits, target, weight = make_logits(4, 5, *spatial), make_probabilities(4, 5, *spatial), make_weight(5)
    p = target.double() * (1 - smoothing) + smoothing / 5
    rows = (weight.double().view(-1, *[1 for _ in spatial]) * p * _nll(logits)).sum(1)
    loss = cross_entropy(logits, target, weight, label_smoothing=smoothing)
    assert loss.item() == pytest.approx((rows.sum() / rows.numel()).item(), rel=1e-6)


def test_10_probabilities_need_not_sum_to_one(cross_entropy: Function) -> None:
    logits, target = make_logits(4, 5), make_probabilities(4, 5)
    once, twice = cross_entropy(logits, target), cross_entropy(logits, 2 * target)
    assert twice.item() == pytest.approx(2 * once.item(), rel=1e-6)


def test_11_probabilities_and_ignore_index(cross_entropy: Function) -> None:
    logits, target = make_logits(4, 5), make_probabilities(4, 5)
    with pytest.raises(RuntimeError, match="ignore_index is not supported for floating point target"):
        cross_entropy(logits, target, ignore_index=0)
    assert cross_entropy(logits, target, ignore_index=-7).item() == cross_entropy(logits, target).item()


def test_12_ignored_row_of_nan_leaves_the_loss_alone(cross_entropy: Function) -> None:
    logits, target = make_logits(3, 5), torch.tensor([1, -100, 2])
    expected = cross_entropy(logits, target)
    logits[1] = torch.nan
    assert cross_entropy(logits, target).item() == expected.item()


@pytest.mark.parametrize("upstream", [torch.nan, torch.inf])
def test_12_upstream_nan_at_an_ignored_row(cross_entropy: Function, upstream: float) -> None:
    logits = make_logits(3, 5).requires_grad_()
    rows = cross_entropy(logits, torch.tensor([1, -100, 2]), reduction="none")
    rows.backward(torch.tensor([1.0, upstream, 1.0]))
    assert logits.grad is not None
    assert (logits.grad[1] == 0).all()
    assert logits.grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_31_gradient_of_a_row_sums_to_zero(cross_entropy: Function, weighted: bool, smoothing: float) -> None:
    logits = make_logits(9, 30).requires_grad_()
    weight = make_weight(30) if weighted else None
    target = make_target(9, n_classes=30, ignored=-100)
    cross_entropy(logits, target, weight, reduction="sum", label_smoothing=smoothing).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() > 0.1
    assert logits.grad.sum(1).abs().max() < 1e-5


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_31_gradient_of_a_row_sums_to_zero_for_probabilities(cross_entropy: Function, smoothing: float) -> None:
    logits, target = make_logits(9, 30).requires_grad_(), make_probabilities(9, 30)
    cross_entropy(logits, target, make_weight(30), reduction="sum", label_smoothing=smoothing).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() > 0.1
    assert logits.grad.sum(1).abs().max() < 1e-5
