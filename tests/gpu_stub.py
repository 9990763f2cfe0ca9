"""What a GPU's tools would answer, for the tests of benchmarks/gpu.py: a stub in place of every command of its stages."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu_run
import gpu_smoke
import gpu_stages

PYTEST = """tests/test_gpu.py::test_a[x y] PASSED                     [ 25%]
tests/test_gpu.py::test_b FAILED                          [ 50%]
tests/test_gpu.py::test_c SKIPPED (fewer than two GPUs)   [ 75%]
"""
NCU = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","Llama 2","Command line profiler metrics","dram__bytes_read.sum","byte","1,000"
"0","7","Llama 2","Command line profiler metrics","dram__bytes_write.sum","byte","500"
"1","7","Llama 2","Command line profiler metrics","dram__bytes_read.sum","byte","524"
"1","7","Llama 2","Command line profiler metrics","dram__bytes_write.sum","byte","524"
"""
LAUNCHED = [{"case": "Llama 2", "shape": [8192, 32000], "floor": 2500}]


def finished(output: str = "", status: int | None = 0, records: list[Any] | None = None, hung: bool = False) -> gpu_run.Finished:
    return gpu_run.Finished(status, output, 12.0, records or [], hung)


def stub_run(monkeypatch: pytest.MonkeyPatch, answers: Any) -> list[list[str]]:
    """Every command gets the next answer, or what a function of it returns; returns the commands."""
    commands: list[list[str]] = []

    def run(command: list[str], seconds: float, *_: Any, **__: str) -> gpu_run.Finished:
        assert seconds > 0
        commands.append(command)
        return answers(command) if callable(answers) else answers[len(commands) - 1]

    monkeypatch.setattr(gpu_stages, "run", run)
    return commands


def smoke_records(*outcomes: str) -> list[dict[str, Any]]:
    """Of the first cases; "" for one that did not end."""
    found = []
    for case, outcome in zip(gpu_smoke.CASES, outcomes, strict=False):
        found.append({"case": case, "outcome": "started"})
        if outcome:
            found.append({"case": case, "outcome": outcome, "seconds": 0.1})
    return found
