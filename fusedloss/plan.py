"""How a problem is cut into tiles: pure functions of shapes, dtypes, options and device facts. They need no GPU."""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch

# Bytes of one vector access (LDG.128 / global_load_dwordx4).
VECTOR_BYTES = 16
# Columns of one row that a program holds at a time: 32 per thread with 8 warps, which no target spills.
ROW_BLOCK = 8192
# Rows with more columns than this get a program of their own; narrower ones share a two-dimensional tile.
MAX_SHARED_ROW_COLS = 512
# Elements of a shared tile: 8 per thread with 8 warps.
TILE_ELEMENTS = 2048
# Up to this many elements one program does everything, so that no ticket is needed.
SINGLE_PROGRAM_ELEMENTS = 16384
# Rows per tile when the rows, not the classes, are contiguous (segmentation).
SPATIAL_BLOCK_ROWS = 256

ROW_REDUCTIONS = ("max", "topk")  # reductions that select rows by their loss
FUSED_BACKENDS = ("cpu",)  # backends whose forward can write the gradient as well


class Options(NamedTuple):
    """What the caller asked for, checked and normalised; the same for every backend."""

    reduction: str = "mean"  # none, sum, mean, max, topk
    ignore_index: int = -100
    label_smoothing: float = 0.0  # in [0, 1]
    top_k: int = 0  # rows averaged by "topk"; 0: top_k_fraction tells
    top_k_fraction: float = 0.0  # of the counted rows, in (0, 1]
    scale: float = 1.0  # factor of the loss and its gradient


class Geometry(NamedTuple):
    """Logits as n_outer blocks of n_inner rows of n_cols classes; strides in elements. (N, C) has n_outer == 1."""

    n_outer: int
    n_inner: int
    n_cols: int
    outer_stride: int
    row_stride: int
    col_stride: int

    @property
    def n_rows(self) -> int:
        return self.n_outer * self.n_inner


class DeviceFacts(NamedTuple):
    """What the plan asks of the hardware. The default is an H100 SXM."""

    n_sms: int = 132
    capability: tuple[int, int] = (9, 0)
    l2_bytes: int = 50 << 20


@dataclass(frozen=True)
class Tile:
    """One launch: each program handles block_rows x block_cols logits at a time."""

    kernel: str  # name of the @triton.jit function
    block_rows: int
    block_cols: int
    num_warps: int
    n_programs: int
    rowwise: bool  # one program per row (and per block of columns in the backward), vector accesses at any row start


@dataclass(frozen=True)
class Plan:
    """Which path a call takes, why, and what it will cost.

    Attributes:
        backend: "triton" or "reference".
        reason: why this backend, in words.
        strategy: "forward only", "recompute", or "autograd" for the reference.
        forward, backward: the launches; None on the reference path.
        copies_logits: the logits are copied once because no pair of strides describes their rows.
        read_bytes, write_bytes: predicted traffic of the logits and their gradient, forward and backward together.
        launches: predicted kernel launches, forward and backward together; None on the reference path.
    """

    backend: str
    reason: str
    strategy: str = "autograd"
    forward: Tile | None = None
    backward: Tile | None = None
    copies_logits: bool = False
    read_bytes: int | None = None
    write_bytes: int | None = None
    launches: int | None = None

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reason}", f"  strategy  {self.strategy}"]
        for name, tile in (("forward", self.forward), ("backward", self.backward)):
            if tile is not None:
                lines.append(
                    f"  {name:9s} {tile.kernel}, {tile.n_programs} programs of {tile.block_rows} x {tile.block_cols}, "
                    f"{tile.num_warps} warps"
                )
        if self.copies_logits:
            lines.append("  copy      the logits are copied: their spatial dimensions do not collapse into one stride")
        if self.read_bytes is not None and self.write_bytes is not None:
            lines.append(f"  traffic   {self.read_bytes:,} bytes read, {self.write_bytes:,} bytes written")
            lines.append(f"  launches  {self.launches}")
        return "\n".join(lines)


def fuses_gradient(backend: str, reduction: str, dtype: torch.dtype) -> bool:
    """Whether the forward writes the gradient while it has the row at hand: the fused strategy, else recompute.

    "none", "max" and "topk" know a row's coefficient only after the forward. A gradient rounded to float16 before GradScaler's
    factor arrives underflows: p / N below 6e-8 would be 0.
    """
    return backend in FUSED_BACKENDS and reduction in ("sum", "mean") and dtype != torch.float16


def spatial_dims_collapse(logits: torch.Tensor) -> bool:
    """Whether the dims after (N, C) can be viewed as one, so that the kernels read (N, C, d1, ...) where it lies."""
    sizes, strides = logits.shape[2:], logits.stride()[2:]
    kept = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(kept))


