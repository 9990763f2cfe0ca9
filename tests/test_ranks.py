"""vocab_parallel_cross_entropy where a rank is gone, or late; the same bits on all ranks, in all launches, with any threads."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from problems import make_logits, make_target, make_weight
from test_transforms import WITHOUT_MEMORY
from torch import Tensor

from fusedloss.distributed import vocab_parallel_cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12 on, at forks

N_RANKS = 2
PATIENCE = 2.0  # seconds that the late rank's group waits
LIMIT = 240.0  # seconds of a launch: a rank that hangs fails its test


def launch(main: Callable[..., None], folder: Path, *arguments: Any, method: str = "fork") -> None:
    """Runs main(rank, folder, *arguments) on all ranks."""
    folder.mkdir()
    context = torch.multiprocessing.start_processes(main, (folder, *arguments), nprocs=N_RANKS, join=False, start_method=method)
    end = time.monotonic() + LIMIT
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            pytest.fail(f"a rank hangs: not done after {LIMIT:g} s")


def join_group(rank: int, folder: Path, seconds: float = LIMIT) -> None:
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=N_RANKS, timeout=timedelta(seconds=seconds))


def leave(rank: int, folder: Path) -> None:
    """Ends a rank, once all are done, and says that it came so far."""
    (folder / str(rank)).touch()
    dist.barrier()
    os._exit(0)


def launch_to_the_end(main: Callable[..., None], folder: Path) -> None:
    """Runs a main that ends by `leave`."""
    launch(main, folder)
    assert all((folder / str(rank)).exists() for rank in range(N_RANKS))


def with_a_rank_that_is_not_there(rank: int, folder: Path, fate: str) -> None:
    join_group(rank, folder, PATIENCE)
    shard, target = make_logits(5, 4).requires_grad_(), make_target(5, n_classes=8)
    loss = vocab_parallel_cross_entropy(shard, target)
    if rank == 1:
        if fate == "late":
            while not (folder / "error").exists():
                time.sleep(0.05)
        os._exit(0)
    start = time.monotonic()
    (gradient,) = torch.autograd.grad(loss, shard)  # which needs nobody else
    assert gradient.isfinite().all()
    try:
        vocab_parallel_cross_entropy(shard, target)
    except RuntimeError as error:
        (folder / "written").write_text(f"{time.monotonic() - start} {error}")
        (folder / "written").rename(folder / "error")
    os._exit(0)


@pytest.mark.parametrize("fate", ["gone", "late"])
def test_a_rank_that_is_not_there_is_an_error_and_no_hang(fate: str, tmp_path: Path) -> None:
    launch(with_a_rank_that_is_not_there, tmp_path / fate, fate)
    seconds, _, message = (tmp_path / fate / "error").read_text().partition(" ")
    assert float(seconds) < LIMIT / 2
    assert ("onnection" if fate == "gone" else "Timed out") in message


# Shapes of whole rows: more of them than PyTorch's sum takes with one thread; rows that threads share out; of one thread's size.
SHAPES = [(33001, 6), (65, 3001), (13, 20)]
CALLS: dict[str, dict[str, Any]] = {
    "mean": {"label_smoothing": 0.1, "weight": True},
    "none": {"reduction": "none", "return_stats": True},
    "topk": {"reduction": "topk", "top_k": 0.5},
}


def bits(values: torch.Tensor) -> bytes:
    return values.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def every_bit(rank: int, folder: Path, threads: tuple[int, ...]) -> None:
    """Writes what this rank finds of every call; threads: of each rank."""
    torch.set_num_threads(threads[rank])
    join_group(rank, folder)
    found: dict[str, tuple[bytes, ...]] = {}
    for shape in SHAPES:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            logits, target = make_logits(*shape, dtype=dtype), make_target(shape[0], n_classes=shape[1])
            sizes = (shape[1] // 3, shape[1] - shape[1] // 3)
            for name, options in CALLS.items():
                if options.get("weight"):
                    of_classes = torch.linspace(0.1, 1.3, shape[1], dtype=torch.float64).sqrt()  # whose sums are rounded
                    options = {**options, "weight": of_classes.to(dtype)}
                shard = logits.split(sizes, 1)[rank].clone().requires_grad_()
                place = {"first_class": sizes[0] * rank, "n_classes": shape[1]}
                loss = vocab_parallel_cross_entropy(shard, target, **place, **options)
                loss, *stats = loss if isinstance(loss, tuple) else (loss,)
                (gradient,) = torch.autograd.grad(loss.sum(), shard)
                of_all = bits(loss), *(bits(value) for value in (stats[0] if stats else ()))
                found[f"{name} of {shape} in {dtype}"] = *of_all, bits(gradient)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)


def test_ranks_launches_and_threads_find_the_same_bits(tmp_path: Path) -> None:
    launches = []
    for n, threads in enumerate([(1, 1), (2, 1), (3, 2)]):
        # Not forked: PyTorch's own sums of two threads hang in a fork of a process that has had two.
        launch(every_bit, tmp_path / str(n), threads, method="spawn")
        launches.append([torch.load(tmp_path / str(n) / f"{rank}.pt", weights_only=False) for rank in range(N_RANKS)])
    for call, first in launches[0][0].items():
        for ranks in launches:
            for rank, found in enumerate(ranks):
                assert found[call][:-1] == first[:-1], f"{call}: loss, or statistics, of rank {rank}"
                assert found[call][-1] == launches[0][rank][call][-1], f"{call}: gradient of rank {rank}"


def under_a_compiler(rank: int, folder: Path) -> None:
    join_group(rank, folder)
    shard, target = make_logits(5, 4, seed=rank), make_target(5, n_classes=8)

    def step(logits: torch.Tensor) -> torch.Tensor:
        losses, stats = vocab_parallel_cross_entropy(logits.sin(), target, reduction="none", return_stats=True)
        return 2 * (losses - stats.entropy).sum()

    found = []
    for call in (step, torch.compile(step, backend="aot_eager")):
        leaf = shard.clone().requires_grad_()
        loss = call(leaf)
        found.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    torch.testing.assert_close(found[1], found[0])
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(step, backend="aot_eager", fullgraph=True)(shard)
    leave(rank, folder)


# Of the compiler itself, which looks at what lies on either side of the call.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_under_a_compiler(tmp_path: Path) -> None:
    launch_to_the_end(under_a_compiler, tmp_path / "compiled")


def upstream_without_memory(rank: int, folder: Path) -> None:
    """Each in turn reaches the kernel's backward, where an address that is none ends the process."""
    join_group(rank, folder)
    weight = make_weight(8)
    for shape, reduction in (((5, 8), "none"), ((5, 8), "mean"), ((2, 8, 3), "none")):
        logits, target = make_logits(*shape), make_target(shape[0], *shape[2:], n_classes=8, ignored=-100)
        options: dict[str, Any] = {"reduction": reduction, "weight": weight, "label_smoothing": 0.1}
        shard = logits.tensor_split(N_RANKS, 1)[rank].clone().requires_grad_()
        whole = logits.clone().requires_grad_()
        counted, log_p = target != -100, whole.log_softmax(1)
        theirs = F.cross_entropy(whole, target, **options)
        loss, stats = vocab_parallel_cross_entropy(shard, target, return_stats=True, **options)
        ours = [[loss]]
        of_torch = [[theirs]]
        if reduction == "none":  # the entropies alone, and both
            entropy = (-(log_p.exp() * log_p).sum(1)).masked_fill(~counted, 0)
            ours += [[stats.entropy], [loss, stats.entropy]]
            of_torch += [[entropy], [theirs, entropy]]
        for outputs, expected in zip(ours, of_torch, strict=True):
            upstream = [make_logits(2, *output.shape, seed=place) for place, output in enumerate(outputs)]
            (found,) = torch.autograd.grad(outputs, shard, upstream, retain_graph=True, is_grads_batched=True)
            (exact,) = torch.autograd.grad(expected, whole, upstream, retain_graph=True, is_grads_batched=True)
            torch.testing.assert_close(found, exact.tensor_split(N_RANKS, 2)[rank])
            for without_memory in WITHOUT_MEMORY.values():
                first = [without_memory(values[0]) for values in upstream]
                (found,) = torch.autograd.grad(outputs, shard, first, retain_graph=True)
                (exact,) = torch.autograd.grad(expected, whole, first, retain_graph=True)
                both = [torch._from_functional_tensor(one) if torch._is_functional_tensor(one) else one for one in (found, exact)]
                torch.testing.assert_close(both[0], both[1].tensor_split(N_RANKS, 1)[rank])
    leave(rank, folder)


