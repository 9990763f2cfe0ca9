"""benchmarks/host_overhead.py: its arms do what they say. No time is asserted."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fusedloss
from fusedloss import known
from fusedloss.backends import triton as launcher

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
    monkeypatch.setattr(known, "find", lambda *_: None)
    memory, target = torch.randn(2570), torch.randint(10, (257,))
    aligned, shifted = memory[:1280].view(128, 10), memory[1:1281].view(128, 10)
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
            (shifted, 0.25, 4),
            (memory.view(257, 10), 0.25, 5),
        ]:
            fusedloss.cross_entropy(logits, target[: len(logits)], scale=scale)
            assert len(asked) == kept
    assert len(launched) == 9
    assert launched[0] is launched[1] is launched[2] is launched[6]
    assert launched[3] is launched[7]
    assert len(set(map(id, launched))) == 5


def test_a_known_call_looks_for_its_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    known.KNOWN.clear()
    asked: list[object] = []  # of Triton's own launcher
    launched: list[object] = []
    run = triton.JITFunction.run
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *args, **kwargs: asked.append(self) or run(self, *args, **kwargs))
    monkeypatch.setattr(host_overhead.StubDriver, "launcher_cls", staticmethod(lambda src, _: lambda *_: launched.append(src)))
    logits, target = torch.randn(129, 11, requires_grad=True), torch.randint(11, (129,))
    with host_overhead.stubbed_launcher():
        launcher._keeps_compiled = lambda _: True
        for n_asked in (2, 2, 3, 3, 3):  # the gradient's scaling, too; then the known call's own launch
            fusedloss.cross_entropy(logits, target).backward()
            assert len(asked) == n_asked
    assert len(launched) == 10
    assert len(set(map(id, launched))) == 2  # Triton had both already


def test_no_kernel_is_specialised_for_the_numbers_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their values are no part of the key of a kept kernel."""
    seen = set()

    def record(launch: launcher.Launch, _: torch.device, arguments: dict[str, object]) -> None:
        assert launch.constants.keys().isdisjoint(arguments)
        function = launcher._kernels()[launch.tile.kernel]
        for parameter in function.params:
            value = arguments.get(parameter.name)
            if value is not None and not isinstance(value, torch.Tensor):
                assert parameter.do_not_specialize, parameter.name
                seen.add(parameter.name)

    monkeypatch.setattr(launcher, "_launch", record)
    logits, target = torch.randn(3, 10, requires_grad=True), torch.tensor([1, 2, 3])
    with fusedloss.backend("triton"):
        for reduction in ("mean", "none"):
            fusedloss.cross_entropy(logits, (target, target, 0.7), reduction=reduction, scale=0.5).sum().backward()
    assert seen == {"scale_bits", "lam_bits"}


def test_a_share_of_zero_is_a_number_of_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """For Triton, which compiles 0 as an i32: the kernel must not be kept for other shares, whose bits take 64."""
    types: list[str] = []
    driver = host_overhead.StubDriver
    monkeypatch.setattr(
        driver, "launcher_cls", staticmethod(lambda source, _: lambda *_: types.append(source.signature["lam_bits"]))
    )
    logits, target = torch.randn(3, 10), torch.tensor([1, 2, 3])
    with host_overhead.stubbed_launcher():
        launcher._keeps_compiled = lambda _: True
        for share in (0.0, 0.7, 0.0, 0.3):
            fusedloss.cross_entropy(logits, (target, target, share))
    assert types == ["i32", "i64", "i32", "i64"]
