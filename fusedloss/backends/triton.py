"""Allocates outputs and launches the Triton kernels that the plan chose. Triton is imported at the first launch."""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedloss.backends.outputs import (
    STATE,
    Allocators,
    Outputs,
    allocate_forward,
    allocate_gradient,
    allocator,
    forward_allocators,
)
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
    n_selections,
    needs_denominator,
    next_power_of_2,
    probabilities_strides,
    row_group,
    scale_tile,
    selection_tile,
)
from fusedloss.reference import FRACTION_BITS

N_STATISTICS = 4  # of a slice; kernels/slices.py
DIGIT_BITS = 8  # as in kernels/reduction.py
N_SELECTION, N_SELECTED_SUMS = 4, 3  # see kernels/selection.py
# 1 + N_GROUPS of kernels/reduction.py, and more than a GPU has SMs; behind them the 256 of kernels/selection.py
N_COUNTERS = 1024


@dataclass(frozen=True, eq=False)
class Launch:
    """What all calls alike share of a launch; decided once. A call adds its tensors, and numbers no kernel is specialised for."""

    tile: Tile
    constants: dict[str, Any]  # arguments of the kernel, and num_warps and the like
    compiled: dict[tuple[Any, ...], Any] = field(default_factory=dict)  # by what Triton looks at besides; see _launch

    @property
    def n_rows(self) -> int:
        return self.constants["n_rows"]

    @cached_property
    def function(self) -> Any:
        return _kernels()[self.tile.kernel]

    @cached_property
    def template(self) -> list[Any]:
        """All arguments of the kernel in order; None where a call has its own."""
        return [self.constants.get(name) for name in self.function.arg_names]

    @cached_property
    def slots(self) -> list[tuple[int, str]]:
        """Places and names of the arguments that a call has."""
        return [(place, name) for place, name in enumerate(self.function.arg_names) if name not in self.constants]


class Launches(NamedTuple):
    """Of a forward."""

    main: Launch
    counting: Launch | None  # before it, where no gradient can be written until the rows are counted
    fused: bool
    n_partials: int  # sums that the last program adds up
    selection: tuple[Launch, ...] = ()  # after it, where rows are too many for the last program to select among


def forward(
    inputs: Inputs,
    options: Options,
    out_dtype: torch.dtype,
    needs_grad: bool,
    keeps_workspace: bool = True,  # between calls; not where a compiled graph owns the memory
) -> Outputs:
    """One launch: every row's loss, and their reduction. The fused strategy writes the gradient in the same launch."""
    inputs = _laid_out(inputs)
    outputs = allocate_forward(inputs, options, out_dtype, needs_grad)
    strides = None if outputs.dlogits is None else outputs.dlogits.stride()
    _forward(outputs, inputs, options, _forward_launches(inputs, strides, options, needs_grad), keeps_workspace)
    return outputs


