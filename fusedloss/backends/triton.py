"""Allocates outputs and launches the Triton kernels that the plan chose. Triton is imported at the first launch."""

import struct
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from fusedloss.backends.outputs import allocate_forward, allocate_gradient
from fusedloss.plan import Options
from fusedloss.plan_triton import DeviceFacts, backward_tile, forward_tile, geometries, row_groups
from fusedloss.reference import FRACTION_BITS


def forward(
    logits: Tensor,  # (N, C) or (N, C, S)
    target: Tensor,  # (n_rows,)
    weight: Tensor | None,  # (C,)
    scale: Tensor | None,  # 0-d
    options: Options,
    out_dtype: torch.dtype,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch: every row's loss, and their reduction."""
    loss, saved, dlogits = allocate_forward(logits, options.reduction, out_dtype, needs_grad, "triton")
    (g,) = geometries(logits)
    itemsize = logits.element_size()
    tile = forward_tile(g, itemsize, device_facts(logits.device))
    partial = ticket = None
    if options.reduction != "none" and tile.n_programs > 1:
        partial = saved.new_empty((2, tile.n_programs))
        ticket = _ticket(logits.device)
    arguments = {
        "loss_ptr": loss,
        "saved_ptr": saved,
        "partial_ptr": partial,
        "ticket_ptr": ticket,
        "logits_ptr": logits,
        "target_ptr": target.contiguous(),
        "weight_ptr": weight.contiguous() if weight is not None else None,
        "scale_ptr": scale,
        "scale_bits": _bits(options.scale),
        "smoothing_bits": _bits(options.label_smoothing),
        "ignore_index": options.ignore_index,
        "top_k": options.top_k or round(options.top_k_fraction * 2**FRACTION_BITS),
        "n_rows": g.n_rows,
    }
    if tile.rowwise:
        vector, has_edges = row_groups(g, itemsize)
        arguments.update(n_cols=g.n_cols, row_stride=g.row_stride, HAS_EDGES=has_edges, VECTOR=vector)
    else:
        arguments.update(
            n_inner=g.n_inner,
            n_cols=g.n_cols,
            outer_stride=g.outer_stride,
            row_stride=g.row_stride,
            col_stride=g.col_stride,
            ROWS_CONTIGUOUS=g.rows_contiguous,
            VECTOR=g.vector(itemsize),
            BLOCK_ROWS=tile.block_rows,
        )
    arguments.update(
        REDUCTION=options.reduction,
        TOP_K_IS_FRACTION=options.top_k == 0,
        HAS_SMOOTHING=options.label_smoothing > 0,
        SAVE=needs_grad,
        BLOCK_COLS=tile.block_cols,
        num_warps=tile.num_warps,
    )
    _launch(tile.kernel, tile.n_programs, logits.device, arguments)
    return loss, saved, dlogits


def backward(
    dloss: Tensor,  # (n_rows,) or (1,)
    logits: Tensor,  # (N, C) or (N, C, S)
    target: Tensor,  # (n_rows,)
    weight: Tensor | None,  # (C,)
    saved: Tensor,
    options: Options,
) -> Tensor:
    """One launch: the gradient of the logits."""
    dlogits = allocate_gradient(logits)
    if logits.numel() == 0:
        return dlogits
    g, out = geometries(logits, dlogits)
    itemsize = logits.element_size()
    tile = backward_tile(g, out, itemsize, device_facts(logits.device))
    arguments = {
        "dlogits_ptr": dlogits,
        "dloss_ptr": dloss.contiguous(),
        "saved_ptr": saved,
        "logits_ptr": logits,
        "target_ptr": target.contiguous(),
        "weight_ptr": weight.contiguous() if weight is not None else None,
        "smoothing_bits": _bits(options.label_smoothing),
        "ignore_index": options.ignore_index,
        "n_rows": g.n_rows,
        "n_cols": g.n_cols,
        "dlogits_row_stride": out.row_stride,
        "row_stride": g.row_stride,
        "REDUCTION": options.reduction,
        "HAS_SMOOTHING": options.label_smoothing > 0,
        "BLOCK_COLS": tile.block_cols,
        "num_warps": tile.num_warps,
    }
    if tile.rowwise:
        vector, has_edges = row_groups(g, itemsize)
        arguments.update(HAS_EDGES=has_edges, VECTOR=vector)
    else:
        arguments.update(
            n_inner=g.n_inner,
            dlogits_outer_stride=out.outer_stride,
            dlogits_col_stride=out.col_stride,
            outer_stride=g.outer_stride,
            col_stride=g.col_stride,
            ROWS_CONTIGUOUS=g.rows_contiguous and out.rows_contiguous,
            VECTOR=min(g.vector(itemsize), out.vector(itemsize)) if g.rows_contiguous == out.rows_contiguous else 1,
            BLOCK_ROWS=tile.block_rows,
        )
    _launch(tile.kernel, tile.n_programs, logits.device, arguments)
    return dlogits


def scale_gradient(dlogits: Tensor, dloss: Tensor) -> None:  # dloss: 0-d
    """dlogits *= dloss."""
    dlogits.mul_(dloss)


@cache
def device_facts(device: torch.device) -> DeviceFacts:
    """Facts of a GPU; those of an H100 for any other device, where kernels are only planned, interpreted or emulated."""
    if device.type != "cuda":
        return DeviceFacts()
    found = torch.cuda.get_device_properties(device)
    return DeviceFacts(found.multi_processor_count, (found.major, found.minor), found.L2_cache_size, found.warp_size)


def _launch(kernel: str, n_programs: int, device: torch.device, arguments: dict[str, Any]) -> None:
    # torch leaves the device of another GPU's tensors to the caller, Triton launches on the current one.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _kernels()[kernel][(n_programs,)](**arguments)
        return
    try:
        _kernels()[kernel][(n_programs,)](**arguments)
    except (RuntimeError, ValueError) as error:
        if device.type == "cuda":
            raise
        raise RuntimeError(
            f"backend 'triton' was asked for, but Triton cannot launch on tensors of device {str(device)!r} here ({error}). "
            "CPU tensors need TRITON_INTERPRET=1, set before Triton is imported."
        ) from error


@lru_cache(maxsize=1)
def _kernels() -> dict[str, Any]:
    from fusedloss.kernels import backward, forward

    return {
        kernel.__name__: kernel
        for kernel in (
            forward.forward_tile_kernel,
            forward.forward_row_kernel,
            backward.backward_tile_kernel,
            backward.backward_row_kernel,
        )
    }


@lru_cache(maxsize=256)
def _bits(value: float) -> int:
    """The bits of a float64 as an int64: Triton rounds float arguments to float32."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _ticket(device: torch.device) -> Tensor:
    """The counter by which the last program of a launch knows itself: int32 zero, and zero again after every launch.

    It belongs to one stream, on which launches follow each other. A CUDA graph gets one of its own, zeroed by a node of
    the graph: its replays may run beside anything else.
    """
    if device.type != "cuda":
        return torch.zeros((), dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros((), dtype=torch.int32, device=device)
    return _stream_ticket(device, torch.cuda.current_stream(device).cuda_stream)


@cache
def _stream_ticket(device: torch.device, stream: int) -> Tensor:
    del stream  # part of the key
    return torch.zeros((), dtype=torch.int32, device=device)
