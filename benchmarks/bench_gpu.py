"""pytest-benchmark suite for a GPU: forward, backward and both, of every shape, dtype and implementation that there is.

    python -m pytest benchmarks/bench_gpu.py
    make bench, make gpu                       # the same, with Markdown tables and a plot

Device time   CUDA events around one call, which waits in the queue behind a kernel that sleeps: launches that the host has not
              made yet cannot stretch it, unless the call itself waits for the device. What two events measure with nothing
              between them is subtracted. Before every call the inputs are rotated, and the L2 is filled with what is read from
              elsewhere: after a write it would have to write back during the call. pytest-benchmark's columns show it, through
              a timer that only device time advances.
Host time     until the call returns, on an idle device; Liger's contains its waits.
Bytes         what the floor moves, the same for every implementation: PHASES, in passes over the logits. Ignored
              rows, every seventh, need not be read.
Copy          dst.copy_(src), 1R + 1W of 1 GB, measured in the same run.

Forward means the forward of training. Ours and Liger's contain the gradient: their backward multiplies it by 1, so its floor is
nothing, and only `both` compares like with like. `accumulation` is `both` for (loss / 8).backward(), as a loop over micro-batches
has it: an upstream gradient other than 1, by which ours and Liger's multiply the whole gradient once more.

What matters most comes first, so that a run that is stopped early has it: forward and backward together, bfloat16.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import peers
import pytest
import torch
import torch.nn.functional as F
from gpu_run import emit
from torch import Tensor

import fusedloss

DEVICE = "cuda"
SHAPES = {
    "ImageNet": (4096, 1000),
    "Llama 2": (8192, 32000),
    "GPT-2": (8192, 50257),
    "Llama 3": (8192, 128256),
    "segmentation": (8, 19, 512, 1024),
    "CIFAR-10": (128, 10),
    "CIFAR-10, large batch": (65536, 10),
}
DTYPES = (torch.bfloat16, torch.float32)
# Passes that no implementation can do without, if it does nothing in another phase's time: reads of the rows that count, and
# writes of all.
PHASES = {"both": (1, 1), "accumulation": (1, 1), "forward": (1, 0), "backward": (1, 1)}
MICRO_BATCHES = 8
ONLY_MATRICES = ("Liger", "flash-attn", "quack")
N_INPUTS = 3  # rotated
MAX_INPUT_BYTES = 1 << 30  # of all rotated inputs: past it one input is enough, as it does not fit the L2 by far
FLUSH_BYTES = 512 << 20  # larger than any L2
EMPTY_INTERVALS = 20
COPY_BYTES = 1 << 30
SLEEP_CYCLES = 2_000_000  # about a millisecond: longer than the host needs to enqueue any call
MEMORY_FACTOR = 8  # eager keeps a softmax, a gradient of it and a gradient, and may do so in float32
SECONDS_PER_CALL = 0.3
ROUNDS = (5, 50)
HOST_CALLS = 20
# Benchmarks that would start later than this many seconds after the first are skipped, and said to be.
BUDGET = float(os.environ.get("FUSEDLOSS_BENCH_SECONDS", "inf"))


class Case(NamedTuple):
    name: str
    dtype: torch.dtype
    implementation: str
    phase: str

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}-{self.implementation}-{self.phase}"


def implementations() -> dict[str, peers.Loss]:
    return {
        "fusedloss": fusedloss.cross_entropy,
        "eager": F.cross_entropy,
        "torch.compile": peers.compiled(),
        **peers.installed(),
    }


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = [
            Case(name, dtype, implementation, phase)
            for phases in (["both"], [phase for phase in PHASES if phase != "both"])
            for dtype in DTYPES
            for name, shape in SHAPES.items()
            for implementation in implementations()
            if len(shape) == 2 or implementation not in ONLY_MATRICES
            for phase in phases
        ]
        metafunc.parametrize("case", cases, ids=str)


class DeviceClock:
    """A timer for pytest-benchmark: seconds that the device has spent in timed calls."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._flushed: Tensor | None = None
        self._empty_seconds: float | None = None

    def __call__(self) -> float:
        return self.seconds

    def flush(self) -> None:
        """Drives the inputs out of the L2, and leaves nothing there that is still to be written."""
        if self._flushed is None:
            self._flushed = torch.zeros(FLUSH_BYTES // 4, device=DEVICE)
        self._flushed.sum()

    def run(self, call: Callable[[], object]) -> float:
        """Device seconds of one call, which are also added to the clock."""
        if self._empty_seconds is None:
            self._empty_seconds = statistics.median(self._interval(lambda: None) for _ in range(EMPTY_INTERVALS))
        elapsed = max(self._interval(call) - self._empty_seconds, 1e-9)
        self.seconds += elapsed
        return elapsed

    @staticmethod
    def _interval(call: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak(self, call: Callable[[], object]) -> int:
        """Bytes by which one call raises the allocator's peak."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def wait(self) -> None:
        torch.cuda.synchronize()

    def memory(self) -> int:
        return torch.cuda.get_device_properties(DEVICE).total_memory


class Timer:
    """The clock of the device, through one object that a test can replace; pytest-benchmark compares timers by identity."""

    def __init__(self) -> None:
        self.clock: Any = DeviceClock()

    def __call__(self) -> float:
        return self.clock()


TIMER = Timer()
_started = time.monotonic()
_compiled_for: list[Any] = [None]


class Problem:
    """The inputs of one case, in turn, and the calls of its phases."""

    def __init__(self, case: Case) -> None:
        shape = SHAPES[case.name]
        n_bytes = torch.Size(shape).numel() * case.dtype.itemsize
        if n_bytes * MEMORY_FACTOR > TIMER.clock.memory():
            pytest.skip(f"{n_bytes / 1e9:.1f} GB of logits: too many for this device's memory")
        generator = torch.Generator(DEVICE).manual_seed(0)
        n_inputs = max(1, min(N_INPUTS, MAX_INPUT_BYTES // n_bytes))
        self.logits = [torch.randn(shape, generator=generator, device=DEVICE, dtype=case.dtype) for _ in range(n_inputs)]
        self.target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator, device=DEVICE)
        self.target[::7] = -100
        self.counted = (self.target != -100).double().mean().item()  # the part of the rows
        # Liger leaves gradients where the logits were: they are put back before each call.
        self.kept = [logits.clone() for logits in self.logits] if case.implementation == "Liger" else None
        for logits in self.logits:
            logits.requires_grad_()
        self.n_bytes, self.phase, self.calls = n_bytes, case.phase, 0
        self.loss = implementations()[case.implementation]
        self.current = self.result = self.logits[0]

    def prepare(self) -> None:
        """What comes before a timed call: the next input, the forward of a backward, a cold L2."""
        i = self.calls % len(self.logits)
        self.calls += 1
        self.current = self.logits[i]
        if self.kept is not None:
            self.current.detach().copy_(self.kept[i])
        self.result = self.current
        if self.phase == "backward":
            self.result = self.loss(self.current, self.target)
        TIMER.clock.flush()

    def call(self) -> None:
        """What is timed."""
        if self.phase != "backward":
            self.result = self.loss(self.current, self.target)
        if self.phase == "accumulation":
            self.result = self.result / MICRO_BATCHES
        if self.phase != "forward":
            (self.result,) = torch.autograd.grad(self.result, self.current)


def host_seconds(problem: Problem) -> float:
    """Median time until a call returns, on an idle device."""
    times = []
    for _ in range(HOST_CALLS):
        problem.prepare()
        TIMER.clock.wait()
        start = time.perf_counter()
        problem.call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes per second of a copy, reads and writes added: what % means."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE).random_()
    destination = torch.empty_like(source)
    times = [TIMER.clock.run(lambda: destination.copy_(source)) for _ in range(10)]
    return 2 * COPY_BYTES / statistics.median(times)  # 1R + 1W


@pytest.mark.benchmark(timer=TIMER)
def test_loss(benchmark: Any, case: Case, copy_bandwidth: float) -> None:
    if time.monotonic() - _started > BUDGET:
        pytest.skip(f"out of time: {BUDGET:.0f} s")
    if case[:2] != _compiled_for[0]:  # or the eighth shape would find the limit of recompilations, and run eagerly
        torch.compiler.reset()
        _compiled_for[0] = case[:2]
    problem = Problem(case)
    try:
        for _ in range(2):  # compilers, allocator
            problem.prepare()
            problem.call()
        TIMER.clock.wait()
    except Exception as error:
        if case.implementation not in peers.installed():
            raise
        pytest.skip(f"{case.implementation} does not serve it: {type(error).__name__}")
    problem.prepare()
    estimate = TIMER.clock.run(problem.call)
    rounds = min(max(int(SECONDS_PER_CALL / max(estimate, 1e-9)), ROUNDS[0]), ROUNDS[1])
    benchmark.pedantic(TIMER.clock.run, args=(problem.call,), setup=problem.prepare, rounds=rounds)
    problem.prepare()
    problem.result = problem.current if case.phase != "backward" else problem.result
    peak = TIMER.clock.peak(problem.call)
    median = statistics.median(benchmark.stats.stats.data)
    reads, writes = PHASES[case.phase]
    n_bytes = round((reads * problem.counted + writes) * problem.n_bytes)
    record = {
        "case": [case.name, str(case.dtype).removeprefix("torch."), case.implementation, case.phase],
        "shape": list(SHAPES[case.name]),
        "device_us": 1e6 * median,
        "host_us": 1e6 * host_seconds(problem),
        "peak_in_logits": peak / problem.n_bytes,
        "bytes": n_bytes,
        "GB/s": n_bytes / median / 1e9,
        "copy GB/s": copy_bandwidth / 1e9,
        "% of copy": 100 * n_bytes / median / copy_bandwidth,
    }
    benchmark.extra_info.update(record)
    emit(record)
