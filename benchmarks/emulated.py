"""Issue 6's marks: what a forward and backward execute and ask of memory, counted by an emulator of the compiled PTX.

The emulator (ptxsim) is a development tool beside the checkout, never a dependency: `emulator()` is None without it.

instructions  thread instructions per logit: warp instructions of all own launches x 32 / logits
passes        32-byte sectors between SM and L2, of all buffers of all own launches / bytes of the logits
widths        narrowest and widest access, in bytes per thread, of the lines that move a quarter of the logits or more
"""

import sys
import warnings
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from fusedloss.kernels.constants import N_COUNTERS
from torch import Tensor
from torch_ops import TorchCost

import fusedloss
from fusedloss.geometry import DeviceFacts

BENCHMARKS = Path(__file__).parent
sys.path.insert(0, str(BENCHMARKS.parent / "tests"))
from compiled import report  # noqa: E402

SHARED = BENCHMARKS.parents[1] / "shared"
SECTOR_BYTES = 32
MAIN_SHARE = 0.25  # of one pass: a source line that moves as much belongs to a main loop
WIDTH_SHARE = 0.01  # of one pass: what moves less is an edge of a row
MARKS = {
    "4096 x 10": (4096, 10, torch.float32),
    "2048 x 1000": (2048, 1000, torch.bfloat16),
    "1024 x 32000": (1024, 32000, torch.bfloat16),
    "512 x 50257": (512, 50257, torch.bfloat16),
    "256 x 128256": (256, 128256, torch.bfloat16),
}


@dataclass(frozen=True)
class Mark:
    """One implementation at one shape."""

    instructions: float
    passes: float
    narrowest: int
    widest: int
    launches: int
    torch_launches: int
    syncs: int
    spills: int  # instructions, in all kernels


def emulator() -> ModuleType | None:
    """The emulator's module, or None where it is not beside the checkout."""
    if not (SHARED / "ptxsim").is_dir():
        return None
    if str(SHARED) not in sys.path:
        sys.path.insert(0, str(SHARED))
    import ptxsim

    return ptxsim


def problem(n_rows: int, n_cols: int, dtype: torch.dtype, *pixels: int) -> tuple[Tensor, Tensor]:
    """Logits and targets, one in seven of them ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n_rows, n_cols, *pixels, generator=generator).mul_(2).to(dtype).requires_grad_()
    target = torch.randint(n_cols, (n_rows, *pixels), generator=generator)
    target.view(-1)[::7] = -100
    return logits, target


def measure(loss: Any, n_rows: int, n_cols: int, dtype: torch.dtype, *pixels: int) -> Mark:
    """Runs `loss` and its backward on an emulated sm_90."""
    ptxsim = emulator()
    assert ptxsim is not None
    logits, target = problem(n_rows, n_cols, dtype, *pixels)
    one_pass = logits.numel() * logits.element_size()
    with ExitStack() as stack:
        # The emulator leaves files to the garbage collector.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", ResourceWarning)
        # Slices of a row wait for each other: as many programs at once as an H100 has SMs.
        gpu = stack.enter_context(ptxsim.emulated_gpu("sm_90", poison_empty=False, resident=DeviceFacts().n_sms))
        stack.enter_context(fusedloss.backend("triton"))
        # On a GPU the ticket of a stream is made once; on CPU tensors it would be made in every launch.
        ticket = torch.zeros((N_COUNTERS,), dtype=torch.int32)
        stack.enter_context(mock.patch("fusedloss.backends.triton.given.ticket", return_value=ticket))
        cost = stack.enter_context(TorchCost(logits.numel()))
        loss(logits, target).backward()
    sectors = sum(launch.load_sectors + launch.store_sectors + launch.atomic_sectors for launch in gpu.launches)
    widths = {width for launch in gpu.launches for width in _main_widths(launch, one_pass)}
    return Mark(
        instructions=32 * sum(launch.warp_instructions for launch in gpu.launches) / logits.numel(),
        passes=SECTOR_BYTES * sectors / one_pass,
        narrowest=min(widths),
        widest=max(widths),
        launches=len(gpu.launches),
        torch_launches=cost.launches,
        syncs=cost.syncs,
        spills=sum(report(launch.compiled, "sm_90").spills for launch in gpu.launches),
    )


def _main_widths(launch: Any, one_pass: int) -> set[int]:
    """Bytes per thread of the global accesses of a launch's main loops."""
    moved: defaultdict[Any, defaultdict[int, int]] = defaultdict(lambda: defaultdict(int))
    for access in launch.memory_instructions:
        if "global" in access["cls"] or access["cls"] == "cp.async":
            moved[access["loc"]][access["bytes"] // access["lanes"]] += access["dbytes"]
    lines = [widths for widths in moved.values() if sum(widths.values()) >= MAIN_SHARE * one_pass]
    return {width for widths in lines for width, n_bytes in widths.items() if n_bytes >= WIDTH_SHARE * one_pass}
