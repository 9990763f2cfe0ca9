"""Which tests run in which process, and the backends that one test file runs on.

TRITON_INTERPRET=1 makes an interpreter process: tests marked `interpreter` run there and nowhere else, all others elsewhere.
"""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch

import fusedloss
from fusedloss import backends

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
HAS_GPU = torch.cuda.is_available() and not INTERPRETED

if INTERPRETED:
    import numpy

    numpy.seterr(all="ignore")  # inf - inf in a masked lane: a GPU does not warn either

# Two cores and small tensors: threads would only wait for each other.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sweep", action="store_true", help="also run the tests marked `sweep` (make test-all)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wrong_process = pytest.mark.skip(
        reason="runs without TRITON_INTERPRET" if INTERPRETED else "needs TRITON_INTERPRET=1 before triton is imported"
    )
    for item in items:
        if (item.get_closest_marker("interpreter") is not None) != INTERPRETED:
            item.add_marker(wrong_process)
        elif item.get_closest_marker("gpu") is not None and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="torch.cuda sees no GPU"))
        elif item.get_closest_marker("sweep") is not None and not config.getoption("--sweep"):
            item.add_marker(pytest.mark.skip(reason="part of the whole sweep: make test-all"))


class Path(NamedTuple):
    """One way through the library: a backend asked for, and the device of the tensors."""

    backend: str  # what fusedloss.backend() gets; "auto" asks for nothing
    device: str

    @property
    def has_kernels(self) -> bool:
        return self.backend not in ("auto", "reference") or self.device == "cuda"


REFERENCE = pytest.param(Path("reference", "cpu"), id="reference")
AUTO = pytest.param(Path("auto", "cpu"), id="auto")
INTERPRETER = pytest.param(Path("triton", "cpu"), id="triton", marks=pytest.mark.interpreter)
GPU = pytest.param(Path("auto", "cuda"), id="cuda", marks=pytest.mark.gpu)
CPU = [pytest.param(Path("cpu", "cpu"), id="cpu")] if "cpu" in backends.NAMES else []


def _entered(path: Path) -> Iterator[Path]:
    with nullcontext() if path.backend == "auto" else fusedloss.backend(path.backend), torch.device(path.device):
        yield path


@pytest.fixture(params=[REFERENCE, *CPU, INTERPRETER, GPU])
def path(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Every path, already chosen: for what the kernels cover. New tensors land on its device."""
    yield from _entered(request.param)


@pytest.fixture(params=[REFERENCE, AUTO, GPU])
def any_call(request: pytest.FixtureRequest) -> Iterator[Path]:
    """For calls that the kernels may hand to the reference path: the choice is left to the library."""
    yield from _entered(request.param)
