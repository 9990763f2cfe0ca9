"""All that a GPU can show, in under 8 minutes: its tests, the benchmarks, compute-sanitizer. Writes RESULTS.md.

    make gpu
    python benchmarks/gpu.py --only benchmarks

Each stage has a share of the time and is stopped at its end; what was left out is named in RESULTS.md. The numbers go to
results/gpu.json, a plot to results/gpu.png. Without a GPU: one line, and exit status 2.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_pages import write

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
# Seconds of each stage: 465 together.
SECONDS = {"tests": 150, "benchmarks": 195, "memcheck": 60, "racecheck": 60}
LAST_BENCHMARK = 25  # seconds that a benchmark may still take when the time is over
PACKAGES = ("torch", "triton", "fusedloss", "liger-kernel", "flash-attn", "quack-kernels")
# Every kernel once, small enough for an instrumented run.
SANITIZED = "tests/test_kernels.py::test_shapes"


def run(command: list[str], seconds: float, **environment: str) -> tuple[int | None, str, float]:
    """Exit status (None: stopped when the time was over), output, and seconds."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as stopped:
        output = stopped.stdout or ""
        return None, output if isinstance(output, str) else output.decode(errors="replace"), time.monotonic() - start
    return done.returncode, done.stdout, time.monotonic() - start


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", *arguments]


def tests() -> dict[str, Any]:
    return stage("tests", pytest_command("-m", "gpu", "-p", "no:cacheprovider"))


def sanitizer(tool: str) -> dict[str, Any]:
    path = shutil.which("compute-sanitizer")
    if path is None:
        return {"outcome": "left out: compute-sanitizer is not installed", "seconds": 0.0, "failed": False, "left_out": []}
    # PyTorch's caching allocator hides accesses past the end of a tensor: without it each tensor is an allocation.
    command = [path, "--tool", tool, "--error-exitcode", "1", *pytest_command("-m", "gpu", "-x", SANITIZED)]
    return stage(tool, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def stage(name: str, command: list[str], **environment: str) -> dict[str, Any]:
    status, output, seconds = run(command, SECONDS[name], **environment)
    summary = re.findall(r"^(?:=+ )?(\d+ (?:passed|failed|skipped|error).*?)(?: =+)?$", output, re.MULTILINE)
    outcome = summary[-1] if summary else f"exit status {status}"
    if status is None:
        outcome = f"stopped after {seconds:.0f} s"
    if status != 0:
        print(output[-4000:])
    skipped = re.findall(r"^SKIPPED \[(\d+)\] [^\s:]+(?::\d+)?: (.+)$", output, re.MULTILINE)
    left_out = [f"{count} x {reason}" for count, reason in skipped if "TRITON_INTERPRET" not in reason]
    return {"outcome": outcome, "seconds": seconds, "failed": status != 0, "left_out": left_out}


def benchmarks(numbers: Path) -> dict[str, Any]:
    """pytest-benchmark's own JSON goes to `numbers`."""
    budget = SECONDS["benchmarks"] - LAST_BENCHMARK
    command = pytest_command(str(FOLDER / "bench_gpu.py"), f"--benchmark-json={numbers}", "-o", "filterwarnings=default")
    return stage("benchmarks", command, FUSEDLOSS_BENCH_SECONDS=str(budget))


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which("nvidia-smi") else ""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "gpu": properties.name,
        "memory_bytes": properties.total_memory,
        "sms": properties.multi_processor_count,
        "driver, clocks, power limit": driver.splitlines()[0] if driver else "unknown",
        "cuda": torch.version.cuda or f"HIP {torch.version.hip}",
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["tests", "benchmarks", "memcheck", "racecheck"], nargs="+", default=list(SECONDS))
    parser.add_argument("--out", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: torch.cuda sees none, nothing was run and RESULTS.md was left as it is")
        sys.exit(2)
    (arguments.out / "results").mkdir(parents=True, exist_ok=True)
    raw = arguments.out / "results" / "gpu_raw.json"
    raw.unlink(missing_ok=True)
    stages = {}
    for name in arguments.only:
        print(f"{name}: at most {SECONDS[name]} s", flush=True)
        stages[name] = tests() if name == "tests" else benchmarks(raw) if name == "benchmarks" else sanitizer(name)
        print(f"{name}: {stages[name]['outcome']}", flush=True)
    records = [entry["extra_info"] for entry in json.loads(raw.read_text())["benchmarks"]] if raw.exists() else []
    raw.unlink(missing_ok=True)  # pytest-benchmark's file names the host and its user
    data = {"machine": machine(), "stages": stages, "benchmarks": [record for record in records if record]}
    write(data, arguments.out)
    print(f"written: {arguments.out / 'RESULTS.md'}")
    sys.exit(1 if any(found["failed"] for found in stages.values()) else 0)


if __name__ == "__main__":
    main()
