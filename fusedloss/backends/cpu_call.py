"""One call of the C++ kernel: what calls alike have in common is packed, and the memory of its tensors looked for."""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedloss import plan_cpu
from fusedloss.backends.cpu_abi import (
    DTYPES,
    KIND,
    NUMBERS_PACKED,
    REDUCTIONS,
    TARGET_KINDS,
    Address,
    Call,
    Extras,
    Kind,
    Library,
)
from fusedloss.backends.outputs import Outputs
from fusedloss.kernels.constants import FRACTION_BITS
from fusedloss.plan import NUMBERS, ClassShard, Inputs, Options, accumulation_dtype


class Span(NamedTuple):
    """How many bytes the examples of a tensor take, from the first to the end of the last."""

    one: int
    step: int  # from one example to the next

    def of(self, n_examples: int) -> int:
        return self.one + (n_examples - 1) * self.step if n_examples > 0 else 0


class Prepacked(NamedTuple):
    """`Kind` and what else is the same for all calls alike, whatever the number of examples."""

    library: Library
    packed: bytes  # numbers, Kind
    per_example: int  # rows
    n_cols: int
    examples_of_two_threads: int  # from so many on a second one is worth waking
    logits: Span
    dlogits: Span
    target: Span

    def workers(self, n_examples: int) -> tuple[int, bool]:
        """How many threads are worth waking, and there; and whether Python's others wait for them."""
        if n_examples < self.examples_of_two_threads:
            return 1, True
        worth = plan_cpu.max_threads(n_examples * self.per_example * self.n_cols)
        return min(worth, torch.get_num_threads()), False


def run(
    is_backward: bool,
    kind: Prepacked,
    outputs: Outputs,
    dloss: Tensor | None,
    inputs: Inputs,  # as `cpu.all_as_read` has them
    options: Options,
    shard: ClassShard | None = None,
    shard_stats: Tensor | None = None,
) -> int:
    logits, target, target_b, lam, weight, sample_weight, scale = inputs
    loss, saved, dlogits, row_stats, counts = outputs
    n_examples = logits.shape[0]
    for tensor, span in ((dlogits, kind.dlogits), (logits, kind.logits), (target, kind.target)):
        check_memory(tensor, span.of(n_examples))
    for tensor in (loss, saved, row_stats, counts, target_b, lam, weight, sample_weight, dloss, shard_stats):
        check_memory(tensor, 0 if tensor is None else tensor.nbytes)  # contiguous
    n_threads, holds_gil = kind.workers(n_examples)
    call = Call(
        loss=loss,
        saved=saved,
        dlogits=dlogits,
        row_stats=row_stats,
        counts=counts,
        logits=logits,
        target=target,
        weight=weight,
        dloss=dloss,
        scale=options.scale if scale is None else options.scale * scale.item(),
        n_threads=n_threads,
        n_examples=n_examples,
    )
    extras = Extras(
        target_b=target_b,
        lam=lam,
        sample_weight=sample_weight,
        shard_stats=shard_stats,
        lam_factor=options.lam,
        first_class=0 if shard is None else shard.first_class,
        n_classes=0 if shard is None else shard.n_classes,
    )
    functions = kind.library.functions
    function = functions.backward if is_backward else functions.forward
    return function(kind.packed, holds_gil, *call, *extras)


