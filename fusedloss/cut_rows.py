"""How the Triton path cuts long rows: a program per row, or several that share one. Pure functions, see plan_triton.py."""

from fusedloss.geometry import SECTOR_BYTES, VECTOR_BYTES, DeviceFacts, Geometry, Operands, next_power_of_2, register_limit, warps
from fusedloss.kernels.constants import MEETING_BITS
from fusedloss.kernels.groups import RowShape
from fusedloss.plan import Cut

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
FUSED_ROW_BLOCKS_EXTRAS = {2: 10, 4: 9, 8: 2}  # one less beside two labels, z_loss and a scale, or sm_100 spills a value
FUSED_ROW_BLOCKS_MORE = {2: 3, 4: 3, 8: 1}
FUSED_ROW_BLOCKS_PROBABILITIES = {2: 4, 4: 4, 8: 1}  # they wait in registers, too
FUSED_ROW_REGISTERS = 128  # with fewer blocks as many as a thread can have, and ptxas takes no more than these either
# An SM has room for two programs of so many threads with so many registers: one loads or stores while the other reduces.
FUSED_ROW_THREADS = 256
FUSED_ROW_THREADS_ALONE = (
    512  # all registers of an SM: used only where waiting is forbidden; a row that fits is then still read once
)
# A longer row is cut into slices: programs that wait for each other, of few threads, so that an SM has room for four and some
# load while others wait.
SLICE_THREADS = 128
# All slices of a row that wait for each other must be resident at once, beside whatever else the GPU does. Where the SMs are
# fewer, so are the slices; and they take no more than a quarter of the SMs unless the row needs them: there may be other such
# launches, or fewer SMs for ours.
MAX_SLICES = 64
WAITING_SHARE = 4
# Rows fewer than the SMs are cut into slices of at least so many columns until all SMs have one. Not rows shorter than
# LONG_ROW_COLS: their exchange of statistics, 1 to 2 microseconds, costs more than an SM needs to read them.
MIN_SLICE_COLS = 4096
LONG_ROW_COLS = 32768
# 16-byte loads that each thread has under way for a block of a row. More would spill on sm_80; fewer would need more warps, whose
# reductions meet at barriers.
ACCESSES_PER_THREAD = 4
# Registers of an SM. A row's forward is compiled for as many as let two programs share one, so that one loads while the other
# reduces; for what one program can have, where more is under way. Left to itself, ptxas spills a value or two to fit another.
SM_REGISTERS = 65536
MAX_REGISTERS = 255


def takes_rows(t: Operands) -> bool:
    """Whether rows have programs of their own: rows long enough, classes side by side, edges the same in all tensors."""
    g = t.logits
    return g.n_outer == 1 and g.col_stride == 1 and g.n_cols > MAX_SHARED_ROW_COLS and t.same_alignment()


