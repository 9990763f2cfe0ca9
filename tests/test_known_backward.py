"""Backwards of calls like one served before (fusedloss/known.py): of every kind, and of graphs that others hold or free."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from known_calls import C, kernel_path, none_known, problem, served, without_known
from paths import Path
from problems import make_logits, make_target, make_weight
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fusedloss
from fusedloss import autograd, known
from fusedloss.backends import cpu
from fusedloss.plan_cpu import ELEMENTS_PER_THREAD

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


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_subnormal_products_of_the_upstream_gradient(path: Path, reduction: str) -> None:
    """exp(-87) is a normal number, a quarter of it is not: known or not, the result is the same. 40 classes are whole vectors."""
    logits = torch.full((3, 40), -87.0, dtype=torch.bfloat16)
    logits[:, 0] = 0.0

    def gradient() -> Tensor:
        return served(logits.requires_grad_(), torch.zeros(3, dtype=torch.long), reduction=reduction, dloss=0.25)[1]

    expected = without_known(gradient)
    for _ in range(4):
        assert torch.equal(gradient(), expected)


@pytest.mark.parametrize("options", [{}, {"reduction": "max"}, {"reduction": "max", "softcap": 2.0}, {"z_loss": 0.1}], ids=str)
def test_batched_gradients_of_one_row(path: Path, options: dict[str, Any]) -> None:
    """(C,), which a kernel takes for (1, C)."""
    for dtype in (torch.float32, torch.float16):
        logits, target = make_logits(C, dtype=dtype).requires_grad_(), torch.tensor(1)

        def gradient(logits: Tensor = logits, target: Tensor = target) -> Tensor:
            loss = fusedloss.cross_entropy(logits, target, **options)
            return torch.autograd.grad(loss, logits, loss.new_tensor([1.0, 3.0]), is_grads_batched=True)[0]

        expected = without_known(gradient)
        for _ in range(3):
            torch.testing.assert_close(gradient(), expected)


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


@pytest.mark.skipif(cpu.LIBRARY is None, reason="the compiled CPU kernel is missing")
@pytest.mark.parametrize("layout", ["rows", "pixels", "channels last", "every other class"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_of_few_rows_is_made_once(dtype: torch.dtype, layout: str) -> None:
    """A known call's, a first call's, one that keeps the graph, and one that is recomputed for a checkpoint: the same bits, and
    PyTorch's numbers, where some upstream gradient is 0, infinite or of an ignored row, too; NaN there may be infinite here."""
    logits = {
        "rows": lambda: make_logits(70, C, dtype=dtype),
        "pixels": lambda: make_logits(2, C, 5, 7, dtype=dtype),
        "channels last": lambda: make_logits(2, C, 5, 7, dtype=dtype).to(memory_format=torch.channels_last),
        "every other class": lambda: make_logits(70, 2 * C, dtype=dtype)[:, ::2],
    }[layout]().requires_grad_()
    shape = (logits.shape[0], *logits.shape[2:])
    target, weight = make_target(*shape, n_classes=C, ignored=-100), make_weight(C, dtype=dtype)
    assert fusedloss.plan(logits, target, reduction="none").strategy == ("recompute" if dtype == torch.float16 else "fused")
    dloss = make_logits(target.numel(), dtype=dtype).view(shape)
    for edge, value in ((0, 0.0), (1, float("inf")), (3, 0.0)):
        dloss.view(-1)[edge] = value
    dloss[target == -100] = float("inf")
    with torch.no_grad():  # (3, ...) or (0, ..., 0, 3): a row whose loss is NaN, and has a gradient of 0
        logits[3 if logits.dim() == 2 else (0, slice(None), 0, 3)] = torch.nan

    def gradient(function: Callable[..., Tensor], dloss: Tensor, **keywords: Any) -> Tensor:
        loss = function(logits, target, weight, reduction="none", label_smoothing=0.1)
        return torch.autograd.grad(loss, logits, dloss, **keywords)[0]

    def exactly(input: Tensor, target: Tensor, weight: Tensor, **options: Any) -> Tensor:
        return F.cross_entropy(input.double(), target, weight.double(), **options).to(dtype)

    def checkpointed(*arguments: Any, **options: Any) -> Tensor:
        return checkpoint(lambda: fusedloss.cross_entropy(*arguments, **options), use_reentrant=False)

    for upstream in (dloss, dloss.flatten()[2:3].expand(shape)):
        theirs = gradient(exactly, upstream)
        first = without_known(lambda: gradient(fusedloss.cross_entropy, upstream))  # noqa: B023
        masked = logits.isnan() & (upstream == 0).unsqueeze(1)
        assert (first[masked] == 0).all()
        theirs = theirs.masked_fill(masked, 0)
        assert torch.equal(first.isfinite(), theirs.isfinite())
        torch.testing.assert_close(first[theirs.isfinite()], theirs[theirs.isfinite()])
        for function in (fusedloss.cross_entropy, checkpointed):
            for keywords in ({}, {"retain_graph": True}) * 2:
                assert torch.equal(gradient(function, upstream, **keywords).nan_to_num(7), first.nan_to_num(7))
    assert known.KNOWN


