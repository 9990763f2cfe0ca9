"""benchmarks/host_overhead.py: its arms do what they say. No time is asserted."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fusedloss

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import host_overhead


def test_only_the_launcher_arm_reaches_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    def launcher_cls(_: object, metadata: object) -> Callable[..., None]:
        return lambda *_: launched.append(metadata.name)

    monkeypatch.setattr(host_overhead.StubDriver, "launcher_cls", staticmethod(launcher_cls))
    logits, target = torch.randn(host_overhead.SHAPE, requires_grad=True), torch.randint(10, (128,))
    reached = {}
    with host_overhead.stubbed_launcher():
        for name, call in host_overhead.arms(logits, target).items():
            launched.clear()
            call()
            reached[name] = list(launched)
            assert logits.grad.shape == logits.shape
    assert reached["launcher on"] == reached["Triton's own"] == ["fused_tile_kernel", "scale_gradient_kernel"]
    assert reached["eager"] == reached["launcher off"] == reached["empty"] == []


def test_the_table_takes_the_launcher_apart() -> None:
    times = {"eager": 50e-6, "launcher off": 60e-6, "launcher on": 85e-6, "empty": 20e-6}
    assert host_overhead.table(times).splitlines()[-1] == "| launcher alone | 25.0 | 0.50 |"


def test_a_compiled_kernel_is_kept_for_what_it_was_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other values of numbers that no kernel is specialised for take the same one; another dtype, shape or alignment another."""
    launched: list[object] = []
    monkeypatch.setattr(host_overhead.StubDriver, "launcher_cls", staticmethod(lambda src, _: lambda *_: launched.append(src)))
    memory, target = torch.randn(129, 10).flatten(), torch.randint(10, (128,))
    aligned, shifted = memory[:1280].view(128, 10), memory[1:1281].view(128, 10)
    launcher = host_overhead.launcher
    with host_overhead.stubbed_launcher():
        launcher._keeps_compiled = lambda _: True
        for logits, scale, kept in [
            (aligned, 1.0, 1),
            (aligned, 1.0, 1),
            (aligned, 0.5, 1),
            (shifted, 0.5, 2),
            (aligned[:127], 0.5, 3),
            (aligned.double(), 0.5, 4),
            (aligned, 0.25, 4),
        ]:
            fusedloss.cross_entropy(logits, target[: len(logits)], scale=scale)
            assert len(launcher._compiled) == kept
    assert len(launched) == 7
    assert launched[0] is launched[1] is launched[2] is launched[6]
    assert len(set(map(id, launched))) == 4