def forward_rows(t: Operands, holds_more: bool, device: DeviceFacts) -> Cut:
    """Cuts a forward; `holds_more`: see plan_triton.holds_more."""
    g = t.logits
    block_cols, num_warps = _row_block(g.n_cols, t.itemsize, device)
    per_sm = 1 if holds_more or t.probabilities is not None or t.itemsize == 8 else 2
    n_slices = min(_slices_that_fill(g, device), -(-g.n_cols // block_cols))
    shape = RowShape(block_cols, _row_group(g, t.itemsize), n_slices)
    registers = register_limit(registers_of(num_warps, per_sm), device)
    return Cut("forward_row_kernel", max(1, g.n_rows) * n_slices, num_warps, shape, registers)


def backward_rows(t: Operands, device: DeviceFacts) -> Cut:
    g = t.logits
    n_cols = _row_cols(g, t.itemsize)
    block_cols, num_warps = _row_block(n_cols, t.itemsize, device)
    n_programs = max(1, g.n_rows * -(-n_cols // block_cols))
    return Cut("backward_row_kernel", n_programs, num_warps, RowShape(block_cols, _row_group(g, t.itemsize)))


def fused_rows(t: Operands, holds_more: bool, extras: bool, device: DeviceFacts) -> Cut | None:
    """Cuts rows into blocks that fit into the registers; None where the slices of a row would be more than can wait for each
    other, or may not. extras: `Options.has_extras`."""
    g, soft = t.logits, t.probabilities is not None
    alone = FUSED_ROW_BLOCKS_EXTRAS if extras else FUSED_ROW_BLOCKS
    fitting = (FUSED_ROW_BLOCKS_MORE if holds_more else FUSED_ROW_BLOCKS_PROBABILITIES if soft else alone)[t.itemsize]
    all_registers = holds_more or soft  # the blocks are so many that they take all that a thread can have
    n_cols = _row_cols(g, t.itemsize)
    filling = min(_slices_that_fill(g, device), max(1, device.n_sms // WAITING_SHARE)) if device.may_wait else 1
    threads = device.warp_size
    while threads * FUSED_COLS_PER_THREAD * fitting < n_cols:
        threads *= 2
    most = FUSED_ROW_THREADS if device.may_wait or all_registers else FUSED_ROW_THREADS_ALONE
    if filling > 1 or threads > most:
        threads = SLICE_THREADS
    block_cols = threads * FUSED_COLS_PER_THREAD
    blocks = -(-n_cols // block_cols)
    n_blocks = -(-blocks // max(-(-blocks // fitting), filling))
    n_slices = -(-blocks // n_blocks)
    if n_slices > (min(MAX_SLICES, device.n_sms) if device.may_wait else 1):
        return None
    num_warps = warps(threads, device)
    # Left to itself, ptxas would spill a few values to fit another program on an SM.
    registers = register_limit(registers_of(num_warps, 1) if all_registers else FUSED_ROW_REGISTERS, device)
    shape = RowShape(block_cols, _row_group(g, t.itemsize), n_slices, n_blocks)
    return Cut("fused_row_kernel", g.n_rows * n_slices, num_warps, shape, registers)


def may_meet(cut: Cut, device: DeviceFacts) -> bool:
    """Whether all programs of a launch may wait for each other: they fit a quarter of the GPU, whatever registers they take. Not
    where each look at a counter costs more than another launch."""
    n_threads = cut.n_programs * cut.num_warps * device.warp_size
    countable = cut.n_programs < 1 << MEETING_BITS and cut.n_programs * cut.shape.rows < 1 << (31 - MEETING_BITS)
    if not device.may_wait or device.flushes_l2 or not countable:
        return False
    return WAITING_SHARE * n_threads * MAX_REGISTERS <= device.n_sms * SM_REGISTERS


def registers_of(num_warps: int, per_sm: int) -> int:
    """Of a thread, where so many programs share an SM."""
    return min(MAX_REGISTERS, SM_REGISTERS // (per_sm * num_warps * 32))


def _row_group(g: Geometry, itemsize: int) -> int:
    """Elements of a sector, or of 16 bytes, if all rows consist of them; 1 for ragged rows."""
    for n_bytes in (SECTOR_BYTES, VECTOR_BYTES):
        group = n_bytes // itemsize
        if g.n_cols % group == 0 and g.row_stride % group == 0:
            return group
    return 1


def _row_cols(g: Geometry, itemsize: int) -> int:
    """Columns of the longest row; of rows that may begin inside a sector, with what precedes them there."""
    group = _row_group(g, itemsize)
    return g.n_cols + (SECTOR_BYTES // itemsize - group if group > 1 else 0)


def _row_block(n_cols: int, itemsize: int, device: DeviceFacts) -> tuple[int, int]:
    block_cols = min(next_power_of_2(n_cols), ROW_BLOCK if itemsize < 8 else ROW_BLOCK // 2)  # float64 takes two registers
    return block_cols, warps(block_cols * itemsize // (ACCESSES_PER_THREAD * VECTOR_BYTES), device)


def _slices_that_fill(g: Geometry, device: DeviceFacts) -> int:
    """Slices of a row that give every SM a program; 1 where rows are many or short. A power of two: each number of slices is a
    kernel of its own, and the number of rows may be another in every call."""
    if g.n_cols < LONG_ROW_COLS or g.n_rows == 0:
        return 1
    return min(next_power_of_2(device.n_sms // g.n_rows), next_power_of_2(-(-g.n_cols // MIN_SLICE_COLS)), MAX_SLICES)
