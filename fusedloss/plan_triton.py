"""How the Triton path cuts a problem into tiles: pure functions of shapes, dtypes and device facts. They need no GPU."""

from dataclasses import replace
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from fusedloss.plan import Inputs, Options, Plan, Tile, fuses_gradient, spatial_dims_collapse

# Bytes of the widest access of a thread (LDG.128, global_load_dwordx4).
VECTOR_BYTES = 16
# Bytes that travel together between L2 and an SM.
SECTOR_BYTES = 32

# Rows with more columns than this get a program of their own; narrower ones share a two-dimensional tile. From 257 columns on a
# program per row asks for fewer sectors, above all of ragged rows, and from 300 on it takes fewer instructions, too.
MAX_SHARED_ROW_COLS = 256
# Columns of one row that a program holds at a time.
ROW_BLOCK = 8192
# A fused row stays in registers, in blocks of so many columns per thread. How many blocks fit into the registers without a spill
# was found by compiling (test_compiled.py), by bytes of a logit; float64 takes two registers for a value. Fewer do where more is
# under way at the same time as the row (holds_more). A row takes the fewest threads that can hold it, since each costs the same
# instructions whatever it holds: 6 to 11 blocks of bfloat16.
FUSED_COLS_PER_THREAD = 8
FUSED_ROW_BLOCKS = {2: 11, 4: 9, 8: 2}
FUSED_ROW_BLOCKS_MORE = {2: 3, 4: 3, 8: 1}
FUSED_ROW_BLOCKS_PROBABILITIES = {2: 4, 4: 4, 8: 1}  # they wait in registers, too
FUSED_ROW_REGISTERS = 128  # as many as 512 threads can have; with fewer blocks 255, as many as 256 can have
FUSED_ROW_THREADS = 512
# A longer row is cut into slices: programs that wait for each other, of few threads, so that an SM has room for four and some
# load while others wait.
SLICE_THREADS = 128
# All slices of a row must be resident at once, beside whatever else the GPU does. Where the SMs are fewer, so are the slices.
MAX_SLICES = 64
# Rows fewer than the SMs are cut into slices of at least so many columns until all SMs have one. Not rows shorter than
# LONG_ROW_COLS: their exchange of statistics, 1 to 2 microseconds, costs more than an SM needs to read them.
MIN_SLICE_COLS = 4096
LONG_ROW_COLS = 32768
# Up to so many rows, every program of a fused mean reads all targets, 512 bytes, which saves a launch.
COUNTED_ROWS = 64
# Up to so many rows, the last program of a forward selects among their losses alone, for "max" and "topk"; of more, launches of
# many programs do (kernels/selection.py).
ROWS_SELECTED_ALONE = 16384
SELECTION_BLOCK = 1024  # rows that a program looks at at a time: PARTIALS_BLOCK of kernels/reduction.py
# 16-byte loads that each thread has under way for a block of a row. More would spill on sm_80; fewer would need more warps, whose
# reductions meet at barriers.
ACCESSES_PER_THREAD = 4
# Registers of an SM. A row's forward is compiled for as many as let two programs share one, so that one loads while the other
# reduces; for what one program can have, where more is under way. Left to itself, ptxas spills a value or two to fit another.
SM_REGISTERS = 65536
MAX_REGISTERS = 255

# Elements of a shared tile, and of each of its threads: one warp. A row is then shared by few threads, which keep its
# statistics many times over, and no warp waits for another (10 to 256 classes: half the instructions of tiles of 8 warps).
TILE_ELEMENTS = 1024
TILE_ELEMENTS_PER_THREAD = 32
# Up to this many elements one program does everything, so that no ticket is needed.
SINGLE_PROGRAM_ELEMENTS = 8192
# Threads of a program whose threads hold whole rows, packed ones or pixels: so few that they hardly wait for each other; and the
# most, in a program that does everything.
OWNER_THREADS = 64
MAX_OWNER_THREADS = 256
# Logits that such a thread holds between loss and gradient: at least, so that its other work is worth while; at most of packed
# rows, and of pixels, or it would spill (test_compiled.py).
THREAD_ELEMENTS = 16
MAX_RUN_ELEMENTS = 64
MAX_PIXEL_ELEMENTS = 104
MAX_PIXEL_ELEMENTS_PROBABILITIES = 64  # besides as many class probabilities
MAX_PIXEL_ELEMENTS_MORE = 64  # besides what holds_more names; not of 16 bits, where a few spills cost less than more threads
# Longer packed rows are cut into parts of so many; left to itself, ptxas would spill two values to fit into 96 registers.
PART_ELEMENTS = 32
PART_REGISTERS = 128
# Pixels with more classes are shared by threads that lie along the classes; MIN_PIXEL_THREADS lie along the pixels, 256 bytes of
# them.
MAX_THREADS_PER_PIXEL = 32
MIN_PIXEL_THREADS = 16
# What still does not fit is read twice, so many logits per thread at a time.
SPATIAL_ELEMENTS_PER_THREAD = 16


