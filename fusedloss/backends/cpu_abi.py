"""The compiled C++ kernel: where it is found, and what its functions take.

The fields of `Call`, `Extras` and `Kind`, `plan.NUMBERS`, and the names that stand for numbers are those of kernels/cpu/problem.h
in the same order; tests/test_cpu_abi.py compares the two files.
"""

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, NewType, get_type_hints

import torch
from torch import Tensor

from fusedloss import environment
from fusedloss.plan import NUMBERS

LIBRARY_NAME = "fusedloss_cpu.so"

ABI = 10
ISA_NAMES = ("auto", "baseline", "avx2", "avx512", "avx512bf16")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "sum", "mean", "max", "topk")
TARGET_KINDS = ("int64", "uint8", "probabilities", "probabilities_as_logits")

Address = NewType("Address", int)


class Call(NamedTuple):
    """What every call has of its own."""

    loss: Tensor | None
    saved: Tensor | None
    dlogits: Tensor | None
    row_stats: Tensor | None
    counts: Tensor | None
    logits: Tensor | None
    target: Tensor | None
    weight: Tensor | None
    dloss: Tensor | None
    scale: float
    n_threads: int
    n_examples: int


class Extras(NamedTuple):
    """What few calls have besides."""

    target_b: Tensor | None
    lam: Tensor | None
    sample_weight: Tensor | None
    shard_stats: Tensor | None
    lam_factor: float
    first_class: int
    n_classes: int


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


NUMBERS_PACKED = struct.Struct(f"={len(NUMBERS)}d")
KIND = struct.Struct("=" + "".join({Address: "Q", int: "q", float: "d"}[kind] for kind in get_type_hints(Kind).values()))


class Functions(NamedTuple):
    """Of the library. Arguments: Kind and its numbers, packed; whether Python's other threads wait meanwhile, as they should for
    problems that are solved before another could make use of the lock; the fields of a Call; those of Extras, or nothing."""

    forward: Callable[..., int]
    backward: Callable[..., int]
    scale_gradient: Callable[..., int]


@dataclass(frozen=True, eq=False)
class Library:
    """The loaded kernel and what its calls need."""

    functions: Functions
    isa: str
    requested_isa: int
    gomp_parallel: int
    path: str


def load(check_memory: Callable[[Tensor], None]) -> tuple[Library | None, str | None]:
    """The library, or why there is none. check_memory raises where a tensor's memory is not there."""
    path = _find()
    if path is None:
        return None, f"the compiled CPU kernel is missing: {_why_not_built()}"
    try:
        library = ctypes.PyDLL(str(path))
    except OSError as error:
        return None, f"the compiled CPU kernel does not load: {error}"
    # A library from before this number has no such function.
    if not hasattr(library, "fusedloss_abi") or library.fusedloss_abi() != ABI * 10000 + NUMBERS_PACKED.size + KIND.size:
        return None, f"the compiled CPU kernel {path} is of another version: build it again"
    library.fusedloss_best_isa.restype = ctypes.c_int64
    requested = ISA_NAMES.index(environment.choice("FUSEDLOSS_CPU_ISA", ISA_NAMES))
    best = library.fusedloss_best_isa()
    isa = ISA_NAMES[min(requested, best) if requested else best]
    function = library.fusedloss_function
    function.argtypes, function.restype = [ctypes.c_char_p, ctypes.py_object], ctypes.py_object
    functions = Functions(*[function(name.encode(), check_memory) for name in Functions._fields])
    return Library(functions, isa, requested, _gomp_parallel(), str(path)), None


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
