"""What a call holds, and who may look at it: checkpoints, saved-tensor hooks, threads, a graph used twice."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import BOTH
from problems import make_logits, make_target, make_weight
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fusedloss
from fusedloss import recover

Call = Callable[..., Any]


@pytest.fixture(params=["kept", "forgotten"])
def _logits_are(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are large are not kept; here all are, or none."""
    from fusedloss import autograd, known

    monkeypatch.setattr(autograd, "KEPT_BYTES", recover.KEPT_BYTES if request.param == "kept" else 0)
    monkeypatch.setattr(known, "KNOWN", {})
    monkeypatch.setattr(known, "_seen", {})
    monkeypatch.setattr(known, "_lengths", {})


def memory(step: Callable[[Callable[[], None]], Any], unit: int) -> tuple[int, int]:
    """What a step holds when it calls its argument, and at most; in units of so many bytes, rounded."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step(lambda: torch.ones(1).cosh_())  # a mark that nothing else leaves
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held, peak, marked = 0, 0, 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
        elif event.name() == "aten::cosh_":
            marked = held
    return round(marked / unit), round(peak / unit)


@pytest.mark.parametrize("n_losses", [1, 4])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"label_smoothing": 0.1}], ids=str)
def test_never_more_than_pytorch_holds(n_losses: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedloss import autograd

    monkeypatch.setattr(autograd, "KEPT_BYTES", 0)
    hidden, head, target = make_logits(512, 8).requires_grad_(), make_logits(8, 256), make_target(512, n_classes=256)

    def step(mark: Callable[[], None], call: Call) -> None:
        losses = [call(hidden @ head, target, **options).sum() for _ in range(n_losses)]
        mark()
        torch.stack(losses).sum().backward()

    memory(lambda mark: step(mark, fusedloss.cross_entropy), 1)  # what is loaded at the first call
    ours, theirs = (memory(lambda mark, call=call: step(mark, call), 4 * 512 * 256) for call in BOTH)
    assert ours[0] <= theirs[0] == n_losses
    assert ours[1] <= theirs[1]


@contextmanager
def _recorded(packed: list[tuple[int, ...]]) -> Iterator[None]:
    def pack(tensor: Tensor) -> Tensor:
        packed.append(tuple(tensor.shape))
        return tensor.clone()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


@pytest.mark.usefixtures("_logits_are")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hooks_have_all_of_it_in_their_hands(reduction: str) -> None:
    results, counts = [], []
    for call in BOTH:
        hidden, target = make_logits(9, 32).requires_grad_(), make_target(9, n_classes=32, ignored=-100)
        for context in (_recorded, nullcontext):
            for _ in range(3):  # known by then
                packed: list[tuple[int, ...]] = []
                with context(packed):
                    loss = call(2.0 * hidden, target, reduction=reduction).sum()
        counts.append(0)
        packed = []
        with _recorded(packed):
            loss = call(2.0 * hidden, target, reduction=reduction).sum()
        counts[-1] = packed.count((9, 32))
        results.append(
            (loss.detach(), *torch.autograd.grad(loss, hidden, retain_graph=True), *torch.autograd.grad(3 * loss, hidden))
        )
    torch.testing.assert_close(*results)
    assert counts[0] == 1 <= counts[1]


@pytest.mark.usefixtures("_logits_are")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpointed_chunks(reduction: str) -> None:
    hidden, head = make_logits(4, 256, 8).requires_grad_(), make_logits(8, 128).requires_grad_()
    target = make_target(4, 256, n_classes=128)
    results = []

    def step(mark: Callable[[], None], call: Call) -> None:
        def loss(hidden: Tensor, target: Tensor) -> Tensor:
            return call(hidden @ head, target, reduction=reduction).sum()

        chunks = [checkpoint(loss, *chunk, use_reentrant=False) for chunk in zip(hidden, target, strict=True)]
        mark()
        results.append(torch.autograd.grad(torch.stack(chunks).sum(), (hidden, head)))

    ours, theirs = (memory(lambda mark, call=call: step(mark, call), 4 * 256 * 128) for call in BOTH)
    torch.testing.assert_close(*results)
    assert ours[0] == theirs[0] == 0
    assert ours[1] <= theirs[1]


def test_save_on_cpu_and_a_backward_of_second_order() -> None:
    results = []
    for call in BOTH:
        logits, target = make_logits(9, 32).requires_grad_(), make_target(9, n_classes=32)
        with save_on_cpu():
            loss = call(2.0 * logits, target)
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        results.append((gradient.detach(), *torch.autograd.grad(gradient.square().sum(), logits)))
    torch.testing.assert_close(*results)


@pytest.mark.usefixtures("_logits_are")
@pytest.mark.parametrize("pack", [lambda tensor: tensor, torch.clone], ids=["in place", "copies"])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_edit_of_what_hooks_keep_is_noticed(reduction: str, create_graph: bool, pack: Callable[[Tensor], Tensor]) -> None:
    """Hooks keep the logits, PyTorch's loss has its own tensor; of what hooks keep autograd compares no versions."""
    weight, target = make_logits(9, 32).requires_grad_(), make_target(9, n_classes=32)
    (expected,) = torch.autograd.grad(F.cross_entropy(2.0 * weight, target, reduction=reduction).sum(), weight)
    for call in BOTH:
        logits = 2.0 * weight
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = call(logits.view(9, 32), target, reduction=reduction).sum()
        logits.detach().zero_()
        if call is F.cross_entropy or pack is torch.clone:
            (gradient,) = torch.autograd.grad(loss, weight, create_graph=create_graph)
            torch.testing.assert_close(gradient, expected)
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(loss, weight, create_graph=create_graph)


