"""What a run is made of, and how it is saved and restored: bit for bit, or not at all."""

import argparse
import dataclasses
import hashlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from training.failure import Failure, reason
from training.files import CHECKPOINT, write_atomically
from training.options import Config, check_combinations, resumed_config
from training.processes import is_first

FORMAT = "fusedloss.train_cifar10.2"  # of the checkpoint; a change that old checkpoints cannot follow raises the number


class Epoch(TypedDict):
    epoch: int
    step: int  # its last, counted from 1
    learning_rate: float  # in that step
    train_loss: float
    train_total_loss: float  # with the tutorial's L2 terms
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    step_seconds: float


@dataclass
class Run:
    """What a checkpoint holds."""

    model: nn.Module
    averaged: nn.Module | None  # moving average of the weights, tested in their place
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    losses: Tensor  # (all steps, names) on the device: each step's losses, then their moving averages
    correct: Tensor  # 0-d int64 on the device: right answers in the epoch so far
    step: int = 0
    history: list[Epoch] = dataclasses.field(default_factory=list)


def check_finite(run: Run, config: Config) -> None:
    """Raises Failure if the losses or the weights are not: what can no longer be trained must not replace a checkpoint."""
    losses = run.losses[: run.step]
    tensors = [losses, *(tensor for tensor in run.model.state_dict().values())]
    if torch.stack([tensor.isfinite().all() for tensor in tensors]).all():  # waits for the device once
        return
    steps_per_epoch = len(run.losses) // config.epochs
    bad = (~losses[:, : losses.shape[1] // 2].isfinite()).any(dim=1).nonzero()
    step = int(bad[0]) if len(bad) else run.step - 1
    what = f"the loss is {losses[step, losses.shape[1] // 2 - 1].item()}" if len(bad) else "weights are not finite"
    raise not_finite(what, step // steps_per_epoch + 1, config)


def not_finite(what: str, epoch: int, config: Config) -> Failure:
    other = ", or a smaller --scale" if config.scale != 1 else ""
    return Failure(f"{what} in epoch {epoch}: try a lower --lr than {config.lr:g}{other}", 1)


def save(run: Run, config: Config, out: Path) -> None:
    if not is_first():
        return
    checkpoint = {
        "format": FORMAT,
        "config": dataclasses.asdict(config),
        "model": run.model.state_dict(),
        "averaged": run.averaged.state_dict() if run.averaged is not None else None,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "losses": run.losses[: run.step].clone(),  # a view would be saved with all that it is a view of
        "correct": run.correct,
        "step": run.step,
        "history": run.history,
    }
    write_checkpoint(checkpoint, out / CHECKPOINT)


# torch.load does not check the checksums in the zip archive that torch.save writes. The SHA-256 of the file stands at its end, as
# the archive's comment, whose length is the last field before it: torch.load and zip programs read the file as before.
_DIGEST_CHARACTERS = 64


def write_checkpoint(checkpoint: Any, path: Path) -> None:
    archive = io.BytesIO()
    torch.save(checkpoint, archive)
    body = archive.getvalue()[:-2] + _DIGEST_CHARACTERS.to_bytes(2, "little")
    digest = hashlib.sha256(body).hexdigest().encode()
    write_atomically(path, lambda file: file.write(body + digest))


def _is_sealed(archive: bytes) -> bool:
    body, digest = archive[:-_DIGEST_CHARACTERS], archive[-_DIGEST_CHARACTERS:]
    return hashlib.sha256(body).hexdigest().encode() == digest


def read_checkpoint(args: argparse.Namespace, device: torch.device) -> tuple[Config, dict[str, Any]]:
    """The options of the run in args.out, and its checkpoint."""
    path = args.out / CHECKPOINT
    try:
        archive = path.read_bytes()
        if not _is_sealed(archive):
            raise ValueError
        checkpoint = torch.load(io.BytesIO(archive), map_location=device, weights_only=True)
    except OSError as error:
        raise Failure(f"cannot read {path}: {reason(error)}") from None
    except Exception:  # zip, pickle and torch each have their own for a file that is not theirs
        raise Failure(f"{path} is damaged, or no checkpoint of this version of train_cifar10.py") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise Failure(f"{path} is no checkpoint of this version of train_cifar10.py")
    config = resumed_config(args, checkpoint.get("config"), path)
    check_combinations(config, device)
    return config, checkpoint


def restore(run: Run, config: Config, checkpoint: dict[str, Any], path: Path) -> None:
    """Into a run that has just started; `checkpoint` may be of fewer epochs."""
    try:
        _check_state(run, config, checkpoint)
        run.model.load_state_dict(checkpoint["model"])
        if run.averaged is not None:
            run.averaged.load_state_dict(checkpoint["averaged"])
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        run.scaler.load_state_dict(checkpoint["scaler"])
        run.losses[: checkpoint["step"]] = checkpoint["losses"]
        run.correct.copy_(checkpoint["correct"])
        run.step, run.history = checkpoint["step"], checkpoint["history"]
    except (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        raise Failure(f"{path} does not fit this network or this amount of data") from None


def _check_state(run: Run, config: Config, checkpoint: dict[str, Any]) -> None:
    """Raises ValueError, or what the wrong type raises, for a state that this run cannot have been in."""
    step, history, optimizer = checkpoint["step"], checkpoint["history"], checkpoint["optimizer"]
    steps_per_epoch = len(run.losses) // config.epochs
    weights = list(run.model.parameters())
    groups, fresh_groups = optimizer["param_groups"], run.optimizer.state_dict()["param_groups"]
    fits = (
        type(step) is int  # each line relies on those before it
        and 0 <= step <= checkpoint["config"]["epochs"] * steps_per_epoch
        and _alike(checkpoint["losses"], run.losses[:step])
        and _alike(checkpoint["correct"], run.correct)
        and 0 <= checkpoint["correct"] <= step % steps_per_epoch * config.batch_size
        and _alike(checkpoint["model"], run.model.state_dict())
        and _alike(checkpoint["averaged"], run.averaged.state_dict() if run.averaged is not None else None)
        and _alike(checkpoint["scaler"], run.scaler.state_dict())
        # The rate is set anew in each step; every other hyperparameter comes from the options.
        and [{**group, "lr": None} for group in groups] == [{**group, "lr": None} for group in fresh_groups]
        and all(_alike(state["momentum_buffer"], weights[i]) for i, state in optimizer["state"].items() if config.momentum)
        and [entry["step"] for entry in history] == [steps_per_epoch * n for n in range(1, step // steps_per_epoch + 1)]
        and all(entry.keys() == Epoch.__annotations__.keys() for entry in history)
        and all(math.isfinite(value) for entry in history for value in entry.values())
    )
    if not fits:
        raise ValueError


def _alike(saved: Any, fresh: Any) -> bool:
    """Whether it has the same keys, types and shapes, and only finite numbers."""
    if isinstance(fresh, Tensor):
        same_kind = (saved.shape, saved.dtype, saved.layout) == (fresh.shape, fresh.dtype, fresh.layout)
        return same_kind and bool(saved.isfinite().all())
    if isinstance(fresh, dict):
        return saved.keys() == fresh.keys() and all(_alike(saved[key], value) for key, value in fresh.items())
    return type(saved) is type(fresh) and (not isinstance(fresh, float) or math.isfinite(saved))
