"""Points 13, 16, 20 to 22, 35 and 41 of PyTorch's semantics: infinities, dtypes of the result, classes out of range."""

from collections.abc import Callable

import pytest
import torch
from paths import Path
from problems import make_logits, make_probabilities, make_weight
from torch import Tensor

import fusedloss

Function = Callable[..., Tensor]
inf, nan = torch.inf, torch.nan


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("spatial", [(), (3,)])
@pytest.mark.parametrize(("bad", "ignore_index"), [(5, -100), (-1, -100), (-100, 0), (2**40, -100)])
def test_13_35_class_out_of_range(
    any_cross_entropy: Function, bad: int, ignore_index: int, spatial: tuple[int, ...], reduction: str
) -> None:
    logits, target = make_logits(4, 5, *spatial), torch.ones(4, *spatial, dtype=torch.long)
    target.view(-1)[2] = bad
    if logits.is_cuda:
        pytest.skip("PyTorch's device-side assertion is the other way: tests/test_differences.py")
    with pytest.raises(IndexError, match=rf"Target {bad} is out of bounds\."):
        any_cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_16_result_has_the_logits_dtype(cross_entropy: Function, reduction: str, dtype: torch.dtype) -> None:
    logits = make_logits(4, 5, dtype=dtype).requires_grad_()
    loss = cross_entropy(logits, torch.tensor([0, 1, 2, 3]), make_weight(5, dtype), reduction=reduction)
    loss.sum().backward()
    assert loss.dtype == dtype
    assert logits.grad is not None
    assert logits.grad.dtype == dtype


@pytest.mark.parametrize(
    ("dtype", "target_dtype", "expected"),
    [
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
    ids=str,
)
def test_16_probabilities_promote(
    any_cross_entropy: Function, dtype: torch.dtype, target_dtype: torch.dtype, expected: torch.dtype
) -> None:
    logits, target = make_logits(4, 5, dtype=dtype), make_probabilities(4, 5, dtype=target_dtype)
    loss = any_cross_entropy(logits, target, reduction="sum")
    assert loss.dtype == expected
    exact = -(target.double() * logits.double().log_softmax(1)).sum()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2 if dtype.itemsize == 2 else 1e-6)


@pytest.mark.parametrize(
    ("row", "target", "expected"),
    [
        ([-200.0] * 4, 2, 1.3862943649291992),
        ([1e4, -1e4], 1, 2e4),
        ([0.0, -inf], 0, 0.0),
        ([0.0, -inf], 1, inf),
        ([-inf, -inf], 0, nan),
        ([0.0, inf], 1, nan),
        ([0.0, inf], 0, nan),
        ([nan, 0.0], 1, nan),
    ],
)
def test_20_extreme_rows(cross_entropy: Function, row: list[float], target: int, expected: float) -> None:
    for reduction in ("none", "sum", "mean"):
        loss = cross_entropy(torch.tensor([row]), torch.tensor([target]), reduction=reduction)
        torch.testing.assert_close(loss.item(), expected, rtol=1e-7, atol=0, equal_nan=True)


def test_20_gradient_at_an_impossible_target(cross_entropy: Function) -> None:
    logits = torch.tensor([[0.0, -inf]], requires_grad=True)
    cross_entropy(logits, torch.tensor([1]), reduction="sum").backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[1.0, -1.0]]


def test_21_infinity_and_smoothing(cross_entropy: Function) -> None:
    logits = torch.tensor([[0.0, 1.0, -inf]])
    assert cross_entropy(logits, torch.tensor([0]), label_smoothing=0.1).item() == inf


def test_21_zero_probability_of_an_impossible_class(cross_entropy: Function) -> None:
    assert cross_entropy(torch.tensor([[0.0, -inf]]), torch.tensor([[1.0, 0.0]])).isnan()


def test_22_half_precision_reductions_stay_finite(path: Path) -> None:
    """PyTorch's fp16 mean over these rows is inf on the CPU: it adds the rows in fp16."""
    logits = make_logits(300, 5, dtype=torch.float16) + 40 * torch.nn.functional.one_hot(torch.zeros(300, dtype=torch.long), 5)
    logits = (20 * logits).to(torch.float16)
    target = torch.full((300,), 3)
    exact = torch.nn.functional.cross_entropy(logits.double(), target)
    assert exact * 300 > torch.finfo(torch.float16).max
    assert fusedloss.cross_entropy(logits, target).item() == pytest.approx(exact.item(), rel=1e-3)


def test_22_half_precision_smoothing_over_many_classes(path: Path) -> None:
    n_classes = 2000 if path.backend == "triton" else 50_000
    logits = 4 * make_logits(2, n_classes, dtype=torch.float16)
    target = torch.tensor([0, 1])
    exact = torch.nn.functional.cross_entropy(logits.double(), target, label_smoothing=0.1)
    loss = fusedloss.cross_entropy(logits, target, label_smoothing=0.1)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)


def test_41_float64_is_not_rounded_on_the_way(cross_entropy: Function) -> None:
    """A factor that passes through float32 leaves 1e-8 here."""
    logits = make_logits(5, 7, dtype=torch.float64)
    target, weight = torch.tensor([0, 1, 2, -100, 4]), torch.rand(7, dtype=torch.float64)
    nll = -logits.log_softmax(1)
    y = torch.tensor([0, 1, 2, 4])
    rows = nll[y, y]
    expected = 0.9 * (weight[y] * rows).sum() + 0.1 / 7 * (weight * nll[y]).sum()
    loss = cross_entropy(logits, target, weight, label_smoothing=0.1)
    assert loss.item() == pytest.approx((expected / weight[y].sum()).item(), rel=1e-14)
