"""benchmarks/gpu_tune.py: its settings reach the plan, and the kernel that it changes is still right."""

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compare import check_against_torch
from compiled import compile_for, launches
from paths import INTERPRETER, entered
from problems import make_logits, make_target, make_weight

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bench_gpu
import gpu_tune

import fusedloss
from fusedloss import kernels
from fusedloss.backends.triton import given, launching


def forget_kernels() -> None:
    launching.kernels.cache_clear()
    given._forward_launches.cache_clear()


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Puts back what a setting changes."""
    from fusedloss.kernels import fused

    monkeypatch.setitem(sys.modules, "fusedloss.kernels.fused", fused)
    monkeypatch.setattr(kernels, "fused", fused)
    for name in {name for setting in gpu_tune.SETTINGS for name in setting} - {"ticket"}:
        monkeypatch.setattr(gpu_tune.constants, name, getattr(gpu_tune.constants, name))
    forget_kernels()
    yield monkeypatch
    forget_kernels()


@pytest.mark.parametrize("setting", gpu_tune.SETTINGS, ids=str)
def test_a_setting_is_measured(
    setting: dict[str, Any], restored: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = SimpleNamespace(flush=lambda: None, run=lambda call: call() is None or 2e-3)
    restored.setattr(bench_gpu.TIMER, "clock", clock)
    restored.setattr(gpu_tune, "SHAPES", {"rows": (4, 1000)})
    gpu_tune.apply(setting, tmp_path)
    gpu_tune.measure(setting, "cpu")
    for name, value in setting.items():
        assert name == "ticket" or getattr(gpu_tune.constants, name) == value
    (record,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (record["setting"], record["shape"], record["device_us"]) == (setting, "rows, 4 x 1000", 2000.0)


def test_a_setting_that_the_plan_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the plan has no FUSED_ROW_THREAD"):
        gpu_tune.apply({"FUSED_ROW_THREAD": 1}, tmp_path)


def test_the_ticket_before_the_stores_compiles(restored: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And comes first in the code: the atomic that draws it, then the stores of the gradient."""
    first = {}
    for name in ("as it is", "before"):
        if name == "before":
            gpu_tune.apply({"ticket": "before the stores"}, tmp_path)
            forget_kernels()
        logits, target = torch.zeros(300, 1000, dtype=torch.bfloat16, requires_grad=True), make_target(300, n_classes=1000)
        launched = launches(restored, "sm_90", partial(fusedloss.cross_entropy, logits, target))
        (row,) = (launch for launch in launched if launch.kernel == "fused_row_kernel")
        ptx = compile_for(row, "sm_90").asm["ptx"]
        wide = max(ptx.rfind("st.global.v4"), ptx.rfind("st.global.v8"))
        first[name] = "ticket" if ptx.index("acq_rel") < wide else "stores"
    assert first == {"as it is": "stores", "before": "ticket"}


@pytest.mark.parametrize("path", [INTERPRETER])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum", "label_smoothing": 0.1, "weight": True}], ids=str)
@pytest.mark.parametrize("shape", [(5, 1001), (3, 1000), (2, 33001)], ids=str)
def test_the_ticket_before_the_stores_is_right(
    path: Any, restored: pytest.MonkeyPatch, tmp_path: Path, shape: tuple[int, int], options: dict[str, Any]
) -> None:
    gpu_tune.apply({"ticket": "before the stores"}, tmp_path)
    rest = dict(options)
    weight = make_weight(shape[1]) if rest.pop("weight", False) else None
    with entered(path):
        check_against_torch(make_logits(*shape), make_target(shape[0], n_classes=shape[1], ignored=-100), weight, **rest)
    assert launching.kernels()["fused_row_kernel"].fn.__code__.co_filename == str(tmp_path / "fused.py")
