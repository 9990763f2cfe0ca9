"""What the program prints, and how it ends: every failure is one line on stderr and a documented exit code."""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from training.failure import Failure, reason
from training.processes import is_first

EXIT_CODES = (
    "Exit codes: 0 done; 1 the loss is not finite, or another process was lost; 2 a wrong option, file or folder, or too "
    "little memory; 129 the terminal was closed, 130 Ctrl-C, 143 SIGTERM: the run is saved, and the command that resumes it is "
    "printed."
)


def say(text: str) -> None:
    """Prints on the first process, at once; what the encoding does not have, such as parts of a file's name, as an escape."""
    if not is_first():
        return
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:  # a full disk, or `| head` that has seen enough
        raise Failure(f"cannot write to standard output: {reason(error)}") from None


def progress_bar(**options: Any) -> Any:
    from tqdm import tqdm

    # None: silent where stderr is no terminal.
    disable = None if is_first() and sys.stderr is not None else True
    return tqdm(disable=disable, leave=False, dynamic_ncols=True, **options)


def exit_code(program: Callable[[], None]) -> int:
    """Runs the program; says in one line what ended it."""
    try:
        program()
    except Failure as failure:
        message, code = str(failure), failure.code
    except ModuleNotFoundError as error:
        message, code = f"{error}: pip install 'fusedloss[train]' brings it", 2
    except KeyboardInterrupt:
        message, code = "stopped by Ctrl-C outside the training loop; checkpoints are as they were", 130
    except (torch.OutOfMemoryError, MemoryError):
        message, code = "the memory is full: lower --batch-size or --width, or raise --accumulate", 2
    except RuntimeError as error:
        message, code = _of_runtime_error(error), 2
        if message is None:
            raise
    else:
        return 0
    if message:
        rank = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""
        line = message.replace("\n", "\\n")
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"train_cifar10.py{rank}: {line}", file=sys.stderr, flush=True)
    return code


def _of_runtime_error(error: RuntimeError) -> str | None:
    text = str(error)
    if "can't allocate memory" in text or "Storage size calculation overflowed" in text:
        return "this needs more memory than the machine has: lower --width, --batch-size or --epochs"
    # By name: importing torch._dynamo to name its class takes seconds, on every error.
    if "TorchDynamoException" in [ancestor.__name__ for ancestor in type(error).__mro__]:
        return f"--compile fails here: {text.splitlines()[0]}"  # the other lines tell how to report bugs
    return None


def leave(code: int) -> None:
    """Ends the process with this code, whatever has become of its standard output."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:  # the interpreter flushes once more as it ends: into nothing
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if "RANK" in os.environ:
        # All files are closed. The threads of gloo and of torchrun's store are not: torn down with the interpreter, they now and
        # then abort the process ("terminate called without an active exception"), and torchrun calls a finished run a failure.
        os._exit(code)
    sys.exit(code)
