"""Trains a CIFAR-10 classifier with fusedloss.cross_entropy, or with torch's, everything else being equal.

    python benchmarks/train_cifar10.py                              # CIFAR-10, or scikit-learn's digits without it
    python benchmarks/train_cifar10.py --model tutorial             # the network and loss of TensorFlow's tutorial
    python benchmarks/train_cifar10.py --reduction sum              # the same steps, with the sum at learning rate l/B
    python benchmarks/train_cifar10.py --reduction topk --top-k 0.5 # the harder half of each batch
    python benchmarks/train_cifar10.py --resume --out runs/001      # after Ctrl-C: the same run as an uninterrupted one
    torchrun --nproc-per-node=2 benchmarks/train_cifar10.py         # a batch over two processes: two GPUs, or CPU cores

Two networks:
    resnet    ResNet-9 with the recipe of David Page's DAWNBench entry (github.com/davidcpage/cifar10-fast): Nesterov SGD,
              a learning rate that rises for a fifth of the run and falls to 0, crop, flip, cutout. Page reports 94 % after
              24 epochs; the defaults on a GPU are his, not measured here. On a CPU the default is a quarter of the width.
    tutorial  TensorFlow's CIFAR-10 tutorial: mean cross-entropy + 0.004 * 0.5 * ||w||^2 on the two dense layers, plain SGD,
              weights averaged with 0.9999 for the test. TensorFlow reports about 86 % after 256 epochs. TensorBoard gets the
              tutorial's scalars: cross_entropy, weight_loss, total_loss, each raw and as a moving average with 0.9.

Measured: the first command, without CIFAR-10: 99.44, 99.44 and 100.00 % of the digits' 360 test images with seeds 0, 1, 2;
35 to 55 s each on 2 cores of an Intel Xeon that other programs used as well; PyTorch 2.14.1, Python 3.11.

Read on: the network, the loss, one step, all steps, the program. What is not about learning is in training/:
  - The images live on the device as uint8; a batch is cropped, flipped and normalised there.
  - All randomness is a function of (seed, epoch) or (seed, step): a checkpoint holds no generator, and a resumed run sees the
    same batches. On the CPU it repeats an uninterrupted run bit for bit; on a GPU cuDNN is held to deterministic algorithms.
  - Nothing in a step waits for the device: losses are written to a buffer there, which is read once per epoch.
  - Under torchrun a batch is the same batch, cut into one shard per process. All make the same draws; the first one prints,
    tests and saves. Any number of processes resumes any run. --accumulate cuts a shard into parts, one after the other.
  - What shards and parts change is batch normalisation, which resnet has: its statistics are those of a part (Goyal et al. 2017,
    arXiv:1706.02677, section 3: keep it so). With parts of a few images resnet learns worse; tutorial, which has none, does not.
"""

import argparse
import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import training  # noqa: F401  # first: it sets OpenMP's wait policy before torch is loaded

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import console, processes, report
from training.augment import augment, for_test, seeded
from training.checkpoints import Run, check_finite, not_finite, read_checkpoint, restore, save
from training.data import Data, choose_data, load_data
from training.failure import Failure
from training.files import CHECKPOINT, check_out_folder, claimed_folder
from training.options import Config, choose_device, command_to_resume, parse_arguments, resolve
from training.tutorial import TutorialNet

import fusedloss
from fusedloss.distributed import global_scale

