"""Mean or sum? The five claims of the README, measured: writes EXPERIMENTS.md, its plots and the numbers they are drawn from.

    python benchmarks/experiments.py                                        # all, on the built-in digits
    python benchmarks/experiments.py --only regulariser                     # one, and the report anew
    python benchmarks/experiments.py --report                               # the report anew, nothing measured
    python benchmarks/experiments.py --data cifar10 --model tutorial --device cuda

The default is a network of one hidden layer on the digits' 64 pixels: small enough that whole grids with several seeds cost
minutes on one core. Every loss is fusedloss.cross_entropy's, every optimizer torch's. A run is a function of its options and
its seed alone: the seed draws initial weights, label noise, the choice of images where not all are used, and their order.

This file measures, and stores results/NAME.json; mean_or_sum/report.py makes plots and sentences of these files alone.
"""

import argparse
import dataclasses
import datetime
import itertools
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import training  # noqa: F401  # first: it sets OpenMP's wait policy before torch is loaded

# isort: split
import torch
from mean_or_sum import report
from mean_or_sum.records import Record, one_record_a_line
from mean_or_sum.task import (
    Effort,
    Loss,
    MakeOptimizer,
    Task,
    accuracy,
    adamw,
    batches,
    cross_entropy,
    few_noisy,
    fit,
    flat,
    largest_in_ulps,
    make_task,
    network,
    sgd,
    train_step,
    with_noise,
    worst_case,
)
from torch import Tensor
from training.data import choose_data
from training.failure import Failure
from training.options import choose_device

import fusedloss
from fusedloss.distributed import global_scale

# --------------------------------------------------------------------------------------------------------- experiments


def gradients(task: Task, effort: Effort) -> list[Record]:
    """Claim 1: the gradient of the sum over that of the mean, for all parameters, at the start of training."""
    records = []
    for batch in effort.grid([1, 2, 3, 4, 8, 10, 16, 32, 64, 100, 128, 256, 512, 1000, 1024]):
        for seed in range(effort.seeds):
            inputs, labels = next(batches(task, seed, batch, 1))
            mean, total = (
                flat(torch.autograd.grad(cross_entropy(reduction=reduction)(model(inputs), labels), list(model.parameters())))
                for reduction, model in (("mean", network(task, seed)), ("sum", network(task, seed)))
            )
            error = (total.double() - batch * mean.double()).abs().max() / (batch * mean.double().abs().max())
            ratio = (total.double().norm() / mean.double().norm()).item()
            records.append({"batch": batch, "seed": seed, "ratio": ratio, "error": error.item()})
    return records


def trajectories(task: Task, effort: Effort) -> list[Record]:
    """Claim 2: two networks, the same batches; one with the mean at rate l, one with the sum."""
    optimizers: dict[str, tuple[float, Callable[[float], MakeOptimizer]]] = {
        "SGD": (task.rate, sgd),
        "SGD, momentum 0.9": (task.rate / 5, lambda rate: sgd(rate, momentum=0.9)),
        "Adam": (task.adam_rate, lambda rate: lambda parameters: torch.optim.Adam(parameters, lr=rate, fused=True)),
    }
    records = []
    for (name, (rate, make)), batch, divided in itertools.product(optimizers.items(), [64, 100], [True, False]):
        for seed in range(effort.seeds):
            sum_rate = rate / batch if divided else rate
            record = {"optimizer": name, "batch": batch, "sum_rate": "l/B" if divided else "l", "rate": rate, "seed": seed}
            records.append({**record, **apart(task, seed, batch, effort.steps(task, 300), make(rate), make(sum_rate))})
    return records