class DeviceFacts(NamedTuple):
    """What the plan asks of the hardware. The default is an H100 SXM."""

    n_sms: int = 132
    capability: tuple[int, int] = (9, 0)
    l2_bytes: int = 50 << 20
    warp_size: int = 32  # of Radeons, too
    is_nvidia: bool = True


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


def geometries(shape: torch.Size, *strides: tuple[int, ...]) -> list[Geometry]:
    """The geometries of tensors of one shape, (N, C) or (N, C, S), by their strides; n_outer and n_inner are the same for all."""
    if len(shape) == 2:
        n_rows, n_cols = shape
        return [Geometry(1, n_rows, n_cols, 0, row, col) for row, col in strides]
    n_outer, n_cols, n_inner = shape
    # channels_last, a single image, or none: one block of rows, if it is one in every tensor
    if n_outer <= 1 or all(outer == n_inner * row for outer, _, row in strides):
        return [Geometry(1, n_outer * n_inner, n_cols, 0, row, col) for _, col, row in strides]
    return [Geometry(n_outer, n_inner, n_cols, outer, row, col) for outer, col, row in strides]


def probabilities_strides(logits: Tensor, probabilities: Tensor) -> tuple[int, ...]:
    """Strides with which the kernels take class probabilities: their own if the logits or the gradient have the same; else the
    gradient's, in a copy."""
    if probabilities.stride() == logits.stride():
        return logits.stride()
    return torch.empty_like(logits, device="meta").stride()


def row_group(g: Geometry, itemsize: int) -> int:
    """Elements of a sector, or of 16 bytes, if all rows consist of them; 1 for ragged rows."""
    for n_bytes in (SECTOR_BYTES, VECTOR_BYTES):
        group = n_bytes // itemsize
        if g.n_cols % group == 0 and g.row_stride % group == 0:
            return group
    return 1


