"""What a run reports: lines, TensorBoard, curves, and the share of a step that the loss takes."""

import functools
import itertools
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusedloss
from training.checkpoints import Epoch, Run
from training.data import Data
from training.failure import Failure, reason
from training.files import CHECKPOINT, CURVES, TENSORBOARD, write_atomically
from training.options import Config
from training.processes import n_ranks


def loss_names(config: Config) -> list[str]:
    """Columns of Run.losses: the cross-entropy first, what is minimised last; each again as a moving average."""
    return ["cross_entropy", "weight_loss", "total_loss"] if config.model == "tutorial" else ["loss"]


def loss_path(config: Config, data: Data, options: dict[str, Any]) -> str:
    """Which code computes the loss with these options."""
    if config.loss == "torch":
        return "torch.nn.functional.cross_entropy"
    rows = config.batch_size // config.accumulate // n_ranks()
    logits = torch.zeros(rows, 10, device=data.train_labels.device, requires_grad=True)
    plan = fusedloss.plan(logits, data.train_labels[:rows], **options)
    return f"fusedloss.cross_entropy, {plan.backend} path: {plan.reason}"


def describe(run: Run, config: Config, data: Data, loss_options: dict[str, Any]) -> str:
    device = data.train_labels.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    name = "cifar10" if config.data == "cifar10" else "digits (scikit-learn's, not CIFAR-10)"
    where += f", {n_ranks()} processes" if n_ranks() > 1 else ""
    parameters = sum(p.numel() for p in run.model.parameters())
    top_k = f" (k = {config.top_k})" if config.top_k is not None else ""
    return (
        f"data    {name}, {len(data.train_labels)} images for training, {len(data.test_labels)} for the test\n"
        f"model   {config.model}, {parameters:,} parameters, on {where}, amp {config.amp}\n"
        f"loss    {config.reduction}{top_k} of {loss_path(config, data, loss_options)}\n"
        f"steps   {len(run.losses)} in {config.epochs} epochs, batch {config.batch_size}, lr {config.lr:g}, "
        f"momentum {config.momentum:g}, weight decay {config.weight_decay:g}, seed {config.seed}"
    )


