"""What a launch asks torch.cuda, with answers of a GPU that is not here."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from compiled import FACTS, TARGETS, launches, variants
from stub_driver import StubDriver
from triton.runtime import driver

import fusedloss
from fusedloss import backends, serving
from fusedloss.backends.triton import launching

DEVICE = torch.device("cuda", 0)
POOLED = 3 << 4 | 1 << 1 | 1  # of torch's pool: torch's own numbering, in c10/cuda/CUDAStream.cpp
FOREIGN = 0x7F00_1234_5670  # a foreign stream's number is its handle, an address
PER_THREAD = 2  # cudaStreamPerThread


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
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


@pytest.mark.parametrize(
    ("name", "flushes_l2"),
    [("gfx942:sramecc+:xnack-", True), ("gfx950", True), ("gfx90a:sramecc+:xnack-", False), ("gfx1100", False)],
)
def test_facts_of_an_amd_gpu(monkeypatch: pytest.MonkeyPatch, name: str, flushes_l2: bool) -> None:
    found = SimpleNamespace(multi_processor_count=304, warp_size=64, gcnArchName=name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    facts = launching._facts_of_gpu.__wrapped__(DEVICE)
    assert facts == FACTS["gfx942"]._replace(flushes_l2=flushes_l2)


BF16, FP32 = torch.bfloat16, torch.float32
# Tiles; slices; a backward that recomputes; two labels; a single row; float16, whose gradient is made in the backward.
WARMED: dict[str, tuple[tuple[int, ...], torch.dtype, dict[str, Any]]] = {
    "mean": ((4096, 10), FP32, {}),
    "slices": ((256, 50257), BF16, {"label_smoothing": 0.1}),
    "none": ((64, 1001), BF16, {"reduction": "none"}),
    "topk, statistics": ((64, 5000), FP32, {"reduction": "topk", "top_k": 3, "return_stats": True}),
    "pixels": ((4, 19, 64, 64), BF16, {"softcap": 30.0}),
    "one row": ((1000,), FP32, {}),
    "one row, none": ((1000,), FP32, {"reduction": "none"}),
    "learned scale": ((64, 1000), FP32, {"scale": torch.ones((), requires_grad=True)}),
    "float16": ((64, 1000), torch.float16, {}),
}


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Kernels that a GPU would have loaded, by name and key; nothing is compiled, and the GPU is an H100 that only answers."""
    found: list[tuple[str, str]] = []

    class Kernel:
        def __init__(self, *names: str) -> None:
            self.names = names

        @property
        def run(self) -> None:
            found.append(self.names)

    monkeypatch.setattr(driver, "_active", StubDriver(TARGETS["sm_90"], "one for which nothing was compiled"))
    monkeypatch.setattr(triton.JITFunction, "_do_compile", lambda function, key, *_: Kernel(function.__name__, key))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(launching, "_facts_of_gpu", lambda _: FACTS["sm_90"])
    return found


def problem(case: str, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    shape, dtype, _ = WARMED[case]
    logits = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    weight = torch.ones(shape[1], dtype=dtype, device=device) if case == "slices" else None
    return logits, torch.zeros(shape[:1] + shape[2:] if len(shape) > 1 else (), dtype=torch.int64, device=device), weight


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("case", WARMED)
def test_warmup_loads_what_the_call_launches(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, case: str, device: str
) -> None:
    options = WARMED[case][2]

    def call() -> torch.Tensor:
        result = fusedloss.cross_entropy(*problem(case, "cpu"), **options)
        return result[0] if options.get("return_stats") else result

    expected = variants(launches(monkeypatch, "sm_90", call), "sm_90")
    loaded = request.getfixturevalue("loaded")
    fusedloss.warmup(*problem(case, device), **options)
    assert set(loaded) == expected
    assert len(expected) >= 2


def test_warmup_of_a_forward_loads_the_forward_alone(loaded: list[tuple[str, str]]) -> None:
    logits, target, _ = problem("mean", "meta")
    fusedloss.warmup(logits.detach(), target)
    assert [name for name, _ in loaded] == ["forward_tile_kernel"]


def test_warmup_raises_what_the_call_would(loaded: list[tuple[str, str]]) -> None:
    logits, target, _ = problem("mean", "meta")
    with pytest.raises(ValueError, match="batch_size"):
        fusedloss.warmup(logits, target[:3])
    assert not loaded


def test_warmup_asks_for_the_backend_of_no_other_thread(monkeypatch: pytest.MonkeyPatch, loaded: list[tuple[str, str]]) -> None:
    found = []
    checked = serving.checked

    def spied(**arguments: Any) -> Any:
        found.append(backends.requested)
        return checked(**arguments)

    monkeypatch.setattr(serving, "checked", spied)
    fusedloss.warmup(*problem("mean", "meta")[:2])
    assert found == [backends.requested]
    assert loaded


def test_warmup_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"warmup compiles for a GPU, and torch.cuda sees none"):
        fusedloss.warmup(*problem("mean", "meta")[:2])


@pytest.mark.parametrize("captures", [True, False])
@pytest.mark.parametrize("was_loaded", [True, False])
def test_a_capture_meets_no_kernel_that_was_not_loaded(
    monkeypatch: pytest.MonkeyPatch, loaded: list[tuple[str, str]], captures: bool, was_loaded: bool
) -> None:
    launched: list[Any] = []
    monkeypatch.setattr(launching, "_captures", lambda _: captures)
    monkeypatch.setattr(launching, "keeps_compiled", lambda _: True)
    monkeypatch.setattr(launching, "_compiled_ahead", lambda *_: SimpleNamespace(module=object() if was_loaded else None))
    monkeypatch.setattr(triton.JITFunction, "run", lambda function, *_, **__: launched.append(function.__name__))
    call: Callable[[], torch.Tensor] = lambda: fusedloss.cross_entropy(*problem("mean", "cpu"))  # noqa: E731
    with fusedloss.backend("triton"):
        if captures and not was_loaded:
            with pytest.raises(RuntimeError, match=r"fused_tile_kernel was not loaded .* fusedloss\.warmup"):
                call()
        else:
            call()
    assert launched == ([] if captures and not was_loaded else ["fused_tile_kernel"])
