"""How the Triton path cuts a problem into tiles: pure functions of shapes, dtypes and device facts. They need no GPU."""

from dataclasses import replace
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from fusedloss.plan import Plan, Tile, spatial_dims_collapse

# Bytes of the widest access of a thread (LDG.128, global_load_dwordx4).
VECTOR_BYTES = 16
# Bytes that travel together between L2 and an SM.
SECTOR_BYTES = 32
# Columns of one row that a program holds at a time.
ROW_BLOCK = 8192
# 16-byte loads that each thread has under way for a block of a row. More would spill on sm_80; fewer would need more warps, whose
# reductions meet at barriers.
ACCESSES_PER_THREAD = 4
# Rows with more columns than this get a program of their own; narrower ones share a two-dimensional tile.
MAX_SHARED_ROW_COLS = 512
# Elements of a shared tile.
TILE_ELEMENTS = 2048
# Up to this many elements one program does everything, so that no ticket is needed.
SINGLE_PROGRAM_ELEMENTS = 8192
# Rows per tile when the rows, not the classes, are contiguous (segmentation).
SPATIAL_BLOCK_ROWS = 256


class DeviceFacts(NamedTuple):
    """What the plan asks of the hardware. The default is an H100 SXM."""

    n_sms: int = 132
    capability: tuple[int, int] = (9, 0)
    l2_bytes: int = 50 << 20
    warp_size: int = 32


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

    @property
    def rows_contiguous(self) -> bool:
        """Neighbouring rows, not classes, lie side by side: (N, C, d1, ...), or a transposed (N, C)."""
        return self.row_stride == 1 and self.col_stride != 1

    def vector(self, itemsize: int) -> int:
        """Elements of the widest access whose multiples all rows, or all runs of contiguous rows, are: at most 16 bytes."""
        sizes = (self.n_inner, self.col_stride) if self.rows_contiguous else (self.n_cols, self.row_stride)
        if min(self.row_stride, self.col_stride) != 1:
            return 1
        return gcd(VECTOR_BYTES // itemsize, *sizes, self.outer_stride)


def geometries(*tensors: Tensor) -> list[Geometry]:
    """The geometries of tensors of one shape, (N, C) or (N, C, S), with the same n_outer and n_inner for all."""
    if tensors[0].dim() == 2:
        n_rows, n_cols = tensors[0].shape
        return [Geometry(1, n_rows, n_cols, 0, t.stride(0), t.stride(1)) for t in tensors]
    n_outer, n_cols, n_inner = tensors[0].shape
    strides = [(t.stride(0), t.stride(2), t.stride(1)) for t in tensors]
    # channels_last, a single image, or none: one block of rows, if it is one in every tensor
    if n_outer <= 1 or all(outer == n_inner * row for outer, row, _ in strides):
        return [Geometry(1, n_outer * n_inner, n_cols, 0, row, col) for _, row, col in strides]
    return [Geometry(n_outer, n_inner, n_cols, *three) for three in strides]


def row_groups(g: Geometry, itemsize: int) -> tuple[int, bool]:
    """How a kernel with one program per row cuts rows into groups: elements of a group, and whether any row has ragged edges."""
    vector = VECTOR_BYTES // itemsize
    if g.n_cols % vector == 0 and g.row_stride % vector == 0:
        return vector, False
    # Ragged rows are cut at sectors, or every request of a warp would touch one sector more than it has bytes for.
    return SECTOR_BYTES // itemsize, True


@lru_cache(maxsize=1024)
def forward_tile(g: Geometry, itemsize: int, device: DeviceFacts) -> Tile:
    """Cuts the forward of a problem whose logits have `itemsize` bytes."""
    if _one_program_per_row(g):
        block_cols, num_warps = _row_block(g.n_cols, itemsize, device)
        return Tile("forward_row_kernel", 1, block_cols, num_warps, max(1, g.n_rows), rowwise=True)
    return _shared_tile("forward_tile_kernel", g, itemsize, SINGLE_PROGRAM_ELEMENTS, device)


@lru_cache(maxsize=1024)
def backward_tile(g: Geometry, grad: Geometry, itemsize: int, device: DeviceFacts) -> Tile:
    """Cuts the backward; `grad` is the geometry of the gradient, whose strides may differ from the logits'."""
    # The ragged edges of a row must be the same in both.
    same_alignment = (g.row_stride - grad.row_stride) % (SECTOR_BYTES // itemsize) == 0 and grad.col_stride == 1
    if _one_program_per_row(g) and same_alignment:
        block_cols, num_warps = _row_block(g.n_cols, itemsize, device)
        n_programs = g.n_rows * -(-g.n_cols // block_cols)
        return Tile("backward_row_kernel", 1, block_cols, num_warps, max(1, n_programs), rowwise=True)
    # No reduction over the batch here, so no gain from a single program.
    return _shared_tile("backward_tile_kernel", g, itemsize, TILE_ELEMENTS, device)


def _next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _one_program_per_row(g: Geometry) -> bool:
    return g.n_outer == 1 and g.col_stride == 1 and g.n_cols > MAX_SHARED_ROW_COLS


def _row_block(n_cols: int, itemsize: int, device: DeviceFacts) -> tuple[int, int]:
    block_cols = min(_next_power_of_2(n_cols), ROW_BLOCK if itemsize < 8 else ROW_BLOCK // 2)  # float64 takes two registers
    return block_cols, max(1, block_cols * itemsize // (ACCESSES_PER_THREAD * VECTOR_BYTES * device.warp_size))


def _shared_tile(kernel: str, g: Geometry, itemsize: int, max_elements: int, device: DeviceFacts) -> Tile:
    cols = _next_power_of_2(g.n_cols)
    if g.rows_contiguous:
        block_rows = min(SPATIAL_BLOCK_ROWS, _next_power_of_2(g.n_inner))
        block_cols = min(cols, TILE_ELEMENTS // block_rows)
    elif _next_power_of_2(g.n_rows) * cols <= max_elements:
        block_rows, block_cols = _next_power_of_2(g.n_inner), cols
    else:
        block_cols = min(cols, TILE_ELEMENTS)
        block_rows = min(TILE_ELEMENTS // block_cols, _next_power_of_2(g.n_inner))
    n_programs = g.n_outer * -(-g.n_inner // block_rows)
    # Where accesses are narrow, a thread's elements belong to as many rows, and each row costs it registers: fewer then.
    per_thread = 8 if g.rows_contiguous else max(4, g.vector(itemsize))
    num_warps = min(512, block_rows * block_cols // per_thread) // device.warp_size
    return Tile(kernel, block_rows, block_cols, max(1, num_warps), max(1, n_programs), rowwise=False)


def triton_plan(reason: str, logits: Tensor, needs_grad: bool, device: DeviceFacts) -> Plan:
    """The plan of the Triton path for logits (N, C) or (N, C, d1, ...)."""
    itemsize = logits.element_size()
    rows = logits if logits.dim() == 2 else logits.flatten(2)
    (g,) = geometries(rows)
    one_pass = logits.numel() * itemsize
    plan = Plan(
        "triton",
        reason,
        "forward only",
        forward_tile(g, itemsize, device),
        copies_logits=logits.dim() > 3 and not spatial_dims_collapse(logits),
        read_bytes=one_pass,
        write_bytes=0,
        launches=1,
    )
    if not needs_grad:
        return plan
    g, gradient = geometries(rows, torch.empty_like(rows, device="meta"))
    return replace(
        plan,
        strategy="recompute",
        backward=backward_tile(g, gradient, itemsize, device),
        read_bytes=2 * one_pass,
        write_bytes=one_pass,
        launches=2,
    )
