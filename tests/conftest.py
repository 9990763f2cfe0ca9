"""Which tests run in which process, and fixtures for the backends that one test file runs on.

TRITON_INTERPRET=1 makes an interpreter process: tests marked `interpreter` run there and nowhere else, all others elsewhere.
"""

import os
import pathlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

import budget
import pytest
import torch
import torch.nn.functional as F
from covering import covering
from paths import AUTO, CPU, GPU, INTERPRETER, REFERENCE, TORCH, Path, entered

import fusedloss

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
HAS_GPU = torch.cuda.is_available() and not INTERPRETED

if INTERPRETED:
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    numpy.seterr(all="ignore")  # inf - inf in a masked lane: a GPU does not warn either

    _patch_lang = interpreter._patch_lang

    def _patch_lang_once(function: Callable[..., object]) -> object:
        """Triton's interpreter replaces the functions of triton.language at every call of a helper, though they are replaced
        already: two thirds of the time of these tests."""
        modules = {value for value in function.__globals__.values() if value is tl or value is tl.core}
        return _patch_lang(function) if any(tl.core.is_builtin(module.load) for module in modules) else None

    interpreter._patch_lang = _patch_lang_once

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_for_later_numpy(tensor: type, *scope: object) -> None:
        """From numpy 2.4 on int() takes no array of one element, as which earlier Triton versions keep scalars."""
        _patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_tensor_for_later_numpy

GPU_SWEEP = "on a GPU, or under the interpreter, part of the whole sweep: make test-all"

# Two cores and small tensors: threads would only wait for each other.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sweep", action="store_true", help="also run the tests marked `sweep` (make test-all)")
    help_shard = "only every N-th test, from the I-th on: what one of N processes runs (benchmarks/gpu_shards.py)"
    parser.addoption("--shard", default="0/1", metavar="I/N", help=help_shard)
    help_noise = "times the error that a GPU's exp and division may have, under the interpreter: noise.py (make test-noise)"
    parser.addoption("--noise", type=float, default=0.0, help=help_noise)


def pytest_configure(config: pytest.Config) -> None:
    if noise := config.getoption("--noise"):
        assert INTERPRETED, "--noise is for tests under the interpreter: set TRITON_INTERPRET=1"
        import noise as of_the_interpreter

        of_the_interpreter.install(noise)
        budget.noise = noise


def _cannot_run(item: pytest.Item, config: pytest.Config) -> str | None:
    """Why this process, or this machine, does not run a test."""
    if (item.get_closest_marker("interpreter") is not None) != INTERPRETED:
        return "run without TRITON_INTERPRET" if INTERPRETED else "need TRITON_INTERPRET=1 before triton is imported"
    if item.get_closest_marker("gpu") is not None and not HAS_GPU:
        return "need a GPU, and torch.cuda sees no GPU"
    if config.getoption("--sweep"):
        return None
    if item.get_closest_marker("sweep") is not None:
        return "part of the whole sweep: make test-all"
    if item.get_closest_marker("gpu") is not None and item.get_closest_marker("gpu_sweep") is not None:
        return GPU_SWEEP
    return None


def _out_of_the_sample(items: list[pytest.Item]) -> set[pytest.Item]:
    """Tests of a grid whose values, or pairs of them, are in others as well: on a GPU, where kernels would be compiled for each
    combination, and under the interpreter, where a row takes milliseconds."""
    grids: defaultdict[tuple[pathlib.Path, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        if (INTERPRETED or item.get_closest_marker("gpu") is not None) and hasattr(item, "callspec"):
            grids[item.path, item.nodeid.partition("[")[0]].append(item)
    out: set[pytest.Item] = set()
    for grid in grids.values():
        strength = 2 if INTERPRETED or grid[0].get_closest_marker("pairs_on_a_gpu") is not None else 1
        kept = covering([{name: repr(value) for name, value in item.callspec.params.items()} for item in grid], strength)
        out |= set(grid) - {grid[place] for place in kept}
    return out


_left_out: Counter[str] = Counter()  # tests, by the reason


@pytest.hookimpl(trylast=True)  # after -m and -k: what they leave out needs no reason
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects what cannot run: of thousands of skipped tests nobody would find the one that should not be."""
    reasons = [_cannot_run(item, config) for item in items]
    if not config.getoption("--sweep"):
        out = _out_of_the_sample([item for item, reason in zip(items, reasons, strict=True) if not reason])
        reasons = [GPU_SWEEP if item in out else reason for item, reason in zip(items, reasons, strict=True)]
    first, step = map(int, config.getoption("--shard").split("/"))
    mine = {i for place, i in enumerate(i for i, reason in enumerate(reasons) if not reason) if place % step == first}
    reasons = [reason or (None if i in mine else "in another shard") for i, reason in enumerate(reasons)]
    config.hook.pytest_deselected(items=[item for item, reason in zip(items, reasons, strict=True) if reason])
    _left_out.update(filter(None, reasons))
    items[:] = [item for item, reason in zip(items, reasons, strict=True) if not reason]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for reason, count in _left_out.items():
        terminalreporter.write_line(f"{count} tests left out: {reason}")


@pytest.fixture(params=[REFERENCE, CPU, INTERPRETER, GPU])
def path(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Every path, already chosen: for what the kernels cover."""
    with entered(request.param):
        yield request.param


@pytest.fixture(params=[INTERPRETER, GPU])
def kernels(request: pytest.FixtureRequest) -> Iterator[Path]:
    """The Triton kernels, in the interpreter and on a GPU."""
    with entered(request.param):
        yield request.param


@pytest.fixture(params=[REFERENCE, AUTO, GPU])
def any_path(request: pytest.FixtureRequest) -> Iterator[Path]:
    """For calls that the kernels may hand to the reference: the choice is left to the library."""
    with entered(request.param):
        yield request.param


@pytest.fixture(params=[TORCH, REFERENCE, CPU, INTERPRETER, GPU])
def cross_entropy(request: pytest.FixtureRequest) -> Iterator[Callable[..., torch.Tensor]]:
    """PyTorch's function, then ours on every path: a test that takes it holds for both."""
    with entered(request.param):
        yield F.cross_entropy if request.param.backend == "torch" else fusedloss.cross_entropy


@pytest.fixture(params=[TORCH, REFERENCE, AUTO, GPU])
def any_cross_entropy(request: pytest.FixtureRequest) -> Iterator[Callable[..., torch.Tensor]]:
    """The same for calls that the kernels may hand to the reference."""
    with entered(request.param):
        yield F.cross_entropy if request.param.backend == "torch" else fusedloss.cross_entropy


@pytest.fixture(autouse=True)
def _waiting_is_allowed() -> Iterator[None]:
    """No test leaves the mode of `no_waits` to all that follow: most of them would fail."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.get_sync_debug_mode():
        torch.cuda.set_sync_debug_mode("default")
        pytest.fail("the test left torch.cuda.set_sync_debug_mode() on")
