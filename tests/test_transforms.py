"""Point 26 of PyTorch's semantics: derivatives of any order and mode, torch.func transforms; with plain autograd beside them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import BOTH
from oracle import torch_loss
from paths import Path
from problems import make_logits, make_probabilities, make_weight
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fusedloss

# make_dual() itself makes PyTorch script its decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

TARGET = [0, 1, -100, 3]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum", "scale": 0.3},
    {"reduction": "none"},
    {"label_smoothing": 0.2},
    {"reduction": "max"},
    {"reduction": "topk", "top_k": 2},
]


def _problem() -> tuple[Tensor, Tensor, Tensor]:
    return make_logits(4, 5, dtype=torch.float64), torch.tensor(TARGET), make_weight(5, torch.float64)


def _losses(options: dict[str, Any]) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The loss as a function of the logits alone: ours, and PyTorch's (or a composition of it)."""
    _, target, weight = _problem()
    return (
        lambda logits: fusedloss.cross_entropy(logits, target, weight, **options),
        lambda logits: torch_loss(logits, target, weight, **options),
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_26_gradcheck(any_path: Path, options: dict[str, Any]) -> None:
    logits, _, _ = _problem()
    ours, _ = _losses(options)
    logits.requires_grad_()
    torch.autograd.gradcheck(ours, logits, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(ours, logits, check_fwd_over_rev=True)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_26_gradcheck_of_explicit_kernels(path: Path, options: dict[str, Any]) -> None:
    """Reverse mode, twice, without leaving the backend asked for."""
    logits, _, _ = _problem()
    ours, _ = _losses(options)
    logits.requires_grad_()
    torch.autograd.gradcheck(ours, logits, fast_mode=True)
    torch.autograd.gradgradcheck(ours, logits, fast_mode=True)


def test_26_27_gradcheck_of_probabilities(any_path: Path) -> None:
    logits, target = make_logits(3, 4, dtype=torch.float64), make_probabilities(3, 4, dtype=torch.float64)
    weight = make_weight(4, torch.float64)
    inputs = tuple(tensor.requires_grad_() for tensor in (logits, target, weight))

    def loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return fusedloss.cross_entropy(logits, target, weight, label_smoothing=0.1)

    torch.autograd.gradcheck(loss, inputs, check_forward_ad=True)
    torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_26_forward_mode(any_path: Path, options: dict[str, Any]) -> None:
    logits, _, _ = _problem()
    tangent = torch.randn_like(logits)
    tangents = []
    for loss in _losses(options):
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(loss(forward_ad.make_dual(logits, tangent))).tangent)
    assert tangents[0].abs().max() > 1e-3
    torch.testing.assert_close(*tangents)


def _tangents(loss: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Of the gradients, for an upstream gradient that has a tangent of its own; the loss was made before."""
    made = loss(*inputs)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.full_like(made, 2.0), torch.full_like(made, 3.0))
        found = [forward_ad.unpack_dual(gradient) for gradient in torch.autograd.grad(made, inputs, dual)]
    return [part for gradient in found for part in gradient]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_26_upstream_gradients_with_a_tangent(path: Path, options: dict[str, Any]) -> None:
    logits, _, _ = _problem()
    ours, theirs = _losses(options)
    logits.requires_grad_()
    for _ in range(3):  # the third is known, perhaps
        torch.testing.assert_close(_tangents(ours, logits), _tangents(theirs, logits))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_26_upstream_gradients_with_a_tangent_of_a_last_layer(reduction: str) -> None:
    layer = make_logits(4, 3, dtype=torch.float64).requires_grad_(), make_logits(5, 3, dtype=torch.float64).requires_grad_()
    target = torch.tensor(TARGET)
    ours = _tangents(lambda x, weight: fusedloss.linear_cross_entropy(x, weight, target, reduction=reduction), *layer)
    torch.testing.assert_close(ours, _tangents(lambda x, w: F.cross_entropy(x @ w.T, target, reduction=reduction), *layer))


def _total(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda logits: loss(logits).sum()


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda loss, x: grad(_total(loss))(x),
    "vjp": lambda loss, x: vjp(_total(loss), x)[1](torch.tensor(2.0, dtype=x.dtype))[0],
    "jvp": lambda loss, x: jvp(loss, (x,), (x.cos(),))[1],
    "jacrev": lambda loss, x: jacrev(loss)(x),
    "jacfwd": lambda loss, x: jacfwd(loss)(x),
    "hessian": lambda loss, x: hessian(_total(loss))(x),
    "vmap": lambda loss, x: vmap(loss)(torch.stack([x, 2 * x, x - 1])),
    "vmap of grad": lambda loss, x: vmap(grad(_total(loss)))(torch.stack([x, 2 * x, x - 1])),
    "grad of vmap": lambda loss, x: grad(lambda y: vmap(loss)(torch.stack([y, 2 * y])).sum())(x),
}


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_26_torch_func(any_path: Path, transform: Callable[..., Tensor], options: dict[str, Any]) -> None:
    logits, _, _ = _problem()
    ours, torchs = _losses(options)
    expected = transform(torchs, logits)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(transform(ours, logits), expected)


def test_26_gradients_per_sample(any_path: Path) -> None:
    """The textbook use of torch.func: vmap over samples and their targets, grad over a module's parameters."""
    module = torch.nn.Linear(6, 5)
    inputs, target = torch.randn(7, 6), torch.arange(7) % 5
    parameters = {name: value.detach() for name, value in module.named_parameters()}

    def loss(cross_entropy: Callable[..., Tensor], parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(module, parameters, (x[None],)), y[None])

    ours, torchs = (
        vmap(grad(lambda p, x, y, call=call: loss(call, p, x, y)), in_dims=(None, 0, 0))(parameters, inputs, target)
        for call in BOTH
    )
    for name, expected in torchs.items():
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(ours[name], expected)


def test_26_transforms_of_one_sample(any_path: Path) -> None:
    logits, targets = make_logits(6, 5), torch.arange(6) % 5
    ours = vmap(fusedloss.cross_entropy)(logits, targets)
    torch.testing.assert_close(ours, F.cross_entropy(logits, targets, reduction="none"))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_26_batched_upstream_gradients(path: Path, reduction: str) -> None:
    """autograd.grad(is_grads_batched=True): the first backward, when a fused gradient waits to be scaled."""
    logits = make_logits(4, 5).requires_grad_()
    loss = fusedloss.cross_entropy(logits, torch.tensor(TARGET), reduction=reduction)
    upstream = torch.randn(3, *loss.shape)
    (batched,) = torch.autograd.grad(loss, logits, upstream, retain_graph=True, is_grads_batched=True)
    one_by_one = torch.stack([torch.autograd.grad(loss, logits, one, retain_graph=True)[0] for one in upstream])
    torch.testing.assert_close(batched, one_by_one)


def test_double_backward_through_a_gradient_penalty(path: Path) -> None:
    """A real use: penalise the norm of the gradient at the inputs."""
    weight = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for call in BOTH:
        loss = call(inputs @ weight, torch.tensor(TARGET), label_smoothing=0.1)
        (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
        results.append(torch.autograd.grad(loss + slope.square().sum(), weight)[0])
    torch.testing.assert_close(*results)


def _kept(transform: Callable[..., Any], tensor: Tensor) -> Tensor:
    """What code inside a transform computed, and somebody kept, for a log for instance."""
    kept: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        kept.append(x * 1)
        return x.sum()

    transform(function)(tensor)
    return kept[0]


# Neither has memory of its own; of the last two the address ends the process.
WITHOUT_MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "grad": lambda tensor: _kept(grad, tensor),
    "jvp": lambda tensor: _kept(lambda function: lambda x: jvp(function, (x,), (x,)), tensor),
    "functionalize": lambda tensor: _kept(functionalize, tensor),
    "zeros": lambda tensor: torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype),
}


def _layer(x: Tensor, target: Tensor, **options: Any) -> Tensor:
    return fusedloss.linear_cross_entropy(x, torch.eye(5, dtype=x.dtype), target, **options)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("without_memory", WITHOUT_MEMORY.values(), ids=WITHOUT_MEMORY)
@pytest.mark.parametrize("call", [fusedloss.cross_entropy, _layer])
def test_tensors_that_outlived_their_transform(
    any_path: Path, call: Callable[..., Tensor], without_memory: Callable[[Tensor], Tensor], reduction: str
) -> None:
    logits, target, _ = _problem()

    def results(call: Callable[..., Tensor]) -> list[Tensor]:
        leaf = logits.clone().requires_grad_()
        soft = without_memory(logits.softmax(1).detach())
        upstream = without_memory(torch.full((4,) if reduction == "none" else (), 2.0, dtype=logits.dtype))
        found = [call(without_memory(logits), target, reduction=reduction)]
        for loss in (call(leaf, target, reduction=reduction), call(leaf, soft, reduction=reduction)):
            found += torch.autograd.grad(loss, leaf, upstream, retain_graph=True)
            found += torch.autograd.grad(loss, leaf, upstream, create_graph=True)
        # A functional tensor is a value as it is to PyTorch, too.
        return [torch._from_functional_tensor(one) if torch._is_functional_tensor(one) else one for one in found]

    for _ in range(3):  # the later ones are calls like an earlier one
        for ours, theirs in zip(results(call), results(F.cross_entropy), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["create_graph", "batched"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_last_layer_whose_input_is_made_of_its_weight(reduction: str, kind: str) -> None:
    """As of a tied embedding. The layer's own gradient with respect to the weight has no part of the input's."""
    results = []
    for fused in (True, False):
        embedding, target = make_logits(7, 3, dtype=torch.float64).requires_grad_(), torch.tensor([0, 5, -100, 3])
        hidden = embedding[[1, 5, 2, 0]].sin()
        if fused:
            loss = fusedloss.linear_cross_entropy(hidden, embedding, target, reduction=reduction)
        else:
            loss = F.cross_entropy(F.linear(hidden, embedding), target, reduction=reduction)
        dloss = torch.ones_like(loss)
        if kind == "batched":
            results.append(torch.autograd.grad(loss, embedding, torch.stack([dloss, 2 * dloss]), is_grads_batched=True))
        else:
            (first,) = torch.autograd.grad(loss, embedding, dloss, create_graph=True)
            results.append((first.detach(), *torch.autograd.grad(first.square().sum(), embedding)))
    torch.testing.assert_close(*results)


class _GivesNone(torch.autograd.Function):
    """The same value, which has no gradient: None, where others have zeros."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        return None


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_upstream_gradient_gives_none(reduction: str, create_graph: bool) -> None:
    """Not zeros, which an optimizer takes for a step."""
    calls: list[Callable[..., Tensor]] = [F.cross_entropy, fusedloss.cross_entropy]
    calls.append(lambda logits, target, **options: fusedloss.linear_cross_entropy(logits, torch.eye(5), target, **options))
    if reduction == "mean":
        calls.append(lambda logits, *rest: fusedloss.cross_entropy_overwriting_logits(1 * logits, *rest))
    for call in calls:
        for _ in range(3):  # known by then
            logits = make_logits(4, 5).requires_grad_()
            loss = call(logits, torch.tensor(TARGET), **({} if reduction == "mean" else {"reduction": reduction}))
            no_loss = _GivesNone.apply(loss).sum()
            found = torch.autograd.grad(no_loss, logits, create_graph=create_graph, allow_unused=True)
            assert found == (None,)
