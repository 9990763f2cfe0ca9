"""Points 1 to 5, 17, 33 of PyTorch's semantics: shapes, kinds of targets, empty batches. The same code runs on both."""

from collections.abc import Callable

import pytest
import torch
from problems import make_logits, make_probabilities, make_target, make_weight
from torch import Tensor

Function = Callable[..., Tensor]
REDUCTIONS = ["none", "sum", "mean"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("target_shape", [(), (1,)])
def test_01_one_sample_gives_a_scalar(cross_entropy: Function, target_shape: tuple[int, ...], reduction: str) -> None:
    logits = make_logits(1, 5)[0]
    loss = cross_entropy(logits, torch.full(target_shape, 3), reduction=reduction)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(-logits.log_softmax(0)[3].item(), rel=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_01_weight_of_one_sample_cancels_in_the_mean(cross_entropy: Function, reduction: str) -> None:
    logits, weight = make_logits(1, 5)[0], torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])
    loss = cross_entropy(logits, torch.tensor(3), weight, reduction=reduction)
    expected = -logits.log_softmax(0)[3].item() * (1 if reduction == "mean" else 4)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("spatial", [(), (6,), (3, 2), (2, 1, 3)])
def test_02_classes_are_dimension_1(cross_entropy: Function, spatial: tuple[int, ...]) -> None:
    logits, target = make_logits(3, 5, *spatial), make_target(3, *spatial, n_classes=5)
    loss = cross_entropy(logits, target, reduction="none")
    expected = -logits.double().log_softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)
    assert loss.is_contiguous()
    torch.testing.assert_close(loss, expected.float())


def test_03_column_of_targets(cross_entropy: Function) -> None:
    with pytest.raises(RuntimeError, match="0D or 1D target tensor expected, multi-target not supported"):
        cross_entropy(make_logits(4, 5), torch.zeros(4, 1, dtype=torch.long))


def test_03_wrong_batch_size(cross_entropy: Function) -> None:
    with pytest.raises(ValueError, match=r"Expected input batch_size \(4\) to match target batch_size \(3\)\."):
        cross_entropy(make_logits(4, 5), torch.zeros(3, dtype=torch.long))


def test_03_wrong_spatial_size(cross_entropy: Function) -> None:
    with pytest.raises(RuntimeError, match=r"Expected target size \[2, 7\], got \[2, 6\]"):
        cross_entropy(make_logits(2, 5, 7), torch.zeros(2, 6, dtype=torch.long))


@pytest.mark.parametrize("shape", [(4, 5), (5,), (1,), (2, 3, 4)])
def test_04_33_integers_of_the_logits_shape(cross_entropy: Function, shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="Expected floating point type for target with class probabilities, got Long"):
        cross_entropy(torch.randn(shape), torch.zeros(shape, dtype=torch.long))


def test_04_probabilities_of_the_logits_shape(cross_entropy: Function) -> None:
    logits, target = make_logits(4, 5), make_probabilities(4, 5)
    expected = -(target.double() * logits.double().log_softmax(1)).sum(1)
    torch.testing.assert_close(cross_entropy(logits, target, reduction="none"), expected.float())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(0, 5), (0, 1000), (0, 1001), (0, 5, 3), (0, 1000, 3), (2, 5, 0), (2, 1000, 0), (2, 5, 3, 0)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_05_empty_batch(cross_entropy: Function, reduction: str, shape: tuple[int, ...], smoothing: float) -> None:
    target = torch.zeros(shape[0], *shape[2:], dtype=torch.long)
    logits = torch.zeros(shape, requires_grad=True)
    loss = cross_entropy(logits, target, reduction=reduction, label_smoothing=smoothing)
    if reduction == "none":
        assert loss.shape == target.shape
    else:
        assert loss.shape == ()
        torch.testing.assert_close(loss.item(), {"mean": torch.nan, "sum": 0.0}[reduction], equal_nan=True)
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == shape


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_05_empty_batch_of_probabilities(cross_entropy: Function, smoothing: float) -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(0, 5), label_smoothing=smoothing)
    loss.backward()
    assert loss.isnan()
    assert logits.grad is not None
    assert logits.grad.shape == (0, 5)
    assert cross_entropy(logits, torch.zeros(0, 5), reduction="sum").item() == 0


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_05_one_class_costs_nothing(cross_entropy: Function, reduction: str) -> None:
    logits = torch.tensor([[3.0], [-7.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(2, dtype=torch.long), reduction=reduction)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.0], [0.0]]


def test_05_no_class_at_all(any_cross_entropy: Function) -> None:
    with pytest.raises(IndexError, match=r"Target 0 is out of bounds\."):
        any_cross_entropy(torch.zeros(2, 0), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(("reduction", "expected"), [("mean", torch.nan), ("sum", 0.0)])
def test_05_no_class_at_all_in_probabilities(any_cross_entropy: Function, reduction: str, expected: float) -> None:
    loss = any_cross_entropy(torch.zeros(2, 0), torch.zeros(2, 0), reduction=reduction)
    torch.testing.assert_close(loss.item(), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_17_37_logits_that_are_not_floats(cross_entropy: Function, dtype: torch.dtype) -> None:
    with pytest.raises(NotImplementedError, match=r"not implemented for '(Long|Bool|ComplexFloat)'"):
        cross_entropy(torch.zeros(4, 5).to(dtype), torch.zeros(4, dtype=torch.long))


def test_17_probabilities_with_a_weight_of_one_class(cross_entropy: Function) -> None:
    logits = make_logits(3, 1)
    assert cross_entropy(logits, torch.ones(3, 1), make_weight(1)).item() == 0
