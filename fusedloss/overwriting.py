"""cross_entropy_overwriting_logits(): the gradient takes the place of the logits, so that training needs no second buffer.

With a vocabulary of 128256 the logits are the largest tensor of a step and their gradient is the second; on a CPU, filling the
fresh pages of that second buffer takes longer than computing it (2048 x 32000 float32 on 2 cores: 49 ms fresh, 27 ms in place).
The forward is the one that `linear_cross_entropy` calls for each chunk of rows, the backward that of `cross_entropy`.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from fusedloss import functional, ops
from fusedloss.autograd import CrossEntropyFunction, save_gradient
from fusedloss.option_checks import check_options
from fusedloss.plan import EXTRAS, Inputs, Options, spatial_dims_collapse
from fusedloss.route import route_of
from fusedloss.rows import kernel_inputs
from fusedloss.serving import with_scale_apart
from fusedloss.world import has_values


def cross_entropy_overwriting_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Literal["sum", "mean"] = "mean",
    label_smoothing: float = 0.0,
    scale: float | Tensor = EXTRAS.scale,
    out_dtype: torch.dtype | None = EXTRAS.out_dtype,
) -> Tensor:
    """`fusedloss.cross_entropy`, but the forward overwrites `input` with its gradient and the backward hands that out.

    Nothing may read the logits afterwards. Autograd notices where an operation saved them for its backward: their version
    counter is raised, as by any in-place operation. Where the graph is kept (retain_graph, create_graph) the gradient that is
    handed out is a copy. Without a gradient to compute the logits are left alone.

    Args:
        input: logits (N, C) or (N, C, d1, ...); float32, bfloat16 or float64; no leaf. On a GPU of a size whose rows stay on chip
            until their gradient is written.
        target, weight, ignore_index, label_smoothing, scale, out_dtype: as for `fusedloss.cross_entropy`.
        reduction: "mean" or "sum".

    Returns:
        The loss, 0-d.

    Raises:
        RuntimeError: the logits are a leaf, may overlap themselves or lie where target or weight does, or no kernel can do this
            here; never a silent copy.
        What `fusedloss.cross_entropy` raises.
    """
    arguments: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "scale": scale,
        "out_dtype": out_dtype,
    }
    if not (isinstance(input, Tensor) and input.requires_grad and torch.is_grad_enabled()):
        return functional.cross_entropy(input, target, weight, **arguments)
    options = check_options(reduction, ignore_index, label_smoothing, EXTRAS._replace(scale=scale, out_dtype=out_dtype))
    inputs = Inputs(input, target, weight=weight, scale=scale if isinstance(scale, Tensor) else None)
    route = route_of(inputs, options, out_dtype)
    if route.backend not in ("cpu", "triton"):
        raise RuntimeError(f"only the kernels can overwrite the logits, and here: {route.reason}")
    if not options.fuses_gradient(input.dtype):
        raise RuntimeError(
            "the forward makes the gradient, and can overwrite the logits, for reduction 'sum' and 'mean' and any dtype but "
            f"torch.float16, but got reduction {options.reduction!r} and {input.dtype}"
        )
    if torch.compiler.is_compiling():
        raise RuntimeError("torch.compile cannot trace a forward that overwrites its input")
    if not has_values(input):
        raise RuntimeError("fake and meta tensors hold no logits that could be overwritten")
    if input.is_leaf:
        raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
    strided = input.dim() >= 2 and (input.dim() <= 3 or spatial_dims_collapse(input))
    if not strided or input.is_neg() or _may_overlap(input):
        raise RuntimeError(
            f"logits of shape {list(input.shape)} and strides {list(input.stride())} cannot be overwritten in place"
        )
    inputs, factor = with_scale_apart(inputs)
    memory = input.untyped_storage().data_ptr()  # 0 of no logits, and of no targets
    for name, tensor in (("target", target), ("weight", weight), ("scale", inputs.scale)):
        if tensor is not None and tensor.is_neg():
            raise RuntimeError(f"{name} is a negative view, which the kernel cannot read")
        if tensor is not None and memory != 0 and tensor.untyped_storage().data_ptr() == memory:
            raise RuntimeError(f"{name} lies in the memory of the logits, which are overwritten while it is read")
    if not ops.overwrites(kernel_inputs(inputs), options, route.backend):
        raise RuntimeError(f"rows of logits of shape {list(input.shape)} do not stay on chip until their gradient is written")
    loss: Tensor = _Overwriting.apply(input, inputs, options, route.out_dtype, route.backend)
    return loss if factor is None else loss * factor.to(loss)


def _may_overlap(logits: Tensor) -> bool:
    """Whether two elements may lie at one place: if a step of some dimension is no longer than all shorter ones together."""
    end = 0  # of the elements so far, from the first
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride <= end:
            return True
        end += (size - 1) * stride
    return False


class _Overwriting(CrossEntropyFunction):
    """The gradient in the memory of the logits, of which nothing is left but their place in the graph."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, inputs: Inputs, options: Options, out_dtype: torch.dtype, backend: str) -> Tensor:
        outputs = ops.forward_overwriting(kernel_inputs(inputs), options, out_dtype, backend)
        torch.autograd.graph.increment_version(logits)
        ctx.call, ctx.has_gradient, ctx.place = (options, out_dtype, backend), True, None
        ctx.set_materialize_grads(False)
        save_gradient(ctx, logits.detach(), inputs)
        return outputs.loss
