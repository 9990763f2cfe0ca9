"""The loss on the CPU: PyTorch's, torch.compile of it, and ours, beside the memory floor. Prints a Markdown table, saves a plot.

Times are medians of interleaved runs in one process, so that what else the machine does falls on all alike; only ratios mean
much. Logits are normal random numbers; every backward makes a fresh gradient, as in training.

floor   torch.add(x, 1, out=y): one read and one write of the logits, y used before
memory  growth of the resident set's peak during forward and backward, in units of the logits: eager, ours (Linux)
"""

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import fusedloss
from fusedloss.backends import cpu

SHAPES = ((128, 10), (4096, 1000), (2048, 32000), (512, 128256))
CALLS = {"eager": F.cross_entropy, "compile": torch.compile(F.cross_entropy, dynamic=False), "ours": fusedloss.cross_entropy}
LARGE = 32 << 20  # bytes; below, what the allocator kept of earlier calls hides the peak


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
    while time.perf_counter() < end or len(times["floor"]) < 11:
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


def measure(shape: tuple[int, int], dtype: torch.dtype, smoothing: float, seconds: float) -> dict[str, float]:
    """Seconds of every call at one shape, and peak memory in units of the logits."""
    torch.compiler.reset()  # or the eighth shape would find the limit of recompilations, and run eagerly
    torch.manual_seed(0)
    logits = torch.randn(shape, dtype=dtype, requires_grad=True)
    target = torch.randint(shape[1], shape[:1])
    detached, out = logits.detach(), torch.empty_like(logits.detach())

    def step(call: Callable[..., torch.Tensor]) -> None:
        logits.grad = None
        call(logits, target, label_smoothing=smoothing).backward()

    calls: dict[str, Callable[[], object]] = {"floor": lambda: torch.add(detached, 1, out=out)}
    for name, call in CALLS.items():
        calls[name] = lambda call=call: step(call)
        calls[f"{name} forward"] = lambda call=call: call(detached, target, label_smoothing=smoothing)
    result = medians(calls, seconds)
    n_bytes = detached.numel() * detached.element_size()
    for name, call in CALLS.items():
        if n_bytes > LARGE:
            logits.grad = None
            result[f"{name} memory"] = peak_growth(lambda call=call: step(call)) / n_bytes
    return result


def table(rows: list[tuple[str, dict[str, float]]]) -> str:
    lines = [
        "| logits | floor | eager | compile | ours | eager / ours | compile / ours | forward: eager / ours | memory: eager, ours "
        "|",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in rows:
        times = [f"{r[call] * 1e3:.3f} ms ({r[call] / r['floor']:.1f}x)" for call in CALLS]
        memory = f"{r['eager memory']:.2f}, {r['ours memory']:.2f}" if "ours memory" in r else ""
        ratios = (r["eager"] / r["ours"], r["compile"] / r["ours"], r["eager forward"] / r["ours forward"])
        lines.append(
            f"| {name} | {r['floor'] * 1e3:.3f} ms | {' | '.join(times)} | "
            f"{' | '.join(f'{ratio:.2f}' for ratio in ratios)} | {memory} |"
        )
    return "\n".join(lines)


def plot(rows: list[tuple[str, dict[str, float]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.5 * len(rows) + 1.5))
    height = 0.8 / len(CALLS)
    for i, name in enumerate(CALLS):
        positions = [row + (i - 1) * height for row in range(len(rows))]
        axes.barh(positions, [r[name] / r["floor"] for _, r in rows], height, label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("forward + backward, multiples of the memory floor (one read, one write)")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5, help="measuring time per row of the table")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plot", type=Path, default=Path("runs/bench_cpu.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, kernel: {cpu.MISSING or cpu.ISA}\n")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            for smoothing in (0.0, 0.1) if shape[1] > 10 else (0.0,):
                name = f"{str(dtype).removeprefix('torch.')} {shape[0]} x {shape[1]}" + (", smoothing" if smoothing else "")
                rows.append((name, measure(shape, dtype, smoothing, arguments.seconds)))
    print(table(rows))
    plot(rows, arguments.plot)
    print(f"\nplot: {arguments.plot}")


if __name__ == "__main__":
    main()
