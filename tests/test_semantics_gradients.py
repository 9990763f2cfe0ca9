"""Points 23 to 29 of PyTorch's semantics: upstream gradients, repeated backwards, edits after the forward, layouts."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import check_against_torch
from paths import Path
from problems import make_logits, make_probabilities, make_target, make_weight
from torch import Tensor

import fusedloss

Function = Callable[..., Tensor]


def _gradient(loss: Tensor, logits: Tensor, dloss: Tensor | None = None, retain: bool = False) -> Tensor:
    return torch.autograd.grad(loss, logits, dloss, retain_graph=retain)[0]


def test_23_gradient_of_the_sum(cross_entropy: Function) -> None:
    logits, target = make_logits(6, 5).requires_grad_(), torch.tensor([0, 1, -100, 3, 4, 1])
    of_sum = _gradient(cross_entropy(logits, target, reduction="sum"), logits)
    of_mean = _gradient(cross_entropy(logits, target), logits)
    torch.testing.assert_close(of_sum, 5 * of_mean)


@pytest.mark.parametrize("dloss", [3.0, -0.5, 0.0, 1e-3])
@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_23_upstream_scalar(path: Path, reduction: str, dloss: float) -> None:
    check_against_torch(make_logits(7, 10), make_target(7, n_classes=10, ignored=-100), reduction=reduction, dloss=dloss)


@pytest.mark.parametrize("layout", ["dense", "expanded", "strided"])
def test_23_upstream_of_every_row(path: Path, layout: str) -> None:
    dloss = {
        "dense": torch.linspace(-1, 2, 7),
        "expanded": torch.tensor(0.5).expand(7),
        "strided": torch.linspace(-1, 2, 14)[::2],
    }[layout]
    check_against_torch(make_logits(7, 10), make_target(7, n_classes=10, ignored=-100), reduction="none", dloss=dloss)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_24_two_backwards_accumulate(cross_entropy: Function, reduction: str) -> None:
    logits = make_logits(4, 5).requires_grad_()
    loss = cross_entropy(logits, torch.tensor([0, 1, -100, 3]), reduction=reduction)
    dloss = torch.full_like(loss, 3.0)
    loss.backward(dloss, retain_graph=True)
    assert logits.grad is not None
    once = logits.grad.clone()
    assert once.abs().max() > 0
    loss.backward(dloss)
    assert logits.grad.equal(2 * once)


def test_24_third_backward_with_another_upstream(cross_entropy: Function) -> None:
    """A kernel that scales its saved gradient in place is wrong from the second backward on."""
    logits = make_logits(4, 5).requires_grad_()
    loss = cross_entropy(logits, torch.tensor([0, 1, 2, 3]))
    unit = _gradient(loss, logits, torch.tensor(1.0), retain=True).clone()
    half = _gradient(loss, logits, torch.tensor(0.5), retain=True).clone()
    again = _gradient(loss, logits, torch.tensor(1.0))
    torch.testing.assert_close(half, unit / 2)
    assert again.equal(unit)


def test_24_backward_twice_without_retaining(cross_entropy: Function) -> None:
    logits = make_logits(4, 5).requires_grad_()
    loss = cross_entropy(logits, torch.tensor([0, 1, 2, 3]))
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "max"])
def test_25_logits_edited_after_the_forward(path: Path, reduction: str) -> None:
    """PyTorch serves this: it saved the log-probabilities. We serve it or raise; never a wrong gradient."""
    target = torch.tensor([0, 1, -100, 3])
    leaf = make_logits(4, 5).requires_grad_()
    expected = _gradient(fusedloss.cross_entropy(leaf, target, reduction=reduction).sum(), leaf)
    logits = leaf * 1
    loss = fusedloss.cross_entropy(logits, target, reduction=reduction).sum()
    with torch.no_grad():
        logits.mul_(0)
    try:
        gradient = _gradient(loss, leaf)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017 (either outcome is right)
    else:
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3), (2, 5, 3, 4)], ids=str)
def test_25_loss_edited_in_place(cross_entropy: Function, shape: tuple[int, ...]) -> None:
    """A row taken out of the loss by hand, in the first call as in those that are known by then."""
    target = torch.arange(shape[0] * math.prod(shape[2:])).view(shape[0], *shape[2:]) % 5

    def gradient(of: Function) -> Tensor:
        logits = make_logits(*shape).requires_grad_()
        loss = of(logits, target, reduction="none")
        loss[0] = 0
        loss.mul_(2)
        return _gradient(loss.sum(), logits)

    for _ in range(4):
        torch.testing.assert_close(gradient(cross_entropy), gradient(F.cross_entropy))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_26_double_backward(path: Path, smoothing: float) -> None:
    logits, weight = make_logits(4, 5, dtype=torch.float64), make_weight(5, torch.float64)
    target = torch.tensor([0, 1, -100, 3])

    def loss(x: Tensor) -> Tensor:
        return fusedloss.cross_entropy(x, target, weight, label_smoothing=smoothing)

    logits.requires_grad_()
    (first,) = torch.autograd.grad(loss(logits), logits, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), logits)
    exact = torch.nn.functional.cross_entropy(logits, target, weight, label_smoothing=smoothing)
    (first,) = torch.autograd.grad(exact, logits, create_graph=True)
    (expected,) = torch.autograd.grad((first**2).sum(), logits)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(second, expected)


def test_27_gradient_of_probabilities(any_cross_entropy: Function) -> None:
    logits, weight = make_logits(4, 5), make_weight(5).requires_grad_()
    target = make_probabilities(4, 5).requires_grad_()
    any_cross_entropy(logits, target, weight).backward()
    nll = -logits.log_softmax(1)
    assert target.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(target.grad, weight.detach() * nll / 4)
    torch.testing.assert_close(weight.grad, (target.detach() * nll).sum(0) / 4)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_28_gradient_has_the_logits_strides(cross_entropy: Function, reduction: str) -> None:
    transposed = make_logits(5, 4).t()
    channels_last = make_logits(2, 5, 3, 4).to(memory_format=torch.channels_last)
    for logits, target in ((transposed, torch.zeros(4)), (channels_last, torch.zeros(2, 3, 4))):
        logits.requires_grad_()
        cross_entropy(logits, target.long(), reduction=reduction).sum().backward()
        assert logits.grad is not None
        assert logits.grad.stride() == logits.stride()


def _column(logits: Tensor) -> Tensor:
    """The same values where the rows are not contiguous."""
    return logits.t().contiguous().t()


def _every_other_row(logits: Tensor) -> Tensor:
    return logits.repeat_interleave(2, 0)[::2]


def _every_third_class(logits: Tensor) -> Tensor:
    return logits.repeat_interleave(3, 1)[:, ::3]


def _offset(logits: Tensor) -> Tensor:
    """The same values in rows that begin at odd addresses."""
    padded = torch.zeros(logits.shape[0], logits.shape[1] + 3, dtype=logits.dtype)
    padded[:, 1:-2] = logits
    return padded[:, 1:-2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_cols", [10, 600])
@pytest.mark.parametrize("layout", [_column, _every_other_row, _every_third_class, _offset])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_29_layout_of_the_logits(
    path: Path, reduction: str, layout: Callable[[Tensor], Tensor], n_cols: int, dtype: torch.dtype
) -> None:
    logits, target = make_logits(5, n_cols, dtype=dtype), make_target(5, n_classes=n_cols, ignored=-100)
    strided = layout(logits)
    assert strided.stride() != logits.stride()
    assert strided.equal(logits)
    check_against_torch(strided, target, reduction=reduction)


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 5, 3, 2)])
def test_29_layout_of_images(path: Path, shape: tuple[int, ...]) -> None:
    logits, target = make_logits(*shape), make_target(shape[0], *shape[2:], n_classes=5, ignored=-100)
    for order in ((0, *range(2, len(shape)), 1), (1, 0, *range(2, len(shape))), tuple(reversed(range(len(shape))))):
        inverse = [order.index(dim) for dim in range(len(shape))]
        strided = logits.permute(order).contiguous().permute(inverse)
        check_against_torch(strided, target)
        check_against_torch(strided, target, reduction="none")


def _negative_view(values: Tensor) -> Tensor:
    """The same values, whose signs are flipped in memory, as those of x.conj().imag are."""
    return torch._neg_view(-values)


def _of_a_layer(input: Tensor, target: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return fusedloss.linear_cross_entropy(input, torch.eye(input.shape[1]), target, weight=weight, **options)


@pytest.mark.parametrize("fused_layer", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("what", ["logits", "weight", "target", "upstream"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_29_negative_views(any_cross_entropy: Function, reduction: str, what: str, soft: bool, fused_layer: bool) -> None:
    target = make_probabilities(6, 5) if soft else make_target(6, n_classes=5)
    tensors = {"logits": make_logits(6, 5), "weight": make_weight(5), "target": target, "upstream": torch.rand(6)}

    def call(function: Function, logits: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        logits.requires_grad_()
        loss = function(logits, target, weight, reduction=reduction)
        (gradient,) = torch.autograd.grad(loss, logits, upstream if reduction == "none" else upstream[0])
        return loss, gradient

    expected = call(any_cross_entropy, **tensors)
    negative = {**tensors, what: _negative_view(tensors[what].detach())}
    torch.testing.assert_close(call(_of_a_layer if fused_layer else any_cross_entropy, **negative), expected)


def test_29_expanded_logits_and_strided_targets(cross_entropy: Function) -> None:
    row = make_logits(1, 5)
    target = torch.tensor([0, 9, 1, 9, -100, 9, 3, 9])[::2]
    expected = cross_entropy(row.repeat(4, 1), target.contiguous())
    assert cross_entropy(row.expand(4, 5), target).item() == expected.item()
    same = torch.tensor([2]).expand(4)
    assert cross_entropy(row.expand(4, 5), same).item() == cross_entropy(row.repeat(4, 1), same.contiguous()).item()


def test_inputs_are_never_written(path: Path) -> None:
    logits, weight = make_logits(6, 40).requires_grad_(), make_weight(40)
    target, scale = make_target(6, n_classes=40, ignored=-100), torch.tensor(0.5)
    inputs = (logits, target, weight, scale)
    before = [(tensor.detach().clone(), tensor._version) for tensor in inputs]
    for reduction in ("none", "sum", "mean", "max"):
        loss = fusedloss.cross_entropy(logits, target, weight, reduction=reduction, scale=scale)
        dloss = torch.full_like(loss, 3.0)
        loss.backward(dloss)
        assert dloss.eq(3).all()
        with torch.no_grad():
            fusedloss.cross_entropy(logits, target, weight, reduction=reduction, scale=scale)
    for tensor, (value, version) in zip(inputs, before, strict=True):
        assert tensor.equal(value)
        assert tensor._version == version


def test_repeated_calls_agree_to_the_last_bit(path: Path) -> None:
    logits, target = make_logits(300, 10), make_target(300, n_classes=10, ignored=-100)
    results = []
    for _ in range(3):
        leaf = logits.clone().requires_grad_()
        loss = fusedloss.cross_entropy(leaf, target, label_smoothing=0.1)
        results.append((loss.item(), _gradient(loss, leaf)))
    for loss, gradient in results[1:]:
        assert loss == results[0][0]
        assert gradient.equal(results[0][1])
