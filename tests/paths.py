"""The backends that one test file runs on. Not in conftest.py: benchmarks/ has one, too, and a spawned process finds either."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import pytest
import torch

import fusedloss
from fusedloss.backends import cpu


class Path(NamedTuple):
    """One way through the library: a backend asked for, and the device of the tensors."""

    backend: str  # what fusedloss.backend() gets; "auto" asks for nothing, "torch" means PyTorch itself
    device: str


TORCH = pytest.param(Path("torch", "cpu"), id="torch")
REFERENCE = pytest.param(Path("reference", "cpu"), id="reference")
AUTO = pytest.param(Path("auto", "cpu"), id="auto")
INTERPRETER = pytest.param(Path("triton", "cpu"), id="triton", marks=pytest.mark.interpreter)
GPU = pytest.param(Path("auto", "cuda"), id="cuda", marks=pytest.mark.gpu)
CPU = pytest.param(
    Path("cpu", "cpu"), id="cpu", marks=pytest.mark.skipif(cpu.MISSING is not None, reason=f"no C++ kernel: {cpu.MISSING}")
)


@contextmanager
def entered(path: Path) -> Iterator[None]:
    """Asks for the path's backend; new tensors land on its device."""
    chosen = nullcontext() if path.backend in ("auto", "torch") else fusedloss.backend(path.backend)
    # Not on the CPU: torch.device() as a context sends every call through __torch_function__, which few users' calls do.
    device = nullcontext() if path.device == "cpu" else torch.device(path.device)
    with chosen, device:
        yield


@contextmanager
def no_waits() -> Iterator[None]:
    """Makes PyTorch raise where the host waits for the GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype, once: as an error it would leave the mode on
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
