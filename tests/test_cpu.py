"""What only the CPU kernel promises: any number of threads, every instruction set, errors before writes, a visible fallback.

Values, gradients and semantics are tested with all other paths in test_values.py and test_semantics_*.py; memory safety by
`make sanitize` (fuzz_cpu_kernel.cpp).
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import check_against_torch
from problems import make_logits, make_probabilities, make_target, make_weight

import fusedloss
from fusedloss.backends import cpu, cpu_abi
from fusedloss.backends.outputs import Outputs
from fusedloss.plan import Inputs, Options

pytestmark = pytest.mark.skipif(cpu.MISSING is not None, reason=f"no C++ kernel: {cpu.MISSING}")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _value_and_gradient(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = fusedloss.cross_entropy(leaf, target, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


@pytest.mark.parametrize("shape", [(5000, 10), (700, 100), (60, 4999), (6, 21, 50, 31), (1, 3000, 130)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none"}, {"reduction": "topk", "top_k": 0.3}, {"z_loss": 1e-3, "softcap": 9.0}],
    ids=["mean", "none", "topk", "extras"],
)
def test_threads_change_no_bit(two_threads: None, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    logits = make_logits(*shape)
    target = make_target(shape[0], *shape[2:], n_classes=shape[1], ignored=-100)
    assert fusedloss.plan(logits, target, **options).threads == 2
    two = _value_and_gradient(logits, target, label_smoothing=0.1, **options)
    torch.set_num_threads(1)
    one = _value_and_gradient(logits, target, label_smoothing=0.1, **options)
    assert torch.equal(two[0], one[0])
    assert torch.equal(two[1], one[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(5000, 10), (6, 21, 50, 31)], ids=str)
def test_threads_change_no_bit_of_probabilities(two_threads: None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits, target = make_logits(*shape, dtype=dtype), make_logits(*shape, dtype=dtype).softmax(1)
    assert fusedloss.plan(logits, target).threads == 2
    two = _value_and_gradient(logits, target)
    torch.set_num_threads(1)
    one = _value_and_gradient(logits, target)
    assert torch.equal(two[0], one[0])
    assert torch.equal(two[1], one[1])


def test_small_problems_wake_no_thread(two_threads: None) -> None:
    assert fusedloss.plan(make_logits(128, 10), make_target(128, n_classes=10)).threads == 1


@pytest.fixture(params=cpu_abi.ISA_NAMES[1 : cpu_abi.ISA_NAMES.index(cpu.ISA) + 1] if cpu.LIBRARY else [])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    assert cpu.LIBRARY is not None
    monkeypatch.setattr(cpu, "LIBRARY", replace(cpu.LIBRARY, requested_isa=cpu_abi.ISA_NAMES.index(request.param)))
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# pixels: all classes in a tile that L1 holds, in one that L2 holds, in several
@pytest.mark.parametrize(
    "shape", [(9, 10), (7, 100), (3, 5003), (2, 30, 4, 5), (2, 150, 7, 11), (1, 256, 66), (2, 300, 3, 7)], ids=str
)
def test_every_instruction_set(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = make_logits(*shape, dtype=dtype)
    target = make_target(shape[0], *shape[2:], n_classes=shape[1], ignored=-100)
    check_against_torch(logits, target)
    check_against_torch(logits, target, make_weight(shape[1], dtype=dtype), label_smoothing=0.1, reduction="none", dloss=0.5)
    if dtype != torch.float64 or shape[1] < 5000:  # there PyTorch's float64 is 30 times further from long double than ours
        check_against_torch(logits, make_probabilities(*shape, dtype=dtype), label_smoothing=0.1)


@pytest.mark.parametrize("isa_of_specials", ["avx512", "baseline"])
def test_special_logits(monkeypatch: pytest.MonkeyPatch, isa_of_specials: str) -> None:
    """Infinities and NaN in any position of a row, in both layouts, end where PyTorch's do."""
    assert cpu.LIBRARY is not None
    monkeypatch.setattr(cpu, "LIBRARY", replace(cpu.LIBRARY, requested_isa=cpu_abi.ISA_NAMES.index(isa_of_specials)))
    for n_cols in (10, 70, 5000):
        for value in (float("inf"), float("-inf"), float("nan"), 1e4, -1e4):
            for column in (0, 3, n_cols - 1):
                logits = make_logits(4, n_cols, spread=0.5)
                logits[1, column] = value
                logits[2] = float("-inf")
                target = torch.tensor([1, 3, 2, n_cols - 1])
                check_against_torch(logits, target, reduction="none")
                check_against_torch(logits[:2], target[:2], reduction="sum")


