"""The loss on the CPU: PyTorch's, torch.compile of it, and ours.

    make bench                                   # this and the other benchmarks of a CPU; ARGS=--quick: the first rows alone
    python benchmarks/bench_cpu.py --quick       # three rows, in a minute where nothing else runs
    pytest benchmarks --benchmark-only           # forward, backward and both apart, by pytest-benchmark
    pytest benchmarks --benchmark-only --benchmark-save=before
    pytest benchmarks --benchmark-only --benchmark-compare

The first prints a Markdown table row by row, with what its columns mean, and writes it to runs/ with a plot. Its times are
medians of interleaved runs in one process, so that what else the machine does falls on all alike; only ratios mean much. Every
backward makes a fresh gradient, as in training.

Under pytest, forward means the forward of training: ours makes the gradient there, and its backward only hands it out, so that
only `both` compares like with like. Calls that belong together are one group of pytest-benchmark's table.
"""

import argparse
import datetime
import gc
import io
import platform
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from files import write_atomically

import fusedloss
from fusedloss.backends import cpu

SHAPES = ((128, 10), (4096, 1000), (2048, 32000), (512, 128256))
DTYPES = (torch.float32, torch.bfloat16)
CALLS = {"eager": F.cross_entropy, "compile": torch.compile(F.cross_entropy, dynamic=False), "ours": fusedloss.cross_entropy}
LARGE = 32 << 20  # bytes; below, what the allocator kept of earlier calls hides the peak
SECONDS, QUICK_SECONDS = 5.0, 1.5  # of measuring, per row of the table
ROUNDS = (5, 2000)  # pytest-benchmark's, as many as fit:
SECONDS_PER_BENCHMARK = 0.3

COLUMNS = """\
- logits: random normal numbers in this dtype and shape; "smoothing" is label_smoothing=0.1.
- floor: torch.add(x, 1, out=y), one read and one write of the logits, into memory that was used before.
- eager, compile, ours: F.cross_entropy, torch.compile of it, and fusedloss.cross_entropy, forward and backward; in brackets in
  multiples of the floor.
- eager / ours, compile / ours: how many times as long PyTorch takes; below 1 ours is the slower one.
- 1/8: eager / ours where the upstream gradient is 1/8, as of (loss / 8).backward(): ours multiplies its gradient once more.
- forward: eager / ours of the forward alone, without a gradient.
- memory: by how much forward and backward raise the peak of the process's memory, in units of the logits; eager, ours (Linux)."""


class Case(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, int]
    smoothing: float = 0.0

    def __str__(self) -> str:
        name = f"{str(self.dtype).removeprefix('torch.')} {self.shape[0]} x {self.shape[1]}"
        return name + (", smoothing" if self.smoothing else "")

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        return torch.randn(self.shape, dtype=self.dtype, requires_grad=True), torch.randint(self.shape[1], self.shape[:1])


ALL = [
    Case(dtype, shape, smoothing)
    for dtype in DTYPES
    for shape in SHAPES
    for smoothing in ((0.0, 0.1) if shape[1] > 10 else (0.0,))
]
QUICK = [Case(torch.float32, SHAPES[0]), Case(torch.float32, SHAPES[1]), Case(torch.bfloat16, SHAPES[2])]


