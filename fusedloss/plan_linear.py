"""How the rows of a loss fused with the last linear layer are cut into chunks: pure functions of shapes and dtypes."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fusedloss.geometry import DeviceFacts, operands
from fusedloss.plan import Options
from fusedloss.plan_triton import forward_cuts, holds_rows

# Bytes of a chunk's logits, and rows of a chunk at least: each chunk reads the weight and its gradient again. More rows are
# faster and hold more: `chunk_rows` is the caller's to raise.
CPU_BYTES, CPU_ROWS = 64 << 20, 256
GPU_BYTES, GPU_ROWS = 250_000_000, 2048
# Where only losses are made, the CPU takes more rows, and a block of their classes at a time. Each matmul packs the weight anew,
# which takes 12 ms for 64 MB: all losses of 2048 x 512 -> 32000 in float32 take 402 ms so, and 444 in four chunks of whole rows.
# Blocks of 8 or 16 MB fit the cache, but lose where others use it too; from 32 MiB on glibc gives an allocation fresh pages.
# Rows of few classes are more than that, for 1 MB of logits: 10^6 x 16 -> 10 took 1.3 times as long in chunks of 2048.
BLOCK_ROWS, BLOCK_BYTES = 2048, 32_000_000


class Chunks(NamedTuple):
    """The rows that are not left out, and their chunks: all of one size but the last; and the blocks of a chunk's classes."""

    n_rows: int
    chunk_rows: int
    n_chunks: int
    block_classes: int  # of which a chunk's logits exist at a time

    def n_logits(self) -> int:
        return self.chunk_rows * self.block_classes


@dataclass(frozen=True)
class LinearPlan:
    """Which path a loss fused with the last linear layer takes, why, and what it will cost.

    Attributes:
        backend: of the loss: "triton", "cpu", "reference" or "torch".
        reason: why this backend, in words.
        strategy: "forward only"; "fused", the gradients are made in the forward; "recompute", the backward computes the logits
            again; "unfused", PyTorch's layer, which stores the logits.
        chunk_rows, n_chunks: rows of a chunk, and chunks of the forward, as if no row were ignored.
        matmuls: per counted row, forward and backward together: each with n_features * n_classes products.
        held_bytes: memory besides inputs, gradients and what has one number per row: logits, and sums in float32.
    """

    backend: str
    reason: str
    strategy: str
    chunk_rows: int
    n_chunks: int
    matmuls: float
    held_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.backend}: {self.reason}\n"
            f"  strategy  {self.strategy}\n"
            f"  chunks    {self.n_chunks} of {self.chunk_rows} rows\n"
            f"  matmuls   {self.matmuls:g} per counted row\n"
            f"  memory    {self.held_bytes:,} bytes besides inputs and gradients"
        )


# Sums over as many chunks may be rounded to bfloat16 or float16 after each: with the rounding of the logits' gradient the error
# is 1.4 roundings; over 4 chunks it would be 1.8, over 256 over 11. Over more chunks the weight's gradient is summed in float32.
MAX_ROUNDED_SUMS = 2


def leaves_rows_out(backend: str, asked: bool) -> bool:
    """Whether rows that do not count are left out of the matmuls: a GPU's host would have to wait for their number."""
    return asked or backend != "triton"


def sums_in_float32(dtype: torch.dtype, n_chunks: int, asked: bool) -> bool:
    """Whether the gradient of a weight of this dtype is summed in float32 and rounded once."""
    return dtype in (torch.bfloat16, torch.float16) and (asked or n_chunks > MAX_ROUNDED_SUMS)


# oneDNN makes the gradient of a bfloat16 weight in blocks of classes, and some numbers of classes fall into bad ones: without the
# last 81 of GPT-2's 50257 it takes 95 ms for 512 rows instead of 119. From 50257 to 50272 the gain was 10 to 20 %; at six other
# numbers from 21843 to 128257 between a loss of 6 % and a gain of 6 %, mostly 3: the measurement's noise.
BLOCK_CLASSES, MANY_CLASSES = 256, 1 << 14


def class_ranges(n_classes: int, dtype: torch.dtype, backend: str) -> list[slice]:
    """The classes whose rows of the weight's gradient a matmul makes; all of them for most calls."""
    even = n_classes // BLOCK_CLASSES * BLOCK_CLASSES
    if backend != "cpu" or dtype != torch.bfloat16 or n_classes < MANY_CLASSES or even == n_classes:
        return [slice(0, n_classes)]
    return [slice(0, even), slice(even, n_classes)]


def overwrites(n_rows: int, n_classes: int, dtype: torch.dtype, soft: bool, options: Options, device: DeviceFacts) -> bool:
    """Whether Triton's kernels write the gradient of a chunk's logits in their place; soft: of class probabilities."""
    shape, strides = torch.Size((n_rows, n_classes)), (n_classes, 1)
    t = operands(shape, strides, strides, strides if soft else None, dtype.itemsize)
    options = options._replace(reduction="sum")
    return Options("sum").fuses_gradient(dtype) and holds_rows(forward_cuts(t, options, device).main)


def chunks_of(
    n_rows: int, n_classes: int, dtype: torch.dtype, backend: str, asked: int | None, losses_only: bool = False
) -> Chunks:
    """asked: rows of a chunk that the caller wants, of all classes then; losses_only: of class indices, no gradient."""
    row_bytes = max(1, n_classes) * dtype.itemsize
    block_classes = n_classes
    if asked is not None:
        chunk_rows = min(asked, n_rows)
    elif losses_only and backend == "cpu" and n_rows * row_bytes > BLOCK_BYTES:
        chunk_rows = _even(n_rows, max(BLOCK_ROWS, BLOCK_BYTES // 32 // row_bytes))
        block = _even(n_classes, max(1, BLOCK_BYTES // (chunk_rows * dtype.itemsize)))
        block_classes = min(n_classes, -(-block // 16) * 16)  # whole lines of the cache
    else:
        n_bytes, least = (CPU_BYTES, CPU_ROWS) if backend == "cpu" else (GPU_BYTES, GPU_ROWS)
        chunk_rows = _even(n_rows, max(least, n_bytes // row_bytes))
    return Chunks(n_rows, chunk_rows, -(-n_rows // max(1, chunk_rows)), block_classes)


def _even(n: int, most: int) -> int:
    """Rows of a chunk, or classes of a block, so that the last has as many as the others."""
    return -(-n // max(1, -(-n // most)))
