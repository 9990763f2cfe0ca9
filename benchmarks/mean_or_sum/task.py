"""The data, the networks and the training that all experiments share."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training.augment import for_test, seeded
from training.data import TRAIN_IMAGES_FROM_DIGITS, load_data
from training.tutorial import TutorialNet

import fusedloss

Loss = Callable[[Tensor, Tensor], Tensor]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Task:
    """Data on the device, a network, and what must be chosen for it: rates for a batch of 32, where weight decay helps."""

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    make_network: Callable[[], nn.Module]
    rate: float
    adam_rate: float
    few: int  # images so few, their labels so noisy, that weight decay decides about the accuracy
    steps: int  # multiplies the steps of every experiment


@dataclass(frozen=True)
class Effort:
    seeds: int
    quick: bool

    def steps(self, task: Task, n: int) -> int:
        return 8 if self.quick else n * task.steps

    def grid(self, values: list[Any]) -> list[Any]:
        return [values[0], values[-1]] if self.quick else values


LABEL_NOISE = 0.3  # of the few images


def make_task(data: str, model: str, data_dir: Path, device: torch.device) -> Task:
    if model == "mlp":
        inputs, labels, test_inputs, test_labels = (tensor.to(device) for tensor in digits_pixels())

        def make_network() -> nn.Module:
            return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

        return Task(inputs, labels, test_inputs, test_labels, make_network, rate=0.1, adam_rate=0.003, few=256, steps=1)
    images = load_data(data, data_dir, None).to(device)
    inputs, test_inputs = (for_test(part, images, "tutorial") for part in (images.train_images, images.test_images))
    # The tutorial's rate is 0.1 for a batch of 128. `few` and `steps` are guesses, not tuned.
    return Task(
        inputs,
        images.train_labels,
        test_inputs,
        images.test_labels,
        TutorialNet,
        rate=0.025,
        adam_rate=3e-4,
        few=min(2048, len(inputs) // 2),
        steps=4,
    )


def digits_pixels() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 8 x 8 pixels as they are, standardised; split as in train_cifar10.py."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    inputs, labels = torch.from_numpy(digits.data).float(), torch.from_numpy(digits.target).long()
    n_train = TRAIN_IMAGES_FROM_DIGITS
    train, test = train_test_split(range(len(labels)), train_size=n_train, stratify=digits.target, random_state=0)
    std, mean = torch.std_mean(inputs[train])
    inputs = (inputs - mean) / std
    return inputs[train], labels[train], inputs[test], labels[test]


def with_noise(labels: Tensor, share: float, seed: int) -> Tensor:
    """That share of the labels drawn anew among the ten classes."""
    generator = seeded(seed, "noise", 0, torch.device("cpu"))
    rows = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    noisy = labels.clone()
    noisy[rows.to(labels.device)] = torch.randint(10, (len(rows),), generator=generator).to(labels.device)
    return noisy


def few_noisy(task: Task, seed: int) -> Task:
    generator = seeded(seed, "few", 0, torch.device("cpu"))
    rows = torch.randperm(len(task.labels), generator=generator)[: task.few].to(task.labels.device)
    labels = with_noise(task.labels[rows], LABEL_NOISE, seed)
    return dataclasses.replace(task, inputs=task.inputs[rows], labels=labels)


def batches(task: Task, seed: int, batch: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive rows of one stream, epochs in random order end to end: the same stream for every batch size."""
    generator = seeded(seed, "order", 0, torch.device("cpu"))
    n_epochs = math.ceil(batch * steps / len(task.labels))
    epochs = [torch.randperm(len(task.labels), generator=generator) for _ in range(n_epochs)]
    for rows in torch.cat(epochs).to(task.labels.device)[: batch * steps].split(batch):
        yield task.inputs[rows], task.labels[rows]


def network(task: Task, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return task.make_network().to(task.labels.device)


def sgd(rate: float, **options: Any) -> MakeOptimizer:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, fused=True, **options)


def adamw(rate: float, weight_decay: float) -> MakeOptimizer:
    return lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay, fused=True)


def cross_entropy(**options: Any) -> Loss:
    return lambda logits, target: fusedloss.cross_entropy(logits, target, **options)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, inputs: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    loss(model(inputs), labels).backward()
    optimizer.step()


def fit(
    task: Task,
    seed: int,
    batch: int,
    steps: int,
    make_optimizer: MakeOptimizer,
    loss: Loss,
    warm_up: tuple[float, int] = (0.0, 0),  # first rate, and the steps in which it grows to the optimizer's
) -> nn.Module:
    model = network(task, seed)
    optimizer = make_optimizer(model.parameters())
    (group,) = optimizer.param_groups
    first, n_warm = warm_up
    rate = group["lr"]
    for step, (inputs, labels) in enumerate(batches(task, seed, batch, steps)):
        group["lr"] = first + (rate - first) * (step + 1) / n_warm if step < n_warm else rate
        train_step(model, optimizer, loss, inputs, labels)
    return model


@torch.no_grad()
def test_losses(model: nn.Module, task: Task) -> tuple[Tensor, Tensor]:
    """The loss of each test image, and whether its class was found."""
    logits = torch.cat([model(part) for part in task.test_inputs.split(1000)])
    return fusedloss.cross_entropy(logits, task.test_labels, reduction="none"), logits.argmax(1) == task.test_labels


def accuracy(model: nn.Module, task: Task) -> float:
    return round(test_losses(model, task)[1].float().mean().item(), 5)


def flat(parameters: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parameters])


@torch.no_grad()
def largest_in_ulps(ours: Any, theirs: Any) -> float:
    """Infinite where a parameter is not finite."""
    largest = 0.0
    for a, b in zip(ours, theirs, strict=True):
        exponent = torch.frexp(a.abs().max()).exponent
        difference = (a.double() - b.double()).abs().max() / 2.0 ** (exponent - 24)
        largest = max(largest, difference.item()) if difference.isfinite() else math.inf
    return float(f"{largest:.4g}")


def worst_case(model: nn.Module, task: Task) -> dict[str, float]:
    losses, correct = test_losses(model, task)
    by_class = [correct[task.test_labels == c].float().mean().item() for c in range(10)]
    return {
        "accuracy": correct.float().mean().item(),
        "worst_class": min(by_class),
        "p99": losses.quantile(0.99).item(),
        "max": losses.max().item(),
    }
