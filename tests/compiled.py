"""Cross-compiles the launches of a call for GPUs that are not here, and reads registers, spills and access widths."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fusedloss
from fusedloss.backends import triton as launcher
from fusedloss.plan_triton import DeviceFacts

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Launch:
    kernel: str
    n_programs: int
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """What the compiler made of one kernel for one target."""

    registers: int
    spills: int  # registers, or instructions that store or load one, spilled to memory
    load_bytes: int  # width of the widest global load, per thread
    store_bytes: int


def launches(monkeypatch: pytest.MonkeyPatch, target: str, call: Callable[[], torch.Tensor]) -> list[Launch]:
    """The launches of `call` and of its backward on a GPU of this kind, recorded instead of run."""
    recorded: list[Launch] = []
    facts = DeviceFacts(warp_size=TARGETS[target].warp_size)
    with monkeypatch.context() as patch, fusedloss.backend("triton"):
        patch.setattr(launcher, "device_facts", lambda _: facts)
        patch.setattr(
            launcher, "_launch", lambda kernel, n_programs, _, arguments: recorded.append(Launch(kernel, n_programs, arguments))
        )
        call().sum().backward()
    return recorded


def compile_for(launch: Launch, target: str) -> Any:
    """The compiled kernel, specialised as Triton's launcher would: divisibility by 16, ints equal to 1, and None."""
    function = launcher._kernels()[launch.kernel]
    options = {name: launch.arguments[name] for name in ("num_warps",)}
    signature, constexprs, attributes = {}, {}, {}
    for index, parameter in enumerate(function.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constexprs[parameter.name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        else:
            signature[parameter.name] = parameter.annotation_type or ("i32" if -(2**31) <= value < 2**31 else "i64")
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constexprs, attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


def report(kernel: Any, target: str) -> Report:
    return _amd_report(kernel.asm["amdgcn"]) if target == "gfx942" else _nvidia_report(kernel.asm["cubin"])


def _amd_report(assembly: str) -> Report:
    def metadata(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly).group(1))

    widths = {"ushort": 2, "short": 2, "ubyte": 1, "byte": 1, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}

    def widest(verb: str) -> int:
        names = re.findall(rf"\b(?:global|buffer)_{verb}_(dwordx?\d?|u?short|u?byte)", assembly)
        return max((widths[name] for name in names), default=0)

    # Scalar registers spill into lanes of vector registers, not to memory.
    return Report(metadata("vgpr_count"), metadata("vgpr_spill_count"), widest("load"), widest("store"))


def _nvidia_report(cubin: bytes) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = _cuobjdump("--dump-resource-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass)

    def widest(name: str) -> int:
        widths = [0]
        for opcode in opcodes:
            parts = opcode.split(".")
            if parts[0] == name:
                widths.append(next((bits // 8 for bits in (256, 128, 64) if str(bits) in parts), 4))
        return max(widths)

    spills = sum(opcode.split(".")[0] in ("STL", "LDL") for opcode in opcodes)
    return Report(int(re.search(r"REG:(\d+)", resources).group(1)), spills, widest("LDG"), widest("STG"))


def _cuobjdump(*arguments: str) -> str:
    return subprocess.run([_cuobjdump_path(), *arguments], capture_output=True, text=True, check=True).stdout


@cache
def _cuobjdump_path() -> str:
    """It ships inside Triton's wheel."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
