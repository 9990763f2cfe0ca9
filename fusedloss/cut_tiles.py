"""How the Triton path cuts short rows, and rows whose classes lie apart: several a program. Pure functions; plan_triton.py."""

from math import gcd

from fusedloss.cut_rows import MAX_SHARED_ROW_COLS, registers_of
from fusedloss.geometry import VECTOR_BYTES, DeviceFacts, Geometry, Operands, next_power_of_2, register_limit, warps
from fusedloss.kernels.groups import TileShape
from fusedloss.plan import Cut

# A shared tile has 1024 elements, 32 for each thread: it is one warp. A row is then shared by few threads, which keep its
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
# AMD's compiler holds more values at a time: with 80 logits it filled all 256 registers, and 13 of those for matrices.
MAX_PIXEL_ELEMENTS_AMD = 64
MAX_RUN_ELEMENTS_AMD_PROBABILITIES = 48  # of packed rows, besides as many class probabilities; with 64 it took 275 registers
# Longer packed rows are cut into parts of so many; left to itself, ptxas would spill two values to fit into 96 registers.
PART_ELEMENTS = 32
PART_REGISTERS = 136
# Pixels with more classes are shared by threads that lie along the classes; MIN_PIXEL_THREADS lie along the pixels, 128 bytes of
# them: with 256 bytes, an SM would have room for one program of 150 classes.
MAX_THREADS_PER_PIXEL = 32
MIN_PIXEL_THREADS = 8
# What still does not fit is read twice, so many logits per thread at a time.
SPATIAL_ELEMENTS_PER_THREAD = 16


