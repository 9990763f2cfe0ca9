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

How it is built:
  - The images live on the device as uint8; a batch is cropped, flipped and normalised there. torchvision's random transforms
    draw once per call, which would be once per batch, so the draws are made here, one per image.
  - All randomness is a function of (seed, epoch) or (seed, step): a checkpoint holds no generator, and a resumed run sees the
    same batches. On the CPU it repeats an uninterrupted run bit for bit; on a GPU cuDNN is held to deterministic algorithms.
  - Nothing in a step waits for the device: losses are written to a buffer there, which is read once per epoch.
  - Under torchrun a batch is the same batch, cut into one shard per process. All make the same draws; the first one prints, tests
    and saves. Any number of processes resumes any run. What differs from one process is batch normalisation, whose statistics
    are those of a shard (Goyal et al. 2017, arXiv:1706.02677, section 3: keep it so), and the order in which numbers are added.
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import http.client
import itertools
import math
import os
import re
import shutil
import signal
import statistics
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# OpenMP's threads wait for each other hundreds of times a step. Spinning while they wait steals the core from the thread that is
# waited for as soon as anything else runs: a step of the digits run took 1176 ms so, and 113 ms asleep, on 2 busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fusedloss
from fusedloss.distributed import global_scale

CHECKPOINT = "checkpoint.pt"
CURVES = "curves.png"
TENSORBOARD = "tensorboard"
FORMAT = "fusedloss.train_cifar10.1"  # of the checkpoint; a change that old checkpoints cannot follow raises the number

CONNECT_SECONDS = 5  # for the first byte of the download, and between any two
DOWNLOAD_SECONDS = 120  # for all 170 MB
COLLECTIVE_MINUTES = 10  # how long the processes wait for one that hangs; for one that died they do not wait
TUTORIAL_CROP = 24
TRAIN_IMAGES_FROM_DIGITS = 1437  # four fifths of 1797


class Failure(Exception):
    """Ends the program with one line on stderr and this exit code."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


# ------------------------------------------------------------------------------------------------------------ options


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


def _top_k(text: str) -> int | float:
    try:
        return _number(int, 1, math.inf, "")(text)
    except argparse.ArgumentTypeError:
        what = "a number of rows (1, 2, ...) or a fraction of them as a decimal number in (0, 1]"
        return _number(float, sys.float_info.min, 1.0, what)(text)


_positive_int = _number(int, 1, 2**31, "a whole number from 1 up")
_fraction = _number(float, 0.0, 1.0, "a number in [0, 1]")
_nonnegative = _number(float, 0.0, sys.float_info.max, "a number from 0 up")
_finite = _number(float, -sys.float_info.max, sys.float_info.max, "a finite number")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Options as given: None where the user said nothing, so that `--resume` can tell a choice from a default."""
    parser = _Parser(
        prog="train_cifar10.py",
        description="Trains a CIFAR-10 classifier with the fused cross-entropy or with torch's.",
        epilog="Exit codes: 0 done, 2 a wrong option, file or folder, 1 the loss is not finite, 130 stopped by Ctrl-C.",
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
    add("--width", type=_positive_int, metavar="N", help="first channels of resnet (default: 64; 16 on a CPU and for digits)")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=_positive_int, metavar="N", help="(default: by model, data and device; 15 for resnet on digits)")
    add("--batch-size", type=_positive_int, metavar="B", help="images per optimizer step (default: by model, data and device)")
    add("--accumulate", type=_positive_int, metavar="N", help="cut the batch into N parts, one after the other (default: 1)")
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
    add("--data-dir", type=Path, default=Path("data"), help="folder of cifar-10-batches-py or its tar.gz (default: data)")
    add("--limit", type=_positive_int, metavar="N", help="train on the first N images only (default: all)")
    add("--out", type=Path, help="folder for checkpoint, curves, TensorBoard (default: the next free runs/001, 002, ...)")
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
    _check_combinations(config, device)
    return config


def _check_combinations(config: Config, device: torch.device) -> None:
    if (config.top_k is None) == (config.reduction == "topk"):
        raise Failure("--top-k is for --reduction topk, and needed there")
    if n_ranks() > 1 and config.reduction not in ("mean", "sum"):
        raise Failure(f"--reduction {config.reduction} needs a single process: no part of a batch knows its worst rows")
    if config.batch_size < n_ranks() * config.accumulate:
        raise Failure(f"--batch-size {config.batch_size} is less than a row for each part on each of {n_ranks()} processes")
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


