"""Allocates outputs and launches the Triton kernels that the plan chose. Triton is imported at the first launch."""

import struct
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from fusedloss.backends.outputs import STATE, Outputs, allocate_forward, allocate_gradient
from fusedloss.plan import Inputs, Options, Tile, accumulation_dtype
from fusedloss.plan_triton import (
    COUNTED_ROWS,
    VECTOR_BYTES,
    DeviceFacts,
    Geometry,
    backward_tile,
    counts_rows,
    denominator_tile,
    forward_tile,
    fused_tile,
    geometries,
    holds_more,
    needs_denominator,
    next_power_of_2,
    probabilities_strides,
    row_group,
    scale_tile,
)
from fusedloss.reference import FRACTION_BITS

N_STATISTICS = 4  # of a slice; kernels/slices.py


@dataclass(frozen=True, eq=False)
class Launch:
    """What all calls alike share of a launch; decided once. A call adds its tensors, and numbers no kernel is specialised for."""

    tile: Tile
    constants: dict[str, Any]  # arguments of the kernel, and num_warps and the like
    compiled: dict[tuple[Any, ...], Any] = field(default_factory=dict)  # by what Triton looks at besides; see _launch

    @property
    def n_rows(self) -> int:
        return self.constants["n_rows"]


def forward(
    inputs: Inputs,
    options: Options,
    out_dtype: torch.dtype,
    needs_grad: bool,
    keeps_workspace: bool = True,  # between calls; not where a compiled graph owns the memory
) -> Outputs:
    """One launch: every row's loss, and their reduction. The fused strategy writes the gradient in the same launch."""
    inputs = _laid_out(inputs)
    logits = inputs.logits
    outputs = allocate_forward(inputs, options, out_dtype, needs_grad)
    if outputs.dlogits is not None:
        _fused(outputs, outputs.dlogits, inputs, options, keeps_workspace)
        return outputs
    saved = outputs.saved if outputs.saved is not None else _state(logits)
    layout = (logits.shape, logits.stride(), _probabilities_strides(inputs), logits.element_size())
    launch = _forward_launch(*layout, options.kind(), needs_grad, device_facts(logits.device))
    tile = launch.tile
    reduces = options.reduction != "none" or options.return_stats
    arguments: dict[str, Any] = {
        "loss_ptr": outputs.loss,
        "saved_ptr": saved,
        **_workspace(2, tile.n_programs // tile.n_slices if reduces else 1, saved, keeps_workspace),
        "logits_ptr": logits,
        **_row_arguments(inputs, options),
        "scale_ptr": inputs.scale,
        "scale_bits": _bits(options.scale),
        **_statistics(outputs, launch.n_rows),
    }
    if tile.n_slices > 1:
        arguments["slices_ptr"] = _slices(launch, saved)
        arguments["ticket_ptr"] = _ticket(saved.device, keeps_workspace)
    _launch(launch, logits.device, arguments)
    return outputs


@lru_cache(maxsize=1024)
def _forward_launch(
    shape: torch.Size,
    strides: tuple[int, ...],
    target_strides: tuple[int, ...] | None,
    itemsize: int,
    options: Options,
    save: bool,
    facts: DeviceFacts,
) -> Launch:
    soft = target_strides is not None
    g, *others = geometries(shape, strides, *((target_strides,) if soft else ()))
    probabilities = others[0] if soft else None
    tile = forward_tile(g, probabilities, itemsize, holds_more(options, itemsize), facts)
    constants: dict[str, Any] = {
        **_option_constants(options),
        "top_k": options.top_k or round(options.top_k_fraction * 2**FRACTION_BITS),
        "TOP_K_IS_FRACTION": options.top_k == 0,
        "SAVE": save,
        "n_rows": g.n_rows,
        "n_cols": g.n_cols,
        "BLOCK_COLS": tile.block_cols,
        **_launch_options(tile),
        **_layout(tile, itemsize, g, probabilities=probabilities),
    }
    if tile.rowwise:
        constants["N_SLICES"] = tile.n_slices
        if tile.n_slices == 1:
            constants["slices_ptr"] = None
    return Launch(tile, constants)


def _fused(outputs: Outputs, dlogits: Tensor, inputs: Inputs, options: Options, keeps_workspace: bool) -> None:
    """One launch, or two where no gradient can be written before the rows are counted, or slices need counters at zero."""
    logits = inputs.logits
    saved = _state(logits)
    layout = (logits.shape, logits.stride(), dlogits.stride(), _probabilities_strides(inputs), logits.element_size())
    facts = device_facts(logits.device)
    launch = _gradient_launch("fused", *layout, options.kind(), facts)
    tile, n_rows = launch.tile, launch.n_rows
    arguments: dict[str, Any] = {
        "loss_ptr": outputs.loss,
        "saved_ptr": saved,
        "dlogits_ptr": dlogits,
        **_workspace(1, tile.n_programs // tile.n_slices, saved, keeps_workspace),
        "logits_ptr": logits,
        **_row_arguments(inputs, options),
        "scale_ptr": inputs.scale,
        "scale_bits": _bits(options.scale),
        **_statistics(outputs, n_rows),
    }
    if tile.n_slices > 1:
        arguments["slices_ptr"] = _slices(launch, saved)
        arguments["arrived_ptr"] = saved.new_empty((1 + n_rows,), dtype=torch.int32)
    # Triton's interpreter runs programs one after another: none can wait for a later one. There, the launches are made twice
    # without waiting, and in the second round every slice finds what all others published in the first.
    for _ in range(2 if tile.n_slices > 1 and _interprets() else 1):
        if inputs.has_probabilities():  # every row counts, and the denominator is known
            if tile.n_slices > 1:
                arguments["arrived_ptr"].zero_()
        elif needs_denominator(tile, n_rows, options.reduction):
            counting = _denominator_launch(n_rows, logits.shape[1], options.ignore_index, facts)
            workspace = _workspace(1, counting.tile.n_programs, saved, keeps_workspace)
            shared = {name: arguments.get(name) for name in _DENOMINATOR_ARGUMENTS}
            _launch(counting, logits.device, {**shared, **workspace})
        _launch(launch, logits.device, arguments)


_DENOMINATOR_ARGUMENTS = (  # which the fused launch has, too
    "saved_ptr",
    "arrived_ptr",
    "target_ptr",
    "target_b_ptr",
    "weight_ptr",
    "scale_ptr",
    "scale_bits",
)


@lru_cache(maxsize=1024)
def _denominator_launch(n_rows: int, n_cols: int, ignore_index: int, facts: DeviceFacts) -> Launch:
    tile = denominator_tile(n_rows, facts)
    constants = {"ignore_index": ignore_index, "n_rows": n_rows, "n_cols": n_cols, "BLOCK_ROWS": tile.block_rows}
    return Launch(tile, {**constants, "num_warps": tile.num_warps})


def backward(
    dloss: Tensor,  # of the loss's shape
    inputs: Inputs,
    saved: Tensor,
    options: Options,
) -> Tensor:
    """One launch: the gradient of the logits."""
    inputs = _laid_out(inputs)
    logits = inputs.logits
    dlogits = allocate_gradient(logits)
    if logits.numel() == 0:
        return dlogits
    layout = (logits.shape, logits.stride(), dlogits.stride(), _probabilities_strides(inputs), logits.element_size())
    arguments: dict[str, Any] = {
        "dlogits_ptr": dlogits,
        "dloss_ptr": dloss.contiguous(),
        "saved_ptr": saved,
        "logits_ptr": logits,
        **_row_arguments(inputs, options),
    }
    launch = _gradient_launch("recompute", *layout, options.kind(), device_facts(logits.device))
    _launch(launch, logits.device, arguments)
    return dlogits


@lru_cache(maxsize=1024)
def _gradient_launch(
    strategy: str,
    shape: torch.Size,
    strides: tuple[int, ...],
    gradient_strides: tuple[int, ...],
    target_strides: tuple[int, ...] | None,
    itemsize: int,
    options: Options,
    facts: DeviceFacts,
) -> Launch:
    """The fused forward's, or the backward's."""
    soft = target_strides is not None
    g, out, *others = geometries(shape, strides, gradient_strides, *((target_strides,) if soft else ()))
    probabilities = others[0] if soft else None
    cut = fused_tile if strategy == "fused" else backward_tile
    tile = cut(g, out, probabilities, itemsize, holds_more(options, itemsize), facts)
    constants: dict[str, Any] = {
        **_option_constants(options),
        "n_rows": g.n_rows,
        "n_cols": g.n_cols,
        "BLOCK_COLS": tile.block_cols,
        **_launch_options(tile),
        **_layout(tile, itemsize, g, out, probabilities),
    }
    if strategy == "fused" and tile.rowwise:
        constants.update(N_BLOCKS=tile.n_blocks, N_SLICES=tile.n_slices)
        if tile.n_slices == 1:
            constants.update(slices_ptr=None, arrived_ptr=None)
        constants["COUNT_ROWS"] = COUNTED_ROWS if counts_rows(tile, g.n_rows, options.reduction) else 0
        constants["WAITS"] = not _interprets()
    return Launch(tile, constants)


def scale_gradient(dlogits: Tensor, dloss: Tensor) -> None:  # dloss: 0-d
    """One launch, which returns at once where dloss is 1: dlogits *= dloss. Dense in memory, in whatever order of dimensions."""
    if dlogits.numel() == 0:
        return
    launch = _scale_launch(dlogits.numel(), device_facts(dlogits.device))
    _launch(launch, dlogits.device, {"dlogits_ptr": dlogits, "dloss_ptr": dloss})


@lru_cache(maxsize=1024)
def _scale_launch(n: int, facts: DeviceFacts) -> Launch:
    tile = scale_tile(n, facts)
    return Launch(tile, {"n": n, "BLOCK": tile.block_cols, "num_warps": tile.num_warps})


def _state(logits: Tensor) -> Tensor:
    """The head of `saved`, which launches hand on to each other where no backward reads the rest."""
    return logits.new_empty((STATE,), dtype=accumulation_dtype(logits.dtype))


def _workspace(n_sums: int, n_programs: int, saved: Tensor, keeps_workspace: bool) -> dict[str, Tensor | None]:
    """What a reduction over several programs needs besides its outputs."""
    if n_programs == 1:
        return {"partial_ptr": None, "ticket_ptr": None}
    return {"partial_ptr": saved.new_empty((n_sums, n_programs)), "ticket_ptr": _ticket(saved.device, keeps_workspace)}


def _statistics(outputs: Outputs, n_rows: int) -> dict[str, Tensor | None]:
    """Where a launch leaves its statistics, and what it needs to count rows."""
    flags = outputs.counts.new_empty((n_rows,), dtype=torch.int8) if outputs.counts is not None else None
    return {"row_stats_ptr": outputs.row_stats, "counts_ptr": outputs.counts, "flags_ptr": flags}


def _option_constants(options: Options) -> dict[str, Any]:
    """None: a kernel is compiled without what it stands for."""
    return {
        "smoothing_bits": _bits(options.label_smoothing),
        "ignore_index": options.ignore_index,
        "REDUCTION": options.reduction,
        "HAS_SMOOTHING": options.label_smoothing > 0,
        "z_loss_bits": _bits(options.z_loss) if options.z_loss != 0 else None,
        "logit_scale_bits": _bits(options.logit_scale) if options.logit_scale != 1 else None,
        "softcap_bits": _bits(options.softcap) if options.softcap > 0 else None,
    }


def _row_arguments(inputs: Inputs, options: Options) -> dict[str, Any]:
    """What a call has per row and per class, besides the logits."""
    soft = inputs.has_probabilities()
    return {
        "target_ptr": inputs.target.contiguous() if not soft else None,
        "probabilities_ptr": inputs.target if soft else None,
        "target_b_ptr": _contiguous(inputs.target_b),
        "lam_ptr": _contiguous(inputs.lam),
        "lam_bits": _bits(options.lam) if inputs.target_b is not None else None,
        "weight_ptr": _contiguous(inputs.weight),
        "sample_weight_ptr": _contiguous(inputs.sample_weight),
    }


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor.contiguous() if tensor is not None else None


def _slices(launch: Launch, saved: Tensor) -> Tensor:
    """Where the slices of a row publish their statistics."""
    return saved.new_empty((N_STATISTICS, launch.n_rows, launch.tile.n_slices))


def _laid_out(inputs: Inputs) -> Inputs:
    """The same, class probabilities copied where the kernels do not take their strides."""
    if not inputs.has_probabilities():
        return inputs
    strides = probabilities_strides(inputs.logits, inputs.target)
    if inputs.target.stride() == strides:
        return inputs
    return inputs._replace(target=torch.empty_like(inputs.logits, dtype=inputs.target.dtype).copy_(inputs.target))


def _probabilities_strides(inputs: Inputs) -> tuple[int, ...] | None:
    return inputs.target.stride() if inputs.has_probabilities() else None


def _layout(
    tile: Tile, itemsize: int, g: Geometry, out: Geometry | None = None, probabilities: Geometry | None = None
) -> dict[str, Any]:
    """The arguments that tell a kernel how logits, gradient and class probabilities lie in memory."""
    layout: dict[str, Any] = {"row_stride": g.row_stride}
    layout["probabilities_row_stride"] = probabilities.row_stride if probabilities is not None else None
    if out is not None:
        layout["dlogits_row_stride"] = out.row_stride
    if tile.rowwise:
        return {**layout, "GROUP": row_group(g, itemsize)}
    layout.update(n_inner=g.n_inner, outer_stride=g.outer_stride, col_stride=g.col_stride)
    layout["probabilities_outer_stride"] = probabilities.outer_stride if probabilities is not None else None
    layout["probabilities_col_stride"] = probabilities.col_stride if probabilities is not None else None
    if out is not None:
        layout.update(dlogits_outer_stride=out.outer_stride, dlogits_col_stride=out.col_stride)
    tensors = [tensor for tensor in (g, out, probabilities) if tensor is not None]
    same_order = len({tensor.rows_contiguous for tensor in tensors}) == 1
    return {
        **layout,
        "ROWS_CONTIGUOUS": all(tensor.rows_contiguous for tensor in tensors),
        "VECTOR": min(tensor.vector(itemsize) for tensor in tensors) if same_order else 1,
        **_tile_layout(tile),
    }


def _launch_options(tile: Tile) -> dict[str, int]:
    options = {"num_warps": tile.num_warps}
    if tile.max_registers is not None:
        options["maxnreg"] = tile.max_registers
    return options


def _tile_layout(tile: Tile) -> dict[str, int]:
    """How a tile of several rows is held on chip."""
    padded = next_power_of_2(tile.row_group * tile.n_blocks)
    return {"ROW_GROUP": tile.row_group, "PADDED": padded, "BLOCK_ROWS": tile.block_rows, "N_BLOCKS": tile.n_blocks}


@cache
def device_facts(device: torch.device) -> DeviceFacts:
    """Facts of a GPU; those of an H100 for any other device, where kernels are only planned, interpreted or emulated."""
    if device.type != "cuda":
        return DeviceFacts()
    found = torch.cuda.get_device_properties(device)
    capability = (found.major, found.minor)
    return DeviceFacts(found.multi_processor_count, capability, found.L2_cache_size, found.warp_size, torch.version.hip is None)


def _launch(launch: Launch, device: torch.device, arguments: dict[str, Any]) -> None:
    # torch leaves the device of another GPU's tensors to the caller, Triton launches on the current one.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(launch, device, arguments)
        return
    function, n_programs = _kernels()[launch.tile.kernel], launch.tile.n_programs
    if not _keeps_compiled(device):
        try:
            function[(n_programs,)](**launch.constants, **arguments)
        except (RuntimeError, ValueError) as error:
            if device.type == "cuda":
                raise
            raise RuntimeError(
                f"backend 'triton' was asked for, but Triton cannot launch on tensors of device {str(device)!r} here ({error}). "
                "CPU tensors need TRITON_INTERPRET=1, set before Triton is imported."
            ) from error
        return
    # Triton's own launch asks every argument what the kernel was specialised for. Of those that change between calls alike it is
    # the presence, dtype and alignment of tensors, and of numbers whether they fit 32 bits.
    values: dict[str, Any] = dict(launch.constants)
    key: list[Any] = [device.index]
    for name, value in arguments.items():
        if value is None:
            values[name] = None
            key.append(None)
        elif type(value) is int:
            values[name] = value
            key.append(-(2**31) <= value < 2**31)
        else:
            values[name] = address = value.data_ptr()
            key += (value.dtype, address % VECTOR_BYTES == 0)
    compiled = launch.compiled.get(tuple(key))
    if compiled is not None:
        compiled[(n_programs, 1, 1)](*[values[name] for name in function.arg_names])
        return
    compiled = function[(n_programs,)](**launch.constants, **arguments)
    if compiled is not None:  # None from Triton's interpreter
        launch.compiled[tuple(key)] = compiled


def _keeps_compiled(device: torch.device) -> bool:
    return device.type == "cuda"  # elsewhere an emulator may take another's place


@lru_cache(maxsize=1)
def _kernels() -> dict[str, Any]:
    from fusedloss.kernels import backward, forward, fused

    return {
        kernel.__name__: kernel
        for kernel in (
            fused.denominator_kernel,
            fused.fused_tile_kernel,
            fused.fused_row_kernel,
            fused.scale_gradient_kernel,
            forward.forward_tile_kernel,
            forward.forward_row_kernel,
            backward.backward_tile_kernel,
            backward.backward_row_kernel,
        )
    }


@cache
def _interprets() -> bool:
    """Whether kernels run in Triton's interpreter, on any device."""
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(_kernels()["fused_row_kernel"], InterpretedFunction)


@lru_cache(maxsize=256)
def _bits(value: float) -> int:
    """The bits of a float64 as an int64: Triton rounds float arguments to float32."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _ticket(device: torch.device, keeps_workspace: bool) -> Tensor:
    """Counters by which the last program of a launch knows itself: int32 zeros, and zeros again after every launch.

    The first is the launch's; one more for each row that a forward may cut into slices, which are fewer than the SMs. They
    belong to one stream, on which launches follow each other. A CUDA graph gets its own, zeroed by a node of the
    graph: its replays may run beside anything else. So does a compiled graph, which may own the pool of all memory that is
    allocated while it runs (CUDA graph trees), and would find ours still alive.
    """
    if device.type != "cuda":
        return _zero_counters(device)
    if device.index != torch.cuda.current_device():  # whose stream the next question is about
        with torch.cuda.device(device):
            return _ticket(device, keeps_workspace)
    if not keeps_workspace or torch.cuda.is_current_stream_capturing():
        return _zero_counters(device)
    return _stream_ticket(device, torch.cuda.current_stream(device).cuda_stream)


def _zero_counters(device: torch.device) -> Tensor:
    return torch.zeros((device_facts(device).n_sms,), dtype=torch.int32, device=device)


@cache
def _stream_ticket(device: torch.device, stream: int) -> Tensor:
    del stream  # part of the key
    return _zero_counters(device)
