"""Programs that wait for each other in the emulator, in any order: a barrier follows the wait, and others are needed."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import check_against_torch
from emulation import emulated, launched, ptxsim
from fusedloss.kernels.constants import N_COUNTERS
from problems import make_logits, make_target, make_weight

import fusedloss
from fusedloss import kernels as kernel_sources
from fusedloss.backends.triton import given, launching

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the emulator leaves a file open

BF16 = torch.bfloat16


def _slices(n_rows: int, n_cols: int) -> int:
    with fusedloss.backend("triton"):
        plan = fusedloss.plan(make_logits(n_rows, n_cols, dtype=BF16).requires_grad_(), make_target(n_rows, n_classes=n_cols))
    assert plan.forward is not None
    assert plan.forward.n_slices > 1
    return plan.forward.n_slices


@pytest.mark.parametrize("order", ["in-order", "reverse", 1, 2, 3], ids=lambda order: f"order {order}")
@pytest.mark.parametrize("shape", [(5, 40001), (140, 50257)], ids=str)
def test_slices_need_no_more_room_than_one_row_has(shape: tuple[int, int], order: str | int) -> None:
    """Whatever the order in which the GPU starts programs: they take their rows from a counter, so that none waits in vain."""
    logits = make_logits(*shape, dtype=BF16)
    target = make_target(shape[0], n_classes=shape[1], ignored=-100)
    with emulated(order=order, resident=_slices(*shape), budget=1_000_000):
        check_against_torch(logits, target)


def test_slices_wait() -> None:
    """The test above can fail: with one program less than a row has slices, the emulator sees them wait for ever."""
    logits = make_logits(5, 40001, dtype=BF16).requires_grad_()
    resident = _slices(5, 40001) - 1
    with pytest.raises(RuntimeError, match="spin-wait deadlock"), emulated(resident=resident, budget=1_000_000):
        fusedloss.cross_entropy(logits, make_target(5, n_classes=40001))


def test_the_wait_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a slice reads statistics that nobody has written yet."""
    logits = make_logits(5, 40001, dtype=BF16).requires_grad_()
    launch, new_slices = launching.launch, given.new_slices

    def without_wait(of: launching.Launch, device: torch.device, arguments: dict[str, Any]) -> None:
        if of.cut.kernel == "fused_row_kernel":
            of = launching.Launch(of.cut, {**of.constants, "shape": replace(of.constants["shape"], waits=False)})
        launch(of, device, arguments)

    monkeypatch.setattr(launching, "launch", without_wait)
    monkeypatch.setattr(given, "new_slices", lambda *arguments: new_slices(*arguments).fill_(torch.nan))
    with ptxsim.emulated_gpu("sm_90"), fusedloss.backend("triton"):  # one program after the other
        fusedloss.cross_entropy(logits, make_target(5, n_classes=40001)).backward()
    assert logits.grad.isnan().any()


@pytest.mark.parametrize("order", ["in-order", "reverse", 1], ids=lambda order: f"order {order}")
def test_slices_hand_on_the_labels_logits(order: str | int) -> None:
    """Three slices, each of which has some of the labels; in float32, where a label's logit shows in the loss of all rows."""
    logits = make_logits(8, 7001)
    a = torch.tensor([0, 1, 3071, 3100, 6100, 6200, 6999, 7000])
    with emulated(order=order, resident=3) as gpu:
        check_against_torch(logits, (a, a.roll(3), 0.25), softcap=5.0, roundings=4)
    assert launched(gpu)["fused_row_kernel"].ctas == 3 * len(logits)


def test_a_slice_is_stored_before_it_is_counted() -> None:
    """By the thread that counts it, whose release orders nothing else: the emulator knows no such order of memory."""
    logits = make_logits(5, 40001, dtype=BF16).requires_grad_()
    with emulated() as gpu:
        fusedloss.cross_entropy(logits, make_target(5, n_classes=40001))
    ptx = launched(gpu)["fused_row_kernel"].compiled.asm["ptx"]
    counting = re.search(r"@(%p\d+) atom\.global\.gpu\.acq_rel", ptx)
    assert counting is not None
    stores = re.findall(r"@(%p\d+) st\.global", ptx[: counting.start()])
    assert len(stores) == 3  # maximum, rest; the target's logit, where it is there
    for store in stores:
        assert store == counting[1] or re.search(rf"and\.pred\s+{store}, (.*, )?{counting[1]}\b", ptx)


