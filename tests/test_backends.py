"""Which path a call takes: what is asked for, what is refused, what the plan says."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import make_logits, make_probabilities, make_target
from torch.multiprocessing.reductions import StorageWeakRef

import fusedloss
from fusedloss import backends
from fusedloss.__main__ import report
from fusedloss.backends import cpu
from fusedloss.cut_rows import SM_REGISTERS
from fusedloss.geometry import DeviceFacts
from fusedloss.plan import Cut
from fusedloss.plan_triton import ROWS_SELECTED_ALONE


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of .*triton.* but got 'cuda'"), fusedloss.backend("cuda"):
        pass


def test_requests_nest_and_end_with_their_block() -> None:
    before = backends.requested
    with fusedloss.backend("reference"):
        with fusedloss.backend("triton"):
            assert backends.requested == "triton"
        with pytest.raises(KeyError), fusedloss.backend("triton"):
            raise KeyError
        assert backends.requested == "reference"
    assert backends.requested == before


def test_requests_of_two_threads_overlap() -> None:
    """The one that began first ends first, and what holds is the other's, then what held before both."""
    before = backends.requested
    first, second = fusedloss.backend("reference"), fusedloss.backend("cpu")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert backends.requested == "cpu"
    second.__exit__(None, None, None)
    assert backends.requested == before


def _run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_the_environment_asks_for_a_backend() -> None:
    program = "import torch, fusedloss; print(fusedloss.plan(torch.zeros(2, 3), torch.zeros(2).long()).backend)"
    assert _run(program, FUSEDLOSS_BACKEND="reference").stdout == "reference\n"


def test_the_environment_asks_for_an_unknown_backend() -> None:
    result = _run("import fusedloss", FUSEDLOSS_BACKEND="fast")
    assert result.returncode != 0
    assert "FUSEDLOSS_BACKEND must be one of" in result.stderr
    assert "'fast'" in result.stderr


def test_triton_on_cpu_tensors_is_one_clear_error() -> None:
    """A request is never served by another backend."""
    with (
        fusedloss.backend("triton"),
        pytest.raises(RuntimeError, match=r"backend 'triton' was asked for, but .*device 'cpu'.*TRITON_INTERPRET=1"),
    ):
        fusedloss.cross_entropy(make_logits(4, 5), make_target(4, n_classes=5))


def test_without_triton_a_request_for_it_says_so() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch, fusedloss
from fusedloss.__main__ import report
print(report())
with fusedloss.backend("triton"):
    fusedloss.cross_entropy(torch.zeros(2, 3), torch.zeros(2).long())
"""
    result = _run(program)
    assert "triton missing" in result.stdout
    assert "RuntimeError: the kernels for GPUs need Triton, which is not installed" in result.stderr


def test_the_report_finds_triton_whatever_its_distribution_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytorch-triton-rocm, beside PyTorch for AMD's GPUs."""
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="0.0.1"))
    assert "triton 0.0.1" in report()


@pytest.mark.interpreter
def test_a_request_that_the_kernels_do_not_cover_is_refused() -> None:
    logits, target = make_logits(4, 5), make_target(4, n_classes=5)
    with fusedloss.backend("triton"):
        with pytest.raises(RuntimeError, match=r"backend 'triton' was asked for, but a torch\.func transform is active"):
            torch.func.grad(lambda x: fusedloss.cross_entropy(x, target))(logits)
        with pytest.raises(RuntimeError, match="backend 'triton' was asked for, but there are no classes"):
            fusedloss.cross_entropy(torch.zeros(2, 0), torch.zeros(2).long())


OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "none"},
    {"reduction": "topk", "top_k": 2},
    {"label_smoothing": 0.1, "scale": 2.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_plan_of_a_cpu_call(options: dict[str, Any]) -> None:
    plan = fusedloss.plan(make_logits(4, 5), make_target(4, n_classes=5), **options)
    if cpu.MISSING is None:
        assert (plan.backend, plan.strategy, plan.write_bytes, plan.holds()) == ("cpu", "forward only", 0, "nothing")
    else:
        served = "reference" if options.get("reduction") in ("max", "topk") else "torch"
        assert (plan.backend, plan.reason) == (served, cpu.MISSING)
    assert str(plan).startswith(f"{plan.backend}: {plan.reason}")


@pytest.mark.skipif(cpu.MISSING is not None, reason=str(cpu.MISSING))
@pytest.mark.parametrize("n_rows", [2, 300])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"logit_scale": 2.0}, {"reduction": "none"}], ids=str)
def test_the_plan_says_whether_the_logits_are_kept(n_rows: int, options: dict[str, Any]) -> None:
    leaf, target = make_logits(n_rows, 1000).requires_grad_(), make_target(n_rows, n_classes=1000)
    for _ in range(3):  # the third call is a known one
        logits = leaf * 1
        holds = fusedloss.plan(logits, target, **options).holds()
        memory = StorageWeakRef(logits.untyped_storage())
        loss = fusedloss.cross_entropy(logits, target, **options)
        del logits
        assert holds.endswith("the logits") is not memory.expired(), holds
        del loss


def test_the_plan_says_why_it_is_no_kernel() -> None:
    """Where no extra is asked for, PyTorch's function serves the call as well as the reference would, and faster."""
    logits, target = make_logits(4, 5), make_probabilities(4, 5).requires_grad_()
    for options, backend in (({}, "torch"), ({"scale": 0.5}, "torch"), ({"z_loss": 0.1}, "reference")):
        plan = fusedloss.plan(logits, target, **options)
        assert plan.backend == backend
        assert "probabilities" in plan.reason or plan.reason == cpu.MISSING
    with fusedloss.backend("reference"):
        assert fusedloss.plan(logits, target).reason == "asked for by backend('reference') or FUSEDLOSS_BACKEND"


@pytest.mark.parametrize("reduction", ["mean", "none", "max"])
@pytest.mark.parametrize("shape", [(128, 10), (8192, 50257), (8, 21, 512, 512)])
def test_the_plan_of_a_gpu_needs_no_gpu_and_no_data(shape: tuple[int, ...], reduction: str) -> None:
    logits = torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
    target = torch.empty(shape[0], *shape[2:], dtype=torch.long, device="meta")
    one_pass = logits.numel() * 2
    with fusedloss.backend("triton"):
        plan = fusedloss.plan(logits, target, reduction=reduction)
        with torch.no_grad():
            forward_only = fusedloss.plan(logits, target, reduction=reduction)
    assert plan.backend == "triton"
    assert plan.strategy == ("fused" if reduction == "mean" else "recompute")
    assert plan.read_bytes is not None
    assert plan.read_bytes >= one_pass
    assert plan.write_bytes == one_pass
    # A fused gradient is multiplied by an upstream gradient other than 1.
    more = f"  upstream  gradient other than 1: {one_pass:,} bytes read and {one_pass:,} written more, which scale= does not"
    assert (more in str(plan).splitlines()) == (reduction == "mean")
    assert (forward_only.strategy, forward_only.read_bytes, forward_only.write_bytes) == ("forward only", one_pass, 0)
    selects_apart = reduction == "max" and target.numel() > ROWS_SELECTED_ALONE  # a launch for each of 4 digits, and one more
    assert forward_only.launches == (6 if selects_apart else 1)
    # Every launch is named, those too that touch no logits.
    (launches,) = re.findall(r"^  launches  (\d+): (.+)$", str(plan), re.MULTILINE)
    counts = [int(count or 1) for count in re.findall(r"(?:(\d+) x )?\w+_kernel", launches[1])]
    assert int(launches[0]) == sum(counts) == plan.launches == len(plan.kernels)
    assert {plan.forward.kernel, plan.backward.kernel} <= set(plan.kernels)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(128, 10), (8192, 50257), (8, 21, 512, 512)])