def _row_cols(g: Geometry, itemsize: int) -> int:
    """Columns of the longest row; of rows that may begin inside a sector, with what precedes them there."""
    group = row_group(g, itemsize)
    return g.n_cols + (SECTOR_BYTES // itemsize - group if group > 1 else 0)


@lru_cache(maxsize=1024)
def forward_tile(g: Geometry, probabilities: Geometry | None, itemsize: int, more: bool, device: DeviceFacts) -> Tile:
    """Cuts the forward of a problem whose logits have `itemsize` bytes; `more`: see holds_more."""
    if _one_program_per_row(g) and _same_alignment(g, probabilities, itemsize):
        block_cols, num_warps = _row_block(g.n_cols, itemsize, device)
        per_sm = 1 if more or probabilities is not None or itemsize == 8 else 2
        n_slices = min(_slices_that_fill(g, device), -(-g.n_cols // block_cols))
        n_programs = max(1, g.n_rows) * n_slices
        return Tile(
            "forward_row_kernel",
            1,
            block_cols,
            num_warps,
            n_programs,
            rowwise=True,
            n_slices=n_slices,
            max_registers=_register_limit(_registers(num_warps, per_sm), device),
        )
    tile = _shared_tile("forward_tile_kernel", g, None, probabilities, itemsize, more, SINGLE_PROGRAM_ELEMENTS, device)
    if g.n_rows <= ROWS_SELECTED_ALONE:
        return tile
    # Without the selection it needs few registers, and ptxas would spill for fewer still.
    return replace(tile, max_registers=_register_limit(_registers(tile.num_warps, 1), device))


@lru_cache(maxsize=1024)
def backward_tile(
    g: Geometry, grad: Geometry, probabilities: Geometry | None, itemsize: int, more: bool, device: DeviceFacts
) -> Tile:
    """Cuts the backward; `grad` is the geometry of the gradient, whose strides may differ from the logits'."""
    if _one_program_per_row(g) and _same_alignment(g, grad, itemsize) and _same_alignment(g, probabilities, itemsize):
        n_cols = _row_cols(g, itemsize)
        block_cols, num_warps = _row_block(n_cols, itemsize, device)
        n_programs = g.n_rows * -(-n_cols // block_cols)
        return Tile("backward_row_kernel", 1, block_cols, num_warps, max(1, n_programs), rowwise=True)
    # No reduction over the batch here, so no gain from a single program.
    return _shared_tile("backward_tile_kernel", g, grad, probabilities, itemsize, more, TILE_ELEMENTS, device)


def holds_more(options: Options, itemsize: int) -> bool:
    """Whether a row shares the registers with more than its exponentials: smoothing's weights, a cap's tanh, statistics."""
    return options.label_smoothing > 0 or options.softcap > 0 or options.return_stats or (itemsize > 2 and options.has_extras())


@lru_cache(maxsize=1024)
def fused_tile(
    g: Geometry, grad: Geometry, probabilities: Geometry | None, itemsize: int, more: bool, device: DeviceFacts
) -> Tile:
    """Cuts the forward that also writes the gradient; `more`: see holds_more."""
    # The kernel of one program per row masks no row: an empty batch, which still needs a loss, is the tile kernel's.
    aligned = _same_alignment(g, grad, itemsize) and _same_alignment(g, probabilities, itemsize)
    if g.n_rows > 0 and _one_program_per_row(g) and aligned:
        soft = probabilities is not None
        blocks = FUSED_ROW_BLOCKS_MORE if more else FUSED_ROW_BLOCKS_PROBABILITIES if soft else FUSED_ROW_BLOCKS
        tile = _fused_row_tile(g, blocks[itemsize], itemsize, more or soft, device)
        if tile.n_slices <= min(MAX_SLICES, device.n_sms):
            return tile
    return _shared_tile("fused_tile_kernel", g, grad, probabilities, itemsize, more, SINGLE_PROGRAM_ELEMENTS, device)


def counts_rows(tile: Tile, n_rows: int, reduction: str) -> bool:
    """Whether each program of a fused mean sums the denominator itself, since rows are few."""
    return reduction == "mean" and tile.rowwise and tile.n_slices == 1 and n_rows <= COUNTED_ROWS


def needs_denominator(tile: Tile, n_rows: int, reduction: str) -> bool:
    """Whether a launch over the targets precedes the fused one: for the mean's denominator, or for the slices' counters."""
    return tile.n_slices > 1 or (reduction == "mean" and tile.n_programs > 1 and not counts_rows(tile, n_rows, reduction))


@lru_cache(maxsize=1024)
def denominator_tile(n_rows: int, device: DeviceFacts) -> Tile:
    """Cuts the sum of the targets' weights, before a fused mean."""
    # Not PARTIALS_BLOCK of reduction.py: loads of one shape get one layout, and two targets are a thread's 16 bytes, not four.
    block_rows = 512
    n_programs = max(1, min(device.n_sms, -(-n_rows // block_rows)))
    return Tile("denominator_kernel", block_rows, 1, _warps(128, device), n_programs, rowwise=False)


def n_selections(n_rows: int, reduction: str, itemsize: int) -> int:
    """Launches that select among the rows of a forward: one for each 8 bits of a loss, and one that adds up."""
    if reduction not in ("max", "topk") or n_rows <= ROWS_SELECTED_ALONE:
        return 0
    return (8 if itemsize == 8 else 4) + 1


@lru_cache(maxsize=1024)
def selection_tile(kernel: str, n_rows: int, device: DeviceFacts) -> Tile:
    """Cuts a pass over the losses of all rows."""
    n_programs = min(device.n_sms, -(-n_rows // SELECTION_BLOCK))
    return Tile(kernel, SELECTION_BLOCK, 1, _warps(128, device), n_programs, rowwise=False)


@lru_cache(maxsize=1024)
def scale_tile(n_elements: int, device: DeviceFacts) -> Tile:
    """Cuts the multiplication of a fused gradient: few programs, since most launches return at once."""
    # Of a number that is no multiple of 16 each element is accessed on its own, and 64 per thread would spill.
    block = 8192 if n_elements % 16 == 0 else 4096
    n_programs = max(1, min(4 * device.n_sms, -(-n_elements // block)))
    return Tile("scale_gradient_kernel", 1, block, _warps(128, device), n_programs, rowwise=False)


def _fused_row_tile(g: Geometry, fitting: int, itemsize: int, more: bool, device: DeviceFacts) -> Tile:
    """Cuts rows into blocks of which `fitting` fit into the registers of a thread; `more`: which are all a thread can have."""
    n_cols = _row_cols(g, itemsize)
    filling = _slices_that_fill(g, device)
    threads = device.warp_size
    while threads * FUSED_COLS_PER_THREAD * fitting < n_cols:
        threads *= 2
    if filling > 1 or threads > (FUSED_ROW_THREADS // 2 if more else FUSED_ROW_THREADS):
        threads = SLICE_THREADS
    block_cols = threads * FUSED_COLS_PER_THREAD
    blocks = -(-n_cols // block_cols)
    n_blocks = -(-blocks // max(-(-blocks // fitting), filling))
    n_slices = -(-blocks // n_blocks)
    return Tile(
        "fused_row_kernel",
        1,
        block_cols,
        _warps(threads, device),
        g.n_rows * n_slices,
        rowwise=True,
        n_blocks=n_blocks,
        n_slices=n_slices,
        max_registers=None if more else _register_limit(FUSED_ROW_REGISTERS, device),
    )


def _slices_that_fill(g: Geometry, device: DeviceFacts) -> int:
    """Slices of a row that give every SM a program; 1 where rows are many or short."""
    if g.n_cols < LONG_ROW_COLS or g.n_rows == 0:
        return 1
    return max(1, min(device.n_sms // g.n_rows, -(-g.n_cols // MIN_SLICE_COLS), MAX_SLICES))


def _register_limit(registers: int, device: DeviceFacts) -> int | None:
    return registers if device.is_nvidia else None  # an option that Triton refuses elsewhere


def _registers(num_warps: int, per_sm: int) -> int:
    """Of a thread, where so many programs share an SM."""
    return min(MAX_REGISTERS, SM_REGISTERS // (per_sm * num_warps * 32))


def _warps(threads: int, device: DeviceFacts) -> int:
    return max(1, threads // device.warp_size)


def _same_alignment(g: Geometry, other: Geometry | None, itemsize: int) -> bool:
    """Whether the ragged edges of a row are the same in the logits and in the other tensor, if there is one."""
    return other is None or ((g.row_stride - other.row_stride) % (SECTOR_BYTES // itemsize) == 0 and other.col_stride == 1)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _one_program_per_row(g: Geometry) -> bool:
    return g.n_outer == 1 and g.col_stride == 1 and g.n_cols > MAX_SHARED_ROW_COLS


def _row_block(n_cols: int, itemsize: int, device: DeviceFacts) -> tuple[int, int]:
    block_cols = min(next_power_of_2(n_cols), ROW_BLOCK if itemsize < 8 else ROW_BLOCK // 2)  # float64 takes two registers
    return block_cols, _warps(block_cols * itemsize // (ACCESSES_PER_THREAD * VECTOR_BYTES), device)


def _shared_tile(
    kernel: str,
    g: Geometry,
    grad: Geometry | None,
    probabilities: Geometry | None,
    itemsize: int,
    more: bool,
    max_elements: int,
    device: DeviceFacts,
) -> Tile:
    """Cuts rows among programs of many rows."""
    is_packed = all(_is_packed(tensor) for tensor in (g, grad, probabilities) if tensor is not None)
    max_run, part = MAX_RUN_ELEMENTS, PART_ELEMENTS
    max_pixels = MAX_PIXEL_ELEMENTS if probabilities is None else MAX_PIXEL_ELEMENTS_PROBABILITIES
    if more and itemsize > 2:
        max_pixels = min(max_pixels, MAX_PIXEL_ELEMENTS_MORE)
    if itemsize == 8:  # two registers for a value
        max_run, part, max_pixels, max_elements = max_run // 2, part // 2, max_pixels // 2, max_elements // 2
    row_group = _packed_row_group(g, itemsize, max_run) if is_packed else 0
    one_program = next_power_of_2(g.n_rows) * next_power_of_2(g.n_cols) <= max_elements
    if row_group > 0:
        vector = g.vector(itemsize) if row_group == 1 else 1
        block_cols = 1 if row_group * g.n_cols <= max_run else next_power_of_2(-(-g.n_cols // part))
        n_blocks = -(-g.n_cols // (block_cols * vector)) * vector
        runs_per_thread = next_power_of_2(max(1, THREAD_ELEMENTS // (row_group * n_blocks)))
        block_rows = OWNER_THREADS * runs_per_thread * row_group // block_cols
        if one_program:
            block_rows = max(row_group, next_power_of_2(g.n_rows))
        threads = min(MAX_OWNER_THREADS, block_rows // row_group * block_cols)
    elif g.rows_contiguous:
        vector = g.vector(itemsize)
        block_cols = 1
        while vector * -(-g.n_cols // block_cols) > max_pixels and block_cols < MAX_THREADS_PER_PIXEL:
            block_cols *= 2
        n_blocks = -(-g.n_cols // block_cols)
        pixel_threads = max(OWNER_THREADS // block_cols, MIN_PIXEL_THREADS)
        if probabilities is not None:  # more threads would not have the registers: 128 bytes of pixels
            pixel_threads = min(pixel_threads, MAX_OWNER_THREADS // block_cols)
        block_rows = min(next_power_of_2(g.n_inner), pixel_threads * vector)
        threads = block_rows // vector * block_cols
        if vector * n_blocks > max_pixels:  # too many classes for the registers: read twice
            block_cols, n_blocks = min(next_power_of_2(g.n_cols), SPATIAL_ELEMENTS_PER_THREAD // vector), 0
            block_rows = min(next_power_of_2(g.n_inner), OWNER_THREADS * vector)
            threads = block_rows // vector
    else:
        # The recompute forward keeps each row's statistics in every thread that shares the row, and would spill.
        per_thread = TILE_ELEMENTS_PER_THREAD // 2 if kernel == "forward_tile_kernel" else TILE_ELEMENTS_PER_THREAD
        block_cols = next_power_of_2(g.n_cols) if one_program else min(next_power_of_2(g.n_cols), TILE_ELEMENTS)
        block_rows = next_power_of_2(g.n_inner) if one_program else min(TILE_ELEMENTS // block_cols, next_power_of_2(g.n_inner))
        n_blocks = 1 if block_cols >= g.n_cols else 0
        threads = block_rows * block_cols // per_thread
    n_programs = max(1, g.n_outer * -(-g.n_inner // block_rows))
    tile = Tile(kernel, block_rows, block_cols, _warps(threads, device), n_programs, False, n_blocks, row_group=row_group)
    if row_group > 0 and block_cols > 1 and probabilities is None and not more:
        return replace(tile, max_registers=_register_limit(PART_REGISTERS, device))
    return tile


def _is_packed(g: Geometry) -> bool:
    """Narrow rows that lie end to end, class by class."""
    return g.n_outer == 1 and g.col_stride == 1 and g.row_stride == g.n_cols <= MAX_SHARED_ROW_COLS


def _packed_row_group(g: Geometry, itemsize: int, max_run: int) -> int:
    """How many packed rows together are whole groups of 16 bytes, or of fewer if one thread cannot hold so many rows."""
    vector = VECTOR_BYTES // itemsize
    while vector > 1 and vector // gcd(vector, g.n_cols) * g.n_cols > max_run:
        vector //= 2
    return vector // gcd(vector, g.n_cols)


def triton_plan(reason: str, inputs: Inputs, options: Options, needs_grad: bool, device: DeviceFacts) -> Plan:
    """The plan of the Triton path for logits (N, C) or (N, C, d1, ...)."""
    logits, soft = inputs.logits, inputs.has_probabilities()
    itemsize = logits.element_size()
    rows = logits if logits.dim() == 2 else logits.flatten(2)
    strides = [rows.stride(), torch.empty_like(rows, device="meta").stride()]
    if soft:
        strides.append(probabilities_strides(rows, inputs.target if logits.dim() == 2 else inputs.target.flatten(2)))
    g, gradient, *of_target = geometries(rows.shape, *strides)
    probabilities = of_target[0] if soft else None
    one_pass = logits.numel() * itemsize
    one_read = one_pass + (inputs.target.numel() * inputs.target.element_size() if soft else 0)
    copies = logits.dim() > 3 and not spatial_dims_collapse(logits)
    more = holds_more(options, itemsize)
    selections = n_selections(g.n_rows, options.reduction, itemsize)
    if not needs_grad:
        tile = forward_tile(g, probabilities, itemsize, more, device)
        return Plan(
            "triton", reason, "forward only", tile, None, copies, read_bytes=one_read, write_bytes=0, launches=1 + selections
        )
    if fuses_gradient(options.reduction, logits.dtype):
        tile = fused_tile(g, gradient, probabilities, itemsize, more, device)
        counts = tile.n_slices > 1 if soft else needs_denominator(tile, g.n_rows, options.reduction)
        return Plan(
            "triton",
            reason,
            "fused",
            tile,
            scale_tile(logits.numel(), device),
            copies,
            # What does not stay in registers is read again, from L2 or L1.
            read_bytes=one_read * (1 if tile.n_blocks else 2),
            write_bytes=one_pass,
            launches=3 if counts else 2,
        )
    return Plan(
        "triton",
        reason,
        "recompute",
        forward_tile(g, probabilities, itemsize, more, device),
        backward_tile(g, gradient, probabilities, itemsize, more, device),
        copies,
        read_bytes=2 * one_read,
        write_bytes=one_pass,
        launches=2 + selections,
    )