# ------------------------------------------------------------------------------------------------------------ the network


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Multiply(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def resnet9(width: int) -> nn.Sequential:
    """6.6 million parameters at width 64."""
    return nn.Sequential(
        conv_bn_relu(3, width),
        conv_bn_relu(width, 2 * width),
        nn.MaxPool2d(2),
        Residual(conv_bn_relu(2 * width, 2 * width), conv_bn_relu(2 * width, 2 * width)),
        conv_bn_relu(2 * width, 4 * width),
        nn.MaxPool2d(2),
        conv_bn_relu(4 * width, 8 * width),
        nn.MaxPool2d(2),
        Residual(conv_bn_relu(8 * width, 8 * width), conv_bn_relu(8 * width, 8 * width)),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(8 * width, 10, bias=False),
        Multiply(0.125),  # features after the last max-pool are large: without it the first softmax is saturated
    )


def build_model(config: Config) -> nn.Module:
    torch.manual_seed(config.seed)
    if config.model == "tutorial":
        return TutorialNet()
    return resnet9(config.width).to(memory_format=torch.channels_last)  # a quarter faster on CPUs, what tensor cores read


# --------------------------------------------------------------------------------------------------------------- the loss


def make_loss(config: Config) -> report.Loss:
    """The loss of one part of a batch; with `part_scale` the parts' losses add up to the batch's."""
    cross_entropy = fusedloss.cross_entropy if config.loss == "fused" else torch_cross_entropy
    options = loss_options(config)
    return lambda logits, target, scale: cross_entropy(logits, target, scale=scale, **options)


def loss_options(config: Config) -> dict[str, Any]:
    # The mean of the parts' means is the mean only for parts of equal counts; the sum over the batch's count always is.
    reduction = "sum" if in_parts(config) and config.reduction == "mean" else config.reduction
    return {"reduction": reduction, "label_smoothing": config.label_smoothing, "top_k": config.top_k}


def in_parts(config: Config) -> bool:
    return config.accumulate > 1 or processes.n_ranks() > 1


def part_scale(config: Config, labels: Tensor) -> float | Tensor:
    """Factor of each part's loss; `labels` are all those of this process."""
    if in_parts(config) and config.reduction == "mean":
        return config.scale * global_scale(labels)
    return config.scale * processes.n_ranks()  # DistributedDataParallel averages what is to be added up


def torch_cross_entropy(
    logits: Tensor,  # (B, 10)
    target: Tensor,  # (B,)
    reduction: str,
    label_smoothing: float = 0.0,
    top_k: int | float | None = None,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """fusedloss.cross_entropy spelled with torch's operators: the baseline."""
    if reduction in ("mean", "sum"):
        loss = F.cross_entropy(logits, target, reduction=reduction, label_smoothing=label_smoothing)
    else:
        rows = F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
        if reduction == "max":
            loss = rows.amax()
        else:
            k = top_k if isinstance(top_k, int) else math.floor((top_k or 1.0) * len(rows) + 0.5)
            loss = rows.topk(min(max(k, 1), len(rows))).values.mean()
    return loss * scale if isinstance(scale, Tensor) or scale != 1.0 else loss


# --------------------------------------------------------------------------------------------------------------- one step


def start_run(config: Config, device: torch.device, total_steps: int) -> Run:
    model = build_model(config).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.model == "resnet" and config.momentum > 0,
        weight_decay=config.weight_decay if config.model == "resnet" else 0.0,  # the tutorial has it in its loss
        fused=device.type == "cuda",  # the others would read fp16's overflow flag on the host in every step
    )
    return Run(
        model=model,
        averaged=copy.deepcopy(model).requires_grad_(False) if config.ema_decay else None,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=config.amp == "fp16"),
        losses=torch.zeros(total_steps, 2 * len(report.loss_names(config)), device=device),
        correct=torch.zeros((), dtype=torch.int64, device=device),
    )


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    if config.model == "tutorial":
        return config.lr * 0.1 ** (step // (350 * steps_per_epoch))
    done = (step + 1) / (config.epochs * steps_per_epoch + 1)  # never 0: no step is wasted
    return config.lr * min(done / 0.2, (1 - done) / 0.8)


def train_step(run: Run, config: Config, network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> None:
    """One optimizer step. Nothing in it makes the host wait for the device.

    `network` is the model, perhaps compiled, perhaps one of several processes'; images and labels are this process's.
    """
    loss = make_loss(config)
    values = torch.zeros(run.losses.shape[1] // 2, device=labels.device)
    correct = torch.zeros_like(run.correct)
    scale = part_scale(config, labels)
    parts = list(zip(images.tensor_split(config.accumulate), labels.tensor_split(config.accumulate), strict=True))
    for part_images, part_labels in parts:
        with processes.gradients_stay_here(network, but_for_the_last=part_labels is parts[-1][1]):
            with config.autocast(labels.device):
                logits = network(part_images)
                cross_entropy = loss(logits, part_labels, scale)
            if isinstance(run.model, TutorialNet):
                weight_loss = run.model.weight_loss(config.weight_decay) / config.accumulate
                total = cross_entropy + weight_loss
                values += torch.stack([cross_entropy, weight_loss, total]).detach()
            else:
                total = cross_entropy
                values += total.detach()
            run.scaler.scale(total).backward()
        correct += (logits.detach().argmax(dim=1) == part_labels).sum()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    processes.add_up(values, correct)
    values /= processes.n_ranks()  # `scale` anticipates that gradients are averaged; so are the losses
    run.correct += correct
    if run.averaged is not None:
        # TensorFlow's ExponentialMovingAverage with num_updates: a young average forgets its random start sooner.
        decay = min(config.ema_decay, (1 + run.step) / (10 + run.step))
        update_average(run.averaged, run.model, decay)
    average = values if run.step == 0 else run.losses[run.step - 1, len(values) :].lerp(values, 0.1)
    run.losses[run.step] = torch.cat([values, average])
    run.step += 1


@torch.no_grad()
def update_average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    for mean, value in zip(averaged.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)
    for mine, its in zip(averaged.buffers(), model.buffers(), strict=True):
        mine.copy_(its)


# -------------------------------------------------------------------------------------------------------------- all steps


def train(run: Run, config: Config, data: Data, out: Path | None, command: str) -> None:
    """Runs the epochs that are left, saving after each. When interrupted, saves and raises Failure with the resuming command."""
    device, n_train = data.train_labels.device, len(data.train_labels)
    steps_per_epoch = n_train // config.batch_size
    network = processes.distributed(run.model, device)
    network = torch.compile(network) if config.compile else network
    save(run, config, out)  # before the first step, so that a folder that cannot be written costs no training
    events = report.start_tensorboard(run, out) if processes.is_first() else None
    bar = console.progress_bar(total=len(run.losses), initial=run.step, desc="training", unit="step")
    with bar, processes.stop_on_signal() as stopped:
        for epoch in range(run.step // steps_per_epoch, config.epochs):
            order = torch.randperm(n_train, device=device, generator=seeded(config.seed, "order", epoch, device))
            start, first = time.perf_counter(), run.step
            while run.step < (epoch + 1) * steps_per_epoch:
                if stopped and processes.is_first():  # the others, perhaps a step ahead, end when nobody answers them
                    check_finite(run, config)
                    save(run, config, out)
                    message = f"stopped at step {run.step} of {len(run.losses)} and saved; go on with: {command}"
                    raise Failure(message, 128 + stopped[0])
                for group in run.optimizer.param_groups:
                    group["lr"] = learning_rate(config, run.step, steps_per_epoch)
                batch = order[run.step % steps_per_epoch * config.batch_size :][: config.batch_size]
                generator = seeded(config.seed, "augment", run.step, device)
                # All of the batch in each process: what is drawn for an image must not depend on the number of processes.
                images = augment(data.train_images[batch], data, config.model, generator)
                train_step(run, config, network, processes.shard(images), data.train_labels[processes.shard(batch)])
                bar.update()
            check_finite(run, config)  # waits for the device, once an epoch
            seconds = (time.perf_counter() - start) / (run.step - first)
            if processes.is_first():
                test = evaluate(run.averaged or run.model, config, data)
                if not math.isfinite(test[0]):
                    raise not_finite(f"the test loss is {test[0]}", epoch + 1, config)
                run.history.append(report.epoch_entry(run, config, seconds, test))
            run.correct.zero_()
            save(run, config, out)  # before anything is written that may fail
            if processes.is_first():
                report.log_epoch(run, config, events)
                with bar.external_write_mode():
                    console.say(report.epoch_line(run, config))


@torch.no_grad()
def evaluate(model: nn.Module, config: Config, data: Data) -> tuple[float, float]:
    """Returns the mean cross-entropy and the accuracy on the test images."""
    loss = make_loss(dataclasses.replace(config, reduction="sum", top_k=None, label_smoothing=0.0))
    total = torch.zeros((), dtype=torch.float64, device=data.test_labels.device)
    correct = torch.zeros((), dtype=torch.int64, device=data.test_labels.device)
    model.eval()
    for images, labels in zip(data.test_images.split(500), data.test_labels.split(500), strict=True):
        with config.autocast(labels.device):
            logits = model(for_test(images, data, config.model))
            total += loss(logits, labels, 1.0)
        correct += (logits.argmax(dim=1) == labels).sum()
    model.train()
    n = len(data.test_labels)
    return total.item() / n, correct.item() / n


# ------------------------------------------------------------------------------------------------------------ the program


def run_training(args: argparse.Namespace) -> None:
    device = choose_device(args.device)
    with processes.process_group(device), contextlib.ExitStack() as stack:
        check_out_folder(args)
        if args.resume:
            out = stack.enter_context(claimed_folder(args))
            config, checkpoint = read_checkpoint(args, device)
            processes.ask_first(lambda: choose_data(config.data, args.data_dir))
        else:
            resolve(args, "digits", device)  # before the download: options that cannot go together must not cost one
            name = processes.ask_first(lambda: choose_data(args.data or "auto", args.data_dir))
            config, checkpoint = resolve(args, name, device), None
        data = load_data(config.data, args.data_dir, config.limit).to(device)
        steps_per_epoch = len(data.train_labels) // config.batch_size
        if steps_per_epoch == 0:
            raise Failure(f"--batch-size {config.batch_size} is larger than the {len(data.train_labels)} training images")
        if device.type == "cuda":
            torch.backends.cudnn.deterministic = True
            torch.set_float32_matmul_precision("high")
        run = start_run(config, device, config.epochs * steps_per_epoch)
        if checkpoint is not None:
            restore(run, config, checkpoint, args.out / CHECKPOINT)
        else:
            out = stack.enter_context(claimed_folder(args))
        console.say(report.describe(run, config, data, loss_options(config)))
        if run.step:
            console.say(f"resumed at step {run.step}")
        train(run, config, data, out, command_to_resume(args, out))
        if processes.is_first():
            report.draw_curves(run, config, out)
            console.say(report.result_table(run, config, loss_seconds(run, config, data), out))


def loss_seconds(run: Run, config: Config, data: Data) -> dict[str, float]:
    """What a step spends in the loss, ours and torch's, on logits of this run."""
    rows = config.batch_size // config.accumulate // processes.n_ranks()
    labels = data.train_labels[:rows]
    with torch.no_grad(), config.autocast(labels.device):
        logits = run.model.eval()(for_test(data.train_images[:rows], data, config.model))
    losses = {name: make_loss(dataclasses.replace(config, loss=name)) for name in ("fused", "torch")}
    return report.loss_seconds(losses, logits, labels, config)


def main(argv: list[str] | None = None) -> int:
    return console.exit_code(lambda: run_training(parse_arguments(argv)))


if __name__ == "__main__":
    console.leave(main())