# ---------------------------------------------------------------------------------------------------------- processes


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


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun started. A failure leaves without saying goodbye: the others notice at once."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(minutes=COLLECTIVE_MINUTES)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        yield
        dist.barrier()  # all leave together: to one that is still busy, a peer that has gone looks like one that died
    except RuntimeError as error:
        if not re.search("gloo|nccl|connection|socket", str(error), re.IGNORECASE):
            raise
        reason = " ".join(str(error).split())
        raise Failure(
            f"lost the other processes: one of them died or left ({reason[:200]}); the last checkpoint is whole, and "
            "--resume --out FOLDER goes on from it with any number of processes",
            1,
        ) from None


# --------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Data:
    name: str
    train_images: Tensor  # (N, 3, 32, 32) uint8
    train_labels: Tensor  # (N,) int64
    test_images: Tensor
    test_labels: Tensor
    mean: Tensor  # (3,) float32, of the training images scaled to [0, 1]; on the device, as a list would be copied at each use
    std: Tensor

    def to(self, device: torch.device) -> "Data":
        tensors: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **tensors)


def choose_data(wanted: str, data_dir: Path) -> str:
    """Makes sure that CIFAR-10 is on disk where it is wanted. Returns "cifar10" or "digits"."""
    if wanted == "digits":
        return "digits"
    problem = _fetch_cifar10(data_dir)
    if problem is None:
        return "cifar10"
    if wanted == "cifar10":
        raise Failure(problem)
    print(f"{problem}: training on scikit-learn's digits instead")
    return "digits"