def as_read(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of this dtype, the same one if it is that already."""
    if tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    return converted(tensor, dtype, bytes_spanned(tensor))


def converted(tensor: Tensor, dtype: torch.dtype, n_bytes: int) -> Tensor:
    """A contiguous tensor of this dtype. n_bytes: as `check_memory` takes them."""
    check_memory(tensor, n_bytes)  # Tensor.to() does not look whether it is there
    return tensor.to(dtype).contiguous()


def bytes_spanned(tensor: Tensor) -> int:
    """From the first value to the end of the last."""
    return _spanned(tensor.shape, tensor.stride()) * tensor.itemsize


def check_memory(tensor: Tensor | None, n_bytes: int) -> None:
    """Raises RuntimeError where a tensor's memory is not there: `tensor.untyped_storage().resize_(0)` frees what it lies in, and
    FSDP does that to logits between forward and backward; that of a fake tensor is on the meta device. n_bytes: from the first
    value to the end of the last."""
    if tensor is None or n_bytes == 0:
        return
    storage, needed = tensor.untyped_storage(), n_bytes + tensor.storage_offset() * tensor.itemsize
    if storage.device.type != "cpu":
        raise RuntimeError(f"the CPU kernel reads no tensor of shape {list(tensor.shape)} on device {str(storage.device)!r}")
    if storage.nbytes() < needed:
        raise RuntimeError(
            f"a tensor of shape {list(tensor.shape)} and strides {list(tensor.stride())} needs {needed} bytes of memory, but "
            f"has {storage.nbytes()}: its data is not allocated yet, or was freed"
        )


def prepack(
    inputs: Inputs,
    gradient_strides: tuple[int, ...] | None,
    loss_dtype: torch.dtype | None,
    options: Options,
    library: Library,
    fresh: bool = True,  # the gradient's memory, which nobody has touched
) -> Prepacked:
    logits, target = inputs.logits, inputs.target
    return _kind(
        logits.shape[1:],
        logits.stride(),
        gradient_strides,
        target.stride() if inputs.has_probabilities() else None,
        logits.dtype,
        loss_dtype,
        target.dtype,
        options.kind(),
        fresh,
        library,
    )


@lru_cache(maxsize=1024)
def _kind(
    example: tuple[int, ...],
    logits_strides: tuple[int, ...],
    dlogits_strides: tuple[int, ...] | None,
    probabilities_strides: tuple[int, ...] | None,
    logits_dtype: torch.dtype,
    loss_dtype: torch.dtype | None,
    target_dtype: torch.dtype,
    options: Options,
    fresh: bool,
    library: Library,
) -> Prepacked:
    rows = plan_cpu.rows(example, logits_strides, dlogits_strides, probabilities_strides)
    if probabilities_strides is None:
        target_kind = "uint8" if target_dtype == torch.uint8 else "int64"
    else:
        target_kind = "probabilities" if target_dtype == accumulation_dtype(logits_dtype) else "probabilities_as_logits"
    places: dict[str, Any] = {
        f"{tensor}_{dim}": stride
        for tensor, strides in zip(("logits", "dlogits", "target"), rows.strides, strict=True)
        for dim, stride in zip(("outer", "middle", "row", "col"), strides, strict=True)
    }
    kind = Kind(
        smoothing=options.label_smoothing,
        plain=not options.non_default_numbers(besides=("z_loss",)),
        ignore_index=options.ignore_index,
        top_k=options.top_k or round(options.top_k_fraction * 2**FRACTION_BITS),
        top_k_is_fraction=options.top_k == 0,
        logits_dtype=DTYPES.index(logits_dtype),
        loss_dtype=DTYPES.index(loss_dtype) if loss_dtype is not None else 0,
        target_kind=TARGET_KINDS.index(target_kind),
        reduction=REDUCTIONS.index(options.reduction),
        isa=library.requested_isa,
        fresh=fresh,
        statistics=options.return_stats,
        rows_per_example=rows.per_example,
        n_middle=rows.n_middle,
        one_block=rows.one_block,
        n_cols=rows.n_cols,
        **places,
        gomp_parallel=Address(library.gomp_parallel),
    )
    itemsize, per_example = logits_dtype.itemsize, rows.per_example * target_dtype.itemsize
    return Prepacked(
        library,
        NUMBERS_PACKED.pack(*[getattr(options, name) for name in NUMBERS]) + KIND.pack(*kind),
        rows.per_example,
        rows.n_cols,
        -(-2 * plan_cpu.ELEMENTS_PER_THREAD // max(1, math.prod(example))),
        _span(example, logits_strides, itemsize),
        Span(0, 0) if dlogits_strides is None else _span(example, dlogits_strides, itemsize),
        Span(per_example, per_example)
        if probabilities_strides is None
        else _span(example, probabilities_strides, target_dtype.itemsize),
    )


def _span(example: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> Span:
    return Span(_spanned(example, strides[1:]) * itemsize, 0 if 0 in example else strides[0] * itemsize)


def _spanned(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
