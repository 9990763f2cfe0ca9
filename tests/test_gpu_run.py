"""benchmarks/gpu.py from its command line to its page, with a stub of the device: order, time, and what a kill would leave."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_stub import LAUNCHED, NCU, PYTEST, finished, smoke_records, stub_run

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu
import gpu_pages
import gpu_run
import gpu_stages
import gpu_tune

ROOT = Path(__file__).parent.parent
MACHINE = {
    "gpu": "a stub",
    "memory_bytes": 1 << 30,
    "sms": 1,
    "driver, clocks, power limit": "unknown",
    "cuda": "none",
    "python": "3",
    "versions": {"torch": "2", "liger-kernel": "not installed"},
    "date": "a day",
}


def measured(case: list[str], device_us: float) -> dict[str, Any]:
    passes = 1 if case[3] == "forward" else 2
    share = {"GB/s": passes * 840 / device_us, "copy GB/s": 3000.0, "% of copy": 100 * passes * 0.28 / device_us}
    return {"case": case, "shape": [70, 3], "device_us": device_us, "host_us": 10.0, "peak_in_logits": 1.0, "bytes": 840, **share}


BENCHMARKED = [
    measured(["matrix", dtype, name, phase], device_us)
    for phase in ("both", "accumulation", "forward", "backward")
    for dtype in ("bfloat16", "float32")
    for name, device_us in (("fusedloss", 8.0 if phase == "accumulation" else 4.0), ("eager", 12.0), ("torch.compile", 6.0))
]


def answer(command: list[str]) -> gpu_run.Finished:
    """What each stage's command would answer."""
    words = " ".join(command)
    if "memcheck" in words:
        return finished("========= ERROR SUMMARY: 0 errors", 0, smoke_records(*["right"] * 8))
    if "gpu_smoke" in words:
        return finished("", 0, smoke_records(*["right"] * 16))
    if "bench_gpu" in words:
        return finished("SKIPPED [3] benchmarks/bench_gpu.py:200: out of time: 100 s", 0, BENCHMARKED)
    if "gpu_linear" in words:
        times = {"eager": 4000.0, "ours": 2500.0, "matmuls": 2000.0}
        record = {"case": "rows", "extra_bytes": 5e6}
        return finished("", 0, [{**record, "implementation": name, "device_us": time} for name, time in times.items()])
    if "gpu_traffic" in words:
        return finished(NCU, None, LAUNCHED)
    if "train_cifar10" in words:
        return finished("  test loss 0.0400 accuracy  99.44%  3.1 ms/step")
    if "gpu_tune" in words:
        settings: list[dict[str, int]] = [{}, {"FUSED_ROW_THREADS": 128}]
        tuned = [{"shape": "rows, 4 x 9", "setting": x, "launch": "1 x 4 warps", "device_us": 9.0 - len(x)} for x in settings]
        return finished("", 0, tuned)
    return finished(PYTEST.replace("FAILED", "PASSED"), None if "tests/test_gpu.py" in words else 0)


