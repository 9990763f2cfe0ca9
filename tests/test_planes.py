"""Pixels (N, C, H, W) of which no one stride leads through a plane: crops, planes on their side, lines outside examples."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import make_logits, make_target
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss
from fusedloss import sharded
from fusedloss.backends import cpu
from fusedloss.plan import ClassShard, Inputs, Options

pytestmark = pytest.mark.skipif(cpu.LIBRARY is None, reason="the compiled CPU kernel is missing")

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "crop": lambda x: F.pad(x, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
    "on its side": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "lines outside": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
}
SHAPES = [(2, 5, 3, 16), (3, 12, 4, 19), (2, 70, 3, 5), (1, 70, 2, 33), (2, 7, 60, 3), (2, 5, 24, 33)]


def loss_and_gradient(loss: Callable[..., Tensor], logits: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, target, reduction=reduction)
    upstream = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view(value.shape)
    (gradient,) = torch.autograd.grad(value, leaf, upstream)
    return value.detach(), gradient


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_they_are_read_where_they_lie(
    layout: str, shape: tuple[int, ...], dtype: torch.dtype, reduction: str, soft: bool
) -> None:
    logits = LAYOUTS[layout](make_logits(*shape, dtype=dtype))
    if soft:
        target = make_logits(*shape, dtype=dtype, seed=1).softmax(1)
    else:
        target = make_target(shape[0], *shape[2:], n_classes=shape[1], ignored=-100)
    assert not fusedloss.plan(logits, target).copies_logits
    exact = loss_and_gradient(F.cross_entropy, logits.double().contiguous(), target.double() if soft else target, reduction)
    error = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float64: 1e-13}[dtype]
    first = loss_and_gradient(fusedloss.cross_entropy, logits, target, reduction)
    for found in (first, *(loss_and_gradient(fusedloss.cross_entropy, logits, target, reduction) for _ in range(3))):
        for ours, theirs, again in zip(found, exact, first, strict=True):
            assert ours.dtype == dtype
            assert ours.shape == theirs.shape
            assert torch.allclose(ours.double(), theirs, rtol=error, atol=error)
            assert torch.equal(ours, again)  # a known call is no other


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_entropy_has_its_gradient(layout: str) -> None:
    gradients = []
    for place in (LAYOUTS[layout], torch.clone):
        leaf = place(make_logits(2, 70, 5, 16, dtype=torch.float64)).detach().requires_grad_()
        target = make_target(2, 5, 16, n_classes=70, ignored=-100)
        value, stats = fusedloss.cross_entropy(leaf, target, reduction="none", return_stats=True)
        weights = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view(value.shape)
        (gradient,) = torch.autograd.grad((value * weights).sum() + (stats.entropy * weights).sum(), leaf)
        gradients.append(gradient)
    assert torch.allclose(*gradients, rtol=1e-12, atol=1e-14)


def test_small_chunks_of_the_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusedloss.entropy.CPU_CHUNK", 70 * 40)
    test_the_entropy_has_its_gradient("crop")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(reduction: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fusedloss.cross_entropy, backend="aot_eager", fullgraph=True)
    for shape in ((2, 5, 3, 16), (4, 5, 7, 18)):  # the second with sizes that are symbols
        logits, target = LAYOUTS["crop"](make_logits(*shape)), make_target(shape[0], *shape[2:], n_classes=5)
        found = loss_and_gradient(compiled, logits, target, reduction)
        for ours, theirs in zip(found, loss_and_gradient(F.cross_entropy, logits, target, reduction), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("crop", (2, 5, 300, 3)),  # lines of a fraction of a vector
        ("lines outside", (3, 40, 90, 5)),
        ("on its side", (2, 5, 64, 64)),  # numbers all in cache lines of their own
    ],
)
def test_some_are_copied(layout: str, shape: tuple[int, ...]) -> None:
    logits, target = LAYOUTS[layout](make_logits(*shape)), make_target(shape[0], *shape[2:], n_classes=shape[1])
    assert fusedloss.plan(logits, target).copies_logits
    assert torch.allclose(fusedloss.cross_entropy(logits, target), F.cross_entropy(logits, target))


class LargestCopy(TorchDispatchMode):
    """How many numbers the largest tensor had that was copied."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if any(word in str(func) for word in ("clone", "copy", "contiguous")):
            self.numel = max(self.numel, result.numel())
        return result


PROBABILITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "crop": LAYOUTS["crop"],
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", PROBABILITIES)
def test_probabilities_are_not_copied(layout: str, reduction: str) -> None:
    logits, target = (PROBABILITIES[layout](make_logits(2, 7, 5, 16, seed=seed).softmax(1)) for seed in (0, 1))
    expected = loss_and_gradient(F.cross_entropy, logits, target, reduction)
    with LargestCopy() as copied:
        found = loss_and_gradient(fusedloss.cross_entropy, logits, target, reduction)
    torch.testing.assert_close(found, expected)
    assert copied.numel < logits.numel()


def test_probabilities_of_sharded_classes_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "_gathered", lambda published, *_: (published.unsqueeze(0), torch.tensor(True)))  # one rank

    def loss_of_slices(logits: Tensor, target: Tensor, reduction: str) -> Tensor:
        return sharded.sharded_cross_entropy(Inputs(logits, target), Options(reduction), ClassShard(0, 7), None, logits.dtype)[0]

    logits, target = (PROBABILITIES["channels last"](make_logits(2, 7, 5, 16, seed=seed).softmax(1)) for seed in (0, 1))
    for reduction in ("mean", "none"):
        expected = loss_and_gradient(F.cross_entropy, logits, target, reduction)
        with LargestCopy() as copied:
            found = loss_and_gradient(loss_of_slices, logits, target, reduction)
        torch.testing.assert_close(found, expected)
        assert copied.numel < logits.numel()
