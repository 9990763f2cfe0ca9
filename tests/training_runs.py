"""Runs of benchmarks/train_cifar10.py in this process, on few images."""

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

for _module in ("torchvision", "sklearn", "matplotlib", "tensorboard", "tqdm"):
    pytest.importorskip(_module, reason="the training script needs fusedloss[train]")

import train_cifar10 as train  # noqa: E402
from training import files, options, report  # noqa: E402

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "train_cifar10.py"
CPU = torch.device("cpu")
TINY = ["--data", "digits", "--device", "cpu", "--limit", "64", "--batch-size", "16", "--epochs", "2"]  # 4 steps an epoch
MODELS = {"resnet": ["--width", "4"], "tutorial": ["--model", "tutorial"]}


def main(*arguments: object) -> int:
    """The program, which leaves an empty file instead of the curves, whose drawing takes longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_curves", lambda run, config, out: (out / files.CURVES).touch())
        return train.main(list(map(str, arguments)))


def run(*arguments: object) -> int:
    """The program on few images, to train on and to test with."""
    load_data = train.load_data

    def load_few(*of: object) -> train.Data:
        data = load_data(*of)
        return dataclasses.replace(data, test_images=data.test_images[:64], test_labels=data.test_labels[:64])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_data", load_few)
        return main(*TINY, *arguments)


@contextlib.contextmanager
def after_step(step: int, what: Callable[[], object]) -> Iterator[None]:
    """Does that after the step's weights have been updated."""
    train_step = train.train_step

    def step_then(state, *arguments):
        train_step(state, *arguments)
        if state.step == step:
            what()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", step_then)
        yield


def signal_after(step: int, *numbers: int) -> contextlib.AbstractContextManager[None]:
    return after_step(step, lambda: [signal.raise_signal(number) for number in numbers])


def checkpoint(out: Path) -> dict:
    return torch.load(out / files.CHECKPOINT, weights_only=True)


def config(*arguments: str, data: str = "digits") -> options.Config:
    return options.resolve(options.parse_arguments(list(arguments)), data, CPU)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(captured: str) -> str:
    assert captured.count("\n") == 1, captured
    assert captured.startswith("train_cifar10.py: "), captured
    return captured


def assert_bitwise_equal(a, b, path: str = "checkpoint") -> None:
    """Equal in everything but the clock."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"step_seconds"}:
            assert_bitwise_equal(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_bitwise_equal(x, y, f"{path}[{index}]")
    else:
        assert a == b, path
