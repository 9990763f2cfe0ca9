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
    monkeypatch.setattr(host_overhead.launcher, "_launch", host_overhead.launcher._launch)  # put back afterwards
    logits, target = torch.randn(host_overhead.SHAPE, requires_grad=True), torch.randint(10, (128,))
    reached = {}
    with host_overhead.stubbed_driver(), fusedloss.backend("triton"):
        for name, call in host_overhead.arms(logits, target).items():
            launched.clear()
            call()
            reached[name] = list(launched)
            assert logits.grad.shape == logits.shape
    assert reached["launcher on"] == ["fused_tile_kernel", "scale_gradient_kernel"]
    assert reached["eager"] == reached["launcher off"] == reached["empty"] == []


def test_the_table_takes_the_launcher_apart() -> None:
    times = {"eager": 50e-6, "launcher off": 60e-6, "launcher on": 85e-6, "empty": 20e-6}
    assert host_overhead.table(times).splitlines()[-1] == "| launcher alone | 25.0 | 0.50 |"
