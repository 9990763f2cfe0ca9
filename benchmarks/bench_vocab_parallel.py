"""Classes sharded over ranks: vocab_parallel_cross_entropy beside torch's loss_parallel, two processes of gloo on this machine.

    python benchmarks/bench_vocab_parallel.py [--rows 1024] [--classes 16000] [--rounds 15]

CPU time, not elapsed time: where ranks wait for each other they share the cores of one machine here. One thread per rank; forward
and backward; medians of interleaved rounds, the slower of the ranks.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from bench_cpu import peak_growth
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel

from fusedloss.distributed import vocab_parallel_cross_entropy

N_RANKS = 2


def rank_main(rank: int, folder: str, n_rows: int, n_classes: int, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=N_RANKS)
    mesh = init_device_mesh("cpu", (N_RANKS,))
    torch.manual_seed(0)
    target = torch.randint(n_classes, (n_rows,))
    torch.manual_seed(rank)
    logits = torch.randn(n_rows, n_classes // N_RANKS, requires_grad=True)
    sharded = DTensor.from_local(logits.detach(), mesh, [Shard(1)]).requires_grad_()

    def ours() -> None:
        logits.grad = None
        vocab_parallel_cross_entropy(logits, target).backward()

    def theirs() -> None:
        sharded.grad = None
        with loss_parallel():
            F.cross_entropy(sharded, target).backward()

    calls: dict[str, Callable[[], None]] = {"ours": ours, "loss_parallel": theirs}
    vocab_parallel_cross_entropy(logits[:1], target[:1]).backward()  # what is loaded once is not the loss's
    found: dict[str, float] = {}
    for name, call in calls.items():  # first, for what earlier calls have freed would hide the peak
        logits.grad = None
        dist.barrier()
        found[f"{name} memory"] = 1 + peak_growth(call) / logits.nbytes
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            dist.barrier()
            start = time.process_time()
            call()
            if turn >= 2:
                times[name].append(time.process_time() - start)
    found.update({name: statistics.median(values) for name, values in times.items()})
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads, torn down with the interpreter, now and then abort a process that has done its work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--classes", type=int, default=16000)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, options.rows, options.classes, options.rounds)
        torch.multiprocessing.start_processes(rank_main, arguments, nprocs=N_RANKS, start_method="spawn")
        ranks = [torch.load(path) for path in Path(folder).glob("*.pt")]
    worst = {name: max(found[name] for found in ranks) for name in ranks[0]}
    print(f"\nfloat32 {options.rows} x {options.classes} over {N_RANKS} ranks: CPU time of a rank, forward and backward")
    print("| | ms | memory, with the logits, in units of the local logits |\n|---|---|---|")
    for name in ("loss_parallel", "ours"):
        print(f"| {name} | {worst[name] * 1e3:.1f} | {worst[f'{name} memory']:.2f} |")
    print(f"loss_parallel / ours: {worst['loss_parallel'] / worst['ours']:.1f}")


if __name__ == "__main__":
    main()
