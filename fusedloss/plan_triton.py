"""How the Triton path cuts a problem into tiles: pure functions of shapes, dtypes and device facts. They need no GPU."""

from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from fusedloss.plan import Options, Plan, Tile, fuses_gradient, spatial_dims_collapse

# Bytes of the widest access of a thread (LDG.128, global_load_dwordx4).
VECTOR_BYTES = 16
# Bytes that travel together between L2 and an SM.
SECTOR_BYTES = 32

# Rows with more columns than this get a program of their own; narrower ones share a two-dimensional tile.
MAX_SHARED_ROW_COLS = 512
# Columns of one row that a program holds at a time.
ROW_BLOCK = 8192
# A fused row stays in registers, in blocks of so many columns, 8 values of each per thread with 16 warps; what does not fit is
# read twice. How many blocks fit without a spill was found by compiling (test_compiled.py): ptxas needs more for itself on
# Blackwell, and label smoothing's weights are under way at the same time as the row.
FUSED_ROW_BLOCK = 4096
FUSED_LOOP_COLS = 16384  # of the columns that do not fit, at a time
FUSED_LOOP_BYTES = 32768  # of a row of which nothing fits, at a time
FUSED_ROW_BLOCKS = {2: 13, 4: 8, 8: 2}  # by bytes of a logit; float64 takes two registers, and the code for its exp many more
FUSED_ROW_BLOCKS_BLACKWELL = {2: 9, 4: 8, 8: 2}
FUSED_ROW_BLOCKS_SMOOTHING = {2: 2, 4: 2, 8: 0}
# 16-byte loads that each thread has under way for a block of a row. More would spill on sm_80; fewer would need more warps, whose
# reductions meet at barriers.
ACCESSES_PER_THREAD = 4