@pytest.fixture
def gpu_with_stubs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs gpu.main with these options; returns its exit status, the stages in order, and the page after each."""
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "machine", lambda: MACHINE)
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: f"/{name}")
    monkeypatch.setattr(gpu_stages, "TRAINING_PACKAGES", ())
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    pages: list[str] = []

    def stub(*options: str, answer: Any = answer) -> tuple[int, list[str]]:
        def answer_and_read(command: list[str]) -> gpu_run.Finished:
            pages.append((tmp_path / "RESULTS.md").read_text())  # as a kill would leave it
            return answer(command)

        stub_run(monkeypatch, answer_and_read)
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), *options])
        with pytest.raises(SystemExit) as stopped:
            gpu.main()
        return stopped.value.code, pages

    return stub


def test_all_stages_in_order_and_a_page_after_each(gpu_with_stubs: Any, tmp_path: Path) -> None:
    status, pages = gpu_with_stubs()
    assert status == 0
    data = json.loads((tmp_path / "results" / "gpu.json").read_text())
    usual = ["smoke", "gpu_tests", "kernel_tests", "benchmarks", "last_layer", "traffic", "memcheck", "training", "other_tests"]
    assert list(data["stages"]) == usual
    assert "| smoke | running | still running | 0 |" in pages[0]
    assert "| smoke | passed | 16 of 16 cases right | 12 |" in pages[1]
    assert all(page.count("passed") >= i for i, page in enumerate(pages[:3]))
    text = (tmp_path / "RESULTS.md").read_text()
    print(text)
    first_page = text[: text.index("## All measurements")]
    for line in (
        "**a stub**, 1 GiB, 1 SMs",
        "**Nothing failed**; 6 tests passed. Stopped before the end: gpu tests, traffic, other tests.",
        "Forward + backward: 14 to 14 % of a copy's bandwidth; something else is faster in 0 of 2 cases.",
        "DRAM moved 1.02 to 1.02 times the bytes of the floor.",
        "| gpu tests | stopped | 2 passed, 1 skipped; stopped after 12 s | 12 |",
        "| kernel tests | passed | 2 passed, 1 skipped | 12 |",
        "- benchmarks: left out: 3 x out of time: 100 s",
        "| matrix, 70 x 3, bfloat16 | 4.0 | 420 | 14 | 3.00 | 1.50 | 8.0 | 1.50 | 0.75 |",
        "- Forward + backward of loss / 8, matrix, 70 x 3, bfloat16: of our device time 0.75 with torch.compile.",
        "| Llama 2, 8192 x 32000 | 2 |",
        "| training | passed | 99.44% right, 3.1 ms a step with fused, 99.44% right, 3.1 ms a step with torch; on scikit-learn's",
    ):
        assert line in first_page, line
    assert "| rows | 4.00 (50 %, 5 MB) | 2.50 (80 %, 5 MB) | 2.00 (100 %, 5 MB) |" in text
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == sorted(f"{name}.txt" for name in usual)
    assert not list(tmp_path.rglob(".*"))


def test_what_fails_is_named_and_the_other_stages_run(gpu_with_stubs: Any, tmp_path: Path) -> None:
    def failing(command: list[str]) -> gpu_run.Finished:
        if "gpu_smoke" in " ".join(command):
            return finished("", None, smoke_records("right", ""), hung=True)
        return answer(command)

    status, _ = gpu_with_stubs("--only", "smoke", "kernel_tests", answer=failing)
    assert status == 1
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| smoke | **failed** | 1 of 16 cases right; stopped after 12 s | 12 |" in text
    assert "- smoke: failed: many programs: hung for 20 s" in text
    assert "**Failed: smoke**; 2 tests passed.\n" in text
    assert "| kernel tests | passed |" in text
    assert "## Speed" not in text


def test_tuning_is_on_request(gpu_with_stubs: Any, tmp_path: Path) -> None:
    assert gpu_with_stubs("--only", "tune")[0] == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| logits | as it is | FUSED_ROW_THREADS 128 |" in text
    assert "| rows, 4 x 9 | 9.0, 1 x 4 warps | **8.0**, 1 x 4 warps |" in text
    assert "- rows, 4 x 9: FUSED_ROW_THREADS 128 takes 0.89 of the time of the plan as it is." in text
    records = json.loads((tmp_path / "results" / "gpu.json").read_text())["stages"]["tune"]["records"]
    assert "No setting beats the plan as it is" in gpu_pages.tuning(records[:1])


def test_tuning_does_not_take_noise_for_a_gain() -> None:
    times = {"as it is": 9.0, "SLICE_THREADS 256": 8.5, gpu_pages.AGAIN: 8.4}
    found = gpu_pages.faster({"rows": {setting: {"device_us": us} for setting, us in times.items()}})
    assert found == ["- rows: the plan as it is, measured first and last, differs by 7 %."]
    assert gpu_pages.named({"as it is": "again"}) == gpu_pages.AGAIN
    assert {"as it is": "again"} in gpu_tune.SETTINGS


def test_the_time_is_shared_out() -> None:
    usual = [name for name in gpu.STAGES if name not in gpu.ON_REQUEST]
    left = 540.0
    for name in usual:
        seconds = gpu.share(gpu.STAGES, name, usual, left)
        assert seconds == pytest.approx(gpu.STAGES[name].seconds)
        left -= seconds
    assert left == pytest.approx(0)
    assert gpu.share(gpu.STAGES, usual[-1], usual, 300) == 300  # what others did not use
    assert gpu.share(gpu.STAGES, "benchmarks", ["benchmarks"], 540) == 540


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_and_status_2(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path / "home")})
    assert done.returncode == 2
    assert done.stdout.splitlines() == ["no GPU: torch.cuda sees none, nothing was run and RESULTS.md was left as it is"]
    assert not list(tmp_path.iterdir())
