"""For the tests of known calls: one problem, how it is served, and who took the long way."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from paths import CPU, GPU, INTERPRETER, Path, entered
from problems import make_logits, make_target
from torch import Tensor

import fusedloss
from fusedloss import known, serving

N, C = 6, 10


@pytest.fixture(params=[CPU, INTERPRETER, GPU])
def kernel_path(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A test's `path`: those that know calls again."""
    with entered(request.param):
        yield request.param


def none_known(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that take the long way from now on, since none is known."""
    monkeypatch.setattr(known, "KNOWN", {})
    monkeypatch.setattr(known, "_seen", {})
    monkeypatch.setattr(known, "_lengths", {})
    seen: list[Any] = []
    dispatch = serving.compute
    monkeypatch.setattr(serving, "compute", lambda *arguments: seen.append(arguments) or dispatch(*arguments))
    return seen


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return make_logits(N, C, dtype=dtype).requires_grad_(), make_target(N, n_classes=C, ignored=-100)


def served(logits: Tensor, target: Tensor, *arguments: Any, dloss: float = 1.0, **options: Any) -> tuple[Tensor, Tensor | None]:
    loss = fusedloss.cross_entropy(logits, target, *arguments, **options)
    if not loss.requires_grad:
        return loss, None
    return loss.detach(), torch.autograd.grad(loss, logits, torch.full_like(loss, dloss))[0]


def equal(ours: tuple[Tensor, Tensor | None], theirs: tuple[Tensor, Tensor | None]) -> bool:
    return all(
        (a is None and b is None) or (a.dtype == b.dtype and _strides(a) == _strides(b) and torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )


def _strides(tensor: Tensor) -> list[int]:
    """But of dimensions of size 1, which tell nothing."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


def without_known(call: Callable[[], Any]) -> Any:
    """What the long way returns, or the exception that it raises."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known, "KNOWN", {})  # where nothing is found, nor left for later
        return outcome(call)


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return type(error), str(error)
