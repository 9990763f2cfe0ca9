"""Times loss and gradient on this machine: fusedloss, PyTorch, torch.compile of PyTorch.

    make bench
    make bench ARGS="--shapes 128x10 8192x50257 --dtype bfloat16"

Medians of interleaved rounds, so that a machine that slows down slows all three; inputs are rotated. Compare columns within
one run only.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedloss

N_INPUTS = 3  # rotated


def seconds(loss: Callable[..., Tensor], inputs: tuple[Tensor, Tensor], device: str, repeats: int) -> float:
    """Wall time of one forward and backward, from `repeats` in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        torch.autograd.grad(loss(*inputs), inputs[0])
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def bench(n_rows: int, n_cols: int, dtype: torch.dtype, device: str, arms: dict[str, Callable[..., Tensor]], rounds: int) -> None:
    inputs = [
        (
            torch.randn(n_rows, n_cols, device=device).to(dtype).requires_grad_(),
            torch.randint(n_cols, (n_rows,), device=device),
        )
        for _ in range(N_INPUTS)
    ]
    repeats = max(1, 2_000_000 // (n_rows * n_cols + 10_000))  # small problems need many calls to be seen by the clock
    times: dict[str, list[float]] = {name: [] for name in arms}
    for loss in arms.values():  # warm-up: compilers, allocator
        seconds(loss, inputs[0], device, 2)
    for i in range(rounds):
        for name, loss in arms.items():
            times[name].append(seconds(loss, inputs[i % N_INPUTS], device, repeats))
    medians = {name: statistics.median(values) for name, values in times.items()}
    shape = f"{n_rows} x {n_cols}"
    cells = "".join(f"{1e6 * median:18,.1f}" for median in medians.values())
    ratios = "".join(f"{medians[name] / medians['fusedloss']:8.2f}x" for name in list(arms)[1:])
    print(f"{shape:>16}{cells}   {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--shapes", nargs="+", default=["128x10", "4096x1000", "512x32000"], help="rows x classes")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes long to warm up")
    args = parser.parse_args()
    try:
        shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
        if any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
            raise ValueError
    except ValueError:
        parser.error(f"--shapes takes ROWSxCLASSES, such as 128x10, but got {' '.join(args.shapes)}")

    arms: dict[str, Callable[..., Tensor]] = {"fusedloss": fusedloss.cross_entropy, "torch": F.cross_entropy}
    if not args.no_compile:
        arms["torch.compile"] = torch.compile(F.cross_entropy, dynamic=False)
    print(f"loss and gradient, {args.dtype}, {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'rows x classes':>16}" + "".join(f"{name + ' us':>18}" for name in arms) + "   in fusedloss's times")
    for n_rows, n_cols in shapes:
        bench(n_rows, n_cols, getattr(torch, args.dtype), args.device, arms, args.rounds)


if __name__ == "__main__":
    main()