def epoch_entry(run: Run, config: Config, step_seconds: float, test: tuple[float, float]) -> Epoch:
    """What is remembered of the epoch that ends at run.step."""
    steps = len(run.losses) // config.epochs
    means = run.losses[run.step - steps : run.step].double().mean(dim=0).tolist()
    return {
        "epoch": len(run.history) + 1,
        "step": run.step,
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "train_loss": means[0],
        "train_total_loss": means[len(means) // 2 - 1],
        "train_accuracy": run.correct.item() / (steps * config.batch_size),
        "test_loss": test[0],
        "test_accuracy": test[1],
        "step_seconds": step_seconds,
    }


def epoch_line(run: Run, config: Config) -> str:
    entry = run.history[-1]
    return (
        f"epoch {entry['epoch']:3d}/{config.epochs}  train loss {entry['train_loss']:.4f} accuracy {entry['train_accuracy']:7.2%}"
        f"  test loss {entry['test_loss']:.4f} accuracy {entry['test_accuracy']:7.2%}  {entry['step_seconds'] * 1e3:.1f} ms/step"
    )


# SummaryWriter writes in a thread, which dies with a traceback when the disk is full or the folder gone. Here the file is opened,
# and written, once an epoch.


def start_tensorboard(run: Run, out: Path) -> Path:
    """Returns the file, in which the run goes on at run.step: TensorBoard hides what earlier files have from there on."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    file = out / TENSORBOARD / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
    version, start = Event(file_version="brain.Event:2"), Event(step=run.step, session_log=SessionLog(status=SessionLog.START))
    try:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    except OSError as error:
        raise Failure(f"cannot write {file.parent}: {reason(error)}") from None
    _append(file, [version, start])
    return file


def log_epoch(run: Run, config: Config, file: Path) -> None:
    """Every step of the epoch that ends at run.step, and run.history's last entry."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    def event(step: int, values: dict[str, float]) -> Event:
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        return Event(step=step, summary=summary)

    names = [f"step/{name}{kind}" for kind in ("", "_average") for name in loss_names(config)]
    first = run.step - len(run.losses) // config.epochs
    losses = run.losses[first : run.step].tolist()
    events = [event(step, dict(zip(names, values, strict=True))) for step, values in enumerate(losses, first)]
    epoch = {f"epoch/{name}": value for name, value in run.history[-1].items() if name not in ("epoch", "step")}
    _append(file, [*events, event(run.step - 1, epoch)])  # at run.step the next start would hide it


def _append(path: Path, events: list[Any]) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    try:
        with open(path, "r+b") as file:  # not "a", which would make a new file in place of one that was deleted
            file.seek(0, os.SEEK_END)
            for event in events:
                event.wall_time = time.time()
                RecordWriter(file).write(event.SerializeToString())
    except OSError as error:
        raise Failure(f"cannot write {path.parent}: {reason(error)}") from None


def draw_curves(run: Run, config: Config, out: Path) -> None:
    from matplotlib.figure import Figure

    steps = [entry["step"] for entry in run.history]
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    losses = run.losses[:, 0].cpu()
    loss_axes.plot(range(1, len(losses) + 1), losses, color="C0", alpha=0.25, linewidth=0.8, label="train, each step")
    for axes, quantity, factor in ((loss_axes, "loss", 1), (accuracy_axes, "accuracy", 100)):
        # An epoch's training value is a mean over its steps: it belongs to its middle.
        middles = [step - steps[0] / 2 for step in steps]
        axes.plot(middles, [factor * entry[f"train_{quantity}"] for entry in run.history], "C0.-", label="train, epoch mean")
        axes.plot(steps, [factor * entry[f"test_{quantity}"] for entry in run.history], "C1.-", label="test")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    loss_axes.set_ylabel(f"cross-entropy (train: {config.reduction}, test: mean)")
    if losses.min() > 0:
        loss_axes.set_yscale("log")
    accuracy_axes.set_ylabel("accuracy (%)")
    figure.suptitle(f"{config.model} on {config.data}, {config.loss} cross-entropy, reduction {config.reduction}")
    write_atomically(out / CURVES, lambda file: figure.savefig(file, format="png", dpi=120))


Loss = Callable[[Tensor, Tensor, float | Tensor], Tensor]  # of logits, labels, scale


def loss_seconds(losses: dict[str, Loss], logits: Tensor, labels: Tensor, config: Config) -> dict[str, float]:
    """Median time of a step's losses, forward and backward down to the logits.

    They take turns, so that what else the machine does falls on all alike.
    """
    logits = logits.detach().requires_grad_()

    def once(loss: Loss) -> None:
        with config.autocast(labels.device):
            value = loss(logits, labels, config.scale)
        torch.autograd.grad(value, logits)

    clock = _marks_of_gpu if labels.is_cuda else _marks_of_cpu
    for _ in range(10):
        for loss in losses.values():
            once(loss)
    marks = clock([functools.partial(once, loss) for _ in range(100) for loss in losses.values()])
    times = [end - start for start, end in itertools.pairwise(marks)]
    return {name: config.accumulate * statistics.median(times[i :: len(losses)]) for i, name in enumerate(losses)}


def _marks_of_cpu(calls: list[Callable[[], None]]) -> list[float]:
    """Seconds at the beginning of each call, and at the end of the last."""
    marks = [time.perf_counter()]
    for call in calls:
        call()
        marks.append(time.perf_counter())
    return marks


def _marks_of_gpu(calls: list[Callable[[], None]]) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    events[0].record()
    for call, event in zip(calls, events[1:], strict=True):
        call()
        event.record()
    torch.cuda.synchronize()
    return [events[0].elapsed_time(event) / 1e3 for event in events]


def result_table(run: Run, config: Config, seconds: dict[str, float], out: Path) -> str:
    """`seconds`: of each loss in a step."""
    last = run.history[-1]
    # The first epoch holds what happens once: allocations, cuDNN's choices, compilation.
    step = statistics.median(entry["step_seconds"] for entry in run.history[1:] or run.history)
    loss = seconds[config.loss]
    ((other, other_loss),) = ((name, value) for name, value in seconds.items() if name != config.loss)
    total = f"{'with the L2 terms':24}{last['train_total_loss']:12.4f}\n" if config.model == "tutorial" else ""
    return (
        f"\n{'':24}{'train':>12}{'test':>12}\n"
        f"{f'loss (train: {config.reduction})':24}{last['train_loss']:12.4f}{last['test_loss']:12.4f}\n{total}"
        f"{'accuracy':24}{last['train_accuracy']:12.2%}{last['test_accuracy']:12.2%}\n"
        f"{'time per step':24}{step * 1e3:9.2f} ms\n"
        f"{'of it in the loss':24}{loss * 1e3:9.3f} ms{loss / step:12.2%}   (cross-entropy, forward and backward)\n"
        f"{f'with --loss {other}':24}{other_loss * 1e3:9.3f} ms{other_loss / (step - loss + other_loss):12.2%}   "
        f"(measured in turns with it, of a step that differs in nothing else)\n"
        f"\n{out}/ holds {CHECKPOINT}, {CURVES} and {TENSORBOARD}/"
    )