@pytest.mark.parametrize("bad", [10, -1, 2**62, -(2**63)])
def test_an_index_out_of_range_is_an_error_before_anything_is_written(bad: int) -> None:
    logits, target = make_logits(300, 10), make_target(300, n_classes=10)
    target[299] = bad
    outputs: list[torch.Tensor] = []
    allocate = cpu.allocate_forward

    def remember(*arguments: Any) -> Outputs:
        results = allocate(*arguments)
        outputs.extend(result.fill_(7) for result in results if result is not None)
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "allocate_forward", remember)
        with pytest.raises(IndexError, match=rf"Target {bad} is out of bounds\. \(n_classes 10, in row 299\)"):
            cpu.forward(Inputs(logits, target), Options(), torch.float32, True)
    assert [output.numel() for output in outputs] == [1, 3000]
    assert all((output == 7).all() for output in outputs)


def test_an_index_that_changed_since_the_forward_is_no_address() -> None:
    logits = make_logits(3, 100).requires_grad_()
    target = make_target(3, n_classes=100)
    inputs = Inputs(logits.detach(), target)
    outputs = cpu.forward(inputs, Options("none"), torch.float32, True)
    target[1] = 10**12
    gradient = cpu.backward(torch.ones(3), inputs, outputs.saved, Options("none"))
    assert outputs.loss.isfinite().all()
    assert gradient[1].isnan().all()
    assert gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("two_labels", [False, True])
