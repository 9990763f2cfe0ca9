"""Cross-compiles the launches of a call for GPUs that are not here, and reads registers, spills and access widths."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from stub_driver import StubDriver
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import fusedloss
from fusedloss import known
from fusedloss.backends import triton as backend
from fusedloss.backends.triton import launching
from fusedloss.geometry import DeviceFacts

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# GPUs of desktops and notebooks, for which kernels must compile as well.
OTHER_TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
# What a plan asks of each: A100, H100 and B200 SXM, MI300X; T4, RTX 4090, RTX 5090, RX 7900 XTX.
FACTS = {
    "sm_80": DeviceFacts(108, 32),
    "sm_90": DeviceFacts(132, 32),
    "sm_100": DeviceFacts(148, 32),
    "gfx942": DeviceFacts(304, 64, is_nvidia=False, flushes_l2=True),
    "sm_75": DeviceFacts(40, 32),
    "sm_89": DeviceFacts(128, 32),
    "sm_120": DeviceFacts(170, 32),
    "gfx1100": DeviceFacts(48, 32, is_nvidia=False),
}
# Earlier Triton versions leave a few spill instructions in variants that take all registers they can have, and make of some
# kernels a percent or two more instructions.
IS_EARLIER_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
ALLOWED_SPILLS = 4 if IS_EARLIER_TRITON else 0
# On AMD more are those for matrices, by way of copies: Triton 3.6 needs two of them for pixels of many classes on gfx942.
ALLOWED_REGISTERS = 258 if IS_EARLIER_TRITON else 256


@dataclass(frozen=True)
class Launch:
    """One launch of a triton.jit function, recorded instead of run."""

    function: Any
    n_programs: int
    arguments: dict[str, Any]  # num_warps and the like among them

    @property
    def kernel(self) -> str:
        return self.function.__name__


@dataclass(frozen=True)
class Report:
    """What the compiler made of one kernel for one target."""

    registers: int
    spills: int  # registers, or instructions that store or load one, spilled to memory
    shared_bytes: int
    loads: dict[int, int]  # bytes of a global load, per thread -> instructions with that width
    stores: dict[int, int]

    @property
    def load_bytes(self) -> int:
        """Width of the widest global load."""
        return max(self.loads, default=0)

    @property
    def store_bytes(self) -> int:
        return max(self.stores, default=0)


def launches(monkeypatch: pytest.MonkeyPatch, target: str, call: Callable[[], torch.Tensor]) -> list[Launch]:
    """Our launches of `call` and of its backward on a GPU of this kind."""
    recorded: list[Launch] = []

    def record(launch: launching.Launch, _: torch.device, arguments: dict[str, Any]) -> None:
        recorded.append(Launch(launch.function, launch.cut.n_programs, {**launch.constants, **launch.own(arguments)}))

    with monkeypatch.context() as patch, fusedloss.backend("triton"):
        patch.setattr(backend, "device_facts", lambda _: FACTS[target])
        patch.setattr(launching, "launch", record)
        patch.setattr(known, "KNOWN", {})  # of another GPU
        call().sum().backward()
    return recorded


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Anybody's launches: kernel[grid](...) of a triton.jit function is recorded instead of run."""
    recorded: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        recorded.append(Launch(self, grid(arguments)[0] if callable(grid) else grid[0], arguments))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", record)
        yield recorded


def compile_for(launch: Launch, target: str, device: str | None = None) -> Any:
    """The compiled kernel, specialised as Triton's launcher does; options that the target refuses raise. device: the key by which
    Triton finds what it has compiled, by default the target."""
    with mock.patch.object(driver, "_active", StubDriver({**TARGETS, **OTHER_TARGETS}[target], device or target)):
        return launch.function.warmup(**launch.arguments, grid=(launch.n_programs,))


def variants(recorded: list[Launch], target: str) -> set[tuple[str, str]]:
    """The kernels that Triton would compile for these launches, by name and key; nothing is compiled."""
    found: set[tuple[str, str]] = set()

    def keep(function: Any, key: str, *_: Any) -> None:
        found.add((function.__name__, key))

    with mock.patch.object(triton.JITFunction, "_do_compile", keep):
        for launch in recorded:
            compile_for(launch, target, device=f"none for which {target} was compiled")
    return found


def report(kernel: Any, target: str) -> Report:
    shared_bytes = kernel.metadata.shared
    if target.startswith("gfx"):
        return _amd_report(kernel.asm["amdgcn"], shared_bytes)
    return _nvidia_report(kernel.asm["cubin"], shared_bytes)


def _amd_report(assembly: str, shared_bytes: int) -> Report:
    def metadata(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly).group(1))

    widths = {"ushort": 2, "short": 2, "ubyte": 1, "byte": 1, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}

    def count(verb: str) -> dict[int, int]:
        names = re.findall(rf"\b(?:global|buffer)_{verb}_(dwordx?\d?|u?short|u?byte)", assembly)
        return dict(Counter(widths[name] for name in names))

    # The compiler's own counts are of more: scalar registers spill into lanes of vector registers, and these into accumulation
    # registers. What goes to memory goes to a thread's scratch, of so many bytes.
    spills = metadata("private_segment_fixed_size") // 4
    return Report(metadata("vgpr_count"), spills, shared_bytes, count("load"), count("store"))


@cache  # the disassembler takes as long as a compilation, and the same small kernels accompany many others
def _nvidia_report(cubin: bytes, shared_bytes: int) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = _cuobjdump("--dump-resource-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    opcodes = [opcode.split(".") for opcode in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass)]
    widths = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}

    def count(*names: str) -> dict[int, int]:
        accesses = [parts for parts in opcodes if parts[0] in names]
        return dict(Counter(next((n for width, n in widths.items() if width in parts), 4) for parts in accesses))

    spills = sum(parts[0] in ("STL", "LDL") for parts in opcodes)
    registers = int(re.search(r"REG:(\d+)", resources).group(1))
    return Report(registers, spills, shared_bytes, count("LDG", "LDGSTS"), count("STG"))


def _cuobjdump(*arguments: str) -> str:
    return subprocess.run([_cuobjdump_path(), *arguments], capture_output=True, text=True, check=True).stdout


@cache
def _cuobjdump_path() -> str:
    """It ships inside Triton's wheel."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