# make_dual() itself makes PyTorch script its decompositions.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_upstream_gradients_without_memory(tmp_path: Path) -> None:
    launch_to_the_end(upstream_without_memory, tmp_path / "upstream")


def negative_views(rank: int, folder: Path) -> None:
    """The same values, whose signs are flipped in memory, as those of x.conj().imag are."""
    join_group(rank, folder)
    tensors: dict[str, Any] = {
        "logits": make_logits(5, 8),
        "weight": make_weight(8),
        "lam": torch.rand(5),
        "scale": torch.rand(()),
    }
    tensors |= {"target": make_target(5, n_classes=8), "probabilities": make_logits(5, 8, seed=1).softmax(1)}

    def loss_and_gradient(
        logits: Tensor, weight: Tensor, lam: Tensor, scale: Tensor, target: Tensor, probabilities: Tensor
    ) -> Any:
        shard = logits.detach().tensor_split(N_RANKS, 1)[rank].requires_grad_()
        options: dict[str, Any] = {"weight": weight, "label_smoothing": 0.1, "scale": scale}
        losses = [
            vocab_parallel_cross_entropy(shard, labels, **options)
            for labels in (target, probabilities, (target, target.flip(0), lam))
        ]
        return [loss.detach() for loss in losses], torch.autograd.grad(losses, shard)

    expected = loss_and_gradient(**tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(loss_and_gradient(**{**tensors, name: torch._neg_view(-tensor.detach())}), expected)
    leave(rank, folder)


def test_negative_views(tmp_path: Path) -> None:
    launch_to_the_end(negative_views, tmp_path / "negative")
