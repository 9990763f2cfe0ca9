"""The GPU's table of the loss fused with the last linear layer, on a CPU with a stub for the device's clock."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bench_gpu
import bench_linear
import gpu_linear
import gpu_pages
from bench_linear import Case

CASES = [Case(torch.float32, 20, 4, 7, kind) for kind in ("", "half ignored", "topk")]


class Clock:
    """Every call takes 2 ms; the peak is that of gradients and 1 MB."""

    def flush(self) -> None:
        pass

    def run(self, call: Callable[[], object]) -> float:
        call()
        return 0.002

    def peak(self, call: Callable[[], object]) -> int:
        call()
        return (20 * 4 + 7 * 4) * 4 + 1_000_000

    def memory(self) -> int:
        return 1 << 30


def _broken(*_: Tensor) -> Tensor:
    raise RuntimeError("no kernel image")


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    monkeypatch.setattr(bench_gpu.TIMER, "clock", Clock())
    monkeypatch.setattr(gpu_linear, "CASES", [*CASES, Case(torch.float32, 1 << 20, 4, 1 << 10)])
    monkeypatch.setattr(bench_linear.torch, "compile", lambda loss, dynamic: loss)
    monkeypatch.setattr(gpu_linear.peers, "installed", lambda: {"Liger": None})
    monkeypatch.setattr(gpu_linear.peers, "liger_linear", _broken)
    monkeypatch.setenv("FUSEDLOSS_RECORDS", str(tmp_path / "records"))
    assert gpu_linear.main([], "cpu") == 0
    printed = capsys.readouterr().out
    assert "Liger: RuntimeError: no kernel image" in printed
    assert "float32 1048576 x 4 -> 1024: too large for this device's memory" in printed
    return [json.loads(line) for line in (tmp_path / "records").read_text().splitlines()]


def test_every_case_beside_the_matmuls_alone(records: list[dict[str, Any]]) -> None:
    for case in CASES:
        found = {record["implementation"]: record for record in records if record["case"] == str(case)}
        assert {"ours", "eager", "compile", "matmuls"} <= set(found)
        assert "Liger" not in found  # it failed, and the others were measured
        assert all(record["device_us"] == 2000 and record["extra_bytes"] == 1_000_000 for record in found.values())
    text = gpu_pages.last_layer(records)
    assert "| float32 20 x 4 -> 7, topk | 2.00 (100 %, 1 MB)" in text
    assert gpu_pages.last_layer([]) == ""
