"""The loss fused with the last linear layer on a GPU: ours, eager, torch.compile, PyTorch's fused function, Liger's, and matmuls.

    python benchmarks/gpu_linear.py            # or as a stage of gpu.py, which makes the table

Emits, for each case and implementation, the median device time of forward and backward together, in interleaved rounds, and the
bytes by which a call raises the allocator's peak beyond the gradients that it returns. The cases, but for their sizes, and the
losses are those of bench_linear.py.
"""

import argparse
import random
import statistics
import sys
from collections.abc import Callable

import bench_gpu  # first: it finds fusedloss where nothing was installed
import bench_linear
import gpu_run
import peers
import torch
from bench_linear import Case
from torch import Tensor

ROUNDS = 10
CASES = [
    Case(torch.bfloat16, 8192, 4096, 32000),
    Case(torch.bfloat16, 8192, 4096, 128256),
    Case(torch.bfloat16, 8192, 4096, 128256, "half ignored"),
    Case(torch.bfloat16, 8192, 4096, 128256, "topk"),
    Case(torch.float32, 2048, 512, 32000),
]
MEMORY_FACTOR = 4  # eager holds logits, their gradient, and one of them in float32


def implementations(case: Case) -> dict[str, Callable[..., Tensor]]:
    found = bench_linear.implementations(case)
    if case.kind != "topk" and "Liger" in peers.installed():
        found["Liger"] = peers.liger_linear
    return found


def measure(case: Case, device: str) -> None:
    clock = bench_gpu.TIMER.clock
    if case.n_rows * case.n_classes * case.dtype.itemsize * MEMORY_FACTOR > clock.memory():
        print(f"{case}: too large for this device's memory", flush=True)
        return
    torch.compiler.reset()
    tensors = tuple(tensor.detach().to(device).requires_grad_(tensor.requires_grad) for tensor in case.tensors())
    input, weight, _ = tensors
    calls = {name: (lambda loss=loss: bench_linear.step(loss, *tensors)) for name, loss in implementations(case).items()}
    calls["matmuls"] = lambda: bench_linear.matmuls(input, weight)  # type: ignore[misc,assignment]
    peaks: dict[str, int] = {}
    for name, call in list(calls.items()):
        try:
            call()  # compilers, the allocator
            input.grad = weight.grad = None
            peaks[name] = clock.peak(call) - input.nbytes - weight.nbytes
        except Exception as error:  # one that does not serve the case is no end of the others
            if name == "ours":
                raise
            print(f"{case}, {name}: {type(error).__name__}: {error}", flush=True)
            del calls[name]
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for _ in range(ROUNDS):
        for name in order.sample(list(calls), len(calls)):
            clock.flush()
            times[name].append(clock.run(calls[name]))
    for name, found in times.items():
        seconds = statistics.median(found)
        gpu_run.emit({"case": str(case), "implementation": name, "device_us": 1e6 * seconds, "extra_bytes": max(0, peaks[name])})


def main(arguments: list[str], device: str = "cuda") -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(arguments)
    for case in CASES:
        measure(case, device)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