def apart(task: Task, seed: int, batch: int, steps: int, mean_optimizer: MakeOptimizer, sum_optimizer: MakeOptimizer) -> Record:
    """The largest difference of a parameter so far, every ten steps, and how far the mean's parameters moved, in ulps.

    An ulp is that of the largest parameter of the same tensor: a parameter near 0 has ulps too fine to mean anything.
    """
    models = network(task, seed), network(task, seed)
    optimizers = mean_optimizer(models[0].parameters()), sum_optimizer(models[1].parameters())
    losses = cross_entropy(), cross_entropy(reduction="sum")
    start = [p.detach().clone() for p in models[0].parameters()]
    largest, steps_at, ulps = 0.0, [], []
    for step, (inputs, labels) in enumerate(batches(task, seed, batch, steps), 1):
        for model, optimizer, loss in zip(models, optimizers, losses, strict=True):
            train_step(model, optimizer, loss, inputs, labels)
        largest = max(largest, largest_in_ulps(models[0].parameters(), models[1].parameters()))
        if step % 10 == 0 or step in (1, steps):
            steps_at.append(step)
            ulps.append(largest if math.isfinite(largest) else None)
    return {"step": steps_at, "ulps": ulps, "moved": largest_in_ulps(models[0].parameters(), start)}


def regulariser(task: Task, effort: Effort) -> list[Record]:
    """Claim 3: accuracy over batch size and weight decay, the steps' number fixed.

    The rates are those with which mean and sum take the same steps without weight decay: l and l/B for SGD, l for Adam.
    """
    records = []
    grid = itertools.product(
        ["SGD", "AdamW"], ["mean", "sum"], effort.grid([8, 32, 128, 512]), effort.grid([2.0**n for n in range(-6, 7)])
    )
    for optimizer, reduction, batch, decay in grid:
        if optimizer == "AdamW":
            make = adamw(task.adam_rate, weight_decay=decay)
        else:
            # Half the rate, so that the noise of small batches, a regulariser of its own, decides less.
            make = sgd(task.rate / 2 / (batch if reduction == "sum" else 1), weight_decay=decay)
        accuracies = []
        for seed in range(effort.seeds):
            problem = few_noisy(task, seed)
            model = fit(problem, seed, batch, effort.steps(task, 800), make, cross_entropy(reduction=reduction))
            accuracies.append(accuracy(model, task))
        record = {"optimizer": optimizer, "reduction": reduction, "batch": batch, "weight_decay": decay}
        records.append({**record, "accuracy": accuracies})
    return records


