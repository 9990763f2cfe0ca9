"""The GPU benchmarks (bench_gpu.py) on a CPU, with a stub for the device's clock: nothing is measured."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"

# What runs the suite on this machine: small shapes, and a clock of which every call takes 2 ms.
STUBBED = """
import sys
sys.path.insert(0, "benchmarks")
import bench_gpu, pytest, torch

class Clock:
    seconds = 0.0
    flushed = 0
    def __call__(self):
        return self.seconds
    def flush(self):
        Clock.flushed += 1
    def run(self, call):
        call()
        self.seconds += 0.002
        return 0.002
    def peak(self, call):
        call()
        return 4 * 70 * 3
    def wait(self):
        pass
    def memory(self):
        return 1 << 20

bench_gpu.DEVICE = "cpu"
bench_gpu.SHAPES = {"matrix": (70, 3), "pixels": (2, 3, 4, 5), "too large": (1000, 1000)}
bench_gpu.DTYPES = (torch.float32,)
bench_gpu.COPY_BYTES = 1 << 10
bench_gpu.HOST_CALLS = 3
bench_gpu.peers.compiled = lambda: torch.nn.functional.cross_entropy
bench_gpu.peers.installed = lambda: {"Liger": overwriting}
bench_gpu.TIMER.clock = Clock()

class Overwriting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target):
        assert logits.abs().max() > 1.5, "the logits were not put back"
        ctx.save_for_backward(logits.clone())
        logits.detach().zero_()
        return logits.new_zeros(())
    @staticmethod
    def backward(ctx, dloss):
        return torch.zeros_like(ctx.saved_tensors[0]), None

def overwriting(logits, target):
    return Overwriting.apply(logits, target)

import os
os.environ["FUSEDLOSS_RECORDS"] = sys.argv[1]
status = pytest.main(["benchmarks/bench_gpu.py", "-p", "no:cacheprovider"])
assert Clock.flushed > 0
sys.exit(status)
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("bench") / "records"
    done = subprocess.run([sys.executable, "-c", STUBBED, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "too many for this device's memory" in done.stdout
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_implementation_and_phase_is_measured(records: list[dict[str, Any]]) -> None:
    measured = {tuple(record["case"]) for record in records}
    phases = ("both", "accumulation", "forward", "backward")
    matrix = {("matrix", "float32", name, p) for name in ("fusedloss", "eager", "torch.compile", "Liger") for p in phases}
    pixels = {("pixels", "float32", name, p) for name in ("fusedloss", "eager", "torch.compile") for p in phases}
    assert measured == matrix | pixels
    assert [record["case"][3] == "both" for record in records] == [True] * 7 + [False] * 21, "what matters most comes first"


def test_numbers_follow_from_the_clock_and_the_bytes(records: list[dict[str, Any]]) -> None:
    for record in records:
        shape = record["shape"]
        counted = 1 - len(range(0, shape[0], 7)) / shape[0]  # labels[::7] are ignored
        passes = counted + (record["case"][3] != "forward")
        n_bytes = passes * 4 * torch.Size(shape).numel()
        assert record["bytes"] == pytest.approx(n_bytes, abs=1)
        assert record["device_us"] == pytest.approx(2000)
        assert record["GB/s"] == pytest.approx(n_bytes / 0.002 / 1e9)
        assert record["copy GB/s"] == pytest.approx(2 * 1024 / 0.002 / 1e9)
        assert record["% of copy"] == pytest.approx(100 * n_bytes / (2 * 1024))
        assert record["host_us"] > 0


def test_the_upstream_gradient_of_an_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_gpu

    monkeypatch.setattr(bench_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(bench_gpu, "SHAPES", {"matrix": (70, 3)})
    monkeypatch.setattr(bench_gpu.TIMER, "clock", Clock())
    gradients = {}
    for phase in ("both", "accumulation"):
        problem = bench_gpu.Problem(bench_gpu.Case("matrix", torch.float32, "fusedloss", phase))
        problem.prepare()
        problem.call()
        gradients[phase] = problem.result
    assert gradients["both"].any()
    torch.testing.assert_close(gradients["accumulation"], gradients["both"] / 8)


class Clock:
    """Of which every call takes 2 ms."""

    def flush(self) -> None:
        pass

    def memory(self) -> int:
        return 1 << 30

    def run(self, call: Any) -> float:
        call()
        return 0.002


def test_an_empty_interval_is_subtracted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_gpu

    clock = bench_gpu.DeviceClock()
    calls = []
    monkeypatch.setattr(clock, "_interval", lambda call: 7e-6 if call() == "work" else 5e-6)
    assert clock.run(lambda: calls.append(1) or "work") == pytest.approx(2e-6)
    assert clock() == pytest.approx(2e-6)
    assert calls == [1]
