"""benchmarks/kernel_report.py: a miniature of the report, and verdicts that say what the numbers say."""

import copy
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import kernel_pages
import kernel_report
from torch_ops import count

BF16, FP32 = torch.bfloat16, torch.float32
CASES = (
    kernel_report.Case((64, 1000), BF16, {}),
    kernel_report.Case((64, 5000), FP32, {"reduction": "max"}),
    kernel_report.Case((64, 1000), BF16, {}, probabilities=True),
)
MARK = {
    "instructions": 12.0,
    "passes": 1.87,
    "narrowest": 16,
    "widest": 16,
    "launches": 3,
    "torch_launches": 1,
    "syncs": 0,
    "spills": 0,
}


needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="the page has plots: matplotlib is missing")


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return json.loads(kernel_report.as_json(kernel_report.collect(CASES, ["sm_90"], [])))


def page(data: dict[str, Any], folder: Path) -> str:
    kernel_pages.write(data, folder)
    return (folder / "KERNELS.md").read_text()


def test_numbers_are_those_of_the_plan_and_the_machine_code(data: dict[str, Any]) -> None:
    fused, recompute, probabilities = (case["targets"]["sm_90"] for case in data["cases"])
    assert (fused["strategy"], fused["reads"], fused["writes"]) == ("fused", 1, 1)
    assert (recompute["strategy"], recompute["reads"], recompute["writes"]) == ("recompute", 2, 1)
    assert (probabilities["strategy"], probabilities["reads"], probabilities["writes"]) == ("fused", 2, 1)
    assert probabilities["memory_passes"] == probabilities["floor_passes"] == 3
    names = [launch["kernel"] for launch in recompute["launches"]]
    assert names == ["forward_row_kernel", "backward_row_kernel"]
    for launch in recompute["launches"]:
        assert 16 < launch["registers"] <= 255
        assert launch["spills"] == 0
        assert launch["loads"]["16"] > 0


@needs_matplotlib
def test_the_page_follows_from_the_numbers_alone(data: dict[str, Any], tmp_path: Path) -> None:
    first = page(data, tmp_path / "a") if (tmp_path / "a").mkdir() is None else ""
    (tmp_path / "b").mkdir()
    assert page(data, tmp_path / "b") == first
    for plot in (tmp_path / "a" / "results").iterdir():
        assert plot.read_bytes() == (tmp_path / "b" / "results" / plot.name).read_bytes()
        assert plot.stat().st_size < 100_000
    assert "| 64 x 1000 bfloat16 | fused | 1R + 1W, 4 B | 3R + 3W, 12 B |" in first
    assert str(Path(__file__).parents[1]) not in first  # no path of this machine


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared_bytes", "programs"),
    [
        ("sm_90", 16, 128, 64, 1),  # all registers
        ("sm_90", 16, 64, 64, 2),
        ("sm_90", 4, 121, 64, 4),  # in eights: 128
        ("sm_90", 4, 255, 64, 2),
        ("sm_90", 2, 16, 64, 32),
        ("sm_90", 2, 16, 50 << 10, 4),
        ("sm_80", 2, 16, 50 << 10, 3),
        ("gfx942", 1, 269, 1024, 7),
        ("gfx942", 4, 64, 16 << 10, 4),
    ],
)
def test_programs_of_an_sm(target: str, warps: int, registers: int, shared_bytes: int, programs: int) -> None:
    launch = {"num_warps": warps, "registers": registers, "shared_bytes": shared_bytes}
    assert kernel_report.programs_per_sm(launch, target) == programs


@needs_matplotlib
def test_losses_are_listed(data: dict[str, Any], tmp_path: Path) -> None:
    before = page(data, tmp_path)
    assert "spills (" not in before
    assert "room for one" not in before
    worse = copy.deepcopy(data)
    worse["cases"][0]["targets"]["sm_90"]["launches"][-2]["spills"] = 7
    worse["cases"][0]["targets"]["sm_90"]["launches"][0]["per_sm"] = 1
    worse["cases"][1]["targets"]["sm_90"]["memory_passes"] = 7.0  # PyTorch: 6
    after = page(worse, tmp_path)
    assert "- 64 x 1000 bfloat16: 7 spills (everywhere)." in after
    assert "- 64 x 1000 bfloat16: an SM has room for one program (everywhere)." in after
    assert "- 64 x 5000 float32, reduction=max: eager needs 0.86 of our bytes (everywhere)." in after


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"instructions": 14.1}, ["14 instructions"]),
        ({"instructions": 40.0}, ["32 instructions", "14 instructions"]),
        ({"passes": 2.0}, ["1.9 passes"]),
        ({"narrowest": 2}, ["16-byte accesses"]),
        ({"launches": 4}, ["3 launches"]),
        ({"syncs": 1, "spills": 2}, ["syncs", "spills"]),
    ],
)
def test_a_missed_mark_is_called_so(changed: dict[str, Any], missed: list[str]) -> None:
    assert kernel_pages.misses("512 x 50257", {**MARK, **changed}) == missed


@needs_matplotlib
def test_marks_stand_beside_the_best_peer(data: dict[str, Any], tmp_path: Path) -> None:
    marked = {**data, "marks": {"512 x 50257": {"ours": MARK}}}
    text = page(marked, tmp_path)
    assert "| 512 x 50257 | **ours** | 12.0 | 1.87 | 16 | 3 + 1 | 0 | 0 | nothing |" in text
    assert "| | best peer: Unsloth | 32 | 4.0 | 2 | 2 + 6 | 0 | | |" in text
    assert "| | Liger | not installed |" in text


@needs_matplotlib
def test_without_the_emulator_the_marks_are_left_out(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_report.emulated, "SHARED", tmp_path)
    assert kernel_report.marks(["4096 x 10"]) is None
    assert kernel_pages.NO_MARKS in page({**data, "marks": None}, tmp_path)


def test_pytorchs_operators_are_counted() -> None:
    logits = torch.empty(64, 1000, dtype=BF16, device="meta", requires_grad=True)
    target = torch.empty(64, dtype=torch.int64, device="meta")
    cost = count(lambda: F.cross_entropy(logits, target), logits.numel())
    one_pass = logits.numel() * 2
    # log_softmax 1R 1W; its backward 2R 1W; nll_loss_backward fills with zeros, 1W
    assert (cost.read_bytes, cost.write_bytes) == (3 * one_pass, 3 * one_pass)
    # log_softmax, nll_loss, the upstream gradient, zeros, nll_loss_backward, log_softmax_backward
    assert (cost.launches, cost.syncs) == (6, 0)


def test_waits_of_the_host_are_counted() -> None:
    logits = torch.randn(8, 10, requires_grad=True)
    cost = count(lambda: logits.sum() * (2.0 if logits.sum().item() > 0 else 3.0), logits.numel())
    assert cost.syncs == 1
