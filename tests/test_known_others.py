"""Calls that are not like a known one, though they look like it: each is served as if none were known (fusedloss/known.py)."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from known_calls import C, N, equal, none_known, outcome, problem, served, without_known
from problems import make_weight
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return none_known(monkeypatch)


class _Functions(TorchFunctionMode):
    """Doubles our loss."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return 2 * result if function is fusedloss.cross_entropy else result


class _Operators(TorchDispatchMode):
    """Doubles the loss of our operator."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return (2 * result[0], *result[1:]) if function is torch.ops.fusedloss.forward.default else result


class _Subclass(Tensor):
    pass


def _in(context: Callable[[], Any]) -> Callable[..., Any]:
    def run(logits: Tensor, target: Tensor) -> Any:
        with context():
            return served(logits, target)

    return run


def _forward_ad(logits: Tensor, target: Tensor) -> Any:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits.detach().requires_grad_(), torch.ones_like(logits))
        return forward_ad.unpack_dual(fusedloss.cross_entropy(dual, target)).tangent


def _traced_backward(logits: Tensor, target: Tensor) -> Any:
    loss = fusedloss.cross_entropy(logits, target)
    return make_fx(lambda dloss: torch.autograd.grad(loss, logits, dloss))(torch.tensor(2.0))


OTHERS = {
    "shape": lambda logits, target: served(logits[:4].detach().requires_grad_(), target[:4]),
    "dtype": lambda logits, target: served(logits.detach().double().requires_grad_(), target),
    "strides": lambda logits, target: served(logits.detach().t().contiguous().t().requires_grad_(), target),
    "targets that are strided": lambda logits, target: served(logits, target.repeat_interleave(2)[::2]),
    "uint8 targets": lambda logits, target: served(logits, target.clamp(min=0).byte()),
    "int32 targets": lambda logits, target: served(logits, target.int()),
    "a list": lambda logits, target: served(logits, target.tolist()),
    "class probabilities": lambda logits, target: served(logits, logits.detach().softmax(1)),
    "no gradient": lambda logits, target: served(logits.detach(), target),
    "a parameter": lambda logits, target: served(nn.Parameter(logits.detach()), target),
    "a subclass": lambda logits, target: served(logits.detach().as_subclass(_Subclass).requires_grad_(), target),
    "a negative view": lambda logits, target: served(torch._neg_view(logits.detach()).requires_grad_(), target),
    "meta": lambda logits, target: fusedloss.cross_entropy(logits.to("meta"), target.to("meta")).device.type,
    "weight": lambda logits, target: served(logits, target, make_weight(C)),
    "a weight too long": lambda logits, target: served(logits, target, make_weight(C + 1)),
    "no such class": lambda logits, target: served(logits, target.clamp(min=0) + C),
    "ignore_index": lambda logits, target: served(logits, target, ignore_index=3),
    "ignore_index True": lambda logits, target: served(logits, target, ignore_index=True),
    "reduction": lambda logits, target: served(logits, target, reduction="sum"),
    "no reduction": lambda logits, target: served(logits, target, reduction="median"),
    "label_smoothing": lambda logits, target: served(logits, target, label_smoothing=0.2),
    "label_smoothing of a tensor": lambda logits, target: served(logits, target, label_smoothing=torch.tensor(0.2)),
    "label_smoothing too large": lambda logits, target: served(logits, target, label_smoothing=2.0),
    "size_average": lambda logits, target: served(logits, target, reduce=False),
    "scale": lambda logits, target: served(logits, target, scale=0.25),
    "an int scale": lambda logits, target: served(logits, target, scale=2),
    "a scale of a tensor": lambda logits, target: served(logits, target, scale=torch.tensor(0.25)),
    "z_loss": lambda logits, target: served(logits, target, z_loss=0.1),
    "an infinite z_loss": lambda logits, target: served(logits, target, z_loss=float("inf")),
    "logit_scale": lambda logits, target: served(logits, target, logit_scale=0.1),
    "softcap": lambda logits, target: served(logits, target, softcap=5.0),
    "topk": lambda logits, target: served(logits, target, reduction="topk", top_k=1),
    "top_k without topk": lambda logits, target: served(logits, target, top_k=1),
    "sample_weight": lambda logits, target: served(logits, target, sample_weight=torch.rand(N, generator=torch.manual_seed(0))),
    "two labels": lambda logits, target: served(logits, (target, target, 0.5)),
    "statistics": lambda logits, target: fusedloss.cross_entropy(logits, target, return_stats=True)[1].n_counted,
    "no_grad": _in(torch.no_grad),
    "inference_mode": _in(torch.inference_mode),
    "autocast": _in(lambda: torch.autocast("cpu", torch.bfloat16)),
    "a function mode": _in(_Functions),
    "a dispatch mode": _in(_Operators),
    "a fake mode": lambda logits, target: _in(lambda: FakeTensorMode(allow_non_fake_inputs=True))(logits, target)[1].__class__,
    "make_fx": lambda logits, target: make_fx(fusedloss.cross_entropy)(logits, target).code,
    "make_fx of the backward": lambda logits, target: _traced_backward(logits, target).code,
    "the reference": _in(lambda: fusedloss.backend("reference")),
    "torch.func.grad": lambda logits, target: torch.func.grad(fusedloss.cross_entropy)(logits.detach(), target),
    "vmap": lambda logits, target: torch.func.vmap(fusedloss.cross_entropy, (None, 0))(logits, target.expand(2, N)),
    "forward-mode differentiation": _forward_ad,
}


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated", "ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_another_call_is_served_as_if_none_were_known(calls: list[Any], other: Callable[..., Any]) -> None:
    logits, target = problem()
    for _ in range(3):
        served(logits, target)
    assert len(calls) <= 3
    expected = without_known(lambda: other(logits, target))
    for _ in range(3):  # known itself by then, perhaps
        found = outcome(lambda: other(logits, target))
        if isinstance(expected, tuple) and isinstance(expected[0], Tensor):
            assert equal(found, expected)
        elif isinstance(expected, Tensor):
            assert torch.equal(found, expected)
        else:
            assert found == expected


class _Recorded(Tensor):
    """Notes what it is asked."""

    asked: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.asked.append(function)
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("loss", [F.cross_entropy, fusedloss.cross_entropy])
@pytest.mark.parametrize("place", range(3))
def test_a_subclass_sees_the_function_first(loss: Callable[..., Any], place: int) -> None:
    arguments = [*problem(), make_weight(C)]
    for _ in range(3):
        loss(*arguments)
    arguments[place] = arguments[place].detach().as_subclass(_Recorded)
    _Recorded.asked.clear()
    loss(*arguments)
    assert _Recorded.asked[0] is loss


@pytest.mark.parametrize("loss", [F.cross_entropy, fusedloss.cross_entropy])
def test_a_mode_sees_what_came_while_it_was_disabled(loss: Callable[..., Any]) -> None:
    class Calls(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    seen: list[Any] = []
    arguments = problem()
    with Calls():
        with torch._C.DisableTorchFunction():
            for _ in range(4):
                loss(*arguments)
        loss(*arguments)
    assert seen == [loss]


def test_fx_traces_what_is_known() -> None:
    for _ in range(3):
        served(*problem())
    traced = torch.fx.symbolic_trace(lambda logits, target: fusedloss.cross_entropy(logits, target))
    assert [node.target for node in traced.graph.nodes][2] is fusedloss.cross_entropy


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "grad": torch.func.grad,
    "vmap(grad)": lambda loss: torch.vmap(torch.func.grad(loss)),
    "grad(vmap)": lambda loss: torch.func.grad(lambda logits, target: torch.vmap(loss)(logits, target).sum()),
    "jacfwd": torch.func.jacfwd,
    "hessian": torch.func.hessian,
    "functionalize": torch.func.functionalize,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_knows_its_calls(calls: list[Any], name: str) -> None:
    """PyTorch's own loss, found without the checks; out of the transform, the kernel serves."""
    logits, target = problem()
    for _ in range(4):
        found = TRANSFORMS[name](fusedloss.cross_entropy)(logits.detach(), target)
        torch.testing.assert_close(found, TRANSFORMS[name](F.cross_entropy)(logits.detach(), target))
    assert len(calls) == 2
    plain = served(logits, target)
    assert len(calls) == 3
    assert equal(plain, without_known(lambda: served(logits, target)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:There is a performance drop")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_a_batch_of_nested_tensors(layout: torch.layout) -> None:
    """PyTorch's comparison with known tensors ends the process where one has no sizes."""
    logits, target = problem()
    for _ in range(3):
        served(logits, target)
        torch.vmap(fusedloss.cross_entropy)(logits.detach().expand(2, N, C), target.expand(2, N))
    nested = [
        torch.nested.nested_tensor([value[:length] for length in (2, 3)], layout=layout) for value in (logits.detach(), target)
    ]
    for _ in range(3):
        found, expected = torch.vmap(fusedloss.cross_entropy)(*nested), torch.vmap(F.cross_entropy)(*nested)
        for mine, its in zip(found.unbind(), expected.unbind(), strict=True):
            torch.testing.assert_close(mine, its)