def geometry(logits: torch.Tensor) -> Geometry:
    """The geometry of logits (N, C) or (N, C, S)."""
    if logits.dim() == 2:
        n_rows, n_cols = logits.shape
        row_stride, col_stride = logits.stride()
        return Geometry(1, n_rows, n_cols, 0, row_stride, col_stride)
    n_outer, n_cols, n_inner = logits.shape
    outer_stride, col_stride, row_stride = logits.stride()
    if outer_stride == n_inner * row_stride or n_outer <= 1:  # channels_last, a single image, or none: one block of rows
        return Geometry(1, n_outer * n_inner, n_cols, 0, row_stride, col_stride)
    return Geometry(n_outer, n_inner, n_cols, outer_stride, row_stride, col_stride)


def _next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _shared_tile(kernel: str, g: Geometry, max_elements: int) -> Tile:
    cols = _next_power_of_2(g.n_cols)
    if g.row_stride == 1 and g.col_stride != 1:
        block_rows = min(SPATIAL_BLOCK_ROWS, _next_power_of_2(g.n_inner))
        block_cols = min(cols, TILE_ELEMENTS // block_rows)
    elif _next_power_of_2(g.n_rows) * cols <= max_elements:
        block_rows, block_cols = _next_power_of_2(g.n_inner), cols
    else:
        block_cols = min(cols, TILE_ELEMENTS)
        block_rows = min(TILE_ELEMENTS // block_cols, _next_power_of_2(g.n_inner))
    n_programs = g.n_outer * -(-g.n_inner // block_rows)
    num_warps = min(16, max(1, block_rows * block_cols // 256))
    return Tile(kernel, block_rows, block_cols, num_warps, max(1, n_programs), rowwise=False)


@lru_cache(maxsize=1024)
def forward_tile(g: Geometry, itemsize: int) -> Tile:
    """Cuts the forward of a problem whose logits have `itemsize` bytes."""
    if not _one_program_per_row(g):
        return _shared_tile("forward_tile_kernel", g, SINGLE_PROGRAM_ELEMENTS)
    block_cols, num_warps = _row_block(g.n_cols)
    return Tile("forward_row_kernel", 1, block_cols, num_warps, max(1, g.n_rows), rowwise=True)


@lru_cache(maxsize=1024)
def backward_tile(g: Geometry, grad: Geometry, itemsize: int) -> Tile:
    """Cuts the backward; `grad` is the geometry of the gradient, whose strides may differ from the logits'."""
    vector = VECTOR_BYTES // itemsize
    same_alignment = (g.row_stride - grad.row_stride) % vector == 0 and grad.col_stride == 1
    if not (_one_program_per_row(g) and same_alignment):
        # No reduction over the batch here, so no gain from a single program.
        return _shared_tile("backward_tile_kernel", g, TILE_ELEMENTS)
    block_cols, num_warps = _row_block(g.n_cols)
    blocks = -(-g.n_cols // block_cols)
    return Tile("backward_row_kernel", 1, block_cols, num_warps, max(1, g.n_rows * blocks), rowwise=True)


def _row_block(n_cols: int) -> tuple[int, int]:
    block_cols = min(_next_power_of_2(n_cols), ROW_BLOCK)
    return block_cols, max(4, block_cols // 1024)


def _one_program_per_row(g: Geometry) -> bool:
    return g.n_outer == 1 and g.col_stride == 1 and g.n_cols > MAX_SHARED_ROW_COLS


def triton_plan(reason: str, logits: torch.Tensor, needs_grad: bool, device: DeviceFacts) -> Plan:
    """The plan of the Triton path for logits (N, C) or (N, C, S)."""
    del device  # forward and recompute do not depend on it
    collapsed = logits.dim() <= 3 or spatial_dims_collapse(logits)
    rows = logits if logits.dim() == 2 else logits.reshape(logits.shape[0], logits.shape[1], logits.shape[2:].numel())
    g = geometry(rows)
    one_pass = logits.numel() * logits.element_size()
    plan = Plan(
        "triton",
        reason,
        "forward only",
        forward_tile(g, logits.element_size()),
        copies_logits=not collapsed,
        read_bytes=one_pass,
        write_bytes=0,
        launches=1,
    )
    if not needs_grad:
        return plan
    gradient = geometry(torch.empty_like(rows, device="meta"))
    return replace(
        plan,
        strategy="recompute",
        backward=backward_tile(g, gradient, logits.element_size()),
        read_bytes=2 * one_pass,
        write_bytes=one_pass,
        launches=2,
    )
