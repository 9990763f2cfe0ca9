"""Trains train_cifar10.py's network with its steps where what its data and its report need is not installed: PyTorch is enough.

    python benchmarks/gpu_training.py --loss fused
    python benchmarks/gpu_training.py --loss torch --device cpu --images 400

The images are made: ten patterns of colours, one for each class, each image a pattern shifted by a few pixels under noise that is
several times as strong. Both losses see the same images in the same order.
"""

import argparse
import sys
import time

import gpu_run  # noqa: F401  # first: where fusedloss is
import torch
import train_cifar10
from torch import Tensor
from training.augment import seeded
from training.options import parse_arguments, resolve

TEST_IMAGES = 1000
NOISE = 4.0  # standard deviations of a pattern: so that a few images stay too hard
SHIFT = 4  # pixels


def make_images(n: int, stream: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(n, 3, 32, 32) float32 and their labels, the same on every run."""
    cpu = torch.device("cpu")
    patterns = torch.randn(10, 3, 8, 8, generator=seeded(0, "patterns", 0, cpu)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    generator = seeded(0, stream, 0, cpu)
    labels = torch.randint(10, (n,), generator=generator)
    images = NOISE * torch.randn(n, 3, 32, 32, generator=generator)
    shifts = torch.randint(-SHIFT, SHIFT + 1, (n, 2), generator=generator).tolist()
    for image, label, shift in zip(images, labels.tolist(), shifts, strict=True):
        image += patterns[label].roll(shift, (1, 2))
    return images.to(device), labels.to(device)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=["fused", "torch"], required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--epochs", type=int, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--images", type=int, default=4000, metavar="N", help="to train with (default: 4000)")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    config = resolve(parse_arguments(["--loss", given.loss, "--epochs", str(given.epochs)]), "digits", device)
    images, labels = make_images(given.images, "train", device)
    test_images, test_labels = make_images(TEST_IMAGES, "test", device)
    steps_per_epoch = len(labels) // config.batch_size
    run = train_cifar10.start_run(config, device, config.epochs * steps_per_epoch)
    for epoch in range(config.epochs):
        order = torch.randperm(len(labels), generator=seeded(config.seed, "order", epoch, device), device=device)
        start = time.perf_counter()
        for batch in order[: steps_per_epoch * config.batch_size].split(config.batch_size):
            for group in run.optimizer.param_groups:
                group["lr"] = train_cifar10.learning_rate(config, run.step, steps_per_epoch)
            train_cifar10.train_step(run, config, run.model, images[batch], labels[batch])
        loss = run.losses[run.step - 1, 0].item()  # waits for the device
        step_ms = 1e3 * (time.perf_counter() - start) / steps_per_epoch
        run.model.eval()
        with torch.no_grad():
            right = torch.cat([run.model(part).argmax(1) for part in test_images.split(500)]) == test_labels
        run.model.train()
        print(f"epoch {epoch + 1}/{config.epochs}  train loss {loss:.4f}", end="  ")
        print(f"test accuracy {right.double().mean().item():7.2%}  {step_ms:.1f} ms/step", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
