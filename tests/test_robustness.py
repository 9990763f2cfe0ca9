"""Threads, worker processes, offsets beyond 2**31 elements, and a PyTorch without some of its private names."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compiled import ALLOWED_SPILLS, TARGETS, compile_for, launches, report
from fusedloss.kernels.constants import MAX_ROWS
from paths import CPU, GPU, INTERPRETER, REFERENCE, Path, entered
from problems import make_logits, make_target, make_weight
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fusedloss
from fusedloss import sharded
from fusedloss.backends import triton
from fusedloss.checks import Facts, InputFacts
from fusedloss.plan import Inputs, Options
from fusedloss.route import TOO_MANY_ROWS, route_with
from fusedloss.world import PLAIN

FAR = 2**31  # elements; a signed 32-bit offset ends one before


@pytest.mark.parametrize("path", [REFERENCE, CPU, GPU])  # Triton's interpreter itself keeps one grid per process
@pytest.mark.parametrize("reduction", ["none", "mean", "topk"])
def test_eight_threads_at_once(path: Path, reduction: str) -> None:
    """Each with its own tensors, to the last bit what one thread computes."""
    options = {"reduction": reduction, "top_k": 0.3 if reduction == "topk" else None, "label_smoothing": 0.1}
    with entered(path):
        targets = [make_target(33, n_classes=100, ignored=-100, seed=n) for n in range(8)]
        problems = [(make_logits(33, 100 + n % 2, seed=n), target) for n, target in enumerate(targets)]  # two kinds of calls
    gradients: list[list[Tensor]] = [[] for _ in problems]
    barrier = threading.Barrier(8)

    def step(logits: Tensor, target: Tensor) -> Tensor:
        leaf = logits.detach().requires_grad_()
        fusedloss.cross_entropy(leaf, target, **options).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    def work(n: int) -> None:
        barrier.wait()
        gradients[n].extend(step(*problems[n]) for _ in range(25))

    chosen = fusedloss.backend(path.backend) if path.device == "cpu" else fusedloss.backend("auto")
    with chosen:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for problem, found in zip(problems, gradients, strict=True):
            alone = step(*problem)
            assert len(found) == 25
            assert all(torch.equal(gradient, alone) for gradient in found)
            assert alone.abs().max() > 0


class Losses(Dataset[float]):
    """What a worker computes for a sample: loss and gradient of a batch, as for hard example mining."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, n: int) -> float:
        logits = make_logits(64, 1000, seed=n).requires_grad_()
        loss = fusedloss.cross_entropy(logits, make_target(64, n_classes=1000, seed=n))
        loss.backward()
        assert logits.grad is not None
        return loss.item() + logits.grad.abs().sum().item()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12 on, at every fork
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(two_threads: None, method: str) -> None:
    """After the parent has used its OpenMP threads, which a fork does not copy."""
    here = [Losses()[n] for n in range(4)]
    loader = DataLoader(Losses(), batch_size=1, num_workers=1, multiprocessing_context=method, timeout=60)
    assert [batch.item() for batch in loader] == pytest.approx(here, rel=1e-6)


