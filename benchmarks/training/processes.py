"""Several processes, which torchrun starts, and the signals that stop them. One process needs no group."""

import contextlib
import datetime
import os
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.failure import Failure, reason

COLLECTIVE_MINUTES = 10  # how long the processes wait for one that hangs; for one that died they do not wait


def n_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that prints, tests and saves."""
    return not dist.is_initialized() or dist.get_rank() == 0


def shard(batch: Tensor) -> Tensor:
    """The rows of this process; the processes' rows together are the batch, in its order."""
    return batch.tensor_split(n_ranks())[dist.get_rank()] if n_ranks() > 1 else batch


def add_up(*tensors: Tensor) -> None:
    """Replaces each tensor by its sum over the processes, on the device."""
    if n_ranks() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def ask_first(question: Callable[[], Any]) -> Any:
    """The first process's answer, which is made there alone, on all of them."""
    answer = [question() if is_first() else None]
    if n_ranks() > 1:
        dist.broadcast_object_list(answer)
    return answer[0]


def distributed(model: nn.Module, device: torch.device) -> nn.Module:
    """The model whose gradients are averaged over the processes."""
    if n_ranks() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def gradients_stay_here(network: Any, but_for_the_last: bool) -> contextlib.AbstractContextManager[None]:
    """Gradients of all parts travel between the processes once, with the last part's."""
    return network.no_sync() if n_ranks() > 1 and not but_for_the_last else contextlib.nullcontext()


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun started. A failure leaves without saying goodbye: the others notice at once."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(minutes=COLLECTIVE_MINUTES)
    try:
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        except ValueError as error:  # a variable is missing, or is no number
            raise Failure(f"WORLD_SIZE is set, but not by torchrun: {reason(error)}") from None
        yield
        dist.barrier()  # all leave together: to one that is still busy, a peer that has gone looks like one that died
    except RuntimeError as error:
        if not re.search("gloo|nccl|connection|socket", str(error), re.IGNORECASE):
            raise
        raise Failure(
            f"lost the other processes: one of them died or left ({reason(error)[:200]}); the last checkpoint is whole, and "
            "--resume --out FOLDER goes on from it with any number of processes",
            1,
        ) from None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM of a scheduler and SIGHUP of a closed terminal fill the list, for the loop to see between two steps.

    A second Ctrl-C ends the program at once. The other two often come twice, or together. A signal that is ignored stays so:
    nohup ignores SIGHUP.
    """
    received: list[int] = []

    def handle(number: int, _frame: Any) -> None:
        received.append(number)
        if signal.SIGINT in previous:
            signal.signal(signal.SIGINT, previous[signal.SIGINT])

    handled = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    previous = {number: signal.getsignal(number) for number in handled if signal.getsignal(number) is not signal.SIG_IGN}
    for number in previous:
        signal.signal(number, handle)
    try:
        yield received
    except RuntimeError:
        if received and not is_first():  # stopped, too: the first process has left after its last step, and told why
            raise Failure("", 128 + received[0]) from None
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
