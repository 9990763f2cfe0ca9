"""The errors of torch.nn.functional.cross_entropy, in its order, for every backend; and those of the extras."""

import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction

from fusedloss.plan import ROW_REDUCTIONS, Options

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TORCH_NAMES = {
    torch.int32: "Int",
    torch.int16: "Short",
    torch.int8: "Char",
    torch.bool: "Bool",
    torch.int64: "Long",
    torch.uint8: "Byte",
    torch.float32: "Float",
    torch.float64: "Double",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
}


def _name(dtype: torch.dtype) -> str:
    return _TORCH_NAMES.get(dtype, str(dtype).removeprefix("torch.").capitalize())


def autocast_dtype(dtype: torch.dtype, autocast: bool) -> torch.dtype:
    """The dtype that autocast has the loss computed in: float32 for the halves."""
    return torch.float32 if autocast and dtype in (torch.float16, torch.bfloat16) else dtype


def check_options(
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    top_k: int | float | None,
    scale: float | Tensor,
) -> Options:
    """Raises on options that no tensor could make right; a scale tensor is left to the caller and stands as 1.0 here."""
    if reduction not in ("mean", "sum", "none", *ROW_REDUCTIONS):
        if reduction == "elementwise_mean":
            _reduction.get_enum(reduction)  # warns
            reduction = "mean"
        else:
            raise ValueError(f"{reduction} is not a valid value for reduction")
    if type(ignore_index) is not int:
        ignore_index = _index("ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit 64 bits, but got {ignore_index}: Overflow when unpacking long long")
    if type(label_smoothing) is not float:
        label_smoothing = _float("label_smoothing", label_smoothing)
    k, fraction = _check_top_k(reduction, top_k)
    if isinstance(scale, Tensor):
        if scale.dim() != 0 or not scale.is_floating_point():
            raise ValueError(
                f"scale must be a number or a 0-d floating point tensor, but got shape {list(scale.shape)}, {scale.dtype}"
            )
        scale = 1.0
    elif type(scale) is not float:
        scale = _float("scale", scale)
    # nan and negative smoothing act as 0, as in PyTorch; more than 1 is an error once the shapes are known.
    return Options(reduction, ignore_index, label_smoothing if label_smoothing > 0 else 0.0, k, fraction, scale)


def _index(name: str, value: Any) -> int:
    if isinstance(value, (bool, float, str)) or not hasattr(value, "__index__"):
        raise TypeError(f"cross_entropy(): argument '{name}' must be int, not {type(value).__name__}")
    return operator.index(value)