# Elements of a shared tile, and of each of its threads: one warp. A row is then shared by few threads, which keep its
# statistics many times over, and no warp waits for another (10 to 512 classes: half the instructions of tiles of 8 warps).
TILE_ELEMENTS = 1024
TILE_ELEMENTS_PER_THREAD = 32
# Up to this many elements one program does everything, so that no ticket is needed.
SINGLE_PROGRAM_ELEMENTS = 8192
# Warps and elements per thread of a tile of contiguous rows (pixels): each thread owns whole rows, so that nothing is reduced
# across threads, and its accesses are as wide as its rows are many.
SPATIAL_WARPS = 2
SPATIAL_ELEMENTS_PER_THREAD = 16


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
    if _one_program_per_row(g) and _same_alignment(g, grad, itemsize):
        block_cols, num_warps = _row_block(g.n_cols, itemsize, device)
        n_programs = g.n_rows * -(-g.n_cols // block_cols)
        return Tile("backward_row_kernel", 1, block_cols, num_warps, max(1, n_programs), rowwise=True)
    # No reduction over the batch here, so no gain from a single program.
    return _shared_tile("backward_tile_kernel", g, itemsize, TILE_ELEMENTS, device)


@lru_cache(maxsize=1024)
def fused_tile(g: Geometry, grad: Geometry, itemsize: int, smoothing: bool, device: DeviceFacts) -> Tile:
    """Cuts the forward that also writes the gradient."""
    # The kernel of one program per row masks no row: an empty batch, which still needs a loss, is the tile kernel's.
    if g.n_rows > 0 and _one_program_per_row(g) and _same_alignment(g, grad, itemsize):
        block_cols = min(_next_power_of_2(g.n_cols), FUSED_ROW_BLOCK)
        n_blocks = -(-g.n_cols // block_cols)
        fitting = _fused_row_blocks(itemsize, smoothing, device)
        if n_blocks <= fitting:
            threads = min(512, n_blocks * block_cols * itemsize // (ACCESSES_PER_THREAD * VECTOR_BYTES))
            resident, loop_cols, num_warps = n_blocks, 0, _warps(_next_power_of_2(threads), device)
        elif smoothing or itemsize == 8:
            resident, loop_cols, num_warps = 0, min(ROW_BLOCK, FUSED_LOOP_BYTES // itemsize), _warps(512, device)
        else:
            resident, loop_cols, num_warps = fitting - _loop_blocks(device), FUSED_LOOP_COLS, _warps(512, device)
        return Tile("fused_row_kernel", 1, block_cols, num_warps, g.n_rows, True, resident, loop_cols)
    return _shared_tile("fused_tile_kernel", g, itemsize, SINGLE_PROGRAM_ELEMENTS, device)


@lru_cache(maxsize=1024)
def denominator_tile(n_rows: int, device: DeviceFacts) -> Tile:
    """Cuts the sum of the targets' weights, before a fused mean."""
    block_rows = 1024
    n_programs = max(1, min(device.n_sms, -(-n_rows // block_rows)))
    return Tile("denominator_kernel", block_rows, 1, _warps(128, device), n_programs, rowwise=False)


@lru_cache(maxsize=1024)
def scale_tile(n_elements: int, device: DeviceFacts) -> Tile:
    """Cuts the multiplication of a fused gradient: few programs, since most launches return at once."""
    block = 4096
    n_programs = max(1, min(8 * device.n_sms, -(-n_elements // block)))
    return Tile("scale_gradient_kernel", 1, block, _warps(256, device), n_programs, rowwise=False)


def _fused_row_blocks(itemsize: int, smoothing: bool, device: DeviceFacts) -> int:
    if smoothing:
        return FUSED_ROW_BLOCKS_SMOOTHING[itemsize]
    return (FUSED_ROW_BLOCKS if device.capability < (10, 0) else FUSED_ROW_BLOCKS_BLACKWELL)[itemsize]


def _loop_blocks(device: DeviceFacts) -> int:
    """Blocks whose registers the loop over the rest of a row takes."""
    return 2 if device.capability < (9, 0) else 1


def _warps(threads: int, device: DeviceFacts) -> int:
    return max(1, threads // device.warp_size)


def _same_alignment(g: Geometry, grad: Geometry, itemsize: int) -> bool:
    """Whether the ragged edges of a row are the same in the logits and in their gradient."""
    return (g.row_stride - grad.row_stride) % (SECTOR_BYTES // itemsize) == 0 and grad.col_stride == 1


def _next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _one_program_per_row(g: Geometry) -> bool:
    return g.n_outer == 1 and g.col_stride == 1 and g.n_cols > MAX_SHARED_ROW_COLS


def _row_block(n_cols: int, itemsize: int, device: DeviceFacts) -> tuple[int, int]:
    block_cols = min(_next_power_of_2(n_cols), ROW_BLOCK if itemsize < 8 else ROW_BLOCK // 2)  # float64 takes two registers
    return block_cols, _warps(block_cols * itemsize // (ACCESSES_PER_THREAD * VECTOR_BYTES), device)


def _shared_tile(kernel: str, g: Geometry, itemsize: int, max_elements: int, device: DeviceFacts) -> Tile:
    cols = _next_power_of_2(g.n_cols)
    # The recompute forward keeps each row's statistics in every thread that shares the row, and would spill.
    per_thread = TILE_ELEMENTS_PER_THREAD // 2 if kernel == "forward_tile_kernel" else TILE_ELEMENTS_PER_THREAD
    if g.rows_contiguous:
        vector = g.vector(itemsize)
        block_rows = min(_next_power_of_2(g.n_inner), SPATIAL_WARPS * device.warp_size * vector)
        block_cols = min(cols, SPATIAL_ELEMENTS_PER_THREAD // vector)
        threads = block_rows // vector
    elif _next_power_of_2(g.n_rows) * cols <= max_elements:
        block_rows, block_cols = _next_power_of_2(g.n_inner), cols
        threads = block_rows * block_cols // per_thread
    else:
        block_cols = min(cols, TILE_ELEMENTS)
        block_rows = min(TILE_ELEMENTS // block_cols, _next_power_of_2(g.n_inner))
        threads = block_rows * block_cols // per_thread
    n_programs = max(1, g.n_outer * -(-g.n_inner // block_rows))
    n_blocks = 1 if block_cols >= g.n_cols else 0
    return Tile(kernel, block_rows, block_cols, _warps(threads, device), n_programs, rowwise=False, n_blocks=n_blocks)


def triton_plan(reason: str, logits: Tensor, options: Options, needs_grad: bool, device: DeviceFacts) -> Plan:
    """The plan of the Triton path for logits (N, C) or (N, C, d1, ...)."""
    itemsize = logits.element_size()
    rows = logits if logits.dim() == 2 else logits.flatten(2)
    g, gradient = geometries(rows, torch.empty_like(rows, device="meta"))
    one_pass = logits.numel() * itemsize
    copies = logits.dim() > 3 and not spatial_dims_collapse(logits)
    if not needs_grad:
        tile = forward_tile(g, itemsize, device)
        return Plan("triton", reason, "forward only", tile, None, copies, read_bytes=one_pass, write_bytes=0, launches=1)
    if fuses_gradient(options.reduction, logits.dtype):
        tile = fused_tile(g, gradient, itemsize, options.label_smoothing > 0, device)
        counts = options.reduction == "mean" and tile.n_programs > 1
        return Plan(
            "triton",
            reason,
            "fused",
            tile,
            scale_tile(logits.numel(), device),
            copies,
            # What does not stay in registers is read again, from L2 or L1.
            read_bytes=one_pass + g.n_rows * max(0, g.n_cols - tile.n_blocks * tile.block_cols) * itemsize,
            write_bytes=one_pass,
            launches=3 if counts else 2,
        )
    return Plan(
        "triton",
        reason,
        "recompute",
        forward_tile(g, itemsize, device),
        backward_tile(g, gradient, itemsize, device),
        copies,
        read_bytes=2 * one_pass,
        write_bytes=one_pass,
        launches=2,
    )
