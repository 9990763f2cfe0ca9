"""Point 30 of PyTorch's semantics, the compilers' half: torch.compile, export, meta and fake tensors, fx, opcheck."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from paths import Path
from poison import poisoned_memory
from problems import make_logits, make_probabilities, make_target, make_weight
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss

OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum", "scale": 0.5, "label_smoothing": 0.1},
    {"reduction": "none", "ignore_index": 3},
    {"reduction": "max"},
    {"reduction": "topk", "top_k": 3},
    {"reduction": "topk", "top_k": 0.5},
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _loss_and_gradient(call: Callable[..., Tensor], logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = call(leaf, *args)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_30_compile_without_a_graph_break(path: Path, options: dict[str, Any]) -> None:
    def loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return fusedloss.cross_entropy(logits, target, weight, **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    problem = (
        make_logits(6, 10),
        make_target(6, n_classes=10, ignored=-100 if "ignore_index" not in options else 3),
        make_weight(10),
    )
    for ours, expected in zip(_loss_and_gradient(compiled, *problem), _loss_and_gradient(loss, *problem), strict=True):
        torch.testing.assert_close(ours, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*problem), loss(*problem))


def test_30_compile_a_training_step(any_path: Path) -> None:
    """The default compiler, forward and backward, the loss fused into what surrounds it."""
    model, criterion = nn.Linear(8, 10), fusedloss.CrossEntropyLoss(label_smoothing=0.1)
    inputs, target = make_logits(6, 8), make_target(6, n_classes=10, ignored=-100)

    def step(inputs: Tensor, target: Tensor) -> Tensor:
        return criterion(model(inputs), target)

    results = []
    for call in (step, torch.compile(step, fullgraph=True)):
        model.zero_grad()
        loss = call(inputs, target)
        loss.backward()
        assert model.weight.grad is not None
        results.append((loss.detach(), model.weight.grad.clone()))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("spatial", [(), (3, 2)])
def test_30_compile_probabilities(path: Path, spatial: tuple[int, ...]) -> None:
    compiled = torch.compile(fusedloss.cross_entropy, fullgraph=True, backend="aot_eager")
    problem = make_logits(4, 5, *spatial), make_probabilities(4, 5, *spatial), make_weight(5)
    for ours, expected in zip(
        _loss_and_gradient(compiled, *problem), _loss_and_gradient(fusedloss.cross_entropy, *problem), strict=True
    ):
        torch.testing.assert_close(ours, expected)


def test_30_new_values_do_not_recompile(path: Path) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fusedloss.cross_entropy, fullgraph=True, backend=counter)
    for seed in range(4):
        logits, target = make_logits(6, 10, seed=seed).requires_grad_(), make_target(6, n_classes=10, ignored=-100, seed=seed)
        loss = compiled(logits, target, scale=torch.tensor(0.5 + seed))
        torch.testing.assert_close(loss, (0.5 + seed) * torch.nn.functional.cross_entropy(logits, target))
    assert counter.frame_count == 1


def test_30_new_batch_sizes_do_not_recompile(path: Path) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fusedloss.cross_entropy, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for n_rows in (6, 9, 17, 5):
        problem = make_logits(n_rows, 10), make_target(n_rows, n_classes=10, ignored=-100)
        for ours, expected in zip(
            _loss_and_gradient(compiled, *problem), _loss_and_gradient(fusedloss.cross_entropy, *problem), strict=True
        ):
            torch.testing.assert_close(ours, expected)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1  # the first call may count twice: analysis restarts once for symbolic floats


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_30_export(any_path: Path, options: dict[str, Any]) -> None:
    module = fusedloss.CrossEntropyLoss(**{name: value for name, value in options.items() if name != "ignore_index"})
    logits, target = make_logits(6, 10), make_target(6, n_classes=10)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(module, (logits, target), dynamic_shapes=({0: batch}, {0: batch})).module()
    torch.testing.assert_close(exported(logits, target), module(logits, target))
    more = make_logits(11, 10), make_target(11, n_classes=10)
    torch.testing.assert_close(exported(*more), module(*more))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_30_tensors_without_values(path: Path, kind: str, options: dict[str, Any]) -> None:
    """Shape, dtype, device and layout of results without data; the real ones beside them."""
    real = make_logits(2, 10, 3), make_target(2, 3, n_classes=10), make_weight(10)
    loss, gradient = _loss_and_gradient(lambda *args: fusedloss.cross_entropy(*args, **options), *real)
    if kind == "meta":
        without = tuple(tensor.to("meta") for tensor in real)
        hollow = _loss_and_gradient(lambda *args: fusedloss.cross_entropy(*args, **options), *without)
        device = torch.device("meta")
    else:
        with FakeTensorMode() as mode:
            without = tuple(mode.from_tensor(tensor) for tensor in real)
            hollow = _loss_and_gradient(lambda *args: fusedloss.cross_entropy(*args, **options), *without)
        device = loss.device
    for ours, expected in zip(hollow, (loss, gradient), strict=True):
        assert (ours.shape, ours.dtype, ours.device) == (expected.shape, expected.dtype, device)


class Recorder(TorchDispatchMode):
    """The calls of our operators, with copies of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "fusedloss":
            self.calls.append((func, tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_30_opcheck(path: Path, options: dict[str, Any]) -> None:
    """Schemas that tell the truth about mutation and aliases, fake functions that agree with the real ones."""
    if path.backend == "reference":
        pytest.skip("the reference calls PyTorch's operators only")
    logits = make_logits(6, 10).requires_grad_()
    target = make_target(6, n_classes=10, ignored=options.get("ignore_index", -100))
    with Recorder() as recorder:
        loss = fusedloss.cross_entropy(logits, target, make_weight(10), **options)
        loss.sum().backward(torch.tensor(2.0), retain_graph=True)
        loss.sum().backward()
    assert len(recorder.calls) >= 3
    for operator, arguments in recorder.calls:
        if path.backend == "cpu":
            with poisoned_memory():
                torch.library.opcheck(operator, arguments)
        else:  # test_aot_dispatch_dynamic compares all of `saved`, of which a Triton reduction writes what its backward reads
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_30_meta_needs_no_memory(any_path: Path) -> None:
    logits = torch.empty(2**21, 128_256, dtype=torch.bfloat16, device="meta", requires_grad=True)
    loss = fusedloss.cross_entropy(logits, torch.empty(2**21, dtype=torch.long, device="meta"))
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape


def test_40_fx_symbolic_trace(any_path: Path) -> None:
    """Through the module, as torch.fx traces nn.CrossEntropyLoss: a leaf that is called."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.loss = nn.Linear(6, 5), fusedloss.CrossEntropyLoss(label_smoothing=0.1)

        def forward(self, inputs: Tensor, target: Tensor) -> Tensor:
            return self.loss(self.layer(inputs), target)

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    inputs, target = make_logits(4, 6), make_target(4, n_classes=5)
    assert traced(inputs, target).equal(model(inputs, target))


def test_40_fx_traces_the_function(any_path: Path) -> None:
    def model(logits: Tensor, target: Tensor) -> Tensor:
        return fusedloss.cross_entropy(logits, target, label_smoothing=0.1) + 1

    problem = make_logits(4, 5), make_target(4, n_classes=5)
    for _ in range(3):
        model(*problem)  # such a call is known by then
    traced = torch.fx.symbolic_trace(model)
    assert any(node.target is fusedloss.cross_entropy for node in traced.graph.nodes)
    assert traced(*problem).equal(model(*problem))


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("requires_grad", [False, True])
def test_40_jit_trace(requires_grad: bool) -> None:
    """What is recorded serves other values; a kernel's memory would be recorded as memory that nobody wrote."""
    problem = make_logits(8, 5).requires_grad_(requires_grad), make_target(8, n_classes=5, ignored=-100)
    for _ in range(3):  # known
        fusedloss.cross_entropy(*problem)
    traced = torch.jit.trace(lambda *arguments: fusedloss.cross_entropy(*arguments), problem)
    logits, target = make_logits(6, 5, seed=1).requires_grad_(requires_grad), make_target(6, n_classes=5, seed=2)
    torch.testing.assert_close(traced(logits, target), torch.nn.functional.cross_entropy(logits, target))
    if requires_grad:
        for ours, expected in zip(
            _loss_and_gradient(traced, logits, target),
            _loss_and_gradient(torch.nn.functional.cross_entropy, logits, target),
            strict=True,
        ):
            torch.testing.assert_close(ours, expected)
