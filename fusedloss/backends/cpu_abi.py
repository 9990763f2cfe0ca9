"""The compiled C++ kernel: where it is found, and what its functions take.

The fields of `Call`, `Extras` and `Kind`, `plan.NUMBERS`, and the names that stand for numbers are those of kernels/cpu/problem.h
in the same order; tests/test_cpu.py compares the two files.
"""

import ctypes
import struct
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NewType, get_type_hints

import torch

from fusedloss import environment
from fusedloss.plan import NUMBERS

LIBRARY_NAME = "fusedloss_cpu.so"

ABI = 9
ISA_NAMES = ("auto", "baseline", "avx2", "avx512", "avx512bf16")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "sum", "mean", "max", "topk")
TARGET_KINDS = ("int64", "uint8", "probabilities", "probabilities_as_logits")

Address = NewType("Address", int)
NULL = Address(0)


class Call(NamedTuple):
    """What every call has of its own."""

    loss: Address
    saved: Address
    dlogits: Address
    logits: Address
    target: Address
    weight: Address
    scale: float
    n_threads: int
    n_examples: int


class Extras(NamedTuple):
    """What few calls have."""

    row_stats: Address = NULL
    counts: Address = NULL
    target_b: Address = NULL
    lam: Address = NULL
    sample_weight: Address = NULL
    dloss: Address = NULL
    lam_factor: float = 1.0
    shard_stats: Address = NULL
    first_class: int = 0
    n_classes: int = 0


class Kind(NamedTuple):
    """What only shapes, strides, dtypes and options decide: the same for all calls alike."""

    smoothing: float
    plain: int
    ignore_index: int
    top_k: int
    top_k_is_fraction: int
    logits_dtype: int
    loss_dtype: int
    target_kind: int
    reduction: int
    isa: int
    fresh: int
    statistics: int
    rows_per_example: int
    n_middle: int
    one_block: int
    n_cols: int
    logits_outer: int
    logits_middle: int
    logits_row: int
    logits_col: int
    dlogits_outer: int
    dlogits_middle: int
    dlogits_row: int
    dlogits_col: int
    target_outer: int
    target_middle: int
    target_row: int
    target_col: int
    gomp_parallel: Address


def packing(fields: type) -> struct.Struct:
    codes = {Address: "Q", int: "q", float: "d"}
    return struct.Struct("=" + "".join(codes[kind] for kind in get_type_hints(fields).values()))


CALL, EXTRAS, FLOATS, KIND = packing(Call), packing(Extras), struct.Struct(f"={len(NUMBERS)}d"), packing(Kind)
NO_EXTRAS = EXTRAS.pack(*Extras())


class Functions(NamedTuple):
    forward: Any
    backward: Any


@dataclass(frozen=True, eq=False)
class Library:
    """The loaded kernel and what its calls need."""

    functions: Functions
    holding_gil: Functions  # for problems that one thread solves before another could make use of the lock
    isa: str
    requested_isa: int
    gomp_parallel: int
    path: str


def load() -> tuple[Library | None, str | None]:
    """The library, or why there is none."""
    path = _find()
    if path is None:
        return None, f"the compiled CPU kernel is missing: {_why_not_built()}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"the compiled CPU kernel does not load: {error}"
    size = CALL.size + EXTRAS.size + FLOATS.size + KIND.size
    # A library from before this number has no such function.
    if not hasattr(library, "fusedloss_abi") or library.fusedloss_abi() != ABI * 10000 + size:
        return None, f"the compiled CPU kernel {path} is of another version: build it again"
    library.fusedloss_best_isa.restype = ctypes.c_int64
    requested = ISA_NAMES.index(environment.choice("FUSEDLOSS_CPU_ISA", ISA_NAMES))
    best = library.fusedloss_best_isa()
    isa = ISA_NAMES[min(requested, best) if requested else best]
    functions, holding_gil = _functions(library), _functions(ctypes.PyDLL(str(path)))
    return Library(functions, holding_gil, isa, requested, _gomp_parallel(), str(path)), None


def _functions(library: ctypes.CDLL) -> Functions:
    forward, backward = library.fusedloss_forward, library.fusedloss_backward
    # No argtypes: bytes go as they are, addresses of their characters, and a conversion of each would take 1 % of a small call.
    forward.restype, backward.restype = ctypes.c_int64, None
    return Functions(forward, backward)


def _find() -> Path | None:
    spec = find_spec("fusedloss.kernels")
    folders = spec.submodule_search_locations if spec is not None else None
    return next((path for folder in folders or () if (path := Path(folder, "cpu", LIBRARY_NAME)).exists()), None)


def _why_not_built() -> str:
    checkout = Path(__file__).parents[2]
    if (checkout / "setup.py").exists():  # Python takes what is in the current folder before what pip installed
        return (
            f"none was built in {checkout}, whose sources are imported here; `pip install -e .` builds it there, "
            "with g++ or clang++; an installed fusedloss is found from any other folder"
        )
    return "the installation could not compile it; install g++ or clang++, then fusedloss again"


def _gomp_parallel() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that torch has loaded, 0 without one; kernels/cpu/threads.h says why."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError):
        return 0
