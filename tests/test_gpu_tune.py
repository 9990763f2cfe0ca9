"""benchmarks/gpu_tune.py: its settings reach the plan."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bench_gpu
import gpu_tune

from fusedloss.backends.triton import given, launching


def forget_kernels() -> None:
    launching.kernels.cache_clear()
    given._forward_launches.cache_clear()


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Puts back what a setting changes."""
    for name in {name for setting in gpu_tune.SETTINGS for name in setting}:
        monkeypatch.setattr(gpu_tune.constants, name, getattr(gpu_tune.constants, name))
    forget_kernels()
    yield monkeypatch
    forget_kernels()


@pytest.mark.parametrize("setting", gpu_tune.SETTINGS, ids=str)
def test_a_setting_is_measured(setting: dict[str, Any], restored: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = SimpleNamespace(flush=lambda: None, run=lambda call: call() is None or 2e-3)
    restored.setattr(bench_gpu.TIMER, "clock", clock)
    restored.setattr(gpu_tune, "SHAPES", {"rows": (4, 1000)})
    gpu_tune.apply(setting)
    gpu_tune.measure(setting, "cpu")
    for name, value in setting.items():
        assert getattr(gpu_tune.constants, name) == value
    (record,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (record["setting"], record["shape"], record["device_us"]) == (setting, "rows, 4 x 1000", 2000.0)


def test_a_setting_that_the_plan_does_not_have() -> None:
    with pytest.raises(AssertionError, match="the plan has no FUSED_ROW_THREAD"):
        gpu_tune.apply({"FUSED_ROW_THREAD": 1})
