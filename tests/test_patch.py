"""patch_torch(): code that knows PyTorch only, run by fusedloss."""

import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import make_logits, make_probabilities, make_target, make_weight
from torch import nn
from torch.nn.functional import cross_entropy as bound_before

import fusedloss
from fusedloss import known, serving

TORCH_CROSS_ENTROPY = F.cross_entropy


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What reached fusedloss: the reduction of every call."""
    seen: list[str] = []
    dispatch = serving.compute

    def recording(inputs: Any, options: Any, route: Any) -> Any:
        seen.append(options.reduction)
        return dispatch(inputs, options, route)

    monkeypatch.setattr(serving, "compute", recording)
    monkeypatch.setattr(known, "find", lambda *_: (None, None))  # every one passes here
    return seen


@pytest.fixture(autouse=True)
def _left_as_found() -> Iterator[None]:
    yield
    assert F.cross_entropy is TORCH_CROSS_ENTROPY


def _problem() -> tuple[torch.Tensor, torch.Tensor]:
    return make_logits(7, 10), make_target(7, n_classes=10, ignored=-100)


def test_function_and_module(calls: list[str]) -> None:
    logits, target = _problem()
    before = nn.CrossEntropyLoss(reduction="sum")
    expected = before(logits, target)
    with fusedloss.patch_torch():
        during = nn.CrossEntropyLoss()
        torch.testing.assert_close(before(logits, target), expected)
        during(logits, target)
        F.cross_entropy(logits, target, None, None, -100, None, "none", 0.1)
        torch.nn.functional.cross_entropy(input=logits, target=target, reduction="mean")
    assert calls == ["sum", "mean", "none", "mean"]
    before(logits, target)
    during(logits, target)
    F.cross_entropy(logits, target)
    assert len(calls) == 4


def test_as_a_function(calls: list[str]) -> None:
    patch = fusedloss.patch_torch()
    try:
        F.cross_entropy(*_problem())
    finally:
        patch.close()
    F.cross_entropy(*_problem())
    assert calls == ["mean"]
    patch.close()  # undoes nothing twice
    with fusedloss.patch_torch():
        F.cross_entropy(*_problem())
    assert calls == ["mean"] * 2


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_reference_calls_the_original(calls: list[str], backend: str) -> None:
    """No recursion: not in the forward, nor where a second derivative goes through PyTorch's operators."""
    logits, target = make_logits(5, 6, dtype=torch.float64).requires_grad_(), make_probabilities(5, 6, dtype=torch.float64)
    with fusedloss.patch_torch(), fusedloss.backend(backend):
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, target), logits, create_graph=True)
        gradient.square().sum().backward()
        batched = torch.func.vmap(F.cross_entropy)(logits.detach().expand(2, 5, 6), target.expand(2, 5, 6))
    assert calls == ["mean", "mean"]
    assert logits.grad is not None
    assert logits.grad.abs().max() > 0
    torch.testing.assert_close(batched, F.cross_entropy(logits.detach(), target).expand(2))


def test_errors_are_torchs(calls: list[str]) -> None:
    with fusedloss.patch_torch():
        with pytest.raises(ValueError, match=r"Expected input batch_size \(4\) to match target batch_size \(3\)\."):
            F.cross_entropy(torch.zeros(4, 5), torch.zeros(3, dtype=torch.long))
        with pytest.raises(TypeError, match="top_k"):
            F.cross_entropy(*_problem(), reduction="topk", top_k=1)  # type: ignore[call-arg]
    assert calls == []


def test_an_exception_inside_the_block() -> None:
    with pytest.raises(ZeroDivisionError), fusedloss.patch_torch():
        _ = 1 / 0
    assert F.cross_entropy is TORCH_CROSS_ENTROPY


def test_blocks_nest_and_overlap(calls: list[str]) -> None:
    with fusedloss.patch_torch():
        with fusedloss.patch_torch():
            F.cross_entropy(*_problem())
        F.cross_entropy(*_problem())
    assert len(calls) == 2
    first, second = fusedloss.patch_torch(), fusedloss.patch_torch()
    first.close()
    F.cross_entropy(*_problem())
    second.close()
    F.cross_entropy(*_problem())
    assert len(calls) == 3


