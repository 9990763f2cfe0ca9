"""CIFAR-10, from disk or from the network, or scikit-learn's digits in its place."""

import contextlib
import dataclasses
import hashlib
import http.client
import os
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.console import progress_bar, say
from training.failure import Failure, reason

CONNECT_SECONDS = 5  # for the first byte of the download, and between any two
DOWNLOAD_SECONDS = 120  # for all 170 MB
TRAIN_IMAGES_FROM_DIGITS = 1437  # four fifths of 1797


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
    say(f"{problem}: training on scikit-learn's digits instead")
    return "digits"


def _fetch_cifar10(data_dir: Path) -> str | None:
    """Unpacks or downloads CIFAR-10 unless it is there. Returns why it cannot be had; raises Failure if it is damaged."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_md5, extract_archive

    archive = data_dir / CIFAR10.filename
    try:
        if (data_dir / CIFAR10.base_folder).exists():
            return None
        if not archive.exists():
            problem = _download(CIFAR10.url, archive, CIFAR10.tgz_md5)
            if problem is not None:
                return f"CIFAR-10 is not in {data_dir}/ and cannot be downloaded ({problem})"
        elif not check_md5(str(archive), CIFAR10.tgz_md5):
            raise Failure(f"{archive} is truncated or damaged (wrong MD5 checksum): delete it to download it again")
        with _temporary_folder(data_dir) as unpacked:
            extract_archive(str(archive), str(unpacked))
            try:
                os.replace(unpacked / CIFAR10.base_folder, data_dir / CIFAR10.base_folder)
            except OSError:
                if not (data_dir / CIFAR10.base_folder).exists():  # else another run, which unpacked it as well, was faster
                    raise
    except OSError as error:
        raise Failure(f"cannot read or unpack {archive}: {reason(error)}") from None
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
            first["problem"] = reason(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    if "response" not in first:
        return first.get("problem", f"no answer within {CONNECT_SECONDS} s")

    digest, deadline = hashlib.md5(usedforsecurity=False), time.monotonic() + DOWNLOAD_SECONDS
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_folder(path.parent) as folder:
            with (
                first["response"] as response,
                open(folder / path.name, "wb") as file,
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
            os.replace(folder / path.name, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return reason(error)
    return None


@contextlib.contextmanager
def _temporary_folder(beside: Path) -> Iterator[Path]:
    """On the disk of the file that is to appear whole; of this run alone, which a process id is not on a shared disk."""
    with tempfile.TemporaryDirectory(dir=beside, prefix=".incomplete-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


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
            raise Failure(f"cannot read {folder / file}: {reason(error)}") from None
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
