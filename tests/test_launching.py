"""What a launch asks torch.cuda, with answers of a GPU that is not here."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusedloss.backends.triton import launching

DEVICE = torch.device("cuda", 0)
POOLED = 3 << 4 | 1 << 1 | 1  # of torch's pool: torch's own numbering, in c10/cuda/CUDAStream.cpp
FOREIGN = 0x7F00_1234_5670  # a foreign stream's number is its handle, an address
PER_THREAD = 2  # cudaStreamPerThread


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The current stream of a GPU that only answers questions; counters are made on the CPU."""
    current = SimpleNamespace(stream_id=0, captures=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: DEVICE.index)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current.captures)
    monkeypatch.setattr(launching, "_zero_counters", lambda _: torch.zeros(1, dtype=torch.int32))
    launching._stream_ticket.cache_clear()
    yield current
    launching._stream_ticket.cache_clear()


def ticket(stream: Any, stream_id: int, keeps_workspace: bool = True, captures: bool = False) -> torch.Tensor:
    stream.stream_id, stream.captures = stream_id, captures
    return launching.ticket(DEVICE, keeps_workspace)


@pytest.mark.parametrize("stream_id", [0, POOLED])
def test_a_stream_of_torch_keeps_its_ticket(stream: SimpleNamespace, stream_id: int) -> None:
    first = ticket(stream, stream_id)
    assert ticket(stream, stream_id) is first
    assert ticket(stream, POOLED + (1 << 4)) is not first
    assert ticket(stream, stream_id, captures=True) is not first
    assert ticket(stream, stream_id, keeps_workspace=False) is not first


@pytest.mark.parametrize("stream_id", [FOREIGN, PER_THREAD])
def test_a_foreign_stream_keeps_none(stream: SimpleNamespace, stream_id: int) -> None:
    """Its handle may come again, for another stream: a ticket of the first might still be in use."""
    assert ticket(stream, stream_id) is not ticket(stream, stream_id)
    assert launching._stream_ticket.cache_info().currsize == 0