def _fetch_cifar10(data_dir: Path) -> str | None:
    """Unpacks or downloads CIFAR-10 unless it is there. Returns why it cannot be had; raises Failure if it is damaged."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_md5, extract_archive

    if (data_dir / CIFAR10.base_folder).exists():
        return None
    archive = data_dir / CIFAR10.filename
    try:
        if not archive.exists():
            problem = _download(CIFAR10.url, archive, CIFAR10.tgz_md5)
            if problem is not None:
                return f"CIFAR-10 is not in {data_dir}/ and cannot be downloaded ({problem})"
        elif not check_md5(str(archive), CIFAR10.tgz_md5):
            raise Failure(f"{archive} is truncated or damaged (wrong MD5 checksum): delete it to download it again")
        unpacked = data_dir / f"{CIFAR10.base_folder}.tmp{os.getpid()}"
        try:
            extract_archive(str(archive), str(unpacked))
            os.replace(unpacked / CIFAR10.base_folder, data_dir / CIFAR10.base_folder)
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)
    except OSError as error:
        raise Failure(f"cannot read or unpack {archive}: {_reason(error)}") from None
    return None


def _download(url: str, path: Path, md5: str) -> str | None:
    """Downloads to `path`, which appears only when complete. Returns what went wrong.

    torchvision's own download has no time limit. The first byte is awaited in a thread because a name server that does not
    answer blocks for longer than any socket timeout.
    """
    first: dict[str, Any] = {}

    def connect() -> None:
        try:
            first["response"] = urllib.request.urlopen(url, timeout=CONNECT_SECONDS)
        except (OSError, ValueError, http.client.HTTPException) as error:
            first["problem"] = _reason(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    if "response" not in first:
        return first.get("problem", f"no answer within {CONNECT_SECONDS} s")

    part = path.with_name(f"{path.name}.tmp{os.getpid()}")
    digest, deadline = hashlib.md5(usedforsecurity=False), time.monotonic() + DOWNLOAD_SECONDS
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            first["response"] as response,
            open(part, "wb") as file,
            progress_bar(total=response.length, desc="CIFAR-10", unit="B", unit_scale=True) as bar,
        ):
            while chunk := response.read(1 << 16):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
                if time.monotonic() > deadline:
                    return f"it takes longer than {DOWNLOAD_SECONDS} s"
        if digest.hexdigest() != md5:
            return "what arrived is not the archive: wrong MD5 checksum"
        os.replace(part, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return _reason(error)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return None


def _reason(error: Exception) -> str:
    """The part of an exception that tells something, on one line."""
    reason = getattr(error, "reason", error)
    return " ".join(str(getattr(reason, "strerror", None) or reason or type(error).__name__).split())


def load_data(name: str, data_dir: Path, limit: int | None) -> Data:
    train_images, train_labels, test_images, test_labels = _read_cifar10(data_dir) if name == "cifar10" else _read_digits()
    train_images, train_labels = train_images[:limit], train_labels[:limit]
    return Data(name, train_images, train_labels, test_images, test_labels, *channel_moments(train_images))


def channel_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, scaled to [0, 1]; from histograms, as floats would be four times the images."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([images[:, channel].flatten().bincount(minlength=256) for channel in range(3)]).double()
    shares = counts / counts.sum(dim=1, keepdim=True)
    mean = shares @ levels
    return mean.float(), (shares @ levels.square() - mean.square()).sqrt().float()


def _read_cifar10(data_dir: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    folder = data_dir / CIFAR10.base_folder
    for file, md5 in [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]:
        try:
            if not check_integrity(str(folder / file), md5):
                problem = "truncated or damaged (wrong MD5 checksum)" if (folder / file).exists() else "missing"
                raise Failure(f"{folder / file} is {problem}: delete {folder} to unpack or download it again")
        except OSError as error:
            raise Failure(f"cannot read {folder / file}: {_reason(error)}") from None
    parts: list[Tensor] = []
    for train in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy 2.4 dislikes how these files, pickled in 2009, spell a bool
            dataset = CIFAR10(str(data_dir), train=train)
        parts += [torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)]
    return parts[0], parts[1], parts[2], parts[3]


def _read_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1797 scanned digits, 8 x 8 with 17 grey levels, in the shape of CIFAR-10's images."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torchvision.transforms.v2 import functional as transforms

    digits = load_digits()
    images = (torch.from_numpy(digits.images) * (255 / 16)).round().to(torch.uint8)
    images = transforms.resize(images[:, None].expand(-1, 3, -1, -1), [32, 32], antialias=True)
    labels = torch.from_numpy(digits.target).long()
    # The split never follows --seed: seeds are compared on the same test images.
    train, test = train_test_split(
        range(len(labels)), train_size=TRAIN_IMAGES_FROM_DIGITS, stratify=digits.target, random_state=0
    )
    return images[train], labels[train], images[test], labels[test]


def seeded(seed: int, stream: str, counter: int, device: torch.device) -> torch.Generator:
    """A generator for one purpose at one point of the run. Hashed, because a CPU generator uses 32 bits of its seed."""
    digest = hashlib.blake2b(f"{seed} {stream} {counter}".encode(), digest_size=4).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def augment(images: Tensor, data: Data, model: str, generator: torch.Generator) -> Tensor:
    """Training images: (B, 3, 32, 32) uint8 -> float32, (B, 3, 32, 32) for resnet, (B, 3, 24, 24) for the tutorial."""
    from torchvision.transforms.v2 import functional as transforms

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high, generator=generator)

    flips = data.name == "cifar10"  # a mirrored digit is another digit, or none
    if model == "resnet":
        images = transforms.to_dtype(images, torch.float32, scale=True)
        images = transforms.normalize(images, data.mean, data.std)
        images = random_crop(transforms.pad(images, [4], padding_mode="reflect"), 32, generator)
        if flips:
            images = torch.where(uniform(-1, 1) < 0, transforms.horizontal_flip(images), images)
            images = cutout(images, 8, generator)
        return images
    images = random_crop(images, TUTORIAL_CROP, generator).float()
    if flips:
        images = torch.where(uniform(-1, 1) < 0, transforms.horizontal_flip(images), images)
    images = images + uniform(-63, 63)
    average = images.mean(dim=(2, 3), keepdim=True)
    images = (images - average) * uniform(0.2, 1.8) + average
    return standardise(images)


def for_test(images: Tensor, data: Data, model: str) -> Tensor:
    """Test images: as `augment`, without chance."""
    from torchvision.transforms.v2 import functional as transforms

    if model == "resnet":
        return transforms.normalize(transforms.to_dtype(images, torch.float32, scale=True), data.mean, data.std)
    return standardise(transforms.center_crop(images, [TUTORIAL_CROP]).float())


def random_crop(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    n, channels, height, width = images.shape
    device = images.device
    top = torch.randint(height - size + 1, (n, 1), device=device, generator=generator)
    left = torch.randint(width - size + 1, (n, 1), device=device, generator=generator)
    span = torch.arange(size, device=device)
    image, channel = torch.arange(n, device=device), torch.arange(channels, device=device)
    rows, cols = (top + span)[:, None, :, None], (left + span)[:, None, None, :]
    return images[image[:, None, None, None], channel[:, None, None], rows, cols]


def cutout(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Blanks a square in each image (DeVries and Taylor 2017, arXiv:1708.04552)."""
    n, _, height, width = images.shape
    top = torch.randint(height - size + 1, (n, 1, 1, 1), device=images.device, generator=generator)
    left = torch.randint(width - size + 1, (n, 1, 1, 1), device=images.device, generator=generator)
    rows, cols = torch.arange(height, device=images.device)[:, None], torch.arange(width, device=images.device)
    inside = (rows >= top) & (rows < top + size) & (cols >= left) & (cols < left + size)
    return images.masked_fill(inside, 0)


