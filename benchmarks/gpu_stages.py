"""The stages of gpu.py: what each runs, and what it makes of what came back.

A result is a dictionary: verdict (passed, failed, stopped or left out), outcome (a line), seconds, output (all that was printed),
records, and where there are any failures and left_out (lines).
"""

import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gpu_traffic
from gpu_run import Finished, Record, run
from gpu_smoke import CASES, SANITIZED

FOLDER = Path(__file__).parent
SMOKE_SILENCE = 20  # seconds for one kernel, its compilation and the start of Python among them
LAST_BENCHMARK = 10  # seconds that a benchmark may still take when the time is over
MAX_SHARDS = 8  # processes that run tests at once: each has a context on the GPU
MAX_FAILURES = 20  # lines of them on the page
SAME_ACCURACY = 0.02  # of 360 test images, or 1000 made ones: two runs of one loss on a GPU differ by as much
KERNEL_TESTS = ("kernels", "values", "reductions", "known")
TRAINING_PACKAGES = ("sklearn", "torchvision", "tqdm", "tensorboard", "matplotlib")

Progress = Callable[[list[Record]], None]
Result = dict[str, Any]


def result(finished: Finished, outcome: str, verdict: str | None = None, **more: Any) -> Result:
    """verdict: by the exit status where it is None. Stopped is not failed: nothing wrong was found until then."""
    if verdict is None:
        verdict = "stopped" if finished.status is None else "failed" if finished.status else "passed"
    if finished.status is None:
        outcome += f"; stopped after {finished.seconds:.0f} s"
    found = {"verdict": verdict, "outcome": outcome, "seconds": finished.seconds, "output": finished.output}
    return {**found, "records": finished.records, **more}


def left_out(why: str) -> Result:
    return {"verdict": "left out", "outcome": why, "seconds": 0.0, "output": "", "records": []}


def last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing was printed"


# ---------------------------------------------------------------------------------------------------------------- smoke


def smoke(seconds: float, progress: Progress) -> Result:
    """A case that was started and did not end has hung, or ended its process: the last one."""
    finished = run([sys.executable, str(FOLDER / "gpu_smoke.py")], seconds, SMOKE_SILENCE, progress)
    ended = [record for record in finished.records if record["outcome"] != "started"]
    wrong = [f"{record['case']}: {record['outcome']}" for record in ended if record["outcome"] != "right"]
    unfinished = {record["case"] for record in finished.records} - {record["case"] for record in ended}
    n_right = len(ended) - len(wrong)
    if finished.hung or (finished.status is not None and unfinished):
        why = f"hung for {SMOKE_SILENCE} s" if finished.hung else f"ended the process: {last_line(finished.output)}"
        wrong += [f"{case}: {why}" for case in unfinished or ["the start of Python"]]
    verdict = "failed" if wrong else None
    return result(finished, f"{n_right} of {len(CASES)} cases right", verdict, failures=wrong)


# ---------------------------------------------------------------------------------------------------------------- tests


def pytest_stage(*tests: str, parallel: bool = False) -> Callable[[float, Progress], Result]:
    """A stage that runs tests marked `gpu`; parallel: in several processes."""

    def run_tests(seconds: float, progress: Progress) -> Result:
        # A file that cannot be imported is no end of the others. -vv: a line per test, as soon as it ends.
        options = ["-m", "gpu", "-vv", "--continue-on-collection-errors", "--tb=short", "-p", "no:cacheprovider", *tests]
        shards = [str(FOLDER / "gpu_shards.py"), str(min(MAX_SHARDS, os.cpu_count() or 1))]
        command = [sys.executable, *(shards if parallel else ["-m", "pytest"]), *options]
        return counted(run(command, seconds, None, progress))

    return run_tests