def test_somebody_else_patches_too(calls: list[str]) -> None:
    """Whoever replaced the function first has it back; a wrapper of ours that outlives the block is PyTorch's again."""

    def wrapped(inner: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: 2 * inner(*args, **kwargs)

    theirs = wrapped(F.cross_entropy)
    F.cross_entropy = theirs  # type: ignore[assignment]
    try:
        with fusedloss.patch_torch():
            F.cross_entropy(*_problem())
        assert F.cross_entropy is theirs
    finally:
        F.cross_entropy = TORCH_CROSS_ENTROPY
    assert calls == ["mean"]
    with fusedloss.patch_torch():
        kept = F.cross_entropy
        F.cross_entropy = wrapped(kept)  # type: ignore[assignment]
    try:
        torch.testing.assert_close(F.cross_entropy(*_problem()), 2 * TORCH_CROSS_ENTROPY(*_problem()))
    finally:
        F.cross_entropy = TORCH_CROSS_ENTROPY
    assert calls == ["mean"]


def test_a_name_bound_before_is_not_reached(calls: list[str]) -> None:
    with fusedloss.patch_torch():
        bound_before(*_problem())
    assert calls == []


def test_every_thread_is_patched_and_blocks_of_threads_overlap(calls: list[str]) -> None:
    barrier = threading.Barrier(4)

    def work() -> None:
        for _ in range(20):
            with fusedloss.patch_torch():
                barrier.wait()
                F.cross_entropy(*_problem())

    threads = [threading.Thread(target=work) for _ in range(4)]
    with fusedloss.patch_torch():
        other = threading.Thread(target=lambda: F.cross_entropy(*_problem()))
        other.start()
        other.join()
    assert len(calls) == 1
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 81


def test_modules_stay_torchs(calls: list[str]) -> None:
    """A module built, or pickled, while patched is PyTorch's, loadable where fusedloss is not installed."""
    with fusedloss.patch_torch():
        module = nn.CrossEntropyLoss(make_weight(10), label_smoothing=0.1)
        data = pickle.dumps((module, F.cross_entropy))
        assert type(module) is nn.CrossEntropyLoss
    assert b"fusedloss" not in data
    loaded, function = pickle.loads(data)
    assert function is TORCH_CROSS_ENTROPY
    torch.testing.assert_close(loaded(*_problem()), module(*_problem()))
    assert calls == []


def test_our_module_inside(calls: list[str]) -> None:
    with fusedloss.patch_torch():
        fusedloss.CrossEntropyLoss(reduction="max")(*_problem())
    assert calls == ["max"]


class Logged(torch.Tensor):
    """A subclass with an override of its own, keyed as third-party code does: by the function that it imported."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is bound_before:
            return "theirs"
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_keeps_its_override(calls: list[str]) -> None:
    logits, target = _problem()
    with fusedloss.patch_torch():
        assert F.cross_entropy(logits.as_subclass(Logged), target) == "theirs"
        with torch.device("cpu"):  # a mode, not a subclass
            F.cross_entropy(logits, target)
    assert calls == ["mean"]


def test_under_compile(calls: list[str]) -> None:
    logits, target = _problem()
    with fusedloss.patch_torch():
        compiled = torch.compile(lambda x: nn.CrossEntropyLoss()(x, target), fullgraph=True, backend="aot_eager")
        leaf = logits.requires_grad_()
        loss = compiled(leaf)
        loss.backward()
    assert set(calls) == {"mean"}  # traced; how often is the compiler's affair
    torch.testing.assert_close(loss, TORCH_CROSS_ENTROPY(logits, target))
    expected = logits.detach().clone().requires_grad_()
    TORCH_CROSS_ENTROPY(expected, target).backward()
    torch.testing.assert_close(leaf.grad, expected.grad)


def test_compiled_before(calls: list[str]) -> None:
    """torch.compile guards the function that it traced."""
    logits, target = _problem()
    compiled = torch.compile(lambda x: F.cross_entropy(x, target), backend="aot_eager")
    compiled(logits)
    assert calls == []
    with fusedloss.patch_torch():
        torch.testing.assert_close(compiled(logits), TORCH_CROSS_ENTROPY(logits, target))
        assert calls
    n_calls = len(calls)
    torch.testing.assert_close(compiled(logits), TORCH_CROSS_ENTROPY(logits, target))
    assert len(calls) == n_calls


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_compiles_torchs(calls: list[str]) -> None:
    logits, target = _problem()
    with fusedloss.patch_torch():
        scripted = torch.jit.script(nn.CrossEntropyLoss(label_smoothing=0.1))
        torch.testing.assert_close(scripted(logits, target), TORCH_CROSS_ENTROPY(logits, target, label_smoothing=0.1))
    assert calls == []


def test_a_patch_for_good_lives_until_the_process_ends() -> None:
    code = (
        "import fusedloss, gc, torch, torch.nn.functional as F; fusedloss.patch_torch(); gc.collect(); "
        "loss = F.cross_entropy(torch.zeros(2, 4), torch.zeros(2).long()); "
        "print(F.cross_entropy.__code__.co_filename.endswith('patch.py'), loss)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True tensor(1.3863)"
