"""How many kernel variants the GPU tests compile: on a new GPU, what the first ten minutes are spent on.

    python tests/variants.py                          # of all tests marked gpu
    python tests/variants.py tests/test_kernels.py    # of some

The tests run on the CPU, with the C++ kernel's results; each launch that the Triton path would make on an H100 is specialised by
Triton, and goes no further. A test that fails without a GPU, and is listed, counts with what it launched until then.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch


class Variants:
    """A plugin for pytest: the GPU's tests, each on the CPU, and the keys under which Triton would keep what it compiles."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], str] = {}  # (kernel, key) -> the file of the first test that needs it
        self.file = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        import conftest
        import paths

        conftest.HAS_GPU = True  # as far as the choice of tests goes
        on_gpu, in_its_place = paths.GPU.values[0], paths.Path("auto", "cpu")
        items[:] = [item for item in items if item.get_closest_marker("gpu") is not None]
        for item in items:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            on_it = [name for name, value in parameters.items() if isinstance(value, paths.Path) and value == on_gpu]
            parameters.update(dict.fromkeys(on_it, in_its_place))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self.file = item.path.name
        with self.recording():
            return (yield)

    def recording(self) -> ExitStack:
        """Every call that the C++ kernel serves is planned and specialised for the Triton kernels as well."""
        from compiled import TARGETS
        from stub_driver import StubDriver
        from triton.runtime import JITFunction, driver

        from fusedloss.backends import cpu, cpu_prepared
        from fusedloss.backends import triton as ours
        from fusedloss.backends.triton import launching

        def both(of_triton: Any, of_cpu: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                of_triton(*args, **kwargs)
                return of_cpu(*args, **kwargs)

            return call

        def record(of: launching.Launch, _: torch.device, arguments: dict[str, Any]) -> None:
            of.function.warmup(**of.constants, **of.own(arguments), grid=(of.cut.n_programs,))

        def keep(function: Any, key: str, *_: Any) -> None:
            self.found.setdefault((function.__name__, key), self.file)

        stack = ExitStack()
        for patch in (
            mock.patch.object(cpu, "forward", both(ours.forward, cpu.forward)),
            mock.patch.object(cpu, "backward", both(ours.backward, cpu.backward)),
            mock.patch.object(cpu, "scale_gradient", both(ours.scale_gradient, cpu.scale_gradient)),
            mock.patch.object(cpu_prepared, "prepare", return_value=None),  # known calls launch what they did before they were
            mock.patch.object(launching, "launch", record),
            mock.patch.object(driver, "_active", StubDriver(TARGETS["sm_90"])),
            mock.patch.object(JITFunction, "_do_compile", keep),
        ):
            stack.enter_context(patch)
        return stack

    def add_streams_and_graphs(self) -> None:
        """The calls of test_gpu.py, whose tests need more of a GPU than its kernels."""
        import test_gpu

        self.file = "test_gpu.py"
        with self.recording():
            for case in test_gpu.CASES:
                test_gpu.run(case, *test_gpu.make(case, device="cpu"))


def count(arguments: list[str]) -> Variants:
    variants = Variants()
    options = ["-m", "gpu", "-p", "no:cacheprovider", "--tb=line", "--ignore=tests/test_gpu.py"]
    status = pytest.main([*options, *arguments], plugins=[variants])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        sys.exit(f"nothing was counted: pytest ended with status {int(status)}")
    if not arguments:
        variants.add_streams_and_graphs()
    return variants


def main(arguments: list[str]) -> int:
    found = count(arguments).found
    for kernel, n in Counter(kernel for kernel, _ in found).most_common():
        print(f"{n:5}  {kernel}")
    for file, n in Counter(found.values()).most_common():
        print(f"{n:5}  first in {file}")
    print(f"{len(found):5}  kernel variants")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
