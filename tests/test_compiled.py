"""Every kernel variant compiles for every GPU we name, without spills, with 16-byte accesses where rows are aligned."""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import triton
from compiled import ALLOWED_REGISTERS, ALLOWED_SPILLS, OTHER_TARGETS, TARGETS, compile_for, launches, report, variants
from compiled_cases import CASES, NARROW, READS_NO_LOGITS, call
from triton.backends.compiler import GPUTarget

from fusedloss.backends.triton.launching import SEVERAL_L2S, kernels
from fusedloss.cut_rows import SM_REGISTERS

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def _cells() -> Iterator[Any]:
    """Every case on every target; in `make test` half of the cases, each on one of them, because a compilation takes seconds."""
    for index, case in enumerate(CASES):
        in_turn = index % len(TARGETS) if index // len(TARGETS) % 2 == 0 else None
        for position, target in enumerate(TARGETS):
            everywhere = pytest.mark.sweep if position != in_turn else ()
            yield pytest.param(case, target, marks=everywhere, id=f"{case}-{target}")


@pytest.mark.parametrize(("case", "target"), list(_cells()))
def test_compiles_without_spills_and_with_wide_accesses(monkeypatch: pytest.MonkeyPatch, case: str, target: str) -> None:
    recorded = launches(monkeypatch, target, lambda: call(*CASES[case]))
    n_finishing = sum(launch.kernel == "finish_kernel" for launch in recorded)
    assert len(recorded) - n_finishing in {"selection": (7,), "selection, fp64": (11,)}.get(case, (2, 3))
    for launch in recorded:
        found = report(compile_for(launch, target), target)
        assert found.spills <= ALLOWED_SPILLS, f"{launch.kernel}: {found}"
        assert found.registers <= ALLOWED_REGISTERS, f"{launch.kernel}: {found}"
        if case not in NARROW and launch.kernel not in READS_NO_LOGITS:
            assert found.load_bytes == 16, f"{launch.kernel}: {found}"
            if not launch.kernel.startswith("forward"):
                assert found.store_bytes == 16, f"{launch.kernel}: {found}"


def _other_cells() -> Iterator[Any]:
    for target in OTHER_TARGETS:
        for case in ("one row a program", "ticket", "rows in registers", "slices", "topk", "pixels"):
            seldom = () if case == "one row a program" or target == "gfx1100" else pytest.mark.sweep
            yield pytest.param(case, target, marks=seldom)


@pytest.mark.parametrize(("case", "target"), list(_other_cells()))
def test_compiles_for_other_gpus_without_spills(monkeypatch: pytest.MonkeyPatch, case: str, target: str) -> None:
    for launch in launches(monkeypatch, target, lambda: call(*CASES[case])):
        found = report(compile_for(launch, target), target)
        assert found.spills <= ALLOWED_SPILLS, f"{launch.kernel}: {found}"


@pytest.mark.skipif(triton.__version__.startswith("3.5."), reason="Triton 3.5 does not look at the size of a tensor in a group")
def test_kernels_for_amd_are_compiled_as_they_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors up to 2 GB Triton knows that offsets are 32 bits wide, which takes other instructions, and more registers."""
    recorded = launches(monkeypatch, "gfx942", lambda: call(*CASES["pixels"]))
    found = variants(recorded, "gfx942")
    assert len(found) == len(recorded)
    for name, key in found:
        assert "'DS'" in key, name
    main = next(launch for launch in recorded if launch.kernel == "fused_tile_kernel")
    assert "buffer_load_dword" in compile_for(main, "gfx942").asm["amdgcn"]


@pytest.mark.parametrize("case", ["statistics of short rows", "selection"])
def test_a_forward_on_mi300_writes_no_l2_back(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Its SMs have no L2 in common, and a ticket would: the sums are added up in a launch of their own (kernels/finish.py)."""
    by_name = {launch.kernel: launch for launch in launches(monkeypatch, "gfx942", lambda: call(*CASES[case]))}
    assert "finish_kernel" in by_name
    main = by_name["fused_row_kernel" if case == "statistics of short rows" else "forward_tile_kernel"]
    assert "buffer_wbl2" not in compile_for(main, "gfx942").asm["amdgcn"]


@pytest.mark.parametrize(
    ("name", "warp_size"), [("gfx90a", 64), ("gfx942", 64), ("gfx950", 64), ("gfx1100", 32), ("gfx1201", 32)]
)
def test_which_gpus_write_an_l2_back_for_a_ticket(monkeypatch: pytest.MonkeyPatch, name: str, warp_size: int) -> None:
    monkeypatch.setitem(OTHER_TARGETS, name, GPUTarget("hip", name, warp_size))
    drawing, *_ = launches(monkeypatch, "gfx1100", lambda: call(*CASES["ticket"]))
    assert ("buffer_wbl2" in compile_for(drawing, name).asm["amdgcn"]) == (name in SEVERAL_L2S)