def scaling(task: Task, effort: Effort) -> list[Record]:
    """Claim 4: 20 epochs with batches of 32 k. The rate l suits 32; sum's rate l/32 is the mean's there."""
    records = []
    for k, warm, policy in itertools.product(
        effort.grid([1, 2, 4, 8, 16, 32]), [False, True], ["rate fixed", "rate x k", "sum, rate fixed"]
    ):
        batch = 32 * k
        steps = effort.steps(task, 20 * len(task.labels) // batch)
        divisor, reduction = (32, "sum") if policy.startswith("sum") else (1, "mean")
        rate = task.rate * (k if policy == "rate x k" else 1) / divisor
        # Goyal et al., section 2.2: gradual warm-up, from the rate of k = 1 to the full one. For the sum, whose k is in the
        # loss, the same effective rates.
        first = rate / (1 if policy == "rate fixed" else k)
        warm_up = (first, steps // 4) if warm else (0.0, 0)
        accuracies = [
            accuracy(fit(task, seed, batch, steps, sgd(rate), cross_entropy(reduction=reduction), warm_up), task)
            for seed in range(effort.seeds)
        ]
        records.append({"k": k, "batch": batch, "warm_up": warm, "policy": policy, "steps": steps, "accuracy": accuracies})
    return records


REMARK_1_DECAY = 0.0625


def remark1(task: Task, effort: Effort) -> list[Record]:
    """Scaling the cross-entropy is not scaling the rate once there is weight decay (Goyal et al., section 3)."""
    records = []
    steps, decay, rate = effort.steps(task, 500), REMARK_1_DECAY, task.rate / 2
    variants: dict[str, Callable[[int], tuple[MakeOptimizer, Loss]]] = {
        "rate x k": lambda k: (sgd(rate * k, weight_decay=decay), cross_entropy()),
        "loss x k": lambda k: (sgd(rate, weight_decay=decay), cross_entropy(scale=float(k))),
        "loss x k, decay x k": lambda k: (sgd(rate, weight_decay=decay * k), cross_entropy(scale=float(k))),
    }
    for k, seed in itertools.product(effort.grid([1, 2, 4, 8]), range(effort.seeds)):
        problem = few_noisy(task, seed)
        reference = None
        for variant, make in variants.items():
            model = fit(problem, seed, 32 * k, steps, *make(k))
            weights = flat(model.parameters())
            reference = weights if reference is None else reference
            distance = ((weights - reference).norm() / reference.norm()).item()
            records.append({"k": k, "seed": seed, "variant": variant, "accuracy": accuracy(model, task), "distance": distance})
    return records


def workers_loss(n_workers: int, variant: str) -> Loss:
    """What k workers, each with its share of the batch, add up to."""

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        parts = list(zip(logits.chunk(n_workers), target.chunk(n_workers), strict=True))
        if variant == "sum / global count":
            scale = global_scale([labels for _, labels in parts])
            return sum(fusedloss.cross_entropy(x, y, reduction="sum", scale=scale) for x, y in parts)  # type: ignore[return-value]
        total = sum(fusedloss.cross_entropy(x, y) for x, y in parts)
        return total / n_workers if variant == "mean of means" else total  # type: ignore[return-value]

    return loss


def remark3(task: Task, effort: Effort) -> list[Record]:
    """Normalise the per-worker loss by the total minibatch kn, not by the worker's n (Goyal et al., section 3).

    The error of the gradient, with a share of the targets ignored that differs between the workers; and the accuracy with
    all of them counted, at a batch of 32 k and the rate l k / 2.
    """
    records = []
    variants = ["sum of means", "mean of means", "sum / global count"]
    for k, seed, variant in itertools.product(effort.grid([1, 2, 4, 8, 16]), range(effort.seeds), variants):
        inputs, labels = next(batches(task, seed, 32 * k, 1))
        labels = labels.clone()
        for worker, part in enumerate(labels.chunk(k)):
            part[: 28 * worker // k] = -100
        model = network(task, seed)
        whole, parts = (
            flat(torch.autograd.grad(loss(model(inputs), labels), list(model.parameters())))
            for loss in (cross_entropy(), workers_loss(k, variant))
        )
        record = {"k": k, "seed": seed, "variant": variant, "error": ((parts - whole).norm() / whole.norm()).item()}
        steps = effort.steps(task, 20 * len(task.labels) // (32 * k))
        fitted = fit(task, seed, 32 * k, steps, sgd(task.rate * k / 2), workers_loss(k, variant))
        records.append({**record, "accuracy": accuracy(fitted, task)})
    return records


WORST_LOSSES: dict[str, dict[str, Any]] = {
    "mean": {},
    "top 50 %": {"reduction": "topk", "top_k": 0.5},
    "top 25 %": {"reduction": "topk", "top_k": 0.25},
    "top 10 %": {"reduction": "topk", "top_k": 0.1},
    "max": {"reduction": "max"},
}


def worst(task: Task, effort: Effort) -> list[Record]:
    """Claim 5: each loss with four rates, on four fifths of the images; the report chooses by accuracy on the last fifth."""
    records = []
    n_held_out = len(task.labels) // 5
    rates = [round(task.rate * factor, 6) for factor in effort.grid([0.1, 0.3, 1.0, 3.0])]
    for noise, name, rate in itertools.product([0.0, 0.1], WORST_LOSSES, rates):
        measures: dict[str, list[float]] = {}
        for seed in range(effort.seeds):
            labels = with_noise(task.labels[n_held_out:], noise, seed)
            problem = dataclasses.replace(task, inputs=task.inputs[n_held_out:], labels=labels)
            loss = cross_entropy(**WORST_LOSSES[name])
            model = fit(problem, seed, 64, effort.steps(task, 1000), sgd(rate), loss)
            held_out = dataclasses.replace(task, test_inputs=task.inputs[:n_held_out], test_labels=task.labels[:n_held_out])
            found = {"held_out_accuracy": accuracy(model, held_out), **worst_case(model, task)}
            for measure, value in found.items():
                measures.setdefault(measure, []).append(round(value, 5))
        records.append({"noise": noise, "loss": name, "rate": rate, **measures})
    return records


EXPERIMENTS: dict[str, Callable[[Task, Effort], list[Record]]] = {
    "gradients": gradients,
    "trajectories": trajectories,
    "regulariser": regulariser,
    "scaling": scaling,
    "remark1": remark1,
    "remark3": remark3,
    "worst": worst,
}

# ---------------------------------------------------------------------------------------------------------------- main


def machine(device: torch.device) -> str:
    name = platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    return f"{gpu}{name}, {os.cpu_count()} cores, of which one is used"


def measure(name: str, args: argparse.Namespace, device: torch.device) -> Record:
    """The file's contents: options, records, and what is needed to judge them."""
    task = make_task(args.data, args.model, args.data_dir, device)
    start = time.perf_counter()
    records = EXPERIMENTS[name](task, Effort(args.seeds, args.quick))
    return {
        "experiment": name,
        "options": {key: getattr(args, key) for key in ("data", "model", "device", "seeds", "quick")},
        "machine": machine(device),
        "versions": f"fusedloss {fusedloss.__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}",
        "date": datetime.date.today().isoformat(),
        "seconds": round(time.perf_counter() - start, 1),
        "records": records,
    }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="experiments.py", description="Mean or sum? Measured.", allow_abbrev=False)
    parser.add_argument("--only", choices=list(EXPERIMENTS), help="this experiment alone (default: all)")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the report of what was measured")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="runs of each kind (default: 5)")
    parser.add_argument("--quick", action="store_true", help="eight steps, two points a grid: to see that it runs")
    parser.add_argument("--data", choices=["digits", "cifar10"], default="digits")
    parser.add_argument("--model", choices=["mlp", "tutorial"], default="mlp", help="mlp is for the digits (default: mlp)")
    parser.add_argument("--device", default="cpu", metavar="cpu|cuda[:N]")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of CIFAR-10 (default: data)")
    parser.add_argument("--out", type=Path, help="(default: benchmarks; runs/experiments-... for other options than these)")
    args = parser.parse_args(argv)
    if args.model == "mlp" and args.data != "digits":
        parser.error("--model mlp is for --data digits")
    if args.seeds < 2:
        parser.error("--seeds: the spread needs two")
    if args.out is None:
        usual = (args.data, args.model, args.device, args.quick) == ("digits", "mlp", "cpu", False)
        name = f"experiments-{args.data}-{args.model}-{args.device}{'-quick' if args.quick else ''}"
        args.out = Path(__file__).parent if usual else Path("runs") / name
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        device = choose_device(args.device)
        if args.data == "cifar10":
            choose_data("cifar10", args.data_dir)
        torch.set_num_threads(1)  # the tensors are small: threads would wait for each other, and sums depend on their number
        if device.type == "cuda":  # the flag is global to the process
            torch.backends.cudnn.deterministic = True
        results = args.out / "results"
        results.mkdir(parents=True, exist_ok=True)
        for name in [] if args.report else [args.only] if args.only else EXPERIMENTS:
            measured = measure(name, args, device)
            report.save_text(results / f"{name}.json", one_record_a_line(measured))
            print(f"{name:14}{measured['seconds']:8.1f} s", flush=True)
        report.write(args.out)
    except Failure as failure:
        print(f"experiments.py: {failure}", file=sys.stderr)
        return failure.code
    print(f"{args.out}/EXPERIMENTS.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
