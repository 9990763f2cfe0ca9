"""The PTX that Triton emits, executed on the CPU by an emulator that checks bounds and races and counts traffic.

The emulator (ptxsim) is a development tool beside the checkout, not a dependency: without it these tests are skipped. Accesses
out of bounds, misaligned ones and shared-memory races raise there; races in global memory are counted.
"""

from typing import Any

import pytest
import torch
from compare import check_against_torch
from emulation import RESIDENT, emulated, launched
from fusedloss.kernels.groups import Work
from in_place import check_in_place
from problems import make_logits, make_probabilities, make_target, make_weight

import fusedloss
from fusedloss import known
from fusedloss.backends import triton
from fusedloss.backends.outputs import Outputs
from fusedloss.geometry import DeviceFacts
from fusedloss.plan import Inputs
from fusedloss.plan_triton import ROWS_SELECTED_ALONE

# The emulator leaves a file to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# What the emulator calls the tensors in a kernel's groups: by their places.
LOGITS, TARGET = (f"inputs.{Inputs._fields.index(name)}" for name in ("logits", "target"))
DLOGITS, ROW_STATS = (f"out.{Outputs._fields.index(name)}" for name in ("dlogits", "row_stats"))
TALLIES = f"work.{Work._fields.index('tallies')}"


# n_cols 10: tiles; 257: one row a program; 1000: rows begin inside a sector; 1001: ragged rows; 20001: several warps; 40008 and
# more: slices, for few rows as many as fill the GPU.
# n_rows 37 leaves the last tile ragged, tiles of 700 x 10 wait for each other, of 17000 x 10 are too many for that, every program
# counts up to 64 rows of its own, 4200 programs add up in groups.
@pytest.mark.parametrize(
    ("n_rows", "n_cols", "dtype"),
    [
        (37, 10, FP32),
        (700, 10, FP32),
        (700, 10, BF16),
        (17000, 10, FP32),
        (9, 1000, BF16),
        (66, 257, FP32),
        (4200, 257, BF16),
        (70, 1001, BF16),
        (5, 1003, FP64),
        (5, 20001, BF16),
        (3, 40008, FP64),
        (2, 70001, BF16),
        (70, 50257, BF16),
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["in-order", 1, 2], ids=lambda order: f"order {order}")
def test_right_in_any_order(n_rows: int, n_cols: int, dtype: torch.dtype, order: str | int) -> None:
    logits = make_logits(n_rows, n_cols, dtype=dtype)
    target = make_target(n_rows, n_classes=n_cols, ignored=-100)
    waits = n_cols > 32768 or (n_rows, n_cols) == (700, 10)
    with emulated(order=order, resident=1 if order == "in-order" and not waits else RESIDENT):
        check_against_torch(logits, target)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"},
        pytest.param({"reduction": "sum", "scale": 0.25}, marks=pytest.mark.sweep),
        pytest.param({"reduction": "max"}, marks=pytest.mark.sweep),  # a topk of 1
        {"reduction": "topk", "top_k": 3},
        {"reduction": "topk", "top_k": 0.5},
        {"label_smoothing": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(700, 10), (11, 1003), (2, 19, 33, 16), (3, 33001)], ids=str)