def medians(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds per call, the calls taking turns, in random order: who follows whom decides which caches are cold."""
    for call in calls.values():
        call()
        call()
    # Calls of microseconds are timed in batches: a clock reading takes 50 ns, a thread's waking more than the call.
    start = time.perf_counter()
    for call in calls.values():
        call()
    batch = max(1, int(0.002 * len(calls) / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    end = time.perf_counter() + seconds
    # At times a call takes three times as long, where a virtual machine has to get its fresh pages from the host: the median of
    # fewer turns would be luck.
    while time.perf_counter() < end or len(times["floor"]) < 7:
        for name in order.sample(list(calls), len(calls)):
            call = calls[name]
            start = time.perf_counter()
            for _ in range(batch):
                call()
            times[name].append((time.perf_counter() - start) / batch)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_growth(call: Callable[[], object]) -> int:
    """Bytes by which the peak of the resident set rose during one call; 0 where Linux does not tell."""
    try:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before
    except OSError:
        return 0


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(case: Case, seconds: float) -> dict[str, float]:
    """Seconds of every call of one case, and peak memory in units of the logits."""
    torch.compiler.reset()  # or the eighth shape would find the limit of recompilations, and run eagerly
    logits, target = case.tensors()
    detached, out = logits.detach(), torch.empty_like(logits.detach())

    eighth = torch.tensor(1 / 8, dtype=case.dtype)

    def step(call: Callable[..., torch.Tensor], upstream: torch.Tensor | None = None) -> None:
        logits.grad = None
        call(logits, target, label_smoothing=case.smoothing).backward(upstream)

    calls: dict[str, Callable[[], object]] = {"floor": lambda: torch.add(detached, 1, out=out)}
    for name, call in CALLS.items():
        calls[name] = lambda call=call: step(call)
        if name != "compile":
            calls[f"{name} 1/8"] = lambda call=call: step(call, eighth)
        calls[f"{name} forward"] = lambda call=call: call(detached, target, label_smoothing=case.smoothing)
    result = medians(calls, seconds)
    n_bytes = detached.numel() * detached.element_size()
    for name, call in CALLS.items():
        if n_bytes > LARGE:
            logits.grad = None
            result[f"{name} memory"] = peak_growth(lambda call=call: step(call)) / n_bytes
    return result


HEADER = """\
| logits | floor | eager | compile | ours | eager / ours | compile / ours | 1/8 | forward | memory |
|---|---|---|---|---|---|---|---|---|---|"""


def row(case: Case, r: dict[str, float]) -> str:
    times = [f"{r[call] * 1e3:.3f} ms ({r[call] / r['floor']:.1f}x)" for call in CALLS]
    ratios = (
        r["eager"] / r["ours"],
        r["compile"] / r["ours"],
        r["eager 1/8"] / r["ours 1/8"],
        r["eager forward"] / r["ours forward"],
    )
    memory = f"{r['eager memory']:.2f}, {r['ours memory']:.2f}" if "ours memory" in r else ""
    cells = [str(case), f"{r['floor'] * 1e3:.3f} ms", *times, *(f"{ratio:.2f}" for ratio in ratios), memory]
    return f"| {' | '.join(cells)} |"


def plot(rows: list[tuple[Case, dict[str, float]]], machine: str) -> bytes:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.45 * len(rows) + 1.5))
    height = 0.8 / len(CALLS)
    for i, name in enumerate(CALLS):
        positions = [row + (i - 1) * height for row in range(len(rows))]
        bars = axes.barh(positions, [1e3 * r[name] for _, r in rows], height, label=name)
        axes.bar_label(bars, [f"{r[name] / r['ours']:.1f}x" for _, r in rows], fontsize=6, padding=2)
    axes.set_yticks(range(len(rows)), [str(case) for case, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("forward + backward, ms, logarithmic; x: in multiples of ours")
    axes.set_title(machine, fontsize=7)
    axes.legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight", dpi=90, metadata={"Software": None})
    plt.close(figure)
    return file.getvalue()


def machine() -> str:
    """What the numbers belong to."""
    model = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    name = " ".join(model[1].split()) if model else platform.machine()
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    kernel = f"instructions {cpu.ISA}" if cpu.MISSING is None else cpu.MISSING
    versions = f"fusedloss {fusedloss.__version__}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s'[: threads - 1]}, {kernel}; {versions}; {date}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rows")
    parser.add_argument("--seconds", type=float, help="measuring time per row of the table")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: as many as PyTorch takes)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of bench_cpu.md and bench_cpu.png")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seconds = arguments.seconds or (QUICK_SECONDS if arguments.quick else SECONDS)
    where = machine()
    print(f"{where}\n\n{COLUMNS}\n\n{HEADER}", flush=True)
    rows = []
    for case in QUICK if arguments.quick else ALL:
        rows.append((case, measure(case, seconds)))
        print(row(*rows[-1]), flush=True)
    table = "\n".join([HEADER, *(row(case, times) for case, times in rows)])
    write_atomically(arguments.out / "bench_cpu.md", f"{where}\n\n{table}\n\n{COLUMNS}\n")
    write_atomically(arguments.out / "bench_cpu.png", plot(rows, where))
    print(f"\nwritten: {arguments.out / 'bench_cpu.md'}, {arguments.out / 'bench_cpu.png'}")


def _name(case: Case) -> str:
    return str(case).replace(" x ", "x").replace(" ", "-")


@pytest.fixture(scope="module", params=[Case(dtype, shape) for dtype in DTYPES for shape in SHAPES], ids=_name)
def case(request: pytest.FixtureRequest) -> Case:
    torch.compiler.reset()  # as in `measure`
    return request.param


@pytest.mark.parametrize("implementation", CALLS)
@pytest.mark.parametrize("phase", ["forward", "backward", "both"])
def test_loss(benchmark: Any, case: Case, phase: str, implementation: str) -> None:
    logits, target = case.tensors()
    loss, result = CALLS[implementation], logits

    def prepare() -> None:
        nonlocal result
        result = loss(logits, target) if phase == "backward" else logits

    def call() -> None:
        nonlocal result
        if phase != "backward":
            result = loss(logits, target)
        if phase != "forward":
            (result,) = torch.autograd.grad(result, logits)

    for _ in range(2):  # compilers, allocator
        prepare()
        call()
    prepare()
    start = time.perf_counter()
    call()
    rounds = int(SECONDS_PER_BENCHMARK / (time.perf_counter() - start))
    benchmark.group = f"{case}, {phase}"
    benchmark.pedantic(call, setup=prepare, rounds=min(max(rounds, ROUNDS[0]), ROUNDS[1]))


if __name__ == "__main__":
    main()