@pytest.mark.skipif(cpu.LIBRARY is None, reason="the compiled CPU kernel is missing")
def test_a_known_number_of_rows_may_be_fewer_or_more_than_few() -> None:
    """Calls with any number of examples are alike, but not those with another strategy."""
    few = ELEMENTS_PER_THREAD // C
    for n_rows in (few - 2, few - 1, few, few + 1, few + 2, few - 3, few + 3) * 3:
        logits, target = make_logits(n_rows, C).requires_grad_(), make_target(n_rows, n_classes=C)
        strategy = fusedloss.plan(logits, target, reduction="none").strategy
        assert strategy == ("fused" if n_rows <= few else "recompute")
        losses = fusedloss.cross_entropy(logits, target, reduction="none")
        node = losses.grad_fn
        assert node is not None
        assert node.has_gradient == (strategy == "fused")
        (gradient,) = torch.autograd.grad(losses.mean(), logits)
        torch.testing.assert_close(gradient, torch.autograd.grad(F.cross_entropy(logits, target), logits)[0])
    assert known.KNOWN


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"focal_gamma": 2.0}, {"z_loss": 0.1}], ids=str)
def test_a_second_derivative_of_edited_logits_is_right_or_refused(path: Path, options: dict[str, Any], reduction: str) -> None:
    """PyTorch's loss keeps what it needs. Ours has the logits from its gradient, unless an extra makes that more than affine in
    the softmax, or the edit is part of the graph; a first derivative is made already."""
    if path.backend == "auto" and cpu.LIBRARY is None:
        pytest.skip("the compiled CPU kernel is missing")
    data, target = problem()

    def gradients(loss: Callable[..., Tensor], edit: str, order: int) -> Tensor:
        leaf = data.detach().clone().requires_grad_()
        logits = leaf * 1
        total = loss(logits, target, reduction=reduction, **options).sum()
        with torch.set_grad_enabled(edit == "in the graph"):
            logits.mul_(7)
        (gradient,) = torch.autograd.grad(total, leaf, create_graph=order == 2)
        return gradient if order == 1 else torch.autograd.grad(gradient.square().sum(), leaf)[0]

    for _ in range(3):
        for edit in ("around the graph", "in the graph"):
            if reduction == "none" and path.backend != "auto":  # there the first derivative needs the logits
                continue
            if not options:
                expected = gradients(F.cross_entropy, edit, 1)
                torch.testing.assert_close(gradients(fusedloss.cross_entropy, edit, 1), expected)
            if options or edit == "in the graph":
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    gradients(fusedloss.cross_entropy, edit, 2)
            else:
                expected = gradients(F.cross_entropy, edit, 2)
                torch.testing.assert_close(gradients(fusedloss.cross_entropy, edit, 2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(cpu.LIBRARY is None, reason="the compiled CPU kernel is missing")
def test_rows_are_scaled_alike_whatever_the_losss_dtype() -> None:
    logits, target = make_logits(128, C).requires_grad_(), make_target(128, n_classes=C)
    found = []
    for _ in range(4):
        losses = fusedloss.cross_entropy(logits, target, reduction="none", out_dtype=torch.float64)
        found.append(torch.autograd.grad(losses, logits, make_logits(128, seed=1).to(losses) / 3)[0])
    assert all(torch.equal(gradient, found[0]) for gradient in found)