def _memory(n_elements: int) -> Tensor:
    """bf16 that is never touched but at the places in question: pages that nobody writes cost nothing."""
    try:
        return torch.empty(n_elements, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")


def _strided(values: Tensor, strides: tuple[int, ...]) -> Tensor:
    span = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
    far = _memory(span).as_strided(values.shape, strides)
    far.copy_(values)
    return far


# Logits and, where the kernel says so, their gradient lie so far apart that the last offset passes 2**31.
LAYOUTS = {
    "shared tile": ((3, 10), (FAR // 2 + 16, 1)),
    "a program per row": ((3, 600), (FAR // 2 + 16, 1)),
    "ragged rows": ((3, 601), (FAR // 2 + 3, 1)),
    "pixels": ((2, 5, 7), (FAR + 8, 8, 1)),
    "classes far apart": ((7, 3), (1, FAR // 2 + 8)),
}


# Memory that is not touched is free on the CPU only.
@pytest.mark.parametrize("path", [REFERENCE, CPU, INTERPRETER], indirect=True)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_beyond_int32(path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, reduction: str) -> None:
    shape, strides = LAYOUTS[layout]
    near = make_logits(*shape, dtype=torch.bfloat16)
    target = make_target(shape[0], *shape[2:], n_classes=shape[1], ignored=-100)
    expected = near.clone().requires_grad_()
    loss = fusedloss.cross_entropy(expected, target, reduction=reduction)
    loss.sum().backward()

    for module in ("outputs", "triton", "cpu"):
        monkeypatch.setattr(
            f"fusedloss.backends.{module}.allocate_gradient", lambda logits: _strided(torch.zeros(shape), strides)
        )
    far = _strided(near, strides).requires_grad_()
    found = fusedloss.cross_entropy(far, target, reduction=reduction)
    (gradient,) = torch.autograd.grad(found.sum(), far)
    torch.testing.assert_close(found, loss, rtol=0, atol=0)
    assert expected.grad is not None
    assert path.backend == "reference" or gradient.stride() == strides
    torch.testing.assert_close(gradient, expected.grad, rtol=2**-7, atol=0)  # another tile may sum in another order


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_wide_strides_compile(monkeypatch: pytest.MonkeyPatch, target: str, layout: str) -> None:
    """Triton specialises on arguments of 64 bits; nothing spills because of them."""
    assert target in TARGETS
    shape, strides = LAYOUTS[layout]

    def call() -> Tensor:
        classes = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
        return fusedloss.cross_entropy(
            _strided(torch.zeros(shape), strides).requires_grad_(), classes, make_weight(shape[1]).bfloat16()
        )

    for launch in launches(monkeypatch, target, call):
        assert report(compile_for(launch, target), target).spills <= ALLOWED_SPILLS


def test_plan_of_more_than_two_to_the_31_logits() -> None:
    n_rows, n_cols = 70_000, 50_257
    logits: Any = torch.empty(n_rows, n_cols, dtype=torch.bfloat16, device="meta", requires_grad=True)
    assert logits.numel() > FAR
    with fusedloss.backend("triton"):
        plan = fusedloss.plan(logits, torch.empty(n_rows, dtype=torch.long, device="meta"))
        one_pixel_each = torch.empty(n_rows, 7, 100, 50, dtype=torch.bfloat16, device="meta")
        pixels = fusedloss.plan(one_pixel_each, torch.empty(n_rows, 100, 50, dtype=torch.long, device="meta"))
    assert plan.write_bytes == 2 * n_rows * n_cols
    assert plan.forward is not None
    assert plan.forward.n_programs == n_rows * plan.forward.n_slices
    assert pixels.forward is not None
    assert pixels.forward.n_programs * pixels.forward.shape.rows >= n_rows * 100 * 50
    assert pixels.forward.n_programs < FAR  # the grid of a launch


def test_rows_too_many_for_the_kernels_of_gpus() -> None:
    """Of a row they keep up to 6 numbers, each n_rows behind the one before, in 32 bits: PyTorch's operators serve more."""
    n_rows = MAX_ROWS + 1
    assert 6 * MAX_ROWS < FAR <= 6 * n_rows
    logits = torch.empty(n_rows, 2, dtype=torch.bfloat16, device="meta")
    target = torch.empty(n_rows, dtype=torch.int64, device="meta")
    refused = pytest.raises(RuntimeError, match="backend 'triton' was asked for, but the kernels for GPUs have 32 bits")
    with fusedloss.backend("triton"):
        assert fusedloss.plan(logits[1:], target[1:]).backend == "triton"
        assert sharded._backend(Inputs(logits[1:], target[1:])) is triton
        with refused:
            fusedloss.cross_entropy(logits, target)
        with refused:
            fusedloss.cross_entropy(logits.t().unsqueeze(0), target.unsqueeze(0))  # one image
        with refused:
            fusedloss.linear_cross_entropy(logits, logits[:7], target)
        with refused:
            sharded._backend(Inputs(logits, target))

    cuda = torch.device("cuda")
    facts = InputFacts(Facts(logits.shape, logits.dtype, cuda, True), Facts(target.shape, torch.int64, cuda, False), *[None] * 4)
    for options, backend in ((Options(), "torch"), (Options(z_loss=0.1), "reference")):
        route = route_with(facts, options, None, False, PLAIN, "auto")
        assert (route.backend, route.reason) == (backend, TOO_MANY_ROWS)


WITHOUT_PRIVATE_NAMES = """
import torch, torch.nn.functional as F
import torch._dynamo  # which looks for them when it is imported

for module, name in (
    (torch._C, "_len_torch_function_stack"),
    (torch._C, "_len_torch_dispatch_stack"),
    (torch._C, "_is_any_autocast_enabled"),
    (torch._C._autograd, "_get_current_graph_task_keep_graph"),
    (torch._C._autograd, "_top_saved_tensors_default_hooks"),
    (torch._C._functorch, "is_legacy_batchedtensor"),
    (torch._C._dynamo.guards, "TensorGuards"),
):
    delattr(module, name)

import fusedloss

torch.manual_seed(0)
weight, target = torch.randn(7, 5), torch.tensor([0, 3, 6, -100])

def ours_of_a_layer(x, target, **options):
    return fusedloss.linear_cross_entropy(x, weight, target, **options)

def theirs_of_a_layer(x, target, **options):
    return F.cross_entropy(x @ weight.T, target, **options)

for ours, theirs, width in ((fusedloss.cross_entropy, F.cross_entropy, 7), (ours_of_a_layer, theirs_of_a_layer, 5)):
    for reduction in ("mean", "none"):
        for autocast in (False, True):
            x = torch.randn(4, width, requires_grad=True)
            results = []
            for function in (ours, theirs):
                for _ in range(3):
                    with torch.autocast("cpu", enabled=autocast):
                        loss = function(2 * x, target, reduction=reduction).sum()
                    kept = torch.autograd.grad(3 * loss, x, retain_graph=True)[0].clone()
                    (curved,) = torch.autograd.grad(loss, x, create_graph=True)
                    found = loss.detach(), kept, curved.detach(), *torch.autograd.grad(loss, x)
                results.append(found)
            torch.testing.assert_close(*results, rtol=2e-2 if autocast else 1e-5, atol=2e-2 if autocast else 1e-5)
"""


def test_a_torch_without_some_private_names() -> None:
    """What is missing makes calls slower, but no other (the table in CONTRIBUTING.md has the names that must be there)."""
    result = subprocess.run([sys.executable, "-c", WITHOUT_PRIVATE_NAMES], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
