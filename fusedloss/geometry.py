"""How the tensors of a call lie in memory, and what a plan asks of the GPU: what the Triton path's tiles follow from."""

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes of the widest access of a thread (LDG.128, global_load_dwordx4).
VECTOR_BYTES = 16
# Bytes that travel together between L2 and an SM.
SECTOR_BYTES = 32


class DeviceFacts(NamedTuple):
    """What the plan asks of the hardware. The default is an H100 SXM."""

    n_sms: int = 132
    warp_size: int = 32  # of Radeons, too
    is_nvidia: bool = True
    flushes_l2: bool = False  # for a ticket (kernels/finish.py)
    may_wait: bool = True  # the programs of a launch, for each other; FUSEDLOSS_NO_WAIT=1: they never do


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


class Operands(NamedTuple):
    """The tensors of a launch that have a value per logit."""

    logits: Geometry
    dlogits: Geometry | None  # of a launch that writes the gradient
    probabilities: Geometry | None
    itemsize: int  # bytes of a logit

    def all(self) -> list[Geometry]:
        return [geometry for geometry in self[:3] if geometry is not None]

    def same_alignment(self) -> bool:
        """Whether the ragged edges of a row are the same in all of them."""
        step, sector = self.logits.row_stride, SECTOR_BYTES // self.itemsize
        return all((step - other.row_stride) % sector == 0 and other.col_stride == 1 for other in self.all()[1:])


Strides = tuple[int, ...]


def operands(
    shape: torch.Size, logits: Strides, dlogits: Strides | None, probabilities: Strides | None, itemsize: int
) -> Operands:
    """Of tensors of one shape, (N, C) or (N, C, S), by their strides; None: there is no such tensor."""
    present = [strides for strides in (logits, dlogits, probabilities) if strides is not None]
    found = iter(_geometries(shape, *present))
    return Operands(
        next(found),
        None if dlogits is None else next(found),
        None if probabilities is None else next(found),
        itemsize,
    )


def _geometries(shape: torch.Size, *strides: Strides) -> list[Geometry]:
    """n_outer and n_inner are the same for all."""
    if len(shape) == 2:
        n_rows, n_cols = shape
        return [Geometry(1, n_rows, n_cols, 0, row, col) for row, col in strides]
    n_outer, n_cols, n_inner = shape
    # channels_last, a single image, or none: one block of rows, if it is one in every tensor
    if n_outer <= 1 or all(outer == n_inner * row for outer, _, row in strides):
        return [Geometry(1, n_outer * n_inner, n_cols, 0, row, col) for _, col, row in strides]
    return [Geometry(n_outer, n_inner, n_cols, outer, row, col) for outer, col, row in strides]


def probabilities_strides(logits: Tensor, probabilities: Tensor) -> Strides:
    """Strides with which the kernels take class probabilities: their own if the logits or the gradient have the same; else the
    gradient's, in a copy."""
    if probabilities.stride() == logits.stride():
        return logits.stride()
    return torch.empty_like(logits, device="meta").stride()


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def warps(threads: int, device: DeviceFacts) -> int:
    return max(1, threads // device.warp_size)


def register_limit(registers: int, device: DeviceFacts) -> int | None:
    """maxnreg for a launch: an option that Triton refuses elsewhere."""
    return registers if device.is_nvidia else None
