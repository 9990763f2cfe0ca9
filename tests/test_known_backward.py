"""Backwards of calls like one served before (fusedloss/known.py): of every kind, and of graphs that others hold or free."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from known_calls import C, kernel_path, none_known, problem, served, without_known
from paths import Path
from problems import make_weight
from torch import Tensor

import fusedloss
from fusedloss import autograd, known

path = kernel_path


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return none_known(monkeypatch)


@pytest.mark.parametrize("reduction", ["mean", "none", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_backward_of_a_known_call(path: Path, dtype: torch.dtype, reduction: str) -> None:
    logits, target = problem(dtype)
    weight = make_weight(C, dtype=dtype)

    def backwards() -> list[Tensor]:
        loss = fusedloss.cross_entropy(logits, target, weight, reduction=reduction, label_smoothing=0.1, scale=0.5)
        one, two = torch.ones_like(loss), torch.full_like(loss, 3.0)
        dlosses = two, one, two, one[..., :1].expand(one.shape) if one.dim() else one, torch._neg_view(two)
        found = [torch.autograd.grad(loss, logits, dloss, retain_graph=True)[0] for dloss in dlosses]
        found.append(torch.autograd.grad(loss, logits, torch.stack([one, two]), retain_graph=True, is_grads_batched=True)[0])
        (gradient,) = torch.autograd.grad(loss, logits, two, create_graph=True)
        found.append(gradient.detach())
        found.append(torch.autograd.grad(gradient.square().sum(), logits)[0])
        found.append(torch.autograd.grad(loss, logits, one)[0])
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(loss, logits, one)
        return found

    expected = without_known(backwards)
    for _ in range(3):
        assert all(map(torch.equal, backwards(), expected))
    assert known.KNOWN


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["plain", "batched", "create_graph"])
def test_every_kind_of_backward_frees_the_graph(path: Path, kind: str, reduction: str) -> None:
    """And with it the gradient that the forward made, though the loss lives on."""
    logits, target = problem()

    def backward(loss: Tensor) -> None:
        dloss = torch.full_like(loss, 3.0)
        if kind == "batched":
            torch.autograd.grad(loss, logits, torch.stack([dloss, dloss]), is_grads_batched=True)
        else:
            torch.autograd.grad(loss, logits, dloss, create_graph=kind == "create_graph", retain_graph=False)

    for _ in range(4):
        loss = fusedloss.cross_entropy(logits, target, reduction=reduction)
        backward(loss)
        assert vars(loss.grad_fn).get("place") is None
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            backward(loss)
    assert known.KNOWN


@pytest.mark.parametrize("upstream", [(3.0, 3.0), (3.0,)], ids=["batched", "plain"])
def test_a_graph_that_another_thread_frees_meanwhile(
    path: Path, monkeypatch: pytest.MonkeyPatch, upstream: tuple[float, ...]
) -> None:
    """The gradient that it scales in place is none for a backward that keeps the graph."""
    logits, target = problem()
    for _ in range(3):
        fusedloss.cross_entropy(logits, target).backward()
    loss = fusedloss.cross_entropy(logits, target)
    made = autograd._made

    def as_another_thread_frees_it(ctx: Any, place: autograd.Place | None) -> Tensor:
        gradient = made(ctx, place)
        monkeypatch.setattr(autograd, "_made", made)
        autograd._taken(ctx).mul_(3)
        return gradient

    monkeypatch.setattr(autograd, "_made", as_another_thread_frees_it)
    dloss = torch.tensor(upstream, device=logits.device)
    batched = len(upstream) > 1
    with pytest.raises(RuntimeError, match="Another thread freed the graph"):
        torch.autograd.grad(loss, logits, dloss if batched else dloss[0], retain_graph=True, is_grads_batched=batched)


def test_logits_changed_after_a_known_forward(path: Path) -> None:
    """As on the long way: the gradient is there already, for every backward."""
    logits, target = problem()
    expected = served(logits, target)[1]
    served(logits, target)
    changed = logits.detach().clone().requires_grad_()
    loss = fusedloss.cross_entropy(changed, target)
    changed.data.zero_()
    with torch.no_grad():
        changed.add_(1)
    for retain_graph in (True, False):
        (gradient,) = torch.autograd.grad(loss, changed, retain_graph=retain_graph)
        assert torch.equal(gradient, expected)


def test_saved_tensor_hooks_see_a_known_call(path: Path) -> None:
    logits, target = problem()
    packed: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: packed.append(tensor.data_ptr()), lambda tensor: tensor):
        for n_calls in range(1, 4):
            fusedloss.cross_entropy(logits, target)
            assert packed.count(logits.data_ptr()) == n_calls


@pytest.mark.parametrize("loss", [F.cross_entropy, fusedloss.cross_entropy])
@pytest.mark.parametrize("n_rows", [6, 600])  # of which large logits are forgotten
@pytest.mark.parametrize("edited", ["target", "weight"])
def test_what_was_edited_is_noticed_in_every_call(loss: Callable[..., Any], n_rows: int, edited: str) -> None:
    logits, weight = torch.randn(n_rows, 1000, requires_grad=True), torch.ones(1000)
    target = torch.randint(1000, (n_rows,))
    for _ in range(4):
        value = loss(logits, target, weight)
        (target if edited == "target" else weight).add_(0)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                value.backward()