def test_a_barrier_follows_the_wait() -> None:
    """One thread waits: the others must not load before it has seen all slices publish. The PTX says so."""
    logits = make_logits(5, 40001, dtype=BF16).requires_grad_()
    with emulated() as gpu:
        fusedloss.cross_entropy(logits, make_target(5, n_classes=40001))
    ptx = launched(gpu)["fused_row_kernel"].compiled.asm["ptx"]
    waiting = re.search(r"global\.gpu\.acquire\..*?ld\.global\.cg", ptx, re.DOTALL)
    assert waiting is not None
    assert "bar.sync" in waiting.group()


@pytest.mark.parametrize("order", ["in-order", "reverse", 1, 2], ids=lambda order: f"order {order}")
@pytest.mark.parametrize("weighs", ["rows", "weights", "two labels"])
@pytest.mark.parametrize("shape", [(700, 10), (300, 100), (2, 19, 33, 16)], ids=str)
def test_few_tiles_sum_the_denominator_together(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], weighs: str, order: str | int
) -> None:
    """In the launch that writes the gradient, whose counters are zeros again after it: a GPU's are those of every launch."""
    counters = torch.zeros(N_COUNTERS, dtype=torch.int32)
    monkeypatch.setattr(given, "ticket", lambda *_: counters)
    target: Any = make_target(*shape[:1], *shape[2:], n_classes=shape[1], ignored=-100)
    if weighs == "two labels":
        target = (target, target.flip(0), 0.25)
    weight = make_weight(shape[1]) if weighs == "weights" else None
    with emulated(order=order) as gpu:
        for _ in range(2):
            check_against_torch(make_logits(*shape), target, weight)
    assert {launch.kernel for launch in gpu.launches} == {"fused_tile_kernel", "scale_gradient_kernel"}
    assert gpu.launches[0].ctas > 1
    assert not counters.any()


def test_tiles_wait() -> None:
    """The test above can fail: one program after the other would wait for ever."""
    logits = make_logits(700, 10).requires_grad_()
    with pytest.raises(RuntimeError, match="spin-wait deadlock"), emulated(resident=1, budget=1_000_000):
        fusedloss.cross_entropy(logits, make_target(700, n_classes=10))


def _with_fences_for_barriers(ptx: str, name: str) -> str:
    """The PTX with fences, which order memory but wait for nobody, for the barriers of tl.debug_barrier() in this file."""
    file = re.search(rf'\.file\s+(\d+)\s+"[^"]*/{name}"', ptx)
    source = (Path(kernel_sources.__path__[0]) / name).read_text().splitlines()
    lines = {number for number, text in enumerate(source, 1) if "tl.debug_barrier()" in text}
    for barrier in reversed(list(re.finditer(r"bar\.sync[^;]*;", ptx))) if file else ():
        file_id, line = re.findall(r"\.loc\s+(\d+)\s+(\d+)", ptx[: barrier.start()])[-1]
        if file_id == file[1] and int(line) in lines:
            ptx = ptx[: barrier.start()] + "membar.gl;" + ptx[barrier.end() :]
    return ptx


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_barrier_before_the_targets_gradient_is_needed(reduction: str) -> None:
    """The tests above can fail: without the barrier the emulator reports the race at the target's gradient."""
    logits = make_logits(4, 5000, dtype=BF16).requires_grad_()
    target = torch.tensor([5, 600, 2000, 4999])
    options = {
        "global_race": True,
        "race": 1,
        "ptx_edit": partial(_with_fences_for_barriers, name="row.py"),
    }  # count races in shared memory, go on
    with ptxsim.emulated_gpu("sm_90", **options) as gpu, fusedloss.backend("triton"):
        fusedloss.cross_entropy(logits, target, reduction=reduction).sum().backward()
    assert sum(launch.global_races for launch in gpu.launches) > 0
