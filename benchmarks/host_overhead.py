"""Host time of a small loss, forward and backward, without a GPU: what Python and the dispatcher cost before a kernel starts.

    python benchmarks/host_overhead.py
    python benchmarks/host_overhead.py --profile       # and where our time goes, by function

A call on (128, 10) logits is bound by launches: the device needs 3 to 4 microseconds, so the host decides. The Triton path runs
on CPU tensors with its launch left out:

    eager           F.cross_entropy: its time includes the arithmetic of 1,280 logits on the CPU, a few microseconds
    launcher off    ours, fusedloss.backends.triton.launching.launch does nothing: checks, plan, operators, autograd
    launcher on     ours, with a compiled kernel launched on a stubbed driver: all of it but the driver's own launch
    Triton's own    the same through Triton's launcher, kernel[grid](...), which looks at every argument again
    empty           an autograd.Function that does nothing: what anything written in Python must pay

Medians of interleaved rounds in one process, in CPU time, which other programs disturb least; only their ratios mean much.
"""

import argparse
import cProfile
import pstats
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import fusedloss
from fusedloss.backends.triton import launching

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from stub_driver import StubDriver

SHAPE = (128, 10)


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        return torch.empty_like(logits)


@contextmanager
def stubbed_launcher() -> Iterator[None]:
    """Inside, the arms may replace our launcher's parts, on CPU tensors; afterwards all is as before."""
    with (
        mock.patch.object(driver, "_active", StubDriver(GPUTarget("cuda", 90, 32))),
        fusedloss.backend("triton"),
        mock.patch.object(launching, "launch", launching.launch),
        mock.patch.object(launching, "keeps_compiled", launching.keeps_compiled),
    ):
        yield


def nothing(*_: object, **__: object) -> None:
    """Stands for a launch."""


def step(loss: Callable[..., Tensor], logits: Tensor, target: Tensor) -> None:
    logits.grad = None
    loss(logits, target).backward()


class Arm(NamedTuple):
    """What is timed, and what must be done before."""

    enter: Callable[[], None]
    call: Callable[[], None]


def arms(logits: Tensor, target: Tensor) -> dict[str, Arm]:
    real = launching.launch

    def arm(loss: Callable[..., Tensor], launch: Callable[..., None] = real, keeps_compiled: bool = True) -> Arm:
        def enter() -> None:
            launching.launch, launching.keeps_compiled = launch, lambda _: keeps_compiled

        return Arm(enter, lambda: step(loss, logits, target))

    return {
        "eager": arm(F.cross_entropy),
        "launcher off": arm(fusedloss.cross_entropy, nothing),
        "launcher on": arm(fusedloss.cross_entropy),
        "Triton's own": arm(fusedloss.cross_entropy, keeps_compiled=False),
        "empty": arm(lambda logits, _: _Nothing.apply(logits)),
    }


def medians(calls: dict[str, Arm], rounds: int, repeats: int = 50) -> dict[str, float]:
    """Median seconds per call, the calls taking turns, in random order: who follows whom decides which caches are cold."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for arm in calls.values():  # compile, fill the caches
        arm.enter()
        for _ in range(20):
            arm.call()
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            arm = calls[name]
            arm.enter()
            start = time.process_time()
            for _ in range(repeats):
                arm.call()
            times[name].append((time.process_time() - start) / repeats)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(rounds: int) -> dict[str, float]:
    """Host seconds of a forward and backward on SHAPE, per arm."""
    logits, target = torch.randn(SHAPE, requires_grad=True), torch.randint(SHAPE[1], SHAPE[:1])
    with stubbed_launcher():
        return medians(arms(logits, target), rounds)


def profile(calls: int = 5000) -> str:
    """Where a call with the launcher off spends its time, by function."""
    import io

    logits, target = torch.randn(SHAPE, requires_grad=True), torch.randint(SHAPE[1], SHAPE[:1])
    with stubbed_launcher():
        arm = arms(logits, target)["launcher off"]
        arm.enter()
        for _ in range(3):
            arm.call()
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(calls):
            arm.call()
        profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(25)
    return text.getvalue()


def table(times: dict[str, float]) -> str:
    launches = times["launcher on"] - times["launcher off"]
    rows = {**times, "launcher alone": launches}
    lines = ["| forward + backward, (128, 10) | us | in eager's times |", "|---|---|---|"]
    lines += [f"| {name} | {1e6 * value:.1f} | {value / times['eager']:.2f} |" for name, value in rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(table(measure(arguments.rounds)))
    if arguments.profile:
        print(profile())


if __name__ == "__main__":
    main()
