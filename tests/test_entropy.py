"""The entropy of every row, on every path, and its gradient where reduction "none" has one. The oracle: PyTorch's operators."""

import math
from typing import Any

import pytest
import torch
from budget import approximation
from paths import Path
from problems import make_logits, make_target
from torch import Tensor

import fusedloss
from fusedloss import entropy

# Of Triton's interpreter: pixels are read with ignored neighbours.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TRANSFORMS: dict[str, Any] = {"softcap": 5.0, "logit_scale": 0.7}


def entropies(logits: Tensor, target: Tensor, *, softcap: float | None = None, logit_scale: float = 1.0) -> Tensor:
    """By definition, in the dtype of the logits; 0 of ignored rows, which may hold anything."""
    counted = target != -100
    z = logits.masked_fill(~counted.unsqueeze(1), 0) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = z - z.logsumexp(1, keepdim=True)  # log_softmax adds up one by one where there is no AVX-512: 2e-13 of 33001 classes
    p = log_p.exp()
    return -(p * torch.where(p == 0, 0, log_p)).sum(1) * counted


def make_problem(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Ignored rows are NaN, some classes are impossible."""
    logits = make_logits(*shape, dtype=dtype)
    target = make_target(shape[0], *shape[2:], n_classes=shape[1], ignored=-100)
    logits[:, 1::7] = -torch.inf
    return logits.masked_fill_((target == -100).unsqueeze(1), torch.nan), target


def statistics(logits: Tensor, target: Tensor, **options: Any) -> fusedloss.LossStats:
    return fusedloss.cross_entropy(logits, target, return_stats=True, **options)[1]


@pytest.mark.parametrize("reduction", ["mean", "none", "max"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
@pytest.mark.parametrize("shape", [(37, 10), (5, 300), (5, 1003), (2, 33001), (2, 5, 6, 7), (1, 600, 2, 3)], ids=str)
def test_values(path: Path, shape: tuple[int, ...], dtype: torch.dtype, reduction: str) -> None:
    logits, target = make_problem(shape, dtype)
    for options in ({}, TRANSFORMS):
        found = statistics(logits.requires_grad_(), target, reduction=reduction, **options).entropy
        assert found.dtype == torch.promote_types(dtype, FP32)
        assert found.requires_grad == (reduction == "none")
        expected = entropies(logits.detach().double(), target, **options)
        limit = 1e-14 if dtype == FP64 else 2e-6
        if path.backend == "reference":  # PyTorch sums the exponentials one by one
            limit *= 10
        torch.testing.assert_close(found.detach().double(), expected, rtol=limit, atol=limit)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("n_cols", [10, 1003, 33001])
def test_rows_of_extremes(path: Path, n_cols: int, reduction: str) -> None:
    """A row that is sure keeps the digits of its entropy; a common offset costs none; infinities and NaN are what they are."""
    logits = torch.zeros(7, n_cols)
    logits[0, 5] = 40.0
    logits[1] = 10000.0
    logits[2] = -torch.inf
    logits[3, 2] = torch.inf
    logits[4, 2] = torch.nan
    logits[5, 1:] = -torch.inf
    logits[6, : n_cols // 2] = -torch.inf  # its target among them, in a slice that may hold nothing else
    logits.requires_grad_()
    target = torch.full((7,), 5)
    target[5] = 0
    expected = entropies(logits.detach().double(), target)
    rest = (n_cols - 1) * math.exp(-40)
    expected[0] = math.log1p(rest) + 40 * rest / (1 + rest)  # of which float64 has 3 digits left
    rows = [statistics(logits[i : i + 1], target[i : i + 1], reduction=reduction).entropy for i in range(7)]
    for found in (statistics(logits, target, reduction=reduction).entropy, torch.cat(rows)):
        assert found[2:5].isnan().all()
        digits = 1e-7 if path.backend == "reference" else 0.0  # of a sure row PyTorch's log-softmax has none
        torch.testing.assert_close(found.detach().double(), expected, rtol=2e-6, atol=digits, equal_nan=True)
        assert found[5] == 0


@pytest.mark.parametrize("options", [{}, TRANSFORMS], ids=["plain", "transforms"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", [(37, 10), (5, 1003), (2, 5, 6, 7)], ids=str)
def test_gradient(
    path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Of a policy's loss with an entropy bonus, and of the entropies alone; in one chunk of rows and in many."""
    logits, target = make_problem(shape, dtype)
    logits.requires_grad_()
    upstream = torch.linspace(-1, 1, target.numel()).reshape(target.shape)
    exact = logits.detach().double().requires_grad_()
    for share in (0.0, 1.0):
        wide = exact.masked_fill((target == -100).unsqueeze(1), 0)  # whose loss would be NaN
        losses = fusedloss.cross_entropy(wide, target, reduction="none", **options)
        expected = (share * losses + upstream.double() * entropies(exact, target, **options)).sum()
        (exact_gradient,) = torch.autograd.grad(expected, exact)
        for chunk in (2**18, 3 * shape[1]):
            for name in ("CPU_CHUNK", "CHUNK"):
                monkeypatch.setattr(entropy, name, chunk)
            losses, stats = fusedloss.cross_entropy(logits, target, reduction="none", return_stats=True, **options)
            bonus = upstream * stats.entropy
            (gradient,) = torch.autograd.grad((share * losses + bonus if share else bonus).sum(), logits)
            assert gradient.dtype == dtype
            rounding = 2 * torch.finfo(dtype).eps  # of the loss's gradient, and of the sum
            least = rounding + approximation(gradient) * exact_gradient.abs().max().item()
            torch.testing.assert_close(gradient.double(), exact_gradient, rtol=rounding + 1e-6, atol=least)


@pytest.mark.parametrize("with_layer", [False, True])
def test_it_may_be_edited_in_place(with_layer: bool) -> None:
    logits, target = make_logits(4, 5).requires_grad_(), torch.tensor([0, 1, 4, 3])

    def entropy_of_rows() -> Tensor:
        if with_layer:
            return fusedloss.linear_cross_entropy(logits, torch.eye(5), target, reduction="none", return_stats=True)[1].entropy
        return fusedloss.cross_entropy(logits, target, reduction="none", return_stats=True)[1].entropy

    (expected,) = torch.autograd.grad(entropy_of_rows() @ torch.tensor([0.0, 2.0, 2.0, 2.0]), logits)
    edited = entropy_of_rows()
    edited[0] = 0
    (gradient,) = torch.autograd.grad(edited.mul_(2).sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_without_a_loss_of_it_the_gradient_is_the_same(path: Path) -> None:
    logits, target = make_problem((7, 300), FP32)
    logits.requires_grad_()
    losses, stats = fusedloss.cross_entropy(logits, target, reduction="none", return_stats=True)
    (gradient,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(fusedloss.cross_entropy(logits, target, reduction="none").sum(), logits)
    assert torch.equal(gradient, expected)
    assert [value.requires_grad for value in stats] == [False] * 5 + [True]


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 2, 2), (5,)], ids=str)
def test_derivatives_of_any_order(path: Path, shape: tuple[int, ...]) -> None:
    logits = make_logits(1, *shape, dtype=FP64, spread=1.0)[0].requires_grad_()
    target = torch.tensor(2) if len(shape) == 1 else make_target(shape[0], *shape[2:], n_classes=3, ignored=-100)

    def both(logits: Tensor) -> tuple[Tensor, Tensor]:
        loss, stats = fusedloss.cross_entropy(logits, target, reduction="none", return_stats=True, z_loss=0.1, **TRANSFORMS)
        return loss, stats.entropy

    assert torch.autograd.gradcheck(both, (logits,))
    assert torch.autograd.gradgradcheck(both, (logits,))
    if path.backend == "triton":  # which no transform reaches
        return
    found = both(logits)[1]
    (expected,) = torch.autograd.grad(found.sum(), logits, retain_graph=True)
    with fusedloss.backend("auto"):
        torch.testing.assert_close(torch.func.grad(lambda x: both(x)[1].sum())(logits.detach()), expected)
    batch = torch.stack([torch.ones_like(found), torch.zeros_like(found)])
    (batched,) = torch.autograd.grad(found, logits, batch, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack([expected, torch.zeros_like(expected)]))


@pytest.mark.parametrize("shape", [(4, 10), (2, 5, 3)], ids=str)
def test_compiles(path: Path, shape: tuple[int, ...]) -> None:
    def total(logits: Tensor, target: Tensor, share: float) -> Tensor:
        losses, stats = fusedloss.cross_entropy(logits, target, reduction="none", return_stats=True)
        return share * losses.sum() - 0.5 * stats.entropy.sum() if share else -0.5 * stats.entropy.sum()

    torch.compiler.reset()
    logits, target = make_problem(shape, FP32)
    logits.requires_grad_()
    for share in (1.0, 0.0):
        compiled = torch.compile(total, fullgraph=True, backend="aot_eager")(logits, target, share)
        expected = total(logits, target, share)
        torch.testing.assert_close(compiled, expected)
        torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (compiled, expected)))
    torch.compiler.reset()