def _all_waves_acquire(steps: list[str]) -> bool:
    """Whether all meet, and each drops its old lines, before any loads or goes elsewhere."""
    upto = next(i for i, step in enumerate(steps) if "load" in step or "branch" in step)
    return ("s_barrier", "buffer_gl0_inv") in pairwise(steps[:upto])


@pytest.mark.parametrize("case", ["recompute, slices", "slices"])
def test_all_waves_acquire_what_a_ticket_publishes(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """RDNA's two compute units of a work group have a cache each: the wave that drew the ticket acquires for its own alone."""
    acquires = re.compile(r"global_atomic_\w+ [^\n]*glc|buffer_gl0_inv|s_barrier|s_cbranch\w* |global_load\w*|buffer_load\w*")
    n_drawn = 0
    for launch in launches(monkeypatch, "gfx1100", lambda: call(*CASES[case])):
        if launch.kernel not in ("forward_row_kernel", "fused_row_kernel"):
            continue
        assert launch.arguments["num_warps"] > 1
        assembly = compile_for(launch, "gfx1100").asm["amdgcn"]
        steps = acquires.findall(assembly)
        drawn = [i for i, step in enumerate(steps) if "atomic" in step and steps[i + 1] == "buffer_gl0_inv"]
        for i in drawn:  # of one wave
            assert _all_waves_acquire(steps[i + 2 :])
        n_drawn += len(drawn)
        if launch.kernel == "fused_row_kernel":  # slices wait in a loop of loads past the caches; where it ends, all meet
            waiting = re.search(r"global_load_b32 [^\n]*glc", assembly)
            leaves = re.findall(r"s_cbranch_vcc\w+ (\.LBB\w+)", assembly[: waiting.start()])[-1]
            assert _all_waves_acquire(acquires.findall(assembly[assembly.index(f"\n{leaves}:") :]))
    assert n_drawn == {"recompute, slices": 1, "slices": 4}[case]


def test_tiles_that_count_their_rows_acquire_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter says it all, and every acquire drops the L1 of an SM, for all programs there."""
    (main,) = (
        launch for launch in launches(monkeypatch, "sm_90", lambda: call(*CASES["ticket"])) if launch.kernel.startswith("fused")
    )
    reads = re.findall(r"(?:ld|atom)\.global\.gpu\.(\w+)", compile_for(main, "sm_90").asm["ptx"])
    assert "relaxed" in reads
    assert "acquire" not in reads


@pytest.mark.parametrize("case", ["pixels of many classes", "long rows", "rows in registers", "rows in registers, smoothing"])
def test_an_sm_has_room_for_two_programs(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """One loads or stores while the other reduces."""
    (main,) = (
        launch for launch in launches(monkeypatch, "sm_90", lambda: call(*CASES[case])) if launch.kernel.startswith("fused")
    )
    registers = report(compile_for(main, "sm_90"), "sm_90").registers
    assert 2 * main.arguments["num_warps"] * 32 * registers <= SM_REGISTERS


@pytest.mark.parametrize(("case", "n_stores"), [("ticket", 1), ("pixels", 1), ("one row a program", 2), ("slices", 2)])
def test_the_loss_is_published_before_the_gradient_is_stored(monkeypatch: pytest.MonkeyPatch, case: str, n_stores: int) -> None:
    """The ticket's fence would wait for all stores before it; of a row there are two places, for it may not count."""
    (main,) = (
        launch for launch in launches(monkeypatch, "sm_90", lambda: call(*CASES[case])) if launch.kernel.startswith("fused")
    )
    steps = re.findall(r"acq_rel|st\.global\.v[48]", compile_for(main, "sm_90").asm["ptx"])
    runs = [step for i, step in enumerate(steps) if i == 0 or steps[i - 1] != step]
    stores = [i for i, step in enumerate(runs) if step != "acq_rel"]
    assert stores == [1 + 2 * i for i in range(n_stores)]


@pytest.mark.parametrize("case", ["ticket", "one row a program", "slices", "topk", "selection", "recompute, shared tile"])
def test_any_number_of_rows_takes_the_same_kernels(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """The last batch of an epoch, or a batch of tokens, compiles nothing anew; but for state of rows in tiles."""
    (_, n_cols), dtype, options = CASES[case]
    found, kernels_of_a_call = set(), set()
    first = 20000 if case == "selection" else 2048
    for n_rows in (first, first + 1, first + 8, first + 1040):
        recorded = launches(monkeypatch, "sm_90", lambda n_rows=n_rows: call((n_rows, n_cols), dtype, options))
        kernels_of_a_call |= {launch.kernel for launch in recorded}
        found |= variants(recorded, "sm_90")
    twice = kernels_of_a_call & {"forward_tile_kernel", "backward_tile_kernel"}  # for multiples of 16, and for others
    assert sorted(name for name, _ in found) == sorted([*kernels_of_a_call, *twice])


def test_cases_select_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    selected = set()
    for case in CASES.values():
        selected |= {launch.kernel for launch in launches(monkeypatch, "gfx942", lambda case=case: call(*case))}
    assert selected == set(kernels())