def standardise(images: Tensor) -> Tensor:
    """tf.image.per_image_standardization: the floor keeps a uniform image finite."""
    std, mean = torch.std_mean(images, dim=(1, 2, 3), correction=0, keepdim=True)
    return (images - mean) / std.clamp(min=images[0].numel() ** -0.5)


# ------------------------------------------------------------------------------------------------------------ network


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class Multiply(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


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


class TutorialNet(nn.Module):
    """inference() of TensorFlow's cifar10.py: layers, initial values and the loss terms of its two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        # TensorFlow's lrn(4, bias=1, alpha=0.001/9, beta=0.75) looks 4 channels each way; torch divides alpha by the size.
        lrn = nn.LocalResponseNorm(9, alpha=0.001, beta=0.75, k=1.0)
        # TensorFlow's "SAME" pooling of an even size pads on the right and at the bottom alone, with -inf.
        pool = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2))  # after a ReLU 0 does for -inf
        conv1, conv2 = nn.Conv2d(3, 64, 5, padding=2), nn.Conv2d(64, 64, 5, padding=2)
        self.dense1, self.dense2 = nn.Linear(64 * 6 * 6, 384), nn.Linear(384, 192)
        output = nn.Linear(192, 10)
        self.features = nn.Sequential(conv1, nn.ReLU(), pool, lrn, conv2, nn.ReLU(), lrn, pool, nn.Flatten())
        self.classifier = nn.Sequential(self.dense1, nn.ReLU(), self.dense2, nn.ReLU(), output)
        initial: list[Any] = [(conv1, 0.05, 0.0), (conv2, 0.05, 0.1), (self.dense1, 0.04, 0.1), (self.dense2, 0.04, 0.1)]
        for layer, std, bias in [*initial, (output, 1 / 192, 0.0)]:
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.constant_(layer.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))

    def weight_loss(self, weight_decay: float) -> Tensor:
        """weight_decay * 0.5 * ||w||^2 over the two dense layers."""
        return 0.5 * weight_decay * (self.dense1.weight.square().sum() + self.dense2.weight.square().sum())


def build_model(config: Config) -> nn.Module:
    torch.manual_seed(config.seed)
    if config.model == "tutorial":
        return TutorialNet()
    return resnet9(config.width).to(memory_format=torch.channels_last)  # a quarter faster on CPUs, what tensor cores read


# --------------------------------------------------------------------------------------------------------------- loss

Loss = Callable[[Tensor, Tensor, float | Tensor], Tensor]  # of logits, labels, scale


def in_parts(config: Config) -> bool:
    return config.accumulate > 1 or n_ranks() > 1


def loss_options(config: Config) -> dict[str, Any]:
    # The mean of the parts' means is the mean only for parts of equal counts; the sum over the batch's count always is.
    reduction = "sum" if in_parts(config) and config.reduction == "mean" else config.reduction
    return {"reduction": reduction, "label_smoothing": config.label_smoothing, "top_k": config.top_k}


def make_loss(config: Config) -> Loss:
    """The loss of one part of a batch; with `part_scale` the parts' losses add up to the batch's."""
    options = loss_options(config)
    if config.loss == "fused":
        return lambda logits, target, scale: fusedloss.cross_entropy(logits, target, scale=scale, **options)
    return lambda logits, target, scale: torch_loss(logits, target, scale=scale, **options)


def part_scale(config: Config, labels: Tensor) -> float | Tensor:
    """Factor of each part's loss; `labels` are all those of this process."""
    if in_parts(config) and config.reduction == "mean":
        return config.scale * global_scale(labels)
    return config.scale * n_ranks()  # DistributedDataParallel averages what is to be added up


def torch_loss(
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


# ----------------------------------------------------------------------------------------------------------- training


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
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)  # one entry per epoch


def loss_names(config: Config) -> list[str]:
    """Columns of Run.losses: the cross-entropy first, what is minimised last; each again as a moving average."""
    return ["cross_entropy", "weight_loss", "total_loss"] if config.model == "tutorial" else ["loss"]


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
        losses=torch.zeros(total_steps, 2 * len(loss_names(config)), device=device),
        correct=torch.zeros((), dtype=torch.int64, device=device),
    )


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    if config.model == "tutorial":
        return config.lr * 0.1 ** (step // (350 * steps_per_epoch))
    done = (step + 1) / (config.epochs * steps_per_epoch + 1)  # never 0: no step is wasted
    return config.lr * min(done / 0.2, (1 - done) / 0.8)


def autocast(config: Config, device: torch.device) -> torch.autocast:
    dtype = torch.float16 if config.amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=config.amp != "off")


