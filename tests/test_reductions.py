"""The reductions that PyTorch lacks, max and top-k, and `scale`: definitions, ties, errors."""

import math
from itertools import pairwise
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from paths import Path
from problems import make_logits, make_target
from torch import Tensor

import fusedloss


def _rows_of_loss(losses: list[float]) -> Tensor:
    """Logits (n, 2) whose cross-entropy with class 0 is exactly ordered as the losses are."""
    return torch.tensor([[0.0, loss] for loss in losses])


def _share(logits: Tensor, loss: Tensor) -> list[float]:
    """How much of each row's own gradient the batch loss passes on."""
    (gradient,) = torch.autograd.grad(loss, logits)
    own = logits.detach().softmax(1)[:, 1]
    return [round(value, 6) for value in (gradient[:, 1] / own).tolist()]


MAX = {"reduction": "max"}


def _zeros() -> Tensor:
    return torch.zeros(5, dtype=torch.long)


@pytest.mark.parametrize(
    ("losses", "options", "expected"),
    [
        ([1, 4, 2, 3, 0], {"reduction": "max"}, [0, 1, 0, 0, 0]),
        ([4, 1, 4, 3, 4], {"reduction": "max"}, [1 / 3, 0, 1 / 3, 0, 1 / 3]),
        ([2, 2, 2, 2, 2], {"reduction": "max"}, [0.2] * 5),
        ([1, 4, 2, 3, 0], {"reduction": "topk", "top_k": 2}, [0, 0.5, 0, 0.5, 0]),
        ([3, 4, 3, 1, 3], {"reduction": "topk", "top_k": 2}, [1 / 6, 0.5, 1 / 6, 0, 1 / 6]),
        ([3, 4, 3, 1, 3], {"reduction": "topk", "top_k": 3}, [2 / 9, 1 / 3, 2 / 9, 0, 2 / 9]),
        ([1, 4, 2, 3, 0], {"reduction": "topk", "top_k": 9}, [0.2] * 5),
        ([1, 4, 2, 3, 0], {"reduction": "topk", "top_k": 1.0}, [0.2] * 5),
        ([1, 4, 2, 3, 0], {"reduction": "topk", "top_k": 0.01}, [0, 1, 0, 0, 0]),
        ([1, 4, 2, 3, 0], {"reduction": "topk", "top_k": 0.5}, [0, 1 / 3, 1 / 3, 1 / 3, 0]),
    ],
    ids=str,
)
def test_which_rows_share_the_gradient(path: Path, losses: list[float], options: dict[str, Any], expected: list[float]) -> None:
    logits = _rows_of_loss(losses).requires_grad_()
    shares = _share(logits, fusedloss.cross_entropy(logits, _zeros(), **options))
    assert shares == pytest.approx(expected, abs=1e-5)


def test_max_shares_ties_as_torch_does(path: Path) -> None:
    logits = _rows_of_loss([4, 1, 4, 3, 4]).requires_grad_()
    (ours,) = torch.autograd.grad(fusedloss.cross_entropy(logits, _zeros(), reduction="max"), logits)
    (torchs,) = torch.autograd.grad(F.cross_entropy(logits, _zeros(), reduction="none").max(), logits)
    torch.testing.assert_close(ours, torchs)


def test_ignored_rows_are_never_the_largest(path: Path) -> None:
    """An ignored row's loss is 0, which is more than that of a row that is certain, but it is not a loss."""
    logits = torch.tensor([[0.0, 9.0], [90.0, 0.0], [80.0, 0.0]], requires_grad=True)
    target = torch.tensor([-100, 0, 0])
    loss = fusedloss.cross_entropy(logits, target, reduction="max")
    assert 0 <= loss.item() < 1e-30
    half = fusedloss.cross_entropy(_rows_of_loss([5, 1, 2, 3, 4]), torch.tensor([-100, 0, 0, 0, 0]), reduction="topk", top_k=0.5)
    assert half.item() == pytest.approx((math.log1p(math.exp(3)) + math.log1p(math.exp(4))) / 2, rel=1e-6)


@pytest.mark.parametrize(
    "options", [{"reduction": "max"}, {"reduction": "topk", "top_k": 2}, {"reduction": "topk", "top_k": 0.5}]
)
def test_nothing_counted(path: Path, options: dict[str, Any]) -> None:
    for logits, target in ((make_logits(3, 5), torch.full((3,), -100)), (torch.zeros(0, 5), torch.zeros(0).long())):
        logits.requires_grad_()
        loss = fusedloss.cross_entropy(logits, target, **options)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isnan()
        assert (gradient == 0).all()


@pytest.mark.parametrize("options", [MAX, {"reduction": "topk", "top_k": 2}], ids=str)
def test_a_nan_is_the_largest(path: Path, options: dict[str, Any]) -> None:
    logits = make_logits(5, 4)
    logits[2, 1] = torch.nan
    assert fusedloss.cross_entropy(logits, _zeros(), **options).isnan()