def _float(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.dim() == 0:
        return float(value.item())
    if isinstance(value, (str, bytes, Tensor)) or not hasattr(value, "__float__"):
        raise TypeError(f"cross_entropy(): argument '{name}' must be float, not {type(value).__name__}")
    return float(value)


def _check_top_k(reduction: str, top_k: int | float | None) -> tuple[int, float]:
    if reduction != "topk":
        if top_k is not None:
            raise ValueError(f"top_k is for reduction 'topk', but got top_k={top_k} with reduction {reduction!r}")
        return 0, 0.0
    if top_k is None:
        raise ValueError("reduction 'topk' needs top_k: a number of rows, or a fraction of the counted rows")
    if isinstance(top_k, float):
        if not 0 < top_k <= 1 or math.isnan(top_k):
            raise ValueError(f"a fractional top_k must be in (0, 1], but got {top_k}")
        return 0, top_k
    k = _index("top_k", top_k)
    if k < 1:
        raise ValueError(f"top_k must be at least 1, but got {k}")
    return min(k, 2**62), 0.0


def check_tensors(input: Tensor, target: Tensor, weight: Tensor | None, options: Options, autocast: bool) -> None:
    """Raises what PyTorch raises for these shapes and dtypes."""
    for name, value in (("input", input), ("target", target), ("weight", weight)):
        if not isinstance(value, Tensor) and not (name == "weight" and value is None):
            raise TypeError(f"cross_entropy(): argument '{name}' must be Tensor, not {type(value).__name__}")
    device = input.device
    if target.device != device or (weight is not None and weight.device != device):  # a kernel would take any address for its own
        found = f"target on {target.device}" + (f", weight on {weight.device}" if weight is not None else "")
        raise RuntimeError(f"Expected all tensors to be on the same device, but got input on {device}, {found}")
    has_probabilities = input.shape == target.shape
    if has_probabilities and not target.is_floating_point():
        raise RuntimeError(f"Expected floating point type for target with class probabilities, got {_name(target.dtype)}")
    if input.dim() == 0:
        raise IndexError(
            "Dimension specified as 1 but tensor has no dimensions: the logits must be (C), (N, C) or (N, C, d1, ...)"
        )
    n_classes = input.shape[0 if input.dim() == 1 else 1]
    if has_probabilities:
        _check_probabilities(input, weight, n_classes, options)
    else:
        _check_indices(input, target, weight, n_classes, options, autocast)


def _check_input_dtype(input: Tensor) -> None:
    if input.dtype not in _FLOATING:
        raise NotImplementedError(f"\"cross_entropy\" not implemented for '{_name(input.dtype)}'")


def _check_weight(weight: Tensor | None, n_classes: int) -> None:
    if weight is not None and (weight.dim() != 1 or weight.shape[0] != n_classes):
        raise RuntimeError(
            f"weight tensor should be defined either for all {n_classes} classes or no classes but got weight tensor of "
            f"shape: {list(weight.shape)}"
        )


def _check_smoothing(options: Options) -> None:
    if options.label_smoothing > 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {options.label_smoothing}")


def _check_probabilities(input: Tensor, weight: Tensor | None, n_classes: int, options: Options) -> None:
    if options.ignore_index >= 0:
        raise RuntimeError(f"ignore_index is not supported for floating point target, but got {options.ignore_index}")
    _check_weight(weight, n_classes)
    _check_smoothing(options)
    _check_input_dtype(input)


def _check_indices(
    input: Tensor, target: Tensor, weight: Tensor | None, n_classes: int, options: Options, autocast: bool
) -> None:
    _check_smoothing(options)
    _check_input_dtype(input)
    if input.dim() == 1:
        if target.dim() > 1:
            raise RuntimeError("0D or 1D target tensor expected, multi-target not supported")
        if target.dim() == 1 and target.shape[0] != 1:
            raise ValueError(f"For 1D input, 1D target must have size 1, but got target size: {target.shape[0]}")
    elif target.dim() == 0 or input.shape[0] != target.shape[0]:
        found = target.shape[0] if target.dim() else "none, a 0-d target"
        raise ValueError(f"Expected input batch_size ({input.shape[0]}) to match target batch_size ({found}).")
    elif input.dim() == 2 and target.dim() != 1:
        raise RuntimeError(f"0D or 1D target tensor expected, multi-target not supported: got target size {list(target.shape)}")
    elif input.dim() > 2 and input.shape[2:] != target.shape[1:]:
        expected = [input.shape[0], *input.shape[2:]]
        raise RuntimeError(f"Expected target size {expected}, got {list(target.shape)}")
    if target.dtype != torch.int64:
        if target.dtype != torch.uint8:
            raise RuntimeError(f"expected target dtype to be Long or Byte, but got {_name(target.dtype)}")
        if input.dim() > 2:
            raise RuntimeError("expected scalar type Long but found Byte")
    _check_weight(weight, n_classes)
    if weight is None:
        return
    if weight.dtype != input.dtype:
        dtype, weight_dtype = autocast_dtype(input.dtype, autocast), autocast_dtype(weight.dtype, autocast)
        if weight_dtype != dtype:
            raise RuntimeError(f"expected scalar type {_name(dtype)} but found {_name(weight_dtype)}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "The function 'cross_entropy' is not differentiable with respect to argument 'weight' for class index "
            "targets. This input cannot have requires_grad True."
        )


def check_class_indices(target: Tensor, n_classes: int, ignore_index: int) -> None:
    """Raises IndexError naming the first class index out of range and its position. Reads the values: on a GPU this waits."""
    outside = ((target < 0) | (target >= n_classes)) & (target != ignore_index)
    if outside.any():
        position = outside.nonzero()[0].tolist()
        value = target[tuple(position)].item()
        raise IndexError(f"Target {value} is out of bounds. (n_classes {n_classes}, at position {position})")
