"""The GPU benchmarks (bench_gpu.py, gpu.py, gpu_pages.py) on a CPU, with a stub for the device's clock: nothing is measured."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu
import gpu_pages

ROOT = Path(__file__).parent.parent

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

status = pytest.main(["benchmarks/bench_gpu.py", "-p", "no:cacheprovider", "--benchmark-json=" + sys.argv[1]])
assert Clock.flushed > 0
sys.exit(status)
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("bench") / "numbers.json"
    done = subprocess.run([sys.executable, "-c", STUBBED, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "too many for this device's memory" in done.stdout
    return [entry["extra_info"] for entry in json.loads(path.read_text())["benchmarks"] if entry["extra_info"]]


def test_every_implementation_and_phase_is_measured(records: list[dict[str, Any]]) -> None:
    measured = {tuple(record["case"]) for record in records}
    phases = ("forward", "backward", "both")
    matrix = {("matrix", "float32", name, p) for name in ("fusedloss", "eager", "torch.compile", "Liger") for p in phases}
    pixels = {("pixels", "float32", name, p) for name in ("fusedloss", "eager", "torch.compile") for p in phases}
    assert measured == matrix | pixels


def test_numbers_follow_from_the_clock_and_the_bytes(records: list[dict[str, Any]]) -> None:
    for record in records:
        passes = 1 if record["case"][3] == "forward" else 2
        n_bytes = passes * 4 * torch.Size(record["shape"]).numel()
        assert record["bytes"] == n_bytes
        assert record["device_us"] == pytest.approx(2000)
        assert record["GB/s"] == pytest.approx(n_bytes / 0.002 / 1e9)
        assert record["copy GB/s"] == pytest.approx(2 * 1024 / 0.002 / 1e9)
        assert record["% of copy"] == pytest.approx(100 * n_bytes / (2 * 1024))
        assert record["host_us"] > 0


MACHINE = {
    "gpu": "a stub",
    "memory_bytes": 1 << 30,
    "sms": 1,
    "driver, clocks, power limit": "unknown",
    "cuda": "none",
    "python": "3",
    "versions": {"torch": "2"},
    "date": "a day",
}


def test_the_pages_show_where_others_are_faster(records: list[dict[str, Any]], tmp_path: Path) -> None:
    slower = [dict(record) for record in records]
    for record in slower:
        if record["case"] == ["matrix", "float32", "fusedloss", "both"]:
            record["device_us"] *= 4
        record["host_us"] = 10.0
    stages = {"tests": {"outcome": "3 passed", "seconds": 1.0, "failed": False, "left_out": ["2 x one GPU"]}}
    gpu_pages.write({"machine": MACHINE, "stages": stages, "benchmarks": slower}, tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    ahead = "eager 0.25, torch.compile 0.25, Liger 0.25"
    assert f"- Forward + backward, matrix, 70 x 3, float32: device time in ours: {ahead}." in text
    assert text.count("device time in ours") == 1
    assert "a stub" in text
    assert "- tests: 3 passed (1 s)\n  - left out: 2 x one GPU" in text
    assert "| matrix, 70 x 3, float32 | 8,000.0 (10), 82 %" in text
    assert (tmp_path / "results" / "gpu.png").stat().st_size < 100_000
    assert json.loads((tmp_path / "results" / "gpu.json").read_text())["benchmarks"] == slower
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["RESULTS.md", "gpu.json", "gpu.png", "results"]


def test_a_run_without_benchmarks_says_what_was_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda _: None)
    stages = {"memcheck": gpu.sanitizer("memcheck")}
    gpu_pages.write({"machine": MACHINE, "stages": stages, "benchmarks": []}, tmp_path)
    assert "memcheck: left out: compute-sanitizer is not installed" in (tmp_path / "RESULTS.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_and_status_2(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.splitlines() == ["no GPU: torch.cuda sees none, nothing was run and RESULTS.md was left as it is"]
    assert not list(tmp_path.iterdir())


def test_stages_fit_eight_minutes_and_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(gpu.SECONDS.values()) < 8 * 60
    monkeypatch.setitem(gpu.SECONDS, "tests", 0.2)
    found = gpu.stage("tests", [sys.executable, "-c", "import time; print('1 passed', flush=True); time.sleep(60)"])
    assert found["failed"]
    assert found["outcome"].startswith("stopped after")
    monkeypatch.setitem(gpu.SECONDS, "tests", 30)
    output = "SKIPPED [4] tests/test_gpu.py:195: fewer than two GPUs\n2 passed, 4 skipped in 3.0s"
    found = gpu.stage("tests", [sys.executable, "-c", f"print({output!r})"])
    assert (found["outcome"], found["failed"]) == ("2 passed, 4 skipped in 3.0s", False)
    assert found["left_out"] == ["4 x fewer than two GPUs"]


@pytest.mark.parametrize("failed", [False, True])
def test_all_stages_in_turn(records: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: bool) -> None:
    """gpu.py itself, with stages that only pretend to run."""
    ran = []

    def stage(name: str, command: list[str], **environment: str) -> dict[str, Any]:
        ran.append(name)
        for option in command:
            if option.startswith("--benchmark-json="):  # as pytest-benchmark does, a case that was skipped among them
                entries = [{"extra_info": record} for record in records] + [{"extra_info": {}}]
                Path(option.partition("=")[2]).write_text(json.dumps({"benchmarks": entries, "machine_info": "secret"}))
        return {"outcome": "1 passed", "seconds": 1.0, "failed": failed and name == "tests", "left_out": []}

    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "machine", lambda: MACHINE)
    monkeypatch.setattr(gpu, "stage", stage)
    monkeypatch.setattr(gpu.shutil, "which", lambda _: "a sanitizer")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == int(failed)
    assert ran == ["tests", "benchmarks", "memcheck", "racecheck"]
    assert "a stub" in (tmp_path / "RESULTS.md").read_text()
    assert json.loads((tmp_path / "results" / "gpu.json").read_text())["benchmarks"] == records
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["gpu.json", "gpu.png"]
