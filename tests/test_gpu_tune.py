"""benchmarks/gpu_tune.py: its settings reach the plan, and the kernel that it changes is still right."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compare import check_against_torch
from paths import INTERPRETER, entered
from problems import make_logits, make_target, make_weight

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bench_gpu
import emulated
import gpu_tune

import fusedloss
from fusedloss import cut_tiles, kernels, known
from fusedloss.backends.triton import given, launching

KEPT = []  # modules with kernels, which would unload themselves from a GPU when they go


def forget_kernels() -> None:
    launching.kernels.cache_clear()
    given._forward_launches.cache_clear()


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Puts back what a setting changes."""
    from fusedloss.kernels import fused, tile

    for module in (tile, fused):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(kernels, name, module)
    monkeypatch.setattr(cut_tiles, "PART_REGISTERS", cut_tiles.PART_REGISTERS)
    monkeypatch.setattr(known, "KNOWN", {})
    for name in {name for setting in gpu_tune.SETTINGS for name in setting if hasattr(gpu_tune.constants, name)}:
        monkeypatch.setattr(gpu_tune.constants, name, getattr(gpu_tune.constants, name))
    forget_kernels()
    yield monkeypatch
    KEPT.append(sys.modules["fusedloss.kernels.fused"])
    forget_kernels()


@pytest.mark.parametrize("setting", gpu_tune.SETTINGS, ids=str)
def test_a_setting_is_measured(setting: dict[str, Any], restored: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = SimpleNamespace(flush=lambda: None, run=lambda call: call() is None or 2e-3)
    restored.setattr(bench_gpu.TIMER, "clock", clock)
    restored.setattr(gpu_tune, "SHAPES", {"rows": (4, 1000)})
    for name, value in setting.items():
        restored.setenv(name, str(value))
    gpu_tune.apply(setting)
    gpu_tune.measure(setting, "cpu")
    for name, value in setting.items():
        assert getattr(gpu_tune.constants, name, value) == value
    (record,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (record["setting"], record["shape"], record["device_us"]) == (setting, "rows, 4 x 1000", 2000.0)


def test_a_setting_that_the_plan_does_not_have() -> None:
    with pytest.raises(AssertionError, match="the plan has no FUSED_ROW_THREAD"):
        gpu_tune.apply({"FUSED_ROW_THREAD": 1})


# Whole 16-byte groups at the end of the batch, and not; a row in parts, and whole; one program, and several.
@pytest.mark.parametrize("path", [INTERPRETER])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum", "label_smoothing": 0.1, "weight": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(5, 37), (200, 100), (203, 101), (40, 255)], ids=str)
def test_gathered_packed_rows_are_right(
    path: Any, restored: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    gpu_tune.apply({"packed rows": "gathered"})
    rest = dict(options)
    weight = make_weight(shape[1], dtype) if rest.pop("weight", False) else None
    with entered(path):
        check_against_torch(
            make_logits(*shape, dtype=dtype), make_target(shape[0], n_classes=shape[1], ignored=-100), weight, **rest
        )
    assert launching.kernels()["fused_tile_kernel"] is sys.modules["fusedloss.kernels.fused"].fused_tile_kernel


@pytest.mark.skipif(emulated.emulator() is None, reason="../shared/ptxsim is not there")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("n_cols", "passes"), [(100, 2.4), (101, 3.2), (37, 3.6)])
def test_gathered_packed_rows_ask_for_less(restored: pytest.MonkeyPatch, n_cols: int, passes: float) -> None:
    """A race, or an access out of bounds, raises; the gradient is that of the kernel as it is."""

    def loss_and_gradient() -> Any:
        logits = make_logits(1021, n_cols, dtype=torch.bfloat16).requires_grad_()
        with emulated.emulator().emulated_gpu("sm_90", order=1, resident=132, race=2), fusedloss.backend("triton"):
            loss = fusedloss.cross_entropy(logits, make_target(1021, n_classes=n_cols, ignored=-100))
            loss.backward()
        return loss, logits.grad, emulated.measure(fusedloss.cross_entropy, 1024, n_cols, torch.bfloat16)

    loss, gradient, mark = loss_and_gradient()
    gpu_tune.apply({"packed rows": "gathered"})
    forget_kernels()
    gathered_loss, gathered_gradient, gathered = loss_and_gradient()
    assert torch.equal(gathered_loss, loss)
    assert torch.equal(gathered_gradient, gradient)
    assert mark.passes > passes > 2.2 > gathered.passes
    assert gathered.narrowest == 16
    assert gathered.spills == 0
