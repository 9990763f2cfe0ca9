"""The command line: what can be chosen, what is chosen where nothing is said, and what does not go together."""

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from training import processes
from training.console import EXIT_CODES
from training.failure import Failure


@dataclass(frozen=True)
class Config:
    """What determines a run, apart from the machine. Saved in its checkpoints."""

    model: str
    width: int  # channels of ResNet-9's first layer
    data: str
    limit: int | None
    loss: str
    reduction: str
    top_k: int | float | None
    label_smoothing: float
    scale: float
    epochs: int
    batch_size: int
    accumulate: int
    lr: float
    momentum: float
    weight_decay: float
    ema_decay: float
    seed: int
    amp: str
    compile: bool

    def autocast(self, device: torch.device) -> torch.autocast:
        dtype = torch.float16 if self.amp == "fp16" else torch.bfloat16
        return torch.autocast(device.type, dtype=dtype, enabled=self.amp != "off")


# Learning rate and weight decay are those of the mean. CPU runs are sized for two minutes or less on two cores.
_RESNET = {"momentum": 0.9, "weight_decay": 5e-4, "ema_decay": 0.0}
_TUTORIAL = {"width": 64, "batch_size": 128, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.004, "ema_decay": 0.9999}
DEFAULTS: dict[tuple[str, str, str], dict[str, Any]] = {
    ("resnet", "cifar10", "cuda"): {**_RESNET, "width": 64, "epochs": 24, "batch_size": 512, "lr": 0.4},
    ("resnet", "cifar10", "cpu"): {**_RESNET, "width": 16, "epochs": 2, "batch_size": 128, "lr": 0.2},
    ("resnet", "digits", "cuda"): {**_RESNET, "width": 16, "epochs": 15, "batch_size": 64, "lr": 0.1},
    ("resnet", "digits", "cpu"): {**_RESNET, "width": 16, "epochs": 15, "batch_size": 64, "lr": 0.1},
    ("tutorial", "cifar10", "cuda"): {**_TUTORIAL, "epochs": 256},
    ("tutorial", "cifar10", "cpu"): {**_TUTORIAL, "epochs": 2},
    ("tutorial", "digits", "cuda"): {**_TUTORIAL, "epochs": 20},
    ("tutorial", "digits", "cpu"): {**_TUTORIAL, "epochs": 20},
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's usage screen."""
        raise Failure(f"{message} (--help lists the options)")


def _number(kind: type, low: float, high: float, what: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if not low <= value <= high:  # also refuses nan
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    return parse


def _up_to(high: int) -> Callable[[str], Any]:
    return _number(int, 1, high, f"a whole number from 1 to {high}")


def _top_k(text: str) -> int | float:
    try:
        return _number(int, 1, 2**31, "")(text)
    except argparse.ArgumentTypeError:
        what = "a number of rows (1, 2, ...) or a fraction of them as a decimal number in (0, 1]"
        return _number(float, sys.float_info.min, 1.0, what)(text)


def _folder(text: str) -> Path:
    if not text:  # of a variable that is not set; Path("") is the current folder
        raise argparse.ArgumentTypeError("the name of the folder is empty")
    return Path(text)


DATA_DIR = Path("data")
_FLOAT32_MAX = torch.finfo(torch.float32).max  # a larger number is an error, or inf, in the optimizer and in the loss
_positive_int = _up_to(2**31)
_fraction = _number(float, 0.0, 1.0, "a number in [0, 1]")
_nonnegative = _number(float, 0.0, _FLOAT32_MAX, "a number from 0 up that float32 holds")
_finite = _number(float, -_FLOAT32_MAX, _FLOAT32_MAX, "a finite number that float32 holds")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Options as given: None where the user said nothing, so that `--resume` can tell a choice from a default."""
    parser = _Parser(
        prog="train_cifar10.py",
        description="Trains a CIFAR-10 classifier with the fused cross-entropy or with torch's.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("the loss").add_argument
    add("--loss", choices=["fused", "torch"], help="fusedloss.cross_entropy or torch's (default: fused)")
    add("--reduction", choices=["mean", "sum", "max", "topk"], help="over the batch; max: its worst example (default: mean)")
    add("--top-k", type=_top_k, metavar="K", help="for topk: average the K largest losses, a number or a fraction of the rows")
    add("--label-smoothing", type=_fraction, metavar="EPS", help="share of the target spread over all classes (default: 0)")
    add("--scale", type=_finite, metavar="C", help="factor of the loss and its gradient, inside the kernel (default: 1)")

    add = parser.add_argument_group("the network").add_argument
    add("--model", choices=["resnet", "tutorial"], help="ResNet-9, or TensorFlow's tutorial network (default: resnet)")
    add("--width", type=_up_to(1024), metavar="N", help="first channels of resnet (default: 64; 16 on a CPU and for digits)")

    add = parser.add_argument_group("training").add_argument
    epochs_help = (
        "(default: by model, data and device; 15 for resnet on digits); with --resume: more than before, and the rate goes on "
        "as in the longer run"
    )
    add("--epochs", type=_up_to(10**6), metavar="N", help=epochs_help)
    add("--batch-size", type=_positive_int, metavar="B", help="images per optimizer step (default: by model, data and device)")
    parts_help = (
        "cut the batch into N parts, one after the other (default: 1): the same gradient, but batch normalisation, which resnet "
        "has, takes its statistics from a part; parts of a few images train worse"
    )
    add("--accumulate", type=_positive_int, metavar="N", help=parts_help)
    rate_help = "peak learning rate (default: by model, data and device; divided by B for --reduction sum)"
    add("--lr", type=_nonnegative, help=rate_help)
    add("--momentum", type=_fraction, help="of SGD, Nesterov's for resnet (default: 0.9 resnet, 0 tutorial)")
    decay_help = "SGD's for resnet (default: 5e-4), the loss term's for tutorial (0.004); times B for --reduction sum"
    add("--weight-decay", type=_nonnegative, metavar="L2", help=decay_help)
    add("--ema-decay", type=_fraction, metavar="D", help="test averaged weights; 0: no (default: 0 resnet, 0.9999 tutorial)")
    add("--seed", type=_number(int, 0, 2**32 - 1, "a whole number in [0, 2**32)"), help="(default: 0)")

    add = parser.add_argument_group("the machine").add_argument
    add("--device", default="auto", metavar="auto|cpu|cuda[:N]", help="auto takes a GPU if there is one (default: auto)")
    amp_help = "autocast, bf16 unless fp16 is named; fp16 scales the loss and needs a GPU (default: off)"
    add("--amp", nargs="?", const="bf16", choices=["off", "bf16", "fp16"], help=amp_help)
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the network (default: no)")

    add = parser.add_argument_group("files").add_argument
    data_help = "auto: CIFAR-10 from disk or network, else scikit-learn's digits (default: auto)"
    add("--data", choices=["auto", "cifar10", "digits"], help=data_help)
    add("--data-dir", type=_folder, default=DATA_DIR, help="folder of cifar-10-batches-py or its tar.gz (default: data)")
    add("--limit", type=_positive_int, metavar="N", help="train on the first N images only (default: all)")
    add("--out", type=_folder, help="folder for checkpoint, curves, TensorBoard (default: the next free runs/001, 002, ...)")
    add("--resume", action="store_true", help="go on with the run in --out; its options come from its checkpoint")
    add("--overwrite", action="store_true", help="start afresh in --out though it holds a checkpoint")

    args = parser.parse_args(argv)
    if args.resume and args.out is None:
        raise Failure("--resume needs --out, the folder of the run to go on with")
    if args.resume and args.overwrite:
        raise Failure("--resume and --overwrite exclude each other")
    return args


def resolve(args: argparse.Namespace, data: str, device: torch.device) -> Config:
    """Fills in what the user left open and checks what must fit together."""
    model = args.model or "resnet"
    values: dict[str, Any] = {
        "loss": "fused",
        "reduction": "mean",
        "top_k": None,
        "label_smoothing": 0.0,
        "scale": 1.0,
        "limit": None,
        "accumulate": 1,
        "seed": 0,
        "amp": "off",
        "compile": False,
        **DEFAULTS[model, data, device.type],
    }
    given = {f.name for f in dataclasses.fields(Config) if getattr(args, f.name) is not None}
    values.update({name: getattr(args, name) for name in given}, model=model, data=data)
    if values["reduction"] == "sum":
        # L_sum = B * L_mean: the same steps need the rate l/B, and the regulariser, whose gradient knows no B, times B.
        if "lr" not in given:
            values["lr"] /= values["batch_size"]
        if "weight_decay" not in given:
            values["weight_decay"] *= values["batch_size"]
    config = Config(**values)
    check_combinations(config, device)
    return config


def check_combinations(config: Config, device: torch.device) -> None:
    if (config.top_k is None) == (config.reduction == "topk"):
        raise Failure("--top-k is for --reduction topk, and needed there")
    if processes.n_ranks() > 1 and config.reduction not in ("mean", "sum"):
        raise Failure(f"--reduction {config.reduction} needs a single process: no part of a batch knows its worst rows")
    if config.batch_size < processes.n_ranks() * config.accumulate:
        each = f"each part on each of {processes.n_ranks()} processes"
        raise Failure(f"--batch-size {config.batch_size} is less than a row for {each}")
    if config.accumulate > 1 and config.reduction not in ("mean", "sum"):
        raise Failure(f"--accumulate does not go with --reduction {config.reduction}: no part of a batch knows its worst rows")
    if config.model == "tutorial" and config.width != _TUTORIAL["width"]:
        raise Failure("--width is for --model resnet: the tutorial's network has fixed layers")
    if config.batch_size % config.accumulate:
        raise Failure(f"--batch-size {config.batch_size} cannot be cut into --accumulate {config.accumulate} equal parts")
    if config.amp == "fp16" and device.type != "cuda":
        raise Failure(f"--amp fp16 needs a GPU, not {device}; bf16 works here")


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun's: a GPU for each process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Failure(f"--device {name}: choose auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise Failure(f"--device {name}: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Failure(f"--device {name}: there is no such GPU; PyTorch sees {torch.cuda.device_count()}")
    return device


def resumed_config(args: argparse.Namespace, saved: Any, path: Path) -> Config:
    """The options in the checkpoint at `path`. Those given again must agree with it, but for more epochs."""
    config = _config_from(saved)
    if config is None:
        raise Failure(f"{path} has options that this version of train_cifar10.py does not know")
    for name, value in vars(config).items():
        given = getattr(args, name)
        more = name == "epochs" and given is not None and given > value
        if given is not None and given != value and not more and (name, given) != ("data", "auto"):
            hint = "; only more epochs are possible" if name == "epochs" else ""
            raise Failure(f"{path} is of a run with --{name.replace('_', '-')} {value}, not {given}{hint}")
    return dataclasses.replace(config, epochs=max(config.epochs, args.epochs or 0))


def _config_from(saved: Any) -> Config | None:
    """None if the command line would not accept the same values."""
    names = {field.name for field in dataclasses.fields(Config)}
    if not isinstance(saved, dict) or saved.keys() != names or saved["data"] == "auto":
        return None
    flag = "--compile" if saved["compile"] else "--no-compile"
    given = {name: value for name, value in saved.items() if value is not None and name != "compile"}
    try:
        args = parse_arguments([flag, *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())])
    except Failure:
        return None
    config = Config(**{name: getattr(args, name) for name in names})
    missing = {name for name, value in vars(config).items() if value is None} - {"limit", "top_k"}
    return config if dataclasses.asdict(config) == saved and not missing else None


def command_to_resume(args: argparse.Namespace, out: Path) -> str:
    """The command line, quoted for a shell, that goes on with this run on this machine in the same way."""
    python = [sys.executable]
    if processes.n_ranks() > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}"]
    options = ["--resume", "--out", str(out)]
    if args.data_dir != DATA_DIR:
        options += ["--data-dir", str(args.data_dir)]
    if args.device != "auto":
        options += ["--device", args.device]
    return shlex.join([*python, sys.argv[0], *options])