def counted(finished: Finished) -> Result:
    """Counts pytest's lines, of which a run that was stopped has some as well."""
    lines = re.findall(r"^\S+::.*?\b(PASSED|FAILED|ERROR|SKIPPED)\b", finished.output, re.MULTILINE)
    counts = Counter(lines)
    broken = set(re.findall(r"^ERROR (\S+\.py)(?: |$)", finished.output, re.MULTILINE))  # files that were not collected
    counts["ERROR"] += len(broken)
    names = {"PASSED": "passed", "FAILED": "failed", "ERROR": "errors", "SKIPPED": "skipped"}
    outcome = ", ".join(f"{counts[key]:,} {name}" for key, name in names.items() if counts[key] or key == "PASSED")
    failures = list(dict.fromkeys(re.findall(r"^(?:FAILED|ERROR) (.+)$", finished.output, re.MULTILINE)))  # of all shards
    if not failures:  # no summary: it was killed
        failures = re.findall(r"^(\S+::\S+) (?:FAILED|ERROR)", finished.output, re.MULTILINE)
    if finished.status not in (None, 0) and not failures:
        failures = [f"pytest's exit status {finished.status}: {last_line(finished.output)}"]
    skipped: Counter[str] = Counter()
    for count, reason in re.findall(r"^SKIPPED \[(\d+)\] [^\s:]+(?::\d+)?: (.+)$", finished.output, re.MULTILINE):
        skipped[reason] += int(count)
    shown = failures[:MAX_FAILURES] + [f"and {len(failures) - MAX_FAILURES} more"] * (len(failures) > MAX_FAILURES)
    reasons = [f"{count} x {reason}" for reason, count in skipped.items()]
    return result(finished, outcome, "failed" if failures else None, failures=shown, left_out=reasons)


# --------------------------------------------------------------------------------------------------- benchmarks, tuning


def benchmarks(seconds: float, progress: Progress) -> Result:
    command = [sys.executable, "-m", "pytest", str(FOLDER / "bench_gpu.py"), "-o", "filterwarnings=default", "--tb=short"]
    budget = str(max(0.0, seconds - LAST_BENCHMARK))
    finished = run([*command, "-p", "no:cacheprovider"], seconds, None, progress, FUSEDLOSS_BENCH_SECONDS=budget)
    skipped = re.findall(r"^SKIPPED \[(\d+)\] [^\s:]+(?::\d+)?: (.+)$", finished.output, re.MULTILINE)
    failures = re.findall(r"^(?:FAILED|ERROR) (.+)$", finished.output, re.MULTILINE)
    reasons = [f"{count} x {reason}" for count, reason in skipped]
    return result(finished, f"{len(finished.records)} measured", failures=failures, left_out=reasons)


def last_layer(seconds: float, progress: Progress) -> Result:
    finished = run([sys.executable, str(FOLDER / "gpu_linear.py")], seconds, None, progress)
    failures = [last_line(finished.output)] if finished.status else []
    return result(finished, f"{len(finished.records)} measured", failures=failures)


def tune(seconds: float, progress: Progress) -> Result:
    finished = run([sys.executable, str(FOLDER / "gpu_tune.py")], seconds, None, progress)
    failures = [last_line(finished.output)] if finished.status else []
    return result(finished, f"{len(finished.records)} measured", failures=failures)


# -------------------------------------------------------------------------------------------------- NVIDIA's own tools


def traffic(seconds: float, progress: Progress) -> Result:
    ncu = shutil.which("ncu")
    if ncu is None:
        return left_out("ncu is not installed")
    command = [ncu, *gpu_traffic.OPTIONS, sys.executable, str(FOLDER / "gpu_traffic.py")]
    finished = run(command, seconds, None, progress)
    if "ERR_NVGPUCTRPERM" in finished.output:
        return left_out("this user may not read the counters of the GPU (ERR_NVGPUCTRPERM)")
    records = gpu_traffic.with_counts(finished.records, finished.output)
    missing = [] if finished.status is None else [case for case in gpu_traffic.CASES if case not in {r["case"] for r in records}]
    failures = [f"not counted: {', '.join(missing)}: {last_line(finished.output)}"] if missing else []
    outcome = f"{len(records)} of {len(gpu_traffic.CASES)} launches counted"
    return result(finished, outcome, "failed" if failures else None, failures=failures, records=records)


