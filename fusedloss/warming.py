"""warmup(): compiles ahead what a call and its backward launch on a GPU."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fusedloss import serving
from fusedloss.backends import triton
from fusedloss.functional import cross_entropy
from fusedloss.plan import Inputs, Options, Target
from fusedloss.rows import expanded_to_rows, kernel_inputs


def warmup(
    input: Tensor,
    target: Target,
    weight: Tensor | None = None,
    *,
    device: torch.device | str | int | None = None,
    **options: Any,
) -> None:
    """Compiles the kernels that `cross_entropy(input, target, weight, **options)` and its backward launch, and loads them.

    Nothing is launched, and no tensor's values are looked at: meta tensors do. Each kernel takes Triton about a second, once on a
    machine. One call is enough for all numbers of rows that are cut alike (`plan` says how); a dtype, an option, a number of
    classes may each need another. Kernels that were not compiled before the capture of a CUDA graph raise there.

    Args:
        input, target, weight: as for `cross_entropy`; with requires_grad, and outside of torch.no_grad(), of input the backward's
            kernels are compiled, too. Tensors are taken to begin at 16 bytes, as those that PyTorch allocates do.
        device: the GPU; the current one by default.
        **options: the other arguments of `cross_entropy`, by keyword.

    Raises:
        RuntimeError: torch.cuda sees no GPU.
        What `cross_entropy` would raise for these shapes, dtypes and options.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("warmup compiles for a GPU, and torch.cuda sees none")
    arguments = signature(cross_entropy).bind(*tree_map_only(Tensor, _on_meta, (input, target, weight)), **options)
    arguments.apply_defaults()
    given = {name: tree_map_only(Tensor, _on_meta, value) for name, value in arguments.arguments.items()}
    with torch.cuda.device(device):
        inputs, checked, route = serving.checked(**given, requested="triton")
        _compile(inputs, checked, route.out_dtype)


def _compile(inputs: Inputs, options: Options, out_dtype: torch.dtype) -> None:
    """Makes the launches of a forward, and of a backward where the logits have one, on meta tensors."""
    needs_grad = inputs.logits.requires_grad and torch.is_grad_enabled()
    inputs = inputs._replace(
        lam=expanded_to_rows(inputs.lam, inputs.logits), sample_weight=expanded_to_rows(inputs.sample_weight, inputs.logits)
    )
    inputs = kernel_inputs(inputs)
    outputs = triton.forward(inputs, options, out_dtype, needs_grad)
    if outputs.dlogits is not None:
        triton.scale_gradient(outputs.dlogits, outputs.loss)
    elif needs_grad:
        triton.backward(outputs.loss, inputs, outputs.saved, options)


def _on_meta(tensor: Tensor) -> Tensor:
    """A tensor like this one, without memory."""
    like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return like.requires_grad_(tensor.requires_grad)