def test_options(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    logits = make_logits(*shape)
    target = make_target(*shape[:1], *shape[2:], n_classes=shape[1], ignored=-100)
    with emulated(order=3):
        check_against_torch(logits, target, make_weight(shape[1]), **options)


@pytest.mark.parametrize("options", [{"reduction": "max"}, {"reduction": "topk", "top_k": 3000}], ids=str)
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
def test_selection_among_many_rows(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """In launches of their own: several programs add their histograms, and the last one looks."""
    n_rows = ROWS_SELECTED_ALONE + 100
    logits, target = make_logits(n_rows, 2, dtype=dtype), make_target(n_rows, n_classes=2, ignored=-100)
    with emulated(order=3) as gpu:
        check_against_torch(logits, target, scale=0.25, **options)
        planned = fusedloss.plan(logits.requires_grad_(), target, **options).launches
    assert len(gpu.launches) == planned == 1 + (8 if dtype == FP64 else 4) + 1 + 1


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none", "label_smoothing": 0.1}, {"reduction": "sum", "softcap": 9.0, "z_loss": 1e-2}], ids=str
)
@pytest.mark.parametrize(
    ("shape", "dtype", "target_dtype"),
    [
        ((700, 10), FP32, FP32),
        ((300, 10), BF16, FP32),
        ((9, 70), FP32, FP32),
        ((11, 1000), BF16, BF16),
        ((11, 1003), FP32, BF16),
        ((2, 19, 33, 16), BF16, BF16),
        ((3, 33001), BF16, FP32),
    ],
    ids=str,
)
def test_probabilities(shape: tuple[int, ...], dtype: torch.dtype, target_dtype: torch.dtype, options: dict[str, Any]) -> None:
    target = make_probabilities(*shape, dtype=target_dtype)
    with emulated(order=3):
        check_against_torch(make_logits(*shape, dtype=dtype), target, make_weight(shape[1], dtype), roundings=4, **options)


@pytest.mark.parametrize("reduction", ["mean", "none", "max"])
@pytest.mark.parametrize("shape", [(11, 1003), (1100, 520), (3, 33001)], ids=str)
def test_extras_of_rows(shape: tuple[int, int], reduction: str) -> None:
    """Two labels and all options; more programs than the last one adds up at a time."""
    a, b = (make_target(shape[0], n_classes=shape[1], ignored=-100, seed=seed) for seed in (1, 2))
    b[1] = a[1]
    options = {"sample_weight": make_weight(shape[0]), "z_loss": 1e-2, "softcap": 9.0, "logit_scale": 0.5}
    with emulated(order=3):
        check_against_torch(make_logits(*shape), (a, b, 0.3), reduction=reduction, roundings=4, **options)
        logits = make_logits(*shape).requires_grad_()
        _, stats = fusedloss.cross_entropy(logits, (a, b, 0.3), reduction=reduction, return_stats=True, **options)
    with fusedloss.backend("reference"):
        _, expected = fusedloss.cross_entropy(logits.detach(), (a, b, 0.3), reduction=reduction, return_stats=True, **options)
    assert stats[2:5] == expected[2:5]
    torch.testing.assert_close(stats[:2] + stats[5:], expected[:2] + expected[5:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("n_rows", "n_cols"), [(20000, 10), (4200, 257)])  # the latter's programs add up in groups
def test_statistics_are_added_up_by_program(n_rows: int, n_cols: int, reduction: str) -> None:
    """Every program counts its own rows: that the last one looks at all rows would take it thousands of journeys to L2."""
    logits, target = make_logits(n_rows, n_cols).requires_grad_(), make_target(n_rows, n_classes=n_cols, ignored=-100)
    with emulated(order=3) as gpu:
        _, stats = fusedloss.cross_entropy(logits, target, reduction=reduction, return_stats=True)
    assert stats.n_counted == (target != -100).sum()
    assert stats.n_correct == (logits.argmax(1) == target).sum()
    assert stats.worst == stats.row_loss.argmax()
    launch = gpu.launches[-1]
    assert launch.buffers[ROW_STATS].loaded_bytes == 0
    tallies = launch.buffers[TALLIES]
    assert tallies.nbytes < launch.buffers[ROW_STATS].nbytes * (3 if n_cols == 257 else 0.1)
    assert tallies.loaded_bytes < 2 * tallies.stored_bytes  # the keys twice


@pytest.mark.parametrize(
    ("shape", "options"),
    [((4200, 257), {}), ((70, 1001), {"reduction": "topk", "top_k": 0.3}), ((140, 50257), {"reduction": "sum"})],
    ids=str,
)
@pytest.mark.parametrize("order", ["reverse", 1], ids=lambda order: f"order {order}")
def test_a_launch_that_adds_up(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], options: dict[str, Any], order: str | int
) -> None:
    """Where tickets are dear (kernels/finish.py): 4200 programs leave groups to 64 of its own, which draw tickets."""
    monkeypatch.setattr(triton, "device_facts", lambda _: DeviceFacts(flushes_l2=True))
    monkeypatch.setattr(known, "KNOWN", {})  # of another GPU
    logits, target = make_logits(*shape, dtype=BF16), make_target(shape[0], n_classes=shape[1], ignored=-100)
    with emulated(order=order) as gpu:
        check_against_torch(logits, target, **options)
        _, stats = fusedloss.cross_entropy(logits, target, return_stats=True, **options)
    assert stats.n_counted == (target != -100).sum()
    assert stats.worst == stats.row_loss.argmax()
    by_name = launched(gpu)
    assert "finish_kernel" in by_name
    if shape[1] < 2**15:  # slices have counters of their own
        main = next(launch for name, launch in by_name.items() if name in ("fused_row_kernel", "forward_row_kernel"))
        assert "atom." not in main.compiled.asm["ptx"]


@pytest.mark.parametrize("order", ["in-order", "reverse", 1, 2], ids=lambda order: f"order {order}")
@pytest.mark.parametrize("shape", [(37, 10), (9, 150), (9, 1000), (70, 1001), (5, 40001)], ids=str)
def test_the_gradient_may_take_the_place_of_the_logits(shape: tuple[int, int], order: str | int) -> None:
    with emulated(order=order):  # which counts a race where a program overwrites what another, or a slice, has yet to read
        for options in ({}, {"label_smoothing": 0.1, "target": "two labels"}):
            check_in_place(shape, BF16, in_place=True, reduction="mean", **options)


@pytest.mark.parametrize("options", [{}, {"reduction": "none", "label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("shape", [(300, 1001), (5, 40001)], ids=str)
def test_order_does_not_change_a_bit(shape: tuple[int, int], options: dict[str, Any]) -> None:
    # Of other bits than make_weight's, whose sum is the same in any order.
    weight = torch.rand(shape[1], generator=torch.Generator().manual_seed(0)) if options else None
    logits = make_logits(*shape).requires_grad_()
    target = make_target(shape[0], n_classes=shape[1], ignored=-100)
    results = []
    for order in ("in-order", "reverse", 5):
        with emulated(order=order, resident=RESIDENT):
            loss = fusedloss.cross_entropy(logits, target, weight, **options)
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
        results.append((loss.detach(), gradient))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("n_cols", [10, 1001])
def test_class_out_of_range_reads_nothing_out_of_bounds(n_cols: int) -> None:
    """Far, near and negative indices: NaN for their rows, the others untouched, and the emulator saw no address outside."""
    logits = make_logits(6, n_cols).requires_grad_()
    target = torch.tensor([1, n_cols, -1, 2**62, -(2**62), 3])
    with emulated():
        losses = fusedloss.cross_entropy(logits, target, make_weight(n_cols), reduction="none")
        losses.sum().backward()
    bad = torch.tensor([False, True, True, True, True, False])
    assert torch.equal(losses.isnan(), bad)
    assert logits.grad[bad].isnan().all()
    assert logits.grad[~bad].isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_are_not_read(reduction: str) -> None:
    logits = make_logits(8, 4096, dtype=BF16).requires_grad_()
    target = torch.full((8,), -100)
    target[3] = 17
    with emulated() as gpu:
        fusedloss.cross_entropy(logits, target, reduction=reduction).sum().backward()
    row = 4096 * 2
    by_name = launched(gpu)
    if reduction == "mean":
        reading, writing = [by_name["fused_row_kernel"]], by_name["fused_row_kernel"]
    else:
        reading, writing = [by_name["forward_row_kernel"], by_name["backward_row_kernel"]], by_name["backward_row_kernel"]
    for launch in reading:
        assert launch.buffers[LOGITS].unique_loaded == row
    assert writing.buffers[DLOGITS].unique_stored == 8 * row


ROW_SECTORS = 1.03  # rows of 50257 share a sector with their neighbours, and each block looks up its target


def test_recompute_reads_each_logit_twice_and_writes_once() -> None:
    logits = make_logits(16, 50257, dtype=BF16).requires_grad_()
    with emulated() as gpu:
        fusedloss.cross_entropy(logits, make_target(16, n_classes=50257), reduction="none").sum().backward()
    forward, backward = gpu.launches
    one_pass = 16 * 50257 * 2
    assert one_pass <= 32 * forward.buffers[LOGITS].load_sectors < one_pass * ROW_SECTORS
    assert one_pass <= 32 * backward.buffers[LOGITS].load_sectors < one_pass * ROW_SECTORS
    assert one_pass <= 32 * backward.buffers[DLOGITS].store_sectors < one_pass * ROW_SECTORS


def test_fused_reads_each_logit_once_and_writes_once() -> None:
    logits = make_logits(16, 20001, dtype=BF16).requires_grad_()
    with emulated() as gpu:
        fusedloss.cross_entropy(logits, make_target(16, n_classes=20001)).backward()
    assert [launch.kernel for launch in gpu.launches] == ["fused_row_kernel", "scale_gradient_kernel"]
    buffers = launched(gpu)["fused_row_kernel"].buffers
    one_pass = 16 * 20001 * 2
    assert one_pass <= 32 * buffers[LOGITS].load_sectors < one_pass * ROW_SECTORS
    assert one_pass <= 32 * buffers[DLOGITS].store_sectors < one_pass * ROW_SECTORS
    assert launched(gpu)["scale_gradient_kernel"].buffers["dlogits_ptr"].loaded_bytes == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(16, 20001), (8, 1000), (1024, 10)], ids=str)
def test_probabilities_are_read_as_often_as_logits(shape: tuple[int, int], reduction: str) -> None:
    logits = make_logits(*shape, dtype=BF16).requires_grad_()
    with emulated() as gpu:
        fusedloss.cross_entropy(logits, make_probabilities(*shape, dtype=BF16), reduction=reduction).sum().backward()
    reading = ["fused_"] if reduction == "mean" else ["forward_", "backward_"]
    assert [launch.kernel.partition("_")[0] + "_" for launch in gpu.launches if "scale" not in launch.kernel] == reading
    one_pass = logits.numel() * 2
    for launch in gpu.launches[: len(reading)]:
        for name in (LOGITS, TARGET):
            assert one_pass <= 32 * launch.buffers[name].load_sectors < one_pass * ROW_SECTORS
    assert one_pass <= 32 * gpu.launches[len(reading) - 1].buffers[DLOGITS].store_sectors < one_pass * ROW_SECTORS


def test_small_problems_take_one_launch_each_way() -> None:
    logits = make_logits(128, 10).requires_grad_()
    with emulated() as gpu:
        fusedloss.cross_entropy(logits, make_target(128, n_classes=10)).backward()
    assert [launch.kernel for launch in gpu.launches] == ["fused_tile_kernel", "scale_gradient_kernel"]
