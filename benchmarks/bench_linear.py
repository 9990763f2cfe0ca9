"""The loss fused with the last linear layer, on the CPU: ours, PyTorch's fused function, torch.compile, eager, and bare matmuls.

    make bench                                     # beside the loss alone; ARGS=--quick: the first case alone
    python benchmarks/bench_linear.py --threads 2

Prints a Markdown table row by row, with what its columns mean, and writes it to runs/ with a plot. Times are medians of
interleaved runs in one process, forward and backward; memory is measured in a process for each number.
"""

import argparse
import io
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from bench_cpu import machine, peak_growth
from files import write_atomically
from torch import Tensor

import fusedloss

COLUMNS = """\
- case: rows x features -> classes, the layer without a bias; of "half ignored", every second target; "topk" averages the 10 % of
  the rows with the largest losses, everywhere else the loss is the mean.
- matmuls: the three of forward and backward alone, over all rows.
- eager: F.cross_entropy of F.linear; for topk, torch.topk of its losses. compile: torch.compile of it.
- torch: F.linear_cross_entropy (PyTorch 2.13) with LinearCrossEntropyOptions(); torch 512: with batch_chunk_size=512.
- ours: fusedloss.linear_cross_entropy; in brackets, by how many times it is faster than each (below 1: slower).
- memory: by how many MB a call raises the peak of the process's memory beyond the gradients that it returns."""
ERRORS = """\
The gradient of a bfloat16 weight, 2048 x 64 -> 512: its error over that of rounding the exact one once, by number of chunks."""
GFLOPS_AT_LEAST = 5.0  # a CPU that emulates bfloat16 manages 1: such a case would take an hour
TURNS = 5


class Case(NamedTuple):
    dtype: torch.dtype
    n_rows: int
    n_features: int
    n_classes: int
    kind: str = ""  # "half ignored", "topk"

    def __str__(self) -> str:
        sizes = f"{str(self.dtype).removeprefix('torch.')} {self.n_rows} x {self.n_features} -> {self.n_classes}"
        return sizes + (f", {self.kind}" if self.kind else "")

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        input = torch.randn(self.n_rows, self.n_features, dtype=self.dtype)
        weight = (torch.randn(self.n_classes, self.n_features) / self.n_features**0.5).to(self.dtype)
        target = torch.randint(self.n_classes, (self.n_rows,))
        if self.kind == "half ignored":
            target[::2] = -100
        return input.requires_grad_(), weight.requires_grad_(), target


ALL = [
    Case(torch.float32, 2048, 512, 32000),
    Case(torch.float32, 2048, 512, 32000, "half ignored"),
    Case(torch.float32, 2048, 512, 32000, "topk"),
    Case(torch.bfloat16, 1024, 768, 50257),
    Case(torch.float32, 4096, 512, 1000),
    Case(torch.float32, 128, 512, 10),
]


def _k(target: Tensor) -> int:
    return max(1, len(target) // 10)


def _eager(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, weight), target)


def _eager_topk(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, weight), target, reduction="none").topk(_k(target)).values.mean()