def cut_tiles(kernel: str, t: Operands, holds_more: bool, device: DeviceFacts) -> Cut:
    """Cuts rows among programs of many rows; `holds_more`: see plan_triton.holds_more."""
    g, itemsize = t.logits, t.itemsize
    # A backward has no reduction over the batch, so no gain from a single program.
    max_elements = TILE_ELEMENTS if kernel == "backward_tile_kernel" else SINGLE_PROGRAM_ELEMENTS
    max_run, part = MAX_RUN_ELEMENTS, PART_ELEMENTS
    max_pixels = MAX_PIXEL_ELEMENTS if t.probabilities is None else MAX_PIXEL_ELEMENTS_PROBABILITIES
    if holds_more and itemsize > 2:
        max_pixels = min(max_pixels, MAX_PIXEL_ELEMENTS_MORE)
    if not device.is_nvidia:
        max_pixels = min(max_pixels, MAX_PIXEL_ELEMENTS_AMD)
        max_run = max_run if t.probabilities is None else MAX_RUN_ELEMENTS_AMD_PROBABILITIES
    if itemsize == 8:  # two registers for a value
        max_run, part, max_pixels, max_elements = max_run // 2, part // 2, max_pixels // 2, max_elements // 2
    row_group = _packed_row_group(g, itemsize, max_run) if all(_is_packed(tensor) for tensor in t.all()) else 0
    one_program = next_power_of_2(g.n_rows) * next_power_of_2(g.n_cols) <= max_elements
    if row_group > 0:
        shape, threads = _packed(t, row_group, max_run, part, one_program)
    elif g.rows_contiguous:
        shape, threads = _pixels(t, max_pixels)
    else:
        # The recompute forward keeps each row's statistics in every thread that shares the row, and would spill.
        per_thread = TILE_ELEMENTS_PER_THREAD // 2 if kernel == "forward_tile_kernel" else TILE_ELEMENTS_PER_THREAD
        shape = _shared(t, one_program)
        threads = shape.rows * shape.cols // per_thread
    n_programs = max(1, g.n_outer * -(-g.n_inner // shape.rows))
    num_warps, limit = warps(threads, device), None
    recomputes_packed = row_group > 0 and kernel != "fused_tile_kernel"
    holds_much = kernel == "backward_tile_kernel" and (holds_more or not shape.is_wide)  # or a thread has whole rows
    if recomputes_packed and (t.probabilities is not None or holds_much):
        limit = registers_of(num_warps, 1)  # ptxas would spill to fit another program on an SM
    elif row_group > 0 and shape.is_wide and t.probabilities is None and not holds_more:
        limit = PART_REGISTERS
    return Cut(kernel, n_programs, num_warps, shape, None if limit is None else register_limit(limit, device))


def _packed(t: Operands, row_group: int, max_run: int, part: int, one_program: bool) -> tuple[TileShape, int]:
    """Packed rows, and the threads for them."""
    g = t.logits
    vector = g.vector(t.itemsize) if row_group == 1 else 1
    cols = 1 if row_group * g.n_cols <= max_run else next_power_of_2(-(-g.n_cols // part))
    n_blocks = -(-g.n_cols // (cols * vector)) * vector
    runs_per_thread = next_power_of_2(max(1, THREAD_ELEMENTS // (row_group * n_blocks)))
    rows = OWNER_THREADS * runs_per_thread * row_group // cols
    if one_program:
        rows = max(row_group, next_power_of_2(g.n_rows))
    padded = next_power_of_2(row_group * n_blocks)
    shape = TileShape(rows, cols, n_blocks, row_group, padded, *_alignment(t))
    return shape, min(MAX_OWNER_THREADS, rows // row_group * cols)


def _pixels(t: Operands, max_pixels: int) -> tuple[TileShape, int]:
    """Rows side by side, and the threads for them."""
    g = t.logits
    vector = g.vector(t.itemsize)
    cols = 1
    while vector * -(-g.n_cols // cols) > max_pixels and cols < MAX_THREADS_PER_PIXEL:
        cols *= 2
    n_blocks = -(-g.n_cols // cols)
    pixel_threads = max(OWNER_THREADS // cols, MIN_PIXEL_THREADS)
    rows = min(next_power_of_2(g.n_inner), pixel_threads * vector)
    threads = rows // vector * cols
    if vector * n_blocks > max_pixels:  # too many classes for the registers: read twice
        cols, n_blocks = min(next_power_of_2(g.n_cols), SPATIAL_ELEMENTS_PER_THREAD // vector), 0
        rows = min(next_power_of_2(g.n_inner), OWNER_THREADS * vector)
        threads = rows // vector
    return TileShape(rows, cols, n_blocks, 0, 1, *_alignment(t)), threads


def _shared(t: Operands, one_program: bool) -> TileShape:
    """Rows that threads share."""
    g = t.logits
    cols = next_power_of_2(g.n_cols) if one_program else min(next_power_of_2(g.n_cols), TILE_ELEMENTS)
    rows = next_power_of_2(g.n_inner) if one_program else min(TILE_ELEMENTS // cols, next_power_of_2(g.n_inner))
    return TileShape(rows, cols, 1 if cols >= g.n_cols else 0, 0, 1, *_alignment(t))


def _alignment(t: Operands) -> tuple[int, bool]:
    """(vector, rows_contiguous) of a TileShape."""
    tensors = t.all()
    same_order = len({tensor.rows_contiguous for tensor in tensors}) == 1
    vector = min(tensor.vector(t.itemsize) for tensor in tensors) if same_order else 1
    return vector, all(tensor.rows_contiguous for tensor in tensors)


def _is_packed(g: Geometry) -> bool:
    """Narrow rows that lie end to end, class by class."""
    return g.n_outer == 1 and g.col_stride == 1 and g.row_stride == g.n_cols <= MAX_SHARED_ROW_COLS


def _packed_row_group(g: Geometry, itemsize: int, max_run: int) -> int:
    """How many packed rows together are whole groups of 16 bytes, or of fewer if one thread cannot hold so many rows."""
    vector = VECTOR_BYTES // itemsize
    while vector > 1 and vector // gcd(vector, g.n_cols) * g.n_cols > max_run:
        vector //= 2
    return vector // gcd(vector, g.n_cols)
