"""The differentiable gradient of losses that are affine in their softmax, against the derivatives of the loss itself."""

from typing import Any

import pytest
import torch
from problems import make_logits, make_probabilities, make_target, make_weight
from torch import Tensor

from fusedloss import affine, reference
from fusedloss.plan import Inputs, Options

FP64 = torch.float64
N, C, S = 4, 5, 3


def _rows(seed: int) -> Tensor:
    return torch.rand(N, S, dtype=FP64, generator=torch.Generator().manual_seed(seed))


def _labels(seed: int = 1) -> Tensor:
    return make_target(N, S, n_classes=C, ignored=-100, seed=seed)


def _logits(inputs: Inputs) -> Tensor:
    """NaN where a row does not count."""
    logits = inputs.logits.clone()
    if not inputs.has_probabilities():
        logits.permute(0, 2, 1)[~reference.labels_of(inputs, Options()).counted] = torch.nan
    return logits.requires_grad_()


LOGITS = make_logits(N, C, S, dtype=FP64)
CASES = {
    "labels": Inputs(LOGITS, _labels()),
    "weights": Inputs(LOGITS, _labels(), weight=make_weight(C, FP64), scale=torch.tensor(0.7, dtype=FP64)),
    "sample_weight": Inputs(LOGITS, _labels(), sample_weight=_rows(0)),
    "two_labels": Inputs(LOGITS, _labels(), _labels(5), lam=_rows(1), weight=make_weight(C, FP64), sample_weight=_rows(0)),
    "one_lam": Inputs(LOGITS, _labels(), _labels(5)),
    "probabilities": Inputs(LOGITS, make_probabilities(N, C, S, dtype=FP64)),
    "weighted_probabilities": Inputs(
        LOGITS, 2 * make_probabilities(N, C, S, dtype=FP64), weight=make_weight(C, FP64), sample_weight=_rows(0)
    ),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("inputs", CASES.values(), ids=CASES)
def test_is_the_derivative_of_the_loss(inputs: Inputs, label_smoothing: float, reduction: str) -> None:
    """And so are its own: with respect to the logits, and to the gradient that arrives."""
    options = Options(reduction, label_smoothing=label_smoothing, scale=0.3, logit_scale=0.5, lam=0.3)
    inputs = inputs._replace(logits=_logits(inputs))
    loss, _ = reference.cross_entropy(inputs, options, FP64)
    dloss = torch.rand(loss.shape, dtype=FP64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    found: list[tuple[Tensor, ...]] = []
    for gradient in (
        affine.gradient(dloss, inputs, options),
        torch.autograd.grad(loss, inputs.logits, dloss, create_graph=True)[0],
    ):
        second = torch.autograd.grad(gradient.pow(3).sum(), (inputs.logits, dloss), create_graph=True)
        third = torch.autograd.grad(second[0].square().sum() + second[1].square().sum(), (inputs.logits, dloss))
        found.append((gradient.detach(), *second, *third))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("factor", [torch.inf, torch.nan])
def test_rows_that_do_not_count(factor: float) -> None:
    """Their gradient is 0 whatever arrives; and where none counts."""
    inputs = CASES["labels"]
    counted = reference.labels_of(inputs, Options()).counted
    gradient = affine.gradient(torch.full((N, S), factor, dtype=FP64), inputs, Options("none"))
    assert torch.equal((gradient == 0).all(1), ~counted)
    inputs = inputs._replace(target=torch.full_like(inputs.target, -100))
    assert not affine.gradient(torch.ones((), dtype=FP64), inputs, Options("mean")).any()


@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_classes_out_of_range_on_a_gpu(ignore_index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_raises_index_error", lambda device: False)
    target = torch.tensor([1, 7, ignore_index, -1])
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": 0.1}
    gradient = affine.gradient(torch.ones(4), Inputs(make_logits(4, C), target), Options("none", **options))
    assert gradient.isnan().all(1).tolist() == [False, True, False, True]
    assert gradient.isnan().any(1).tolist() == [False, True, False, True]