def implementations(case: Case) -> dict[str, Callable[..., Tensor]]:
    """The losses to compare, each a function of input, weight and target."""
    topk = case.kind == "topk"
    eager = _eager_topk if topk else _eager
    found: dict[str, Callable[..., Tensor]] = {"eager": eager, "compile": torch.compile(eager, dynamic=False)}
    if hasattr(F, "linear_cross_entropy"):
        for name, options in (
            ("torch", torch.nn.LinearCrossEntropyOptions()),
            ("torch 512", torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512)),
        ):

            def theirs(input: Tensor, weight: Tensor, target: Tensor, options: object = options) -> Tensor:
                loss = F.linear_cross_entropy(input, weight, target, options=options, reduction="none" if topk else "mean")
                return loss.topk(_k(target)).values.mean() if topk else loss

            found[name] = theirs

    def ours(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        if topk:
            return fusedloss.linear_cross_entropy(input, weight, target, reduction="topk", top_k=_k(target))
        return fusedloss.linear_cross_entropy(input, weight, target)

    found["ours"] = ours
    return found


def step(loss: Callable[..., Tensor], input: Tensor, weight: Tensor, target: Tensor) -> None:
    """Forward and backward, with fresh gradients."""
    input.grad = weight.grad = None
    loss(input, weight, target).backward()


def matmuls(input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What no implementation can do without."""
    with torch.no_grad():
        logits = input @ weight.t()
        return logits @ weight, logits.t() @ input


def gflops(case: Case) -> float:
    """Of the slowest of the matmuls, measured on few rows."""
    input, weight, _ = case._replace(n_rows=min(16, case.n_rows)).tensors()
    with torch.no_grad():
        logits = input @ weight.t()
        logits @ weight  # the first is slow
        start = time.perf_counter()
        logits @ weight
        seconds = time.perf_counter() - start
    return 2e-9 * logits.numel() * case.n_features / seconds


def measure(case: Case) -> dict[str, float]:
    """Median seconds of every implementation, and of the matmuls."""
    torch.compiler.reset()
    tensors = case.tensors()
    calls = {name: (lambda loss=loss: step(loss, *tensors)) for name, loss in implementations(case).items()}
    calls["matmuls"] = lambda: matmuls(*tensors[:2])
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for _ in range(TURNS):
        for name in order.sample(list(calls), len(calls)):
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def memory(case: Case, name: str) -> int:
    """Bytes by which one call, in this process the first of its size, raises the peak beyond its gradients."""
    loss = implementations(case)[name]
    step(loss, *case._replace(n_rows=8, n_classes=16).tensors())  # threads, libraries, the compiler
    if name == "compile":
        torch.compiler.reset()
    tensors = case.tensors()
    grown = peak_growth(lambda: step(loss, *tensors))
    return max(0, grown - sum(tensor.numel() * tensor.element_size() for tensor in tensors[:2]))


def memory_of(case: Case, name: str, threads: int) -> int:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--memory", str(ALL.index(case)), name, "--threads", str(threads)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def weight_gradient_errors() -> str:
    """The table of ERRORS."""
    torch.manual_seed(0)
    n_rows, n_features, n_classes = 2048, 64, 512
    input, target = torch.randn(n_rows, n_features).bfloat16(), torch.randint(n_classes, (n_rows,))
    weight = (torch.randn(n_classes, n_features) / n_features**0.5).bfloat16().requires_grad_()
    logits = (input.double() @ weight.detach().double().t()).bfloat16().double().requires_grad_()  # the logits are rounded, too
    (dlogits,) = torch.autograd.grad(F.cross_entropy(logits, target), logits)
    exact = dlogits.t() @ input.double()

    def error(found: Tensor) -> str:
        return f"{(found.double() - exact).norm() / (exact.bfloat16().double() - exact).norm():.2f}"

    def error_of(loss: Tensor) -> str:
        return error(torch.autograd.grad(loss, weight)[0])

    counts = (1, 2, 4, 8, 64, 256)
    rows = {"ours": [error_of(fusedloss.linear_cross_entropy(input, weight, target, chunk_rows=n_rows // n)) for n in counts]}
    if hasattr(F, "linear_cross_entropy"):
        options = [torch.nn.LinearCrossEntropyOptions(batch_chunk_size=n_rows // n) for n in counts]
        rows["torch"] = [error_of(F.linear_cross_entropy(input, weight, target, options=option)) for option in options]
    lines = [f"| | {' | '.join(map(str, counts))} |", "|---" * (1 + len(counts)) + "|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(found)} |" for name, found in rows.items())])


NAMES = ("matmuls", "eager", "compile", "torch", "torch 512")
HEADER = f"""\
| case | ours | {" | ".join(NAMES)} | memory: ours | eager | torch | torch 512 |
|---|{"---|" * (len(NAMES) + 5)}"""


def row(case: Case, times: dict[str, float], peaks: dict[str, int]) -> str:
    """One line of the table."""
    others = [f"{1e3 * times[name]:.1f} ms ({times[name] / times['ours']:.2f}x)" if name in times else "" for name in NAMES]
    grown = [f"{peaks[name] / 1e6:.0f} MB" if name in peaks else "" for name in ("ours", "eager", "torch", "torch 512")]
    cells = [str(case), f"{1e3 * times['ours']:.1f} ms", *others, *grown]
    return f"| {' | '.join(cells)} |"


def plot(rows: list[tuple[Case, dict[str, float], dict[str, int]]], title: str) -> bytes:
    """Times in multiples of the matmuls, and memory."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.7 * len(rows) + 1.5), sharey=True)
    names = ("ours", *NAMES[1:])
    for i, name in enumerate(names):
        at = [(place + (i - 2) * 0.16, times, peaks) for place, (_, times, peaks) in enumerate(rows)]
        shown = [(place, times[name] / times["matmuls"]) for place, times, _ in at if name in times]
        left.barh([place for place, _ in shown], [value for _, value in shown], 0.16, label=name)
        held = [(place, peaks[name] / 1e6) for place, _, peaks in at if name in peaks]
        right.barh([place for place, _ in held], [value for _, value in held], 0.16, color=f"C{i}")
    left.axvline(1, color="black", linewidth=1)
    left.set_yticks(range(len(rows)), [str(case) for case, _, _ in rows], fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("forward + backward, in multiples of the three matmuls alone")
    right.set_xlabel("peak memory beyond inputs and gradients, MB")
    left.legend(fontsize=8)
    figure.suptitle(title, fontsize=7)
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight", dpi=90, metadata={"Software": None})
    plt.close(figure)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first case alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: as many as PyTorch takes)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of bench_linear.md and bench_linear.png")
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "NAME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        print(memory(ALL[int(arguments.memory[0])], arguments.memory[1]))
        return
    where = machine()
    print(f"{where}\n\n{COLUMNS}\n\n{HEADER}", flush=True)
    lines, rows = [HEADER], []
    for case in ALL[:1] if arguments.quick else ALL:
        speed = gflops(case)
        if case.dtype == torch.bfloat16 and speed < GFLOPS_AT_LEAST:
            lines.append(f"| {case} | left out: this CPU multiplies at {speed:.1f} GFLOP/s in this dtype {'|' * 10}")
        else:
            times = measure(case)
            measured = [name for name in ("ours", "eager", "torch", "torch 512") if name in times]
            rows.append((case, times, {name: memory_of(case, name, arguments.threads) for name in measured}))
            lines.append(row(*rows[-1]))
        print(lines[-1], flush=True)
    errors = weight_gradient_errors()
    print(f"\n{ERRORS}\n\n{errors}")
    page = [where, "", *lines, "", COLUMNS, "", ERRORS, "", errors, ""]
    write_atomically(arguments.out / "bench_linear.md", "\n".join(page))
    if rows:
        write_atomically(arguments.out / "bench_linear.png", plot(rows, where))
    print(f"\nwritten: {arguments.out / 'bench_linear.md'}, {arguments.out / 'bench_linear.png'}")


if __name__ == "__main__":
    main()