def test_hooks_that_copy_and_a_gradient_under_inference_mode() -> None:
    """What hooks unpack there has no version; nor has the gradient a derivative, though create_graph asks for one."""
    results = []
    for call in BOTH:
        logits, target = make_logits(9, 32).requires_grad_(), make_target(9, n_classes=32)
        with saved_tensors_hooks(lambda tensor: tensor, torch.clone):
            loss = call(2.0 * logits, target)
        with torch.inference_mode():
            (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        results.append(gradient.clone())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_examples_under_a_selective_checkpoint(reduction: str) -> None:
    """Which lets a backward unpack once."""
    results = []
    for call in BOTH:
        logits, target = torch.empty(0, 5).requires_grad_(), torch.empty(0, dtype=torch.int64)
        loss = checkpoint(
            lambda x, t, call=call: call(x, t, reduction=reduction).sum(),
            logits,
            target,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts([]),
        )
        results.append(torch.autograd.grad(loss, logits, create_graph=True)[0].detach())
    torch.testing.assert_close(*results)


@pytest.mark.usefixtures("_logits_are")
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum", "label_smoothing": 0.1}, {"weight": make_weight(5), "label_smoothing": 0.2}, {"reduction": "none"}],
    ids=lambda options: "+".join(options) or "plain",
)
def test_a_graph_used_many_times(options: dict[str, Any]) -> None:
    """Every backward has the same bits, whatever was done to what the one before handed out; of second order, too."""
    results = []
    for call in BOTH:
        for _ in range(3):  # known by then
            hidden, target = make_logits(6, 5).requires_grad_(), make_target(6, n_classes=5, ignored=-100)
            loss = call(2.0 * hidden, target, **options).sum()
            first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
            tripled = torch.autograd.grad(3 * loss, hidden, retain_graph=True)[0]
            second = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
            assert torch.equal(first, second)
            first.zero_()
            batched = torch.autograd.grad(loss, hidden, torch.tensor([1.0, 2.0]), retain_graph=True, is_grads_batched=True)[0]
            (slope,) = torch.autograd.grad(loss, hidden, create_graph=True)
            (curvature,) = torch.autograd.grad(slope.square().sum(), hidden)
            assert torch.equal(torch.autograd.grad(call(2.0 * hidden, target, **options).sum(), hidden)[0], second)
        results.append((second, tripled, batched, slope.detach(), curvature))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_second_order_of_forgotten_logits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Class probabilities, two labels, pixels, a learned scale of the logits: the softmax comes back from the gradient."""
    from fusedloss import autograd

    logits = make_logits(4, 5, 3, dtype=dtype).requires_grad_()
    a, b = make_target(4, 3, n_classes=5, ignored=-100), make_target(4, 3, n_classes=5)
    soft = make_logits(4, 5, 3, seed=3, dtype=dtype).softmax(1)
    weight = make_weight(5, dtype)
    for target, options in (
        (soft, {"weight": weight}),
        ((a, b, 0.3), {"label_smoothing": 0.1}),
        (a, {"logit_scale": 0.5, "sample_weight": torch.rand(4, 3, dtype=dtype, generator=torch.manual_seed(0))}),
        (a, {"z_loss": 0.1, "softcap": 5.0}),
    ):
        found = []
        for kept in (0, 2**20):
            monkeypatch.setattr(autograd, "KEPT_BYTES", kept)
            loss = fusedloss.cross_entropy(2.0 * logits, target, scale=0.7, **options)
            (slope,) = torch.autograd.grad(loss, logits, create_graph=True)
            found.append((slope.detach(), *torch.autograd.grad(slope.square().sum(), logits)))
        torch.testing.assert_close(*found)


@pytest.mark.usefixtures("_logits_are")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_threads_share_a_graph(reduction: str) -> None:
    logits, target = make_logits(6, 10).requires_grad_(), make_target(6, n_classes=10)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, target, reduction=reduction).sum(), logits)
    wrong: list[Any] = []

    def work(loss: Tensor) -> None:
        for _ in range(50):
            (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
            if gradient is None or not torch.allclose(gradient, expected):
                wrong.append(gradient)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(3):
            loss = fusedloss.cross_entropy(logits, target, reduction=reduction).sum()
            threads = [threading.Thread(target=work, args=(loss,)) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_that_is_saved_is_none(reduction: str) -> None:
    """torchviz and others that draw a graph ask each saved tensor for its shape."""
    logits, target = make_logits(6, 10).requires_grad_(), make_target(6, n_classes=10)
    for _ in range(3):
        for dtype in (logits.dtype, torch.float64):
            loss = fusedloss.cross_entropy(logits.to(dtype), target, reduction=reduction)  # in torch 2.11 the node ends with it
            assert all(isinstance(tensor, Tensor) for tensor in loss.grad_fn.saved_tensors)


def test_torchviz() -> None:
    torchviz = pytest.importorskip("torchviz")
    logits, target = make_logits(6, 10).requires_grad_(), make_target(6, n_classes=10)
    for show_saved in (False, True):
        assert "CrossEntropy" in torchviz.make_dot(fusedloss.cross_entropy(logits, target), show_saved=show_saved).source


@pytest.mark.parametrize("order", [1, 2])
def test_logits_edited_behind_autograds_back(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under sum and mean nobody reads them again, where they are large; y.data.zero_() leaves no trace."""
    from fusedloss import autograd, known

    monkeypatch.setattr(autograd, "KEPT_BYTES", 0)
    monkeypatch.setattr(known, "KNOWN", {})  # another test may have made such calls, which keep their logits
    results = []
    for call in BOTH:
        leaf, target = make_logits(6, 5).requires_grad_(), make_target(6, n_classes=5)
        logits = 2.0 * leaf
        loss = call(logits, target)
        logits.data.zero_()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=order == 2)
        results.append(torch.autograd.grad(gradient.square().sum(), leaf)[0] if order == 2 else gradient)
    torch.testing.assert_close(*results)
