"""benchmarks/host_overhead.py: its arms do what they say. No time is asserted."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fusedloss
from fusedloss import known
from fusedloss.backends.triton import launching

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
        for name, arm in host_overhead.arms(logits, target).items():
            launched.clear()
            arm.enter()
            arm.call()
            reached[name] = list(launched)
            assert logits.grad.shape == logits.shape
    assert reached["launcher on"] == reached["Triton's own"] == ["fused_tile_kernel", "scale_gradient_kernel"]
    assert reached["eager"] == reached["launcher off"] == reached["empty"] == []


def test_the_table_takes_the_launcher_apart() -> None:
    times = {"eager": 50e-6, "launcher off": 60e-6, "launcher on": 85e-6, "empty": 20e-6}
    assert host_overhead.table(times).splitlines()[-1] == "| launcher alone | 25.0 | 0.50 |"


def test_a_compiled_kernel_is_kept_for_what_it_was_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other values of numbers that no kernel is specialised for take the same one; another dtype, shape or alignment another."""
    import triton

    launched: list[object] = []
    asked: list[object] = []  # of Triton's own launcher
    run = triton.JITFunction.run
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *args, **kwargs: asked.append(self) or run(self, *args, **kwargs))
    monkeypatch.setattr(host_overhead.StubDriver, "launcher_cls", staticmethod(lambda src, _: lambda *_: launched.append(src)))
    monkeypatch.setattr(known, "find", lambda *_: (None, None))
    memory, target = torch.randn(2570), torch.randint(10, (257,))
    aligned, shifted = memory[:1280].view(128, 10), memory[1:1281].view(128, 10)
    with host_overhead.stubbed_launcher():
        launching.keeps_compiled = lambda _: True
        for logits, scale, kept in [
            (aligned, 1.0, 1),
            (aligned, 1.0, 1),
            (aligned, 0.5, 1),
            (shifted, 0.5, 2),
            (aligned[:127], 0.5, 3),
            (aligned.double(), 0.5, 4),
            (aligned, 0.25, 4),
            (shifted, 0.25, 4),
            (memory.view(257, 10), 0.25, 5),
        ]:
            fusedloss.cross_entropy(logits, target[: len(logits)], scale=scale)
            assert len(asked) == kept
    assert len(launched) == 9
    assert launched[0] is launched[1] is launched[2] is launched[6]
    assert launched[3] is launched[7]
    assert len(set(map(id, launched))) == 5  # forward_tile_kernel is specialised for a multiple of 16 rows, which 127 are not


def test_a_known_call_looks_for_its_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    known.KNOWN.clear()
    asked: list[object] = []  # of Triton's own launcher
    launched: list[object] = []
    run = triton.JITFunction.run
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *args, **kwargs: asked.append(self) or run(self, *args, **kwargs))
    monkeypatch.setattr(host_overhead.StubDriver, "launcher_cls", staticmethod(lambda src, _: lambda *_: launched.append(src)))
    # In a dtype of its own: what another test has compiled would go to that test's launcher.
    logits, target = torch.randn(129, 11, dtype=torch.bfloat16, requires_grad=True), torch.randint(11, (129,))
    with host_overhead.stubbed_launcher():
        launching.keeps_compiled = lambda _: True
        for _ in range(5):
            fusedloss.cross_entropy(logits, target).backward()
            assert len(asked) == 2  # the loss, and the scaling of its gradient
    assert len(launched) == 10
    assert len(set(map(id, launched))) == 2


def test_no_kernel_is_specialised_for_the_numbers_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their values are no part of the key of a kept kernel, and arrive as they are: float64, 0 and 1 like any other."""
    import triton

    signatures: list[dict[str, object]] = []
    given: list[tuple[object, ...]] = []

    def launcher_cls(source: object, _: object) -> Callable[..., None]:
        signatures.append(source.signature)
        return lambda *arguments: given.append(arguments)

    asked: list[object] = []  # of Triton's own launcher
    run = triton.JITFunction.run
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *args, **kwargs: asked.append(self) or run(self, *args, **kwargs))
    monkeypatch.setattr(host_overhead.StubDriver, "launcher_cls", staticmethod(launcher_cls))
    monkeypatch.setattr(known, "KNOWN", {})
    logits, target = torch.randn(3, 12), torch.tensor([1, 2, 3])
    with host_overhead.stubbed_launcher():
        launching.keeps_compiled = lambda _: True
        for scale, share in ((1.0, 0.0), (0.1, 1.0), (0.0, 0.7), (1.0, 0.5)):
            fusedloss.cross_entropy(logits, (target, target, share), scale=scale)
            assert {scale, share} <= {value for value in given[-1] if type(value) is float}
    assert len(asked) == 1
    assert len(given) == 4
    assert [signature[name] for signature in signatures for name in ("scale", "lam")] == ["fp64", "fp64"]