def test_the_plan_of_probabilities_on_a_gpu(shape: tuple[int, ...], reduction: str) -> None:
    """They are read like the logits, and no launch counts rows."""
    logits = torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
    one_pass = logits.numel() * 2
    with fusedloss.backend("triton"):
        plan = fusedloss.plan(logits, torch.empty(shape, device="meta"), reduction=reduction)
    passes = 1 if reduction == "mean" else 2
    assert (plan.read_bytes, plan.write_bytes) == (passes * 3 * one_pass, one_pass)  # float32 probabilities: twice the bytes
    assert plan.launches == (3 if reduction == "mean" and plan.forward.n_slices > 1 else 2)


def _forward_of(n_rows: int, n_cols: int, device: DeviceFacts, dtype: torch.dtype = torch.bfloat16) -> Cut:
    logits = torch.empty(n_rows, n_cols, dtype=dtype, device="meta", requires_grad=True)
    with fusedloss.backend("triton"):
        plan = fusedloss.plan(logits, torch.empty(n_rows, dtype=torch.long, device="meta"), device=device)
    assert plan.strategy == "fused"
    return plan.forward


@pytest.mark.parametrize(
    ("n_rows", "reduction", "before"), [(70, "mean", "denominator_kernel"), (1, "mean", "zeros"), (70, "sum", "zeros")]
)
def test_slices_have_their_counters_cleared_by_a_launch_that_counts_only_for_a_mean(
    n_rows: int, reduction: str, before: str
) -> None:
    logits = torch.empty(n_rows, 50257, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with fusedloss.backend("triton"):
        plan = fusedloss.plan(logits, torch.empty(n_rows, dtype=torch.long, device="meta"), reduction=reduction)
    assert plan.kernels == (before, "fused_row_kernel", "scale_gradient_kernel")


@pytest.mark.parametrize(
    ("n_rows", "options", "kernels"),
    [
        (64, {}, ("fused_row_kernel", "scale_gradient_kernel")),  # so few tickets take no longer than a launch
        (65, {}, ("denominator_kernel", "fused_row_kernel", "finish_kernel", "scale_gradient_kernel")),
        (65, {"reduction": "max"}, ("forward_row_kernel", "finish_kernel", "backward_row_kernel")),
        (65, {"reduction": "none"}, ("forward_row_kernel", "backward_row_kernel")),
        (65, {"reduction": "none", "return_stats": True}, ("forward_row_kernel", "finish_kernel", "backward_row_kernel")),
    ],
    ids=str,
)
def test_sums_are_added_up_by_a_launch_where_tickets_are_dear(
    n_rows: int, options: dict[str, Any], kernels: tuple[str, ...]
) -> None:
    logits, target = (
        torch.empty(n_rows, 1000, device="meta", requires_grad=True),
        torch.empty(n_rows, dtype=torch.long, device="meta"),
    )
    with fusedloss.backend("triton"):
        assert fusedloss.plan(logits, target, device=DeviceFacts(flushes_l2=True), **options).kernels == kernels
        assert "finish_kernel" not in fusedloss.plan(logits, target, device=DeviceFacts(), **options).kernels


def test_slices_that_wait_take_a_quarter_of_the_gpu_unless_a_row_needs_more() -> None:
    for n_cols in (50257, 128256, 256000):
        assert 1 < _forward_of(1, n_cols, DeviceFacts()).n_slices <= 132 // 4
    assert _forward_of(1, 128256, DeviceFacts(n_sms=40)).n_slices == 12  # as many columns as fit take 11.4 programs
    assert _forward_of(1, 128256, DeviceFacts(n_sms=12)).n_slices == 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n_cols", [4096, 22528, 22536, 32000, 32768, 45056, 50257, 128256, 262144])
def test_an_sm_has_room_for_two_programs_of_any_row(n_cols: int, dtype: torch.dtype) -> None:
    """One loads or stores while the other reduces. With one, as 32000 classes had, neither overlaps."""
    cut = _forward_of(8192, n_cols, DeviceFacts(), dtype)
    assert cut.kernel == "fused_row_kernel"
    assert 2 * cut.num_warps * 32 * cut.max_registers <= SM_REGISTERS


def test_few_rows_compile_few_kernels() -> None:
    """Rows fewer than the SMs are cut into slices, of which each number is a kernel of its own."""
    cuts = [_forward_of(n_rows, 128256, DeviceFacts()) for n_rows in range(1, 200)]
    assert {cut.n_slices for cut in cuts} == {12, 16, 32}
    assert len({(cut.num_warps, cut.shape) for cut in cuts}) == 3
    with fusedloss.backend("triton"), torch.no_grad():
        for n_rows in range(1, 200):
            logits = torch.empty(n_rows, 128256, dtype=torch.bfloat16, device="meta")
            cuts.append(fusedloss.plan(logits, torch.empty(n_rows, dtype=torch.long, device="meta")).forward)
    assert {cut.n_slices for cut in cuts if cut.kernel == "forward_row_kernel"} == {1, 2, 4, 8, 16}


@pytest.mark.parametrize(
    ("n_rows", "device", "together"),
    [
        (4096, DeviceFacts(), True),  # 32 programs of 64 threads: with 255 registers each they fill 8 SMs
        (4096, DeviceFacts(n_sms=30), False),
        (16896, DeviceFacts(), True),
        (17000, DeviceFacts(), False),
        (4096, DeviceFacts(may_wait=False), False),
    ],
    ids=str,
)
def test_tiles_sum_the_denominator_together_where_they_are_a_quarter_of_the_gpu(
    n_rows: int, device: DeviceFacts, together: bool
) -> None:
    logits = torch.empty(n_rows, 10, device="meta", requires_grad=True)
    target = torch.empty(n_rows, dtype=torch.long, device="meta")
    with fusedloss.backend("triton"):
        plan = fusedloss.plan(logits, target, device=device)
        total = fusedloss.plan(logits, target, reduction="sum", device=device)
    counted = ("fused_tile_kernel", "scale_gradient_kernel")
    assert plan.kernels == (counted if together else ("denominator_kernel", *counted))
    assert plan.forward.meets == together
    assert not total.forward.meets


@pytest.mark.parametrize("n_cols", [32000, 50257, 128256])
@pytest.mark.parametrize("n_rows", [1, 8192])
def test_where_nobody_may_wait_no_row_is_shared(n_rows: int, n_cols: int) -> None:
    cut = _forward_of(n_rows, n_cols, DeviceFacts(may_wait=False))
    assert cut.n_slices == 1
    assert cut.kernel == ("fused_row_kernel" if n_cols == 32000 else "fused_tile_kernel")


@pytest.mark.parametrize(("value", "may_wait"), [("", True), ("0", True), ("1", False)])
def test_the_environment_says_whether_programs_may_wait(value: str, may_wait: bool) -> None:
    asked = "import torch; from fusedloss.backends.triton import device_facts; print(device_facts(torch.device('cpu')).may_wait)"
    environment = {**os.environ, "FUSEDLOSS_NO_WAIT": value}
    done = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(may_wait)


def test_the_plan_refuses_what_the_call_refuses() -> None:
    logits, target = make_logits(4, 5), make_target(4, n_classes=5)
    with pytest.raises(ValueError, match="batch_size"):
        fusedloss.plan(logits, target[:3])
    with pytest.raises(ValueError, match="average is not a valid value for reduction"):
        fusedloss.plan(logits, target, reduction="average")
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        fusedloss.plan(logits, target, nonsense=1)


@pytest.mark.gpu
def test_the_plan_of_a_gpu_call() -> None:
    logits, target = make_logits(128, 10).cuda().requires_grad_(), make_target(128, n_classes=10).cuda()
    assert fusedloss.plan(logits, target).backend == "triton"
