"""The errors of torch.nn.functional.linear_cross_entropy that cross_entropy of the logits would not raise."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedloss.plan import are_probabilities


class Chunking(NamedTuple):
    """How the caller wants the rows to be taken."""

    chunk_rows: int | None  # None: as many as fit the device
    float32_sum: bool  # of the gradient of a bfloat16 or float16 weight, however few the chunks
    compact: bool  # rows that do not count are left out of the matmuls, though it makes the host wait


def check_layer(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """Raises where the layer does not fit its input."""
    for name, tensor in (("input", input), ("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if not isinstance(tensor, Tensor) and not (name == "linear_bias" and tensor is None):
            raise TypeError(f"argument '{name}' must be Tensor, not {type(tensor).__name__}")
    if input.dim() < 1:
        raise RuntimeError(f"expected input with dimensionality 1 or more, (..., in_features), got {input.dim()}")
    if linear_weight.numel() == 0:
        raise RuntimeError(
            f"linear_weight of shape {list(linear_weight.shape)} has no elements: a parameter that is sharded (DeepSpeed ZeRO-3, "
            "FSDP) must be gathered before its loss is computed"
        )
    if linear_weight.dim() < 2:
        raise RuntimeError(f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}")
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), got shapes "
            f"{list(input.shape)} and {list(linear_weight.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(f"expected linear_bias shape {list(linear_weight.shape[:-1])}, got {list(linear_bias.shape)}")
    if linear_weight.dim() > 2 and input.dim() != 2:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {list(linear_weight.shape)} requires batched input, "
            f"(N, {input.shape[-1]}), got input with shape {list(input.shape)}"
        )
    parts = [tensor for tensor in (input, linear_weight, linear_bias) if tensor is not None]
    if any(part.device != input.device for part in parts):
        found = ", ".join(str(part.device) for part in parts)
        raise RuntimeError(f"Expected input, linear_weight and linear_bias to be on the same device, but got {found}")


def check_dtypes(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, autocast: bool) -> torch.dtype:
    """The logits' dtype. Autocast casts all that is floating point but float64."""
    found = [tensor.dtype for tensor in (input, linear_weight, linear_bias) if tensor is not None]
    if autocast:
        to = torch.get_autocast_dtype(input.device.type)
        found = [to if dtype in (torch.float32, torch.float16, torch.bfloat16) else dtype for dtype in found]
    if any(dtype != found[0] for dtype in found):
        names = ", ".join(map(str, found))
        raise RuntimeError(f"expected input, linear_weight and linear_bias to have the same dtype, but got {names}")
    return found[0]


def check_targets(
    input: Tensor,
    linear_weight: Tensor,
    target: Any,
    target_b: Tensor | None,
    lam: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int | None,
) -> None:
    """Raises where what has a value per row has other rows than the input, or probabilities are to be ignored."""
    if not isinstance(target, Tensor):
        raise TypeError(f"argument 'target' must be Tensor, not {type(target).__name__}")
    rows = input.shape[:-1]
    has_probabilities = are_probabilities(target.shape, logits_shape(input, linear_weight), target_b is not None)
    if has_probabilities and ignore_index is not None:
        raise RuntimeError(f"ignore_index cannot be specified when target contains probabilities, but got {ignore_index}")
    if input.dim() <= 2:
        return  # what does not fit is found by the checks of cross_entropy, which knows no other rows
    for labels in () if has_probabilities else (target, target_b):
        if labels is not None and labels.shape != rows:
            raise ValueError(
                f"Expected target of shape {list(rows)}, or probabilities {[*rows, len(linear_weight)]}, for input of shape "
                f"{list(input.shape)}, but got {list(labels.shape)}"
            )
    for name, values in (("lam", lam), ("sample_weight", sample_weight)):
        if values is not None and values.shape != rows and not (name == "lam" and values.dim() == 0):
            raise ValueError(f"{name} must have one value per row, shape {list(rows)}, but got {list(values.shape)}")


def logits_shape(input: Tensor, linear_weight: Tensor) -> torch.Size:
    return input.shape[:-1] + linear_weight.shape[:-1]


def check_chunking(options: Any, chunk_rows: int | None, compact: bool) -> Chunking:
    """options: a torch.nn.LinearCrossEntropyOptions, whose class PyTorch has from 2.13 on."""
    if chunk_rows is not None and (isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int)):
        raise TypeError(f"argument 'chunk_rows' must be int, not {type(chunk_rows).__name__}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, but got {chunk_rows}")
    if options is None:
        return Chunking(chunk_rows, False, bool(compact))
    try:
        asked, accurate = options.batch_chunk_size, options.acc_policy == "accurate" or options.acc_dtype == torch.float32
    except AttributeError:
        raise TypeError(f"argument 'options' must be LinearCrossEntropyOptions, not {type(options).__name__}") from None
    if asked is not None and chunk_rows is not None and asked != chunk_rows:
        raise ValueError(f"options.batch_chunk_size ({asked}) and chunk_rows ({chunk_rows}) differ: pass only one")
    return Chunking(asked if chunk_rows is None else chunk_rows, accurate, bool(compact))