@pytest.mark.parametrize("shape", [(600, 100), (600, 200), (2, 21, 3000)])
def test_an_index_that_changes_during_the_forward_is_no_address(
    two_threads: None, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], two_labels: bool
) -> None:
    """Its row becomes NaN, and no other. The labels change when the kernel starts threads for its rows: it has looked at them."""
    rows = (shape[0], *shape[2:])
    logits, target = make_logits(*shape), make_target(*rows, n_classes=shape[1])
    target_b = make_target(*rows, n_classes=shape[1]).roll(1) if two_labels else None
    inputs = Inputs(logits, target, target_b, weight=make_weight(shape[1]))
    expected = [cpu.forward(inputs, Options(reduction), torch.float32, reduction == "sum") for reduction in ("none", "sum")]
    row = torch.arange(target.numel()) == 7
    changing = target if target_b is None else target_b
    before = changing.clone()

    @ctypes.CFUNCTYPE(None, ctypes.CFUNCTYPE(None, ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def gomp_parallel(share: Any, job: int, n_threads: int, flags: int) -> None:
        changing.view(-1)[row] = 10**12
        share(job)

    assert cpu.LIBRARY is not None
    address = ctypes.cast(gomp_parallel, ctypes.c_void_p).value
    monkeypatch.setattr(cpu, "LIBRARY", replace(cpu.LIBRARY, gomp_parallel=address))
    loss = cpu.forward(inputs, Options("none"), torch.float32, False).loss
    changing.copy_(before)
    fused = cpu.forward(inputs, Options("sum"), torch.float32, True)
    assert changing.view(-1)[row] == 10**12
    assert loss[row].isnan()
    assert fused.loss.isnan()
    assert torch.equal(loss[~row], expected[0].loss[~row])
    gradient, before_change = (outputs.dlogits.movedim(1, -1).flatten(0, -2) for outputs in (fused, expected[1]))
    assert gradient[row].isnan().all()
    assert torch.equal(gradient[~row], before_change[~row])


def test_an_index_that_changes_after_it_was_found_out_of_range() -> None:
    with pytest.raises(IndexError, match="Target 3 is out of bounds"):
        cpu.raise_out_of_bounds(1, 10, torch.tensor([1, 3]))


def test_strategies_agree() -> None:
    """Fused and recomputed gradients of the same problem: the same bits where a row is one block of columns."""
    logits, target = make_logits(50, 1000), make_target(50, n_classes=1000, ignored=-100)
    inputs, options = Inputs(logits, target), Options("mean", label_smoothing=0.1, z_loss=1e-3, logit_scale=0.5)
    fused = cpu.forward(inputs, options, torch.float32, True).dlogits
    options = options._replace(reduction="none")
    saved = cpu.forward(inputs, options, torch.float32, True).saved
    dloss = torch.full((50,), 1 / int((target != -100).sum()))
    assert torch.equal(cpu.backward(dloss, inputs, saved, options), fused)


def test_fused_mode_allocates_one_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = make_logits(64, 1000), make_target(64, n_classes=1000)
    sizes: list[int] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if "empty" in str(function) or "clone" in str(function) or "copy" in str(function):
                sizes.append(result.numel() * result.element_size())
            return result

    with Record():
        cpu.forward(Inputs(logits, target), Options(), torch.float32, True)
    assert sorted(sizes)[-1] == 64 * 1000 * 4
    assert sum(sizes) < 1.05 * 64 * 1000 * 4


@pytest.mark.parametrize("shape", [(6, 12), (70, 300), (2, 5, 3, 4), (1, 300, 70)], ids=str)
def test_any_strides(shape: tuple[int, ...]) -> None:
    """Every other row or class, transposed, expanded, channels last: read where they lie."""
    big = make_logits(*(2 * size for size in shape))
    views = [
        big[tuple(slice(None, None, 2) for _ in shape)],
        big[tuple(slice(0, size) for size in shape)],
        make_logits(*reversed(shape)).permute(*reversed(range(len(shape)))),
        make_logits(1, *shape[1:]).expand(shape),
        make_logits(*shape).movedim(1, -1).contiguous().movedim(-1, 1),
    ]
    target = make_target(shape[0], *shape[2:], n_classes=shape[1])
    for view in views:
        check_against_torch(view, target)
        check_against_torch(view, target, reduction="none", label_smoothing=0.1)
        check_against_torch(view, make_probabilities(*shape))


def test_without_the_library_the_reference_serves_and_says_why() -> None:
    program = """
import importlib.util, torch
from fusedloss.backends import cpu, cpu_abi
cpu.MISSING, cpu.LIBRARY = "the compiled CPU kernel is missing: a test", None
import fusedloss
from fusedloss.__main__ import report
logits, target = torch.randn(4, 10, requires_grad=True), torch.tensor([1, 2, 3, 4])
assert str(fusedloss.plan(logits, target)).startswith("torch: the compiled CPU kernel is missing")
fusedloss.cross_entropy(logits, target).backward()
assert "reference path: the compiled CPU kernel is missing" in report()
try:
    with fusedloss.backend("cpu"):
        fusedloss.cross_entropy(logits, target)
except RuntimeError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env={**os.environ})
    assert result.returncode == 0, result.stderr
    assert "backend 'cpu' was asked for, but the compiled CPU kernel is missing" in result.stdout


@pytest.mark.parametrize("shape", [(4000, 10), (400, 100), (4, 100, 500)], ids=str)
def test_denormals_are_flushed_by_all_threads_or_none(two_threads: None, shape: tuple[int, ...]) -> None:
    """The setting is a thread's own, and which thread runs which rows is chance."""
    logits = make_logits(*shape, spread=60.0)
    target = make_target(shape[0], *shape[2:], n_classes=shape[1])
    found = []
    try:
        for flush in (True, False):
            torch.set_flush_denormal(flush)
            for threads in (2, 1):
                torch.set_num_threads(threads)
                results = [_value_and_gradient(logits, target) for _ in range(20)]
                found += [(flush, loss, gradient.view(torch.int32)) for loss, gradient in results]
    finally:
        torch.set_flush_denormal(False)
    for flush in (True, False):
        (loss, gradient), *others = [result[1:] for result in found if result[0] is flush]
        assert all(torch.equal(loss, other[0]) and torch.equal(gradient, other[1]) for other in others)
    assert not torch.equal(found[0][2], found[-1][2])  # else there was nothing to flush


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_sum_beyond_float64_is_infinite(reduction: str) -> None:
    logits = torch.zeros(2, 2, dtype=torch.float64)
    logits[:, 0] = 1.6e308
    target = torch.ones(2, dtype=torch.long)
    assert F.cross_entropy(logits, target, reduction=reduction) == torch.inf
    assert fusedloss.cross_entropy(logits, target, reduction=reduction) == torch.inf
    assert F.cross_entropy(logits, target, torch.tensor([1.0, -1.0]).double(), reduction="sum") == -torch.inf
    assert fusedloss.cross_entropy(logits, target, torch.tensor([1.0, -1.0]).double(), reduction="sum") == -torch.inf


@pytest.mark.parametrize("value", ["AVX2", "avx", "", "baseline"])
def test_the_instruction_set_asked_for(value: str) -> None:
    def answer(value: str) -> subprocess.CompletedProcess[str]:
        program = "from fusedloss.backends import cpu; print(cpu.ISA)"
        return subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "FUSEDLOSS_CPU_ISA": value},
        )

    result = answer(value)
    if value in ("", "baseline"):
        assert result.stdout.strip() == (value or answer("auto").stdout.strip())
    else:
        assert f"FUSEDLOSS_CPU_ISA must be one of auto, baseline, avx2, avx512, avx512bf16, but is {value!r}" in result.stderr
