"""`pytest benchmarks --benchmark-only`: the CPU's benchmarks, and a GPU's where there is one."""

from pathlib import Path

import pytest
import torch

_left_out: list[pytest.Item] = []


def _needs_gpu(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and getattr(item.module, "DEVICE", "cpu") == "cuda"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("default"))  # a compiler's advice is no error here
    if not torch.cuda.is_available():
        _left_out[:] = filter(_needs_gpu, items)
        config.hook.pytest_deselected(items=_left_out)
        items[:] = [item for item in items if not _needs_gpu(item)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _left_out:
        terminalreporter.write_line(f"{len(_left_out)} benchmarks left out: they need a GPU, and torch.cuda sees no GPU")