def _forward_launches(inputs: Inputs, gradient_strides: tuple[int, ...] | None, options: Options, needs_grad: bool) -> Launches:
    logits, facts = inputs.logits, device_facts(inputs.logits.device)
    shape, strides, target_strides = logits.shape, logits.stride(), _probabilities_strides(inputs)
    if gradient_strides is None:
        launch = _forward_launch(shape, strides, target_strides, logits.element_size(), options.kind(), needs_grad, facts)
        reduces = options.reduction != "none" or options.return_stats
        n_partials = launch.tile.n_programs // launch.tile.n_slices if reduces else 1
        selection = _selection_launches(launch.n_rows, options.reduction, logits.element_size(), facts)
        return Launches(launch, None, False, n_partials, selection)
    layout = (shape, strides, gradient_strides, target_strides, logits.element_size())
    launch = _gradient_launch("fused", *layout, options.kind(), facts)
    counts = not inputs.has_probabilities() and needs_denominator(launch.tile, launch.n_rows, options.reduction)
    counting = _denominator_launch(launch.n_rows, shape[1], options.ignore_index, facts) if counts else None
    return Launches(launch, counting, True, launch.tile.n_programs // launch.tile.n_slices)


def _forward(outputs: Outputs, inputs: Inputs, options: Options, launches: Launches, keeps_workspace: bool) -> None:
    logits, n_rows = inputs.logits, launches.main.n_rows
    saved = outputs.saved if outputs.saved is not None else _state(logits)
    arguments = {
        "loss_ptr": outputs.loss,
        "saved_ptr": saved,
        "logits_ptr": logits,
        **_row_arguments(inputs, options),
        "scale_ptr": inputs.scale,
        "scale_bits": _bits(options.scale),
        **_statistics(outputs, n_rows),
    }
    if outputs.dlogits is not None:
        arguments["dlogits_ptr"] = outputs.dlogits
    _launch_forward(launches, logits.device, arguments, saved, keeps_workspace)


def _launch_forward(
    launches: Launches, device: torch.device, arguments: dict[str, Any], saved: Tensor, keeps_workspace: bool
) -> None:
    """Adds the workspace to the arguments, and launches."""
    launch, counting, fused, n_partials, selection = launches
    tile = launch.tile
    arguments.update(_workspace(1 if fused else 2, n_partials, saved, keeps_workspace))
    if tile.n_slices > 1:
        arguments["slices_ptr"] = _slices(launch, saved)
        if fused:
            arguments["arrived_ptr"] = saved.new_empty((1 + launch.n_rows,), dtype=torch.int32)
        else:
            arguments["ticket_ptr"] = _ticket(device, keeps_workspace)
    if selection:
        arguments["selection_ptr"] = saved.new_empty((N_SELECTION,), dtype=torch.int64)
    # Triton's interpreter runs programs one after another: none can wait for a later one. There, the launches are made twice
    # without waiting, and in the second round every slice finds what all others published in the first.
    for _ in range(2 if fused and tile.n_slices > 1 and _interprets() else 1):
        if counting is not None:
            workspace = _workspace(1, counting.tile.n_programs, saved, keeps_workspace)
            shared = {name: arguments.get(name) for name in _DENOMINATOR_ARGUMENTS}
            _launch(counting, device, {**shared, **workspace})
        elif fused and tile.n_slices > 1:  # every row counts, and the denominator is known
            arguments["arrived_ptr"].zero_()
        _launch(launch, device, arguments)
    if selection:
        arguments["sums_ptr"] = saved.new_empty((N_SELECTED_SUMS, selection[-1].tile.n_programs), dtype=torch.float64)
    for step in selection:
        _launch(step, device, {name: arguments.get(name) for name in step.function.arg_names if name not in step.constants})


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
    if n_selections(g.n_rows, options.reduction, itemsize) == 0:
        constants["selection_ptr"] = None
    if tile.rowwise:
        constants["N_SLICES"] = tile.n_slices
        if tile.n_slices == 1:
            constants["slices_ptr"] = None
    return Launch(tile, constants)


@lru_cache(maxsize=1024)
def _selection_launches(n_rows: int, reduction: str, itemsize: int, facts: DeviceFacts) -> tuple[Launch, ...]:
    n_digits = n_selections(n_rows, reduction, itemsize) - 1
    if n_digits < 0:
        return ()
    digit, selected = (selection_tile(kernel, n_rows, facts) for kernel in ("digit_kernel", "selected_kernel"))
    constants = {"n_rows": n_rows, "num_warps": digit.num_warps}
    digits = (Launch(digit, {**constants, "shift": DIGIT_BITS * i}) for i in reversed(range(n_digits)))
    return (*digits, Launch(selected, constants))


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


_ABSENT = dict.fromkeys(  # from all calls that are prepared: not looked at in each
    (
        "probabilities_ptr",
        "target_b_ptr",
        "lam_ptr",
        "lam_bits",
        "sample_weight_ptr",
        "scale_ptr",
        "row_stats_ptr",
        "counts_ptr",
        "flags_ptr",
    )
)


@dataclass(frozen=True, eq=False)
class Prepared:
    """The forward of calls alike, on contiguous logits with class indices, and weights or not, as the caller has them."""

    new: Allocators
    new_state: Callable[[], Tensor]
    launches: Launches
    scaling: Launch
    device: torch.device

    def forward(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss, what the backward reads and the gradient for an upstream gradient of 1; as `Outputs` has them."""
        new = self.new
        loss = new.loss()
        saved = None if new.saved is None else new.saved()
        dlogits = None if new.dlogits is None else new.dlogits()
        state = self.new_state() if saved is None else saved
        arguments: dict[str, Any] = {
            "loss_ptr": loss,
            "saved_ptr": state,
            "logits_ptr": logits,
            "target_ptr": target,
            "weight_ptr": weight,
            "scale_bits": _bits(scale),
        }
        if dlogits is not None:
            arguments["dlogits_ptr"] = dlogits
        _launch_forward(self.launches, self.device, arguments, state, keeps_workspace=True)
        return loss, saved, dlogits

    def scale_gradient(self, dlogits: Tensor, dloss: Tensor) -> None:
        _launch(self.scaling, self.device, {"dlogits_ptr": dlogits, "dloss_ptr": dloss})


def prepare(inputs: Inputs, options: Options, out_dtype: torch.dtype, needs_grad: bool, shape: torch.Size) -> Prepared | None:
    """What `forward` decides for these arguments, or None where it has to copy a tensor first, or there is nothing to do. shape:
    the caller's logits'."""
    if inputs.logits.numel() == 0 or not all(tensor is None or tensor.is_contiguous() for tensor in inputs):
        return None
    new, device = forward_allocators(inputs, options, out_dtype, needs_grad, shape), inputs.logits.device
    strides = inputs.logits.stride() if new.dlogits is not None else None
    new_state = allocator((STATE,), accumulation_dtype(inputs.logits.dtype), device)
    launches = _forward_launches(inputs, strides, options, needs_grad)
    main = replace(launches.main, constants={**launches.main.constants, **_ABSENT}, compiled={})
    return Prepared(
        new, new_state, launches._replace(main=main), _scale_launch(inputs.logits.numel(), device_facts(device)), device
    )


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
    n_programs = launch.tile.n_programs
    if not _keeps_compiled(device):
        try:
            launch.function[(n_programs,)](**launch.constants, **arguments)
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
    values = launch.template.copy()
    key: list[Any] = [device.index]
    for place, name in launch.slots:
        value = arguments[name]
        if value is None:
            key.append(None)
        elif type(value) is int:
            values[place] = value
            key.append(-(2**31) <= value < 2**31)
        else:
            values[place] = address = value.data_ptr()
            key += (value.dtype, address % VECTOR_BYTES == 0)
    compiled = launch.compiled.get(tuple(key))
    if compiled is not None:
        compiled[(n_programs, 1, 1)](*values)
        return
    compiled = launch.function[(n_programs,)](**launch.constants, **arguments)
    if compiled is not None:  # None from Triton's interpreter
        launch.compiled[tuple(key)] = compiled


def _keeps_compiled(device: torch.device) -> bool:
    return device.type == "cuda"  # elsewhere an emulator may take another's place


@lru_cache(maxsize=1)
def _kernels() -> dict[str, Any]:
    from fusedloss.kernels import backward, forward, fused, selection

    return {
        kernel.__name__: kernel
        for kernel in (
            fused.denominator_kernel,
            fused.fused_tile_kernel,
            fused.fused_row_kernel,
            fused.scale_gradient_kernel,
            forward.forward_tile_kernel,
            forward.forward_row_kernel,
            selection.digit_kernel,
            selection.selected_kernel,
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

    The first is the launch's; one more for each group of programs (kernels/reduction.py), or for each row that a forward may cut
    into slices, which are fewer than the SMs. They belong to one stream, on which launches follow each other. A CUDA graph gets
    its own, zeroed by a node of the graph: its replays may run beside anything else. So does a compiled graph, which may own the
    pool of all memory that is allocated while it runs (CUDA graph trees), and would find ours still alive.
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
    return torch.zeros((N_COUNTERS,), dtype=torch.int32, device=device)


@cache
def _stream_ticket(device: torch.device, stream: int) -> Tensor:
    del stream  # part of the key
    return _zero_counters(device)
