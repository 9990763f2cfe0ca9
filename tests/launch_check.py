"""What a launch really gives to the driver: a stub of libcuda behind Triton's own launcher, every kernel, the first call and the
calls after it that go past Triton's. test_launches.py runs this file; its argument is the folder of the stub.

    python tests/launch_check.py FOLDER ["ragged rows" ...]
    python tests/launch_check.py FOLDER --swap            # must fail: two arguments of the later calls change places
"""

import argparse
import ctypes
import importlib
import struct
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import compiled_cases
import torch
from compiled import FACTS, TARGETS
from stub_driver import StubDriver
from triton.runtime import driver

import fusedloss
from fusedloss.backends import triton as backend
from fusedloss.backends.triton import launching

STREAM = 0xABCD00
CASES = (  # of compiled_cases.py: every kernel, groups with and without tensors, numbers, slices
    "ticket",
    "ragged rows",
    "slices of ragged rows, all options",
    "slices, fp64, smoothing",
    "fp16, none",
    "recompute, shared tile",
    "probabilities, packed rows",
    "topk of a fraction, shared tile",
    "selection",
    "one row a program",
)
FINISHED = "one row a program"  # as if its sums were added up by a launch of their own
BYTES = {"i1": 1, "i8": 1, "u1": 1, "u8": 1, "i16": 2, "i32": 4, "u32": 4, "fp32": 4, "i64": 8, "u64": 8, "fp64": 8}


class LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("n_attributes", ctypes.c_uint),
    )


class Launched(ctypes.Structure):
    """Launch of cuda_stub.c."""

    _fields_ = (
        ("n_launches", ctypes.c_long),
        ("config", LaunchConfig),
        ("function", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 128),
    )


class Driver(StubDriver):
    """With what Triton's driver for NVIDIA's GPUs has to load and to launch, on the stub of libcuda."""

    def __init__(self) -> None:
        super().__init__(TARGETS["sm_90"], device=0, stream=STREAM)
        module = importlib.import_module("triton.backends.nvidia.driver")
        self.utils = module.CudaUtils()
        self.launcher_cls = module.CudaLauncher


def flattened(value: Any, kind: Any) -> list[tuple[str, Any]]:
    """(type, value) of every number and tensor of an argument that the compiled kernel still takes."""
    if isinstance(kind, tuple):
        return [leaf for part, of in zip(value, kind, strict=True) for leaf in flattened(part, of)]
    return [] if kind == "constexpr" else [(kind, value)]


def bits(kind: str, value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if kind in ("fp32", "fp64"):
        return int.from_bytes(struct.pack("<f" if kind == "fp32" else "<d", value), "little")
    return value & ((1 << 8 * BYTES[kind]) - 1)


class Check:
    def __init__(self, stub: ctypes.CDLL, swap: bool) -> None:
        self.stub, self.swap = stub, swap
        self.stub.stub_last_launch.restype = ctypes.POINTER(Launched)
        self.launch = launching.launch
        self.checked: dict[str, int] = {}

    def __call__(self, of: launching.Launch, device: torch.device, arguments: dict[str, Any]) -> None:
        """Launches twice, as a first and as a later call, and compares both with what was to be launched."""
        of.compiled.clear()
        self.expect([])  # the first launch compiles: only then is it known what the kernel takes
        self.launch(of, device, arguments)
        (kernel,) = of.compiled.values()
        everything = {**of.constants, **of.own(arguments)}
        leaves = [leaf for name, kind in kernel.src.signature.items() for leaf in flattened(everything[name], kind)]
        expected = [bits(*leaf) for leaf in leaves]
        self.expect([8 if kind.startswith("*") else BYTES[kind] for kind, _ in leaves])
        of.compiled.clear()
        self.compare(of, device, arguments, kernel.function, expected, "first call")
        if self.swap:
            swapped = list(expected)
            swapped[0], swapped[1] = expected[1], expected[0]
            expected = swapped
        self.compare(of, device, arguments, kernel.function, expected, "later call")
        self.checked[of.cut.kernel] = self.checked.get(of.cut.kernel, 0) + 1

    def expect(self, sizes: list[int]) -> None:
        self.stub.stub_expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))

    def compare(
        self, of: launching.Launch, device: torch.device, arguments: dict[str, Any], function: int, expected: list[int], what: str
    ) -> None:
        before = self.stub.stub_last_launch().contents.n_launches
        self.launch(of, device, arguments)
        found = self.stub.stub_last_launch().contents
        assert found.n_launches == before + 1, f"{of.cut.kernel}, {what}: {found.n_launches - before} launches"
        assert list(found.config.grid) == [of.cut.n_programs, 1, 1], f"{of.cut.kernel}, {what}: grid {list(found.config.grid)}"
        assert list(found.config.block) == [32 * of.cut.num_warps, 1, 1], f"{of.cut.kernel}, {what}: {list(found.config.block)}"
        assert found.config.stream == STREAM
        assert found.function == function, f"{of.cut.kernel}, {what}: another kernel's function"
        given = list(found.arguments)[: len(expected)]
        wrong = [i for i, pair in enumerate(zip(given, expected, strict=True)) if pair[0] != pair[1]]
        assert not wrong, f"{of.cut.kernel}, {what}: arguments {wrong}: {given}, expected {expected}"


def main(folder: str, cases: list[str], swap: bool) -> None:
    check = Check(ctypes.CDLL(f"{folder}/libcuda.so.1", mode=ctypes.RTLD_GLOBAL), swap)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", Driver()))
        stack.enter_context(mock.patch.object(launching, "launch", check))
        stack.enter_context(mock.patch.object(launching, "keeps_compiled", return_value=True))
        stack.enter_context(fusedloss.backend("triton"))
        for case in cases or CASES:
            facts = FACTS["sm_90"]._replace(flushes_l2=case == FINISHED)
            with mock.patch.object(backend, "device_facts", return_value=facts):
                for _ in range(3):  # the third call is a known one
                    compiled_cases.call(*compiled_cases.CASES[case]).sum().backward()
    for kernel, n in sorted(check.checked.items()):
        print(f"{n:3} {kernel}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--swap", action="store_true")
    main(**vars(parser.parse_intermixed_args()))  # FOLDER --swap CASE, too