def sanitizer(tool: str) -> Callable[[float, Progress], Result]:
    def run_sanitizer(seconds: float, progress: Progress) -> Result:
        path = shutil.which("compute-sanitizer")
        if path is None:
            return left_out("compute-sanitizer is not installed")
        smoke = [sys.executable, str(FOLDER / "gpu_smoke.py"), *SANITIZED]
        warm = run(smoke, seconds / 2)  # compiles what the sanitizer would slow down
        # PyTorch's caching allocator hides accesses past the end of a tensor: without it each tensor is an allocation.
        command = [path, "--tool", tool, "--error-exitcode", "1", *smoke]
        finished = run(command, seconds - warm.seconds, None, progress, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        ended = [record for record in finished.records if record["outcome"] != "started"]
        failures = re.findall(r"^========= ((?:Invalid|Error|Race|Program hit|Leaked).*)$", finished.output, re.MULTILINE)
        if finished.status and not failures:
            failures = [last_line(finished.output)]
        verdict = "failed" if failures else None
        outcome = f"{len(ended)} of {len(SANITIZED)} cases"
        return result(finished, outcome, verdict, failures=list(dict.fromkeys(failures))[:MAX_FAILURES])

    return run_sanitizer


# ------------------------------------------------------------------------------------------------------------- training


def training(seconds: float, progress: Progress) -> Result:
    """The training script on the digits, with our loss and with torch's; its network on made images where it lacks a package."""
    missing = [package for package in TRAINING_PACKAGES if importlib.util.find_spec(package) is None]
    script = [sys.executable, str(FOLDER / ("gpu_training.py" if missing else "train_cifar10.py")), "--device", "cuda"]
    why = f"; on made images, as the digits need {', '.join(missing)}" if missing else "; on scikit-learn's digits"
    records: list[Record] = []
    output = ""
    for loss in ("fused", "torch"):
        with tempfile.TemporaryDirectory() as out:
            options = [] if missing else ["--data", "digits", "--epochs", "8", "--out", f"{out}/run"]
            finished = run([*script, "--loss", loss, *options], seconds / 2)
        output += finished.output
        found = re.findall(r"accuracy +([\d.]+)%.*?([\d.]+) ms/step", finished.output)
        if finished.status != 0 or not found:
            failures = [] if finished.status is None else [f"{loss}: {last_line(finished.output)}"]
            verdict = "failed" if failures else None
            return result(finished, f"{len(records)} of 2 runs{why}", verdict, failures=failures, records=records)
        accuracy, step = found[-1]
        records.append({"loss": loss, "accuracy": float(accuracy) / 100, "step_ms": float(step), "seconds": finished.seconds})
        progress(records)
    apart = abs(records[0]["accuracy"] - records[1]["accuracy"])
    runs = [f"{run['accuracy']:.2%} right, {run['step_ms']:.1f} ms a step with {run['loss']}" for run in records]
    outcome = ", ".join(runs) + why
    failures = [f"the accuracies differ by {apart:.2%}"] if apart > SAME_ACCURACY else []
    together = finished._replace(seconds=sum(record["seconds"] for record in records), output=output)
    return result(together, outcome, "failed" if failures else None, failures=failures, records=records)


class Stage(NamedTuple):
    """seconds: what it takes in a usual run, by which the time is divided."""

    seconds: float
    run: Callable[[float, Progress], Result]


FILES = [f"tests/test_{name}.py" for name in KERNEL_TESTS]
OTHERS = [f"--ignore={path}" for path in ("tests/test_gpu.py", *FILES)]
STAGES = {
    "smoke": Stage(40, smoke),
    "gpu_tests": Stage(80, pytest_stage("tests/test_gpu.py")),  # alone: streams, threads and graphs
    "kernel_tests": Stage(90, pytest_stage(*FILES, parallel=True)),
    "benchmarks": Stage(120, benchmarks),
    "last_layer": Stage(40, last_layer),
    "traffic": Stage(40, traffic),
    "memcheck": Stage(50, sanitizer("memcheck")),
    "training": Stage(40, training),
    "other_tests": Stage(40, pytest_stage("tests", *OTHERS, parallel=True)),
    "racecheck": Stage(60, sanitizer("racecheck")),
    "tune": Stage(160, tune),
}
ON_REQUEST = ("racecheck", "tune")
