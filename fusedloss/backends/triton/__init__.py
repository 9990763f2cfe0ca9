"""Forward and backward of the Triton kernels: outputs are allocated, launches made. Triton is imported at the first launch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedloss.backends.outputs import (
    NO_OUTPUTS,
    NO_STATS,
    Allocators,
    Outputs,
    RowStats,
    allocate_forward,
    allocate_gradient,
    allocator,
    forward_allocators,
    n_statistics,
)
from fusedloss.backends.triton import given, launching
from fusedloss.backends.triton.given import Launches
from fusedloss.backends.triton.launching import Launch, device_facts
from fusedloss.kernels.constants import STATE
from fusedloss.plan import ClassShard, Inputs, Options, accumulation_dtype

__all__ = [
    "Prepared",
    "backward",
    "device_facts",
    "forward",
    "forward_overwriting",
    "overwrites",
    "prepare",
    "scale_gradient",
    "shard_gradient",
    "shard_statistics",
]


def forward(
    inputs: Inputs,
    options: Options,
    out_dtype: torch.dtype,
    needs_grad: bool,
    keeps_workspace: bool = True,  # between calls; not where a compiled graph owns the memory
) -> Outputs:
    """Every row's loss and their reduction in one launch, which writes the gradient, too, where the strategy is fused. Some calls
    have a launch before it, to count the rows, or some behind it, to add up or to select losses."""
    inputs = given.laid_out(inputs)
    outputs = allocate_forward(inputs, options, out_dtype, needs_grad)
    return _forward(outputs, inputs, options, keeps_workspace)


def _forward(outputs: Outputs, inputs: Inputs, options: Options, keeps_workspace: bool) -> Outputs:
    strides = None if outputs.dlogits is None else outputs.dlogits.stride()
    facts = device_facts(inputs.logits.device)
    launches = given.forward_launches(inputs, strides, options, outputs.saved is not None, facts)
    # What launches hand on to each other, where no backward reads the rest.
    saved = outputs.saved if outputs.saved is not None else _new_state(inputs.logits)()
    _launch_forward(launches, outputs._replace(saved=saved), inputs, options.scale, options.lam, keeps_workspace)
    return outputs


def overwrites(inputs: Inputs, options: Options) -> bool:
    """Whether `forward_overwriting` uses the memory of the logits."""
    if not options.fuses_gradient(inputs.logits.dtype):
        return False
    return given.overwrites(given.laid_out(inputs), options, device_facts(inputs.logits.device))


def forward_overwriting(inputs: Inputs, options: Options, out_dtype: torch.dtype, keeps_workspace: bool = True) -> Outputs:
    """The same for reduction "sum" or "mean", and any dtype; the gradient takes the place of the logits where that can be."""
    logits = inputs.logits
    if options.fuses_gradient(logits.dtype):
        inputs = given.laid_out(inputs)
        if given.overwrites(inputs, options, device_facts(logits.device)):
            outputs = allocate_forward(inputs, options, out_dtype, False)
            return _forward(outputs._replace(dlogits=logits), inputs, options, keeps_workspace)
        return forward(inputs, options, out_dtype, True, keeps_workspace)
    outputs = forward(inputs, options, out_dtype, True, keeps_workspace)
    return outputs._replace(dlogits=backward(outputs.saved.new_ones(()), inputs, outputs.saved, options))


def _new_state(logits: Tensor) -> Callable[[], Tensor]:
    """Makes the head of `saved`."""
    return allocator((STATE,), accumulation_dtype(logits.dtype), logits.device)


def _launch_forward(launches: Launches, out: Outputs, inputs: Inputs, scale: float, lam: float, keeps_workspace: bool) -> None:
    counting, main, _, finishing, selection, clears = launches
    device = inputs.logits.device
    work = given.workspace(launches, out, keeps_workspace)
    arguments = {"out": out, "inputs": inputs, "work": work, "scale": scale, "lam": lam}
    waits = out.dlogits is not None and main.cut.n_slices > 1
    # Triton's interpreter runs programs one after another: none can wait for a later one. There, the launches are made twice
    # without waiting, and in the second round every slice finds what all others published in the first.
    for _ in range(2 if waits and launching.interprets() else 1):
        if counting is not None:
            own = given.counting_workspace(counting, work, out, keeps_workspace)
            launching.launch(counting, device, {**arguments, "work": own})
        elif clears:
            work.arrived.zero_()
        launching.launch(main, device, arguments if finishing is None else {**arguments, "work": work._replace(ticket=None)})
    if finishing is not None:
        launching.launch(finishing, device, arguments)
    for step in selection:
        launching.launch(step, device, arguments)


def backward(
    dloss: Tensor,  # of the loss's shape
    inputs: Inputs,
    saved: Tensor,
    options: Options,
) -> Tensor:
    """One launch: the gradient of the logits."""
    inputs = given.laid_out(inputs)
    logits = inputs.logits
    dlogits = allocate_gradient(logits)
    if logits.numel() == 0:
        return dlogits
    launch = given.backward_launch(inputs, dlogits.stride(), options, device_facts(logits.device))
    out = NO_OUTPUTS._replace(saved=saved, dlogits=dlogits)
    launching.launch(launch, logits.device, {"out": out, "dloss_ptr": dloss.contiguous(), "inputs": inputs, "lam": options.lam})
    return dlogits


def shard_statistics(inputs: Inputs, options: Options, shard: ClassShard) -> Tensor:
    """What a shard publishes of its rows, as `shards.shard_statistics` has it."""
    inputs = given.laid_out(inputs)
    logits = inputs.logits
    n_rows = logits.numel() // logits.shape[1]
    stats = logits.new_empty((n_statistics(inputs, options), n_rows), dtype=accumulation_dtype(logits.dtype))
    if logits.numel() > 0:
        launches = given.forward_launches(inputs, None, options, False, device_facts(logits.device), shard)
        _launch_forward(launches, NO_OUTPUTS._replace(saved=stats), inputs, 1.0, options.lam, keeps_workspace=True)
    return stats


def shard_gradient(
    drows: Tensor, inputs: Inputs, merged: Tensor, weight_total: float | Tensor, options: Options, shard: ClassShard
) -> Tensor:
    """The gradient of a shard's logits, as `shards.shard_gradient` has it."""
    del weight_total  # it is merged's weight_total, where it is needed
    inputs = given.laid_out(inputs)
    logits = inputs.logits
    dlogits = allocate_gradient(logits)
    if logits.numel() > 0:
        launch = given.backward_launch(inputs, dlogits.stride(), options, device_facts(logits.device), shard)
        out = NO_OUTPUTS._replace(saved=merged, dlogits=dlogits)
        arguments = {"out": out, "dloss_ptr": drows.contiguous(), "inputs": inputs, "lam": options.lam}
        launching.launch(launch, logits.device, arguments)
    return dlogits