def train_step(run: Run, config: Config, network: Callable[[Tensor], Tensor], loss: Loss, images: Tensor, labels: Tensor) -> None:
    """One optimizer step. Nothing in it makes the host wait for the device.

    `network` is the model, perhaps compiled, perhaps one of several processes'; images and labels are this process's.
    """
    values = torch.zeros(run.losses.shape[1] // 2, device=labels.device)
    correct = torch.zeros_like(run.correct)
    scale = part_scale(config, labels)
    parts = list(zip(images.tensor_split(config.accumulate), labels.tensor_split(config.accumulate), strict=True))
    for part_images, part_labels in parts:
        with gradients_stay_here(network, but_for_the_last=part_labels is parts[-1][1]):
            with autocast(config, labels.device):
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
    add_up(values, correct)
    values /= n_ranks()  # `scale` anticipates that gradients are averaged; so are the losses
    run.correct += correct
    if run.averaged is not None:
        # TensorFlow's ExponentialMovingAverage with num_updates: a young average forgets its random start sooner.
        decay = min(config.ema_decay, (1 + run.step) / (10 + run.step))
        update_average(run.averaged, run.model, decay)
    average = values if run.step == 0 else run.losses[run.step - 1, len(values) :].lerp(values, 0.1)
    run.losses[run.step] = torch.cat([values, average])
    run.step += 1


def gradients_stay_here(network: Any, but_for_the_last: bool) -> contextlib.AbstractContextManager[None]:
    """Gradients of all parts travel between the processes once, with the last part's."""
    return network.no_sync() if n_ranks() > 1 and not but_for_the_last else contextlib.nullcontext()


@torch.no_grad()
def update_average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    for mean, value in zip(averaged.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)
    for mine, its in zip(averaged.buffers(), model.buffers(), strict=True):
        mine.copy_(its)


@torch.no_grad()
def evaluate(model: nn.Module, config: Config, data: Data) -> tuple[float, float]:
    """Returns the mean cross-entropy and the accuracy on the test images."""
    loss = make_loss(dataclasses.replace(config, reduction="sum", top_k=None, label_smoothing=0.0, scale=1.0))
    total = torch.zeros((), dtype=torch.float64, device=data.test_labels.device)
    correct = torch.zeros((), dtype=torch.int64, device=data.test_labels.device)
    model.eval()
    for images, labels in zip(data.test_images.split(500), data.test_labels.split(500), strict=True):
        with autocast(config, labels.device):
            logits = model(for_test(images, data, config.model))
            total += loss(logits, labels, 1.0)
        correct += (logits.argmax(dim=1) == labels).sum()
    model.train()
    n = len(data.test_labels)
    return total.item() / n, correct.item() / n


def make_network(model: nn.Module, config: Config, device: torch.device) -> nn.Module:
    if n_ranks() > 1:
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    return torch.compile(model) if config.compile else model  # type: ignore[return-value]


def train(run: Run, config: Config, data: Data, out: Path) -> None:
    """Runs the epochs that are left, saving after each. Raises Failure when interrupted, after saving."""
    device = data.train_labels.device
    n_train = len(data.train_labels)
    steps_per_epoch = n_train // config.batch_size
    network = make_network(run.model, config, device)
    loss = make_loss(config)
    save(run, config, out)  # before the first step, so that a folder that cannot be written costs no training
    bar = progress_bar(total=len(run.losses), initial=run.step, desc="training", unit="step")
    with tensorboard(run, out) as writer, bar, stop_on_signal() as stopped:
        for epoch in range(run.step // steps_per_epoch, config.epochs):
            order = torch.randperm(n_train, device=device, generator=seeded(config.seed, "order", epoch, device))
            start, first = time.perf_counter(), run.step
            while run.step < (epoch + 1) * steps_per_epoch:
                if stopped and is_first():  # the others, perhaps a step ahead, end when nobody answers them
                    save(run, config, out)
                    raise Failure(_how_to_go_on(run, out), 128 + stopped[0])
                for group in run.optimizer.param_groups:
                    group["lr"] = learning_rate(config, run.step, steps_per_epoch)
                batch = order[run.step % steps_per_epoch * config.batch_size :][: config.batch_size]
                generator = seeded(config.seed, "augment", run.step, device)
                # All of the batch in each process: what is drawn for an image must not depend on the number of processes.
                images = augment(data.train_images[batch], data, config.model, generator)
                train_step(run, config, network, loss, shard(images), data.train_labels[shard(batch)])
                bar.update()
            losses = run.losses[epoch * steps_per_epoch : run.step].tolist()  # waits for the device, once an epoch
            seconds = time.perf_counter() - start
            means = epoch_means(run, config, losses)
            if is_first():
                end_epoch(run, config, data, means, seconds / (run.step - first))
                log_epoch(writer, run, config, losses)
                bar.set_postfix(test_accuracy=f"{run.history[-1]['test_accuracy']:.1%}")
                bar.write(epoch_line(run, config))
                sys.stdout.flush()
            run.correct.zero_()
            save(run, config, out)


def epoch_means(run: Run, config: Config, losses: list[list[float]]) -> list[float]:
    means = [statistics.fmean(column) for column in zip(*losses, strict=True)][: len(loss_names(config))]
    if not math.isfinite(means[-1]):
        epoch = run.step // len(losses)
        raise Failure(f"the loss is {means[-1]} in epoch {epoch}: try a lower --lr than {config.lr:g}", 1)
    return means


def end_epoch(run: Run, config: Config, data: Data, means: list[float], step_seconds: float) -> None:
    test_loss, test_accuracy = evaluate(run.averaged or run.model, config, data)
    steps = len(run.losses) // config.epochs
    run.history.append(
        {
            "epoch": len(run.history) + 1,
            "step": run.step,
            "learning_rate": run.optimizer.param_groups[0]["lr"],
            "train_loss": means[0],
            "train_total_loss": means[-1],
            "train_accuracy": run.correct.item() / (steps * config.batch_size),
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "step_seconds": step_seconds,
        }
    )


@contextlib.contextmanager
def tensorboard(run: Run, out: Path) -> Iterator[Any]:
    if not is_first():
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(out / TENSORBOARD), purge_step=run.step) as writer:
        yield writer


def log_epoch(writer: Any, run: Run, config: Config, losses: list[list[float]]) -> None:
    entry = run.history[-1]
    names = [f"{name}{kind}" for kind in ("", "_average") for name in loss_names(config)]
    for step, values in enumerate(losses, run.step - len(losses)):
        for name, value in zip(names, values, strict=True):
            writer.add_scalar(f"step/{name}", value, step)
    for name in entry.keys() - {"epoch", "step"}:
        writer.add_scalar(f"epoch/{name}", entry[name], run.step - 1)  # purge_step would hide the step resumed at


def epoch_line(run: Run, config: Config) -> str:
    entry = run.history[-1]
    return (
        f"epoch {entry['epoch']:3d}/{config.epochs}  train loss {entry['train_loss']:.4f} accuracy {entry['train_accuracy']:7.2%}"
        f"  test loss {entry['test_loss']:.4f} accuracy {entry['test_accuracy']:7.2%}  {entry['step_seconds'] * 1e3:.1f} ms/step"
    )


@contextlib.contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Ctrl-C (and a scheduler's SIGTERM) fill the list, for the loop to see between two steps; a second one kills at once."""
    received: list[int] = []

    def handle(number: int, _frame: Any) -> None:
        received.append(number)
        for name, handler in previous.items():
            signal.signal(name, handler)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    except RuntimeError:
        if received and not is_first():  # stopped, too: the first process has left after its last step, and told why
            raise Failure("", 128 + received[0]) from None
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _how_to_go_on(run: Run, out: Path) -> str:
    return f"stopped at step {run.step} of {len(run.losses)} and saved; go on with: python {sys.argv[0]} --resume --out {out}"


def progress_bar(**options: Any) -> Any:
    from tqdm import tqdm

    disable = None if is_first() else True  # None: silent where stderr is no terminal
    return tqdm(disable=disable, leave=False, dynamic_ncols=True, **options)


# -------------------------------------------------------------------------------------------------------- checkpoints


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
        "losses": run.losses,
        "correct": run.correct,
        "step": run.step,
        "history": run.history,
    }
    write_atomically(out / CHECKPOINT, lambda file: torch.save(checkpoint, file))


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """A reader, or a crash, finds the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power failure may keep the rename and lose the contents
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise Failure(f"cannot write {path}: {_reason(error)}") from None


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise Failure(f"{path} does not exist: there is nothing to resume") from None
    except OSError as error:
        raise Failure(f"cannot read {path}: {_reason(error)}") from None
    except Exception:  # zip, pickle and torch each have their own for a file that is not theirs
        raise Failure(f"{path} is damaged, or no checkpoint of train_cifar10.py") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise Failure(f"{path} is no checkpoint of this version of train_cifar10.py")
    return checkpoint


def resumed_config(args: argparse.Namespace, checkpoint: dict[str, Any], path: Path, device: torch.device) -> Config:
    """The checkpoint's options; those given again must agree with it."""
    try:
        config = Config(**checkpoint["config"])
    except (KeyError, TypeError):
        raise Failure(f"{path} is no checkpoint of this version of train_cifar10.py") from None
    for name, saved in vars(config).items():
        given = getattr(args, name)
        if given is not None and given != saved and (name, given) != ("data", "auto"):
            raise Failure(f"{path} is of a run with --{name.replace('_', '-')} {saved}, not {given}")
    _check_combinations(config, device)
    return config


def restore(run: Run, checkpoint: dict[str, Any], path: Path) -> None:
    try:
        run.model.load_state_dict(checkpoint["model"])
        if run.averaged is not None:
            run.averaged.load_state_dict(checkpoint["averaged"])
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        run.scaler.load_state_dict(checkpoint["scaler"])
        run.losses.copy_(checkpoint["losses"])
        run.correct.copy_(checkpoint["correct"])
        run.step, run.history = checkpoint["step"], checkpoint["history"]
    except (KeyError, RuntimeError, TypeError, ValueError):
        raise Failure(f"{path} does not fit this network or this amount of data") from None


# ------------------------------------------------------------------------------------------------------------- report


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


def loss_seconds(run: Run, config: Config, data: Data) -> dict[str, float]:
    """Median time of a step's losses, forward and backward down to the logits, on logits of this run: ours, and torch's.

    They take turns, so that what else the machine does falls on both alike.
    """
    device = data.train_labels.device
    rows = config.batch_size // config.accumulate // n_ranks()
    labels = data.train_labels[:rows]
    run.model.eval()
    with torch.no_grad(), autocast(config, device):
        logits = run.model(for_test(data.train_images[:rows], data, config.model))
    run.model.train()
    logits.requires_grad_()
    losses = {name: make_loss(dataclasses.replace(config, loss=name)) for name in ("fused", "torch")}

    def once(loss: Loss) -> None:
        with autocast(config, device):
            value = loss(logits, labels, config.scale)
        torch.autograd.grad(value, logits)

    clock = _marks_of_gpu if device.type == "cuda" else _marks_of_cpu
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


def loss_path(config: Config, data: Data) -> str:
    """Which code computes the loss."""
    if config.loss == "torch":
        return "torch.nn.functional.cross_entropy"
    rows = config.batch_size // config.accumulate // n_ranks()
    logits = torch.zeros(rows, 10, device=data.train_labels.device, requires_grad=True)
    plan = fusedloss.plan(logits, data.train_labels[:rows], **loss_options(config))
    return f"fusedloss.cross_entropy, {plan.backend} path: {plan.reason}"


def describe(config: Config, data: Data, run: Run) -> str:
    device = data.train_labels.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    where += f", {n_ranks()} processes" if n_ranks() > 1 else ""
    parameters = sum(p.numel() for p in run.model.parameters())
    top_k = f" (k = {config.top_k})" if config.top_k is not None else ""
    return (
        f"data    {config.data}, {len(data.train_labels)} images for training, {len(data.test_labels)} for the test\n"
        f"model   {config.model}, {parameters:,} parameters, on {where}, amp {config.amp}\n"
        f"loss    {config.reduction}{top_k} of {loss_path(config, data)}\n"
        f"steps   {len(run.losses)} in {config.epochs} epochs, batch {config.batch_size}, lr {config.lr:g}, "
        f"momentum {config.momentum:g}, weight decay {config.weight_decay:g}, seed {config.seed}"
    )


def result_table(run: Run, config: Config, data: Data, out: Path) -> str:
    last = run.history[-1]
    # The first epoch holds what happens once: allocations, cuDNN's choices, compilation.
    step = statistics.median(entry["step_seconds"] for entry in run.history[1:] or run.history)
    losses = loss_seconds(run, config, data)
    loss = losses.pop(config.loss)
    ((other, other_loss),) = losses.items()
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


# --------------------------------------------------------------------------------------------------------------- main


def check_out_folder(args: argparse.Namespace) -> None:
    if args.out is not None and (args.out / CHECKPOINT).exists() and not (args.resume or args.overwrite):
        raise Failure(f"{args.out} holds the checkpoint of a run: --resume goes on with it, --overwrite starts afresh")


def claim_out_folder(args: argparse.Namespace) -> Path:
    """Creates the folder, or takes the next free one in runs/."""
    try:
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            if args.overwrite:  # else TensorBoard shows both runs as one
                shutil.rmtree(args.out / TENSORBOARD, ignore_errors=True)
            return args.out
        for number in range(1, 1_000_000):
            folder = Path("runs") / f"{number:03d}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)  # fails if another process was faster
                return folder
    except OSError as error:
        raise Failure(f"cannot create the output folder {error.filename}: {_reason(error)}") from None
    raise Failure("runs/ is full")


def run_training(args: argparse.Namespace) -> None:
    device = choose_device(args.device)
    with process_group(device):
        run_in_group(args, device)


def run_in_group(args: argparse.Namespace, device: torch.device) -> None:
    checkpoint = None
    try:
        check_out_folder(args)
        if args.resume:
            checkpoint = read_checkpoint(args.out / CHECKPOINT, device)
            config = resumed_config(args, checkpoint, args.out / CHECKPOINT, device)
            ask_first(lambda: choose_data(config.data, args.data_dir))
        else:
            # Before the download: options that cannot go together must not cost one.
            resolve(args, "digits", device)
            config = resolve(args, ask_first(lambda: choose_data(args.data or "auto", args.data_dir)), device)
    except OSError as error:
        raise Failure(f"cannot read {error.filename}: {_reason(error)}") from None
    data = load_data(config.data, args.data_dir, config.limit).to(device)
    steps_per_epoch = len(data.train_labels) // config.batch_size
    if steps_per_epoch == 0:
        raise Failure(f"--batch-size {config.batch_size} is larger than the {len(data.train_labels)} training images")
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
        torch.set_float32_matmul_precision("high")
    run = start_run(config, device, config.epochs * steps_per_epoch)
    if checkpoint is not None:
        restore(run, checkpoint, args.out / CHECKPOINT)
    out = ask_first(lambda: claim_out_folder(args))
    if is_first():
        print(describe(config, data, run))
        if run.step:
            print(f"resumed at step {run.step}")
        sys.stdout.flush()
    train(run, config, data, out)
    if is_first():
        draw_curves(run, config, out)
        print(result_table(run, config, data, out))


def main(argv: list[str] | None = None) -> int:
    try:
        run_training(parse_arguments(argv))
    except Failure as failure:
        message, code = str(failure), failure.code
    except ModuleNotFoundError as error:
        message, code = f"{error}: pip install 'fusedloss[train]' brings it", 2
    except torch.OutOfMemoryError:
        message, code = "the GPU's memory is full: lower --batch-size or raise --accumulate", 2
    except KeyboardInterrupt:
        message, code = "stopped by Ctrl-C outside the training loop; checkpoints are as they were", 130
    except RuntimeError as error:
        # By name: importing torch._dynamo to name its class takes seconds, on every error.
        if "TorchDynamoException" not in [ancestor.__name__ for ancestor in type(error).__mro__]:
            raise
        message, code = f"--compile fails here: {str(error).splitlines()[0]}", 2  # the other lines tell how to report bugs
    else:
        return 0
    if message:
        rank = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"train_cifar10.py{rank}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    exit_code = main()
    if "RANK" in os.environ:
        # All files are closed. The threads of gloo and of torchrun's store are not: torn down with the interpreter, they now and
        # then abort the process ("terminate called without an active exception"), and torchrun calls a finished run a failure.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