@pytest.mark.parametrize("options", [{"reduction": "max"}, {"reduction": "topk", "top_k": 2}], ids=str)
def test_ignored_rows_do_not_tie_with_minus_infinity(path: Path, options: dict[str, Any]) -> None:
    """A negative weight makes the infinite loss of an impossible class the least of all, as low as what does not count."""
    logits = torch.tensor([[0.0, 1.0, -torch.inf]]).repeat(5, 1).requires_grad_()
    target = torch.tensor([-100, 2, -100, -100, 2])
    loss = fusedloss.cross_entropy(logits, target, torch.tensor([1.0, 1.0, -1.0]), **options)
    loss.backward()
    assert loss.item() == -torch.inf
    assert logits.grad is not None
    assert logits.grad[[1, 4], 2].tolist() == [0.5, 0.5]
    assert (logits.grad[[0, 2, 3]] == 0).all()


def test_an_infinite_loss_is_the_largest(path: Path) -> None:
    logits = make_logits(5, 4)
    logits[3, 0] = -torch.inf
    assert fusedloss.cross_entropy(logits, _zeros(), reduction="max").item() == torch.inf


@pytest.mark.parametrize("spatial", [(), (2, 2)])
def test_top_k_lies_between_mean_and_max(path: Path, spatial: tuple[int, ...]) -> None:
    """Fan et al. 2017: nonincreasing in k from the maximum (k = 1) to the mean (k = n)."""
    logits, target = make_logits(5, 5, *spatial), make_target(5, *spatial, n_classes=5)
    losses = [fusedloss.cross_entropy(logits, target, reduction="topk", top_k=k).item() for k in range(1, target.numel() + 1)]
    assert all(larger >= smaller for larger, smaller in pairwise(losses))
    assert losses[0] == fusedloss.cross_entropy(logits, target, reduction="max").item()
    assert losses[-1] == pytest.approx(fusedloss.cross_entropy(logits, target).item(), rel=1e-6)
    assert losses[0] > 1.5 * losses[-1]


def test_max_and_top_k_of_probabilities(path: Path) -> None:
    logits, target = make_logits(6, 5), make_logits(6, 5, seed=7).softmax(1)
    rows = -(target * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(fusedloss.cross_entropy(logits, target, reduction="max"), rows.max())
    top = fusedloss.cross_entropy(logits, target, reduction="topk", top_k=0.5)
    torch.testing.assert_close(top, rows.topk(3).values.mean())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 3}, ValueError, r"top_k is for reduction 'topk', but got top_k=3 with reduction 'mean'"),
        ({"reduction": "topk"}, ValueError, "reduction 'topk' needs top_k"),
        ({"reduction": "topk", "top_k": 0}, ValueError, "top_k must be at least 1, but got 0"),
        ({"reduction": "topk", "top_k": -2}, ValueError, "top_k must be at least 1, but got -2"),
        ({"reduction": "topk", "top_k": 0.0}, ValueError, r"must be in \(0, 1\], but got 0.0"),
        ({"reduction": "topk", "top_k": 1.5}, ValueError, r"must be in \(0, 1\], but got 1.5"),
        ({"reduction": "topk", "top_k": math.nan}, ValueError, r"must be in \(0, 1\], but got nan"),
        ({"reduction": "topk", "top_k": "3"}, TypeError, "argument 'top_k' must be int, not str"),
        ({"reduction": "topk", "top_k": True}, TypeError, "argument 'top_k' must be int, not bool"),
        ({"scale": "2"}, TypeError, "argument 'scale' must be float, not str"),
        ({"scale": None}, TypeError, "argument 'scale' must be float, not NoneType"),
        ({"scale": torch.ones(1)}, ValueError, r"scale must be a number or a 0-d .* got shape \[1\]"),
        ({"scale": torch.ones(4)}, ValueError, r"scale must be a number or a 0-d .* got shape \[4\]"),
        ({"scale": torch.tensor(2)}, ValueError, r"0-d floating point tensor, but got shape \[\], torch.int64"),
    ],
    ids=str,
)
def test_bad_extras(path: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fusedloss.cross_entropy(make_logits(4, 5), torch.tensor([0, 1, 2, 3]), **options)


@pytest.mark.parametrize("top_k", [numpy.int64(2), torch.tensor(2)], ids=lambda k: str(type(k)))
def test_top_k_of_integer_types(path: Path, top_k: Any) -> None:
    logits = _rows_of_loss([1, 4, 2, 3, 0])
    loss = fusedloss.cross_entropy(logits, _zeros(), reduction="topk", top_k=top_k)
    assert loss.item() == fusedloss.cross_entropy(logits, _zeros(), reduction="topk", top_k=2).item()


@pytest.mark.parametrize("scale", [2, numpy.float32(2.0), torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64)], ids=str)
def test_scale_of_any_number_type(path: Path, scale: Any) -> None:
    logits, target = make_logits(4, 5), torch.tensor([0, 1, 2, 3])
    loss = fusedloss.cross_entropy(logits, target, scale=scale)
    assert loss.dtype == torch.float32
    assert loss.item() == 2 * fusedloss.cross_entropy(logits, target).item()


def test_scale_that_requires_grad_gets_it(path: Path) -> None:
    logits, scale = make_logits(4, 5).requires_grad_(), torch.tensor(0.5, requires_grad=True)
    loss = fusedloss.cross_entropy(logits, torch.tensor([0, 1, 2, 3]), scale=scale)
    loss.backward()
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, 2 * loss.detach())
    assert logits.grad is not None
    assert logits.grad.abs().max() > 0