def scale_gradient(dlogits: Tensor, dloss: Tensor) -> None:  # dloss: 0-d
    """One launch, which returns at once where dloss is 1: dlogits *= dloss. Dense in memory, in whatever order of dimensions.

    A row of zeros, as an ignored one has, stays so even where dloss is infinite or NaN.
    """
    if dlogits.numel() == 0:
        return
    launch = given.scale_launch(dlogits, device_facts(dlogits.device))
    launching.launch(launch, dlogits.device, {"dlogits_ptr": dlogits, "dloss_ptr": dloss})


@dataclass(frozen=True, eq=False)
class Prepared:
    """Forward and backward of calls alike, on contiguous logits with class indices, and weights or not, as they are given."""

    any_batch = False
    new: Allocators
    new_state: Callable[[], Tensor]
    launches: Launches
    backward_launch: Launch
    scaling: Launch
    device: torch.device

    def forward(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor | None, Tensor | None, RowStats | None]:
        """The loss, what the backward reads, the gradient for an upstream gradient of 1 and statistics; as `Outputs` has them."""
        new = self.new
        loss = new.loss()
        saved = None if new.saved is None else new.saved()
        dlogits = None if new.dlogits is None else new.dlogits()
        stats = None if new.stats is None else new.stats()
        row_stats, counts = stats or NO_STATS
        out = Outputs(loss, self.new_state() if saved is None else saved, dlogits, row_stats, counts)
        _launch_forward(self.launches, out, Inputs(logits, target, None, None, weight), scale, 1.0, keeps_workspace=True)
        return loss, saved, dlogits, stats

    def backward(self, dloss: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, saved: Tensor) -> Tensor:
        """The gradient of the logits; saved: the forward's, the scale in it."""
        out = NO_OUTPUTS._replace(saved=saved, dlogits=torch.empty_like(logits))
        inputs = Inputs(logits, target, None, None, weight)
        arguments = {"out": out, "dloss_ptr": dloss.contiguous(), "inputs": inputs, "lam": 1.0}
        launching.launch(self.backward_launch, self.device, arguments)
        return out.dlogits

    def scale_gradient(self, dlogits: Tensor, dloss: Tensor) -> None:
        launching.launch(self.scaling, self.device, {"dlogits_ptr": dlogits, "dloss_ptr": dloss})


def prepare(inputs: Inputs, options: Options, out_dtype: torch.dtype, needs_grad: bool, as_given: Inputs) -> Prepared | None:
    """What `forward` decides for these arguments, or None where it has to copy a tensor first, or there is nothing to do.
    as_given: the inputs as the caller has them."""
    logits, shape = inputs.logits, as_given.logits.shape
    if logits.numel() == 0 or not all(tensor is None or tensor.is_contiguous() for tensor in (*inputs, *as_given)):
        return None
    if len(shape) == 1 or inputs.has_probabilities():
        return None
    new, facts = forward_allocators(inputs, options, out_dtype, needs_grad, shape), device_facts(logits.device)
    strides = logits.stride() if new.dlogits is not None else None
    launches = given.forward_launches(inputs, strides, options, new.saved is not None, facts)
    backward_launch = given.backward_launch(inputs, logits.stride(), options, facts)
    return Prepared(new, _new_state(logits), launches, backward_launch, given.scale_launch(logits, facts), logits.device)
