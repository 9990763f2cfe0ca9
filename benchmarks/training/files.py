"""The folder of a run: who may write to it, and files that are always whole."""

import argparse
import contextlib
import datetime
import fcntl
import itertools
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from training.failure import Failure, reason
from training.processes import is_first

CHECKPOINT = "checkpoint.pt"
CURVES = "curves.png"
TENSORBOARD = "tensorboard"
LOCK = ".lock"


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
        raise Failure(f"cannot write {path}: {reason(error)}") from None


def check_out_folder(args: argparse.Namespace) -> None:
    """Before anything is loaded or created: whether the folder is what the options say it is."""
    if args.out is None:
        return
    try:
        os.stat(args.out / CHECKPOINT)  # not exists(), which calls a folder without permission empty
    except (FileNotFoundError, NotADirectoryError):
        if args.resume:
            raise Failure(f"{args.out / CHECKPOINT} does not exist: there is nothing to resume") from None
    except OSError as error:
        raise Failure(f"cannot read {args.out / CHECKPOINT}: {reason(error)}") from None
    else:
        if not (args.resume or args.overwrite):
            raise Failure(f"{args.out} holds the checkpoint of a run: --resume goes on with it, --overwrite starts afresh")


@contextlib.contextmanager
def claimed_folder(args: argparse.Namespace) -> Iterator[Path]:
    """The folder of --out, or the next free one in runs/: created, and of this run alone until the context is left."""
    if not is_first():  # never writes
        yield args.out
        return
    with contextlib.ExitStack() as stack:
        try:
            out = _create_folder(args)
            stack.enter_context(_locked(out))
            check_out_folder(args)  # again: another run may have ended since
            if args.overwrite:  # no curve of the run before may pass for one of this run
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(out / TENSORBOARD)
                (out / CURVES).unlink(missing_ok=True)
        except OSError as error:
            raise Failure(f"cannot create the output folder, or write to it: {error.filename}: {reason(error)}") from None
        yield out


def _create_folder(args: argparse.Namespace) -> Path:
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        return args.out
    runs = Path("runs")
    runs.mkdir(exist_ok=True)  # here, so that below FileExistsError can only mean that the number is taken
    for number in itertools.count(1):
        folder = runs / f"{number:03d}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()  # fails if another process was faster
            return folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises Failure if another process is in this context. The system frees the lock of a process that dies."""
    path = folder / LOCK
    with _open_locked(path) as file:
        file.truncate(0)
        since = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def _open_locked(path: Path) -> IO[str]:
    """The file at `path`, with the only lock on it; without a lock, and with a warning, where the file system has none."""
    while True:
        file = open(path, "a+")  # noqa: SIM115  # closing the file would free the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise Failure(f"{path.parent} is in use by {holder}") from None
        except OSError as error:  # of a network file system
            print(f"{path.parent} cannot be locked ({reason(error)}): see to it that no other run writes to it", file=sys.stderr)
            return file
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # its last owner has deleted the file since it was opened: a lock on it would keep nobody out
