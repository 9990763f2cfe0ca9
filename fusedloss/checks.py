"""The errors of torch.nn.functional.cross_entropy about its tensors, in its order, for every backend; and those of the extras."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fusedloss.option_checks import FLOATING
from fusedloss.plan import Options, are_probabilities, counted_rows
from fusedloss.world import has_values

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


class Facts(NamedTuple):
    """What the checks and the choice of path ask of a tensor: all but its values and strides."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    needs_grad: bool

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Facts":
        if not isinstance(tensor, Tensor):
            raise TypeError(f"argument '{name}' must be Tensor, not {type(tensor).__name__}")
        return cls(tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad and torch.is_grad_enabled())


class InputFacts(NamedTuple):
    """Facts of `plan.Inputs`, but the scale."""

    logits: Facts
    target: Facts
    target_b: Facts | None
    lam: Facts | None
    weight: Facts | None
    sample_weight: Facts | None

    def has_probabilities(self) -> bool:
        return are_probabilities(self.target.shape, self.logits.shape, self.target_b is not None)

    def n_rows(self) -> int:
        shape = self.logits.shape
        return math.prod(shape[:1] + shape[2:]) if len(shape) > 1 else 1

    def n_classes(self) -> int:
        shape = self.logits.shape
        return shape[0 if len(shape) == 1 else 1]


def check_tensors(facts: InputFacts, options: Options, autocast: bool) -> None:
    """Raises what PyTorch raises for these shapes and dtypes; then what the extras ask for."""
    input, target = facts.logits, facts.target
    if any(other is not None and other.device != input.device for other in facts[1:]):  # a kernel takes any address for its own
        found = ", ".join(f"{name} on {fact.device}" for name, fact in zip(facts._fields, facts, strict=True) if fact is not None)
        raise RuntimeError(f"Expected all tensors to be on the same device, but got {found.replace('logits', 'input', 1)}")
    if facts.has_probabilities() and not target.dtype.is_floating_point:
        raise RuntimeError(f"Expected floating point type for target with class probabilities, got {_name(target.dtype)}")
    if len(input.shape) == 0:
        raise IndexError(
            "Dimension specified as 1 but tensor has no dimensions: the logits must be (C), (N, C) or (N, C, d1, ...)"
        )
    if facts.has_probabilities():
        _check_probabilities(input, facts.weight, facts.n_classes(), options)
    else:
        _check_indices(input, target, facts.weight, facts.n_classes(), options, autocast)
    if facts.target_b is not None:
        _check_second_label(target, facts.target_b)
    if options.focal_gamma > 0:
        _check_focal(facts, options)
    rows = input.shape[:1] + input.shape[2:] if len(input.shape) > 1 else torch.Size()
    for name, value in (("lam", facts.lam), ("sample_weight", facts.sample_weight)):
        if value is not None:
            _check_row_values(name, value, rows)


def _check_second_label(target: Facts, target_b: Facts) -> None:
    if target_b.shape != target.shape or target_b.dtype != target.dtype:
        raise RuntimeError(
            f"two labels must agree in shape and dtype, but got {list(target.shape)}, {_name(target.dtype)} and "
            f"{list(target_b.shape)}, {_name(target_b.dtype)}"
        )


def _check_focal(facts: InputFacts, options: Options) -> None:
    found = "class probabilities" if facts.has_probabilities() else "two labels" if facts.target_b is not None else None
    if options.label_smoothing > 0:
        found = f"label_smoothing={options.label_smoothing}"
    if found is not None:
        raise ValueError(f"focal_gamma is for one class index per row, but got focal_gamma={options.focal_gamma} with {found}")


def _check_row_values(name: str, value: Facts, rows: torch.Size) -> None:
    if not value.dtype.is_floating_point:
        raise RuntimeError(f"expected floating point type for {name}, got {_name(value.dtype)}")
    one_row = len(rows) == 0 and value.shape == (1,)
    broadcasts = name == "lam" and len(value.shape) == 0
    if not (value.shape == rows or value.shape == rows[:1] or one_row or broadcasts):
        per_example = f" or one per example, {list(rows[:1])}" if len(rows) > 1 else ""
        raise ValueError(
            f"{name} must have one value per row, shape {list(rows)}{per_example}, but got shape {list(value.shape)}"
        )


def _check_input_dtype(input: Facts) -> None:
    if input.dtype not in FLOATING:
        raise NotImplementedError(f"\"cross_entropy\" not implemented for '{_name(input.dtype)}'")


def _check_weight(weight: Facts | None, n_classes: int) -> None:
    if weight is not None and (len(weight.shape) != 1 or weight.shape[0] != n_classes):
        raise RuntimeError(
            f"weight tensor should be defined either for all {n_classes} classes or no classes but got weight tensor of "
            f"shape: {list(weight.shape)}"
        )


def _check_smoothing(options: Options) -> None:
    if options.label_smoothing > 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {options.label_smoothing}")


def _check_probabilities(input: Facts, weight: Facts | None, n_classes: int, options: Options) -> None:
    if options.ignore_index >= 0:
        raise RuntimeError(f"ignore_index is not supported for floating point target, but got {options.ignore_index}")
    _check_weight(weight, n_classes)
    _check_input_dtype(input)
    _check_smoothing(options)


def _check_indices(input: Facts, target: Facts, weight: Facts | None, n_classes: int, options: Options, autocast: bool) -> None:
    _check_smoothing(options)
    _check_input_dtype(input)
    n_dims, batch = len(input.shape), target.shape[:1] or (0,)  # PyTorch counts no example in a 0-d target
    if n_dims > 1 and not _same_sizes(input.shape[:1], batch):
        raise ValueError(f"Expected input batch_size ({input.shape[0]}) to match target batch_size ({batch[0]}).")
    if n_dims > 2 and not _same_sizes(input.shape[2:], target.shape[1:]):
        expected = [input.shape[0], *input.shape[2:]]
        raise RuntimeError(f"Expected target size {expected}, got {list(target.shape)}")
    if n_dims < 3 and len(target.shape) > 1:
        raise RuntimeError(f"0D or 1D target tensor expected, multi-target not supported: got target size {list(target.shape)}")
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"expected target dtype to be Long or Byte, but got {_name(target.dtype)}")
    # PyTorch does not look at the labels of no row for a sum or a mean.
    if n_dims > 2 and target.dtype == torch.uint8 and not (options.reduction in ("sum", "mean") and 0 in target.shape):
        raise RuntimeError("expected scalar type Long but found Byte")
    if n_dims == 2 and len(target.shape) == 0:
        raise IndexError("Dimension specified as 0 but tensor has no dimensions: for no example the target must be of shape [0]")
    if n_dims == 1 and len(target.shape) == 1 and target.shape[0] != 1:
        raise ValueError(f"For 1D input, 1D target must have size 1, but got target size: {target.shape[0]}")
    _check_weight(weight, n_classes)
    if weight is None:
        return
    if weight.dtype != input.dtype:
        dtype, weight_dtype = autocast_dtype(input.dtype, autocast), autocast_dtype(weight.dtype, autocast)
        if weight_dtype != dtype:
            raise RuntimeError(f"expected scalar type {_name(dtype)} but found {_name(weight_dtype)}")
    if weight.needs_grad:
        raise RuntimeError(
            "The function 'cross_entropy' is not differentiable with respect to argument 'weight' for class index "
            "targets. This input cannot have requires_grad True."
        )


def _same_sizes(sizes: tuple[int, ...], others: tuple[int, ...]) -> bool:
    """Whether they are equal; sizes that a compiler knows only when it runs, as of x[mask], are asserted to be."""
    if not torch.compiler.is_compiling() or len(sizes) != len(others):
        return sizes == others
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # loaded with a compiler only

    for size, other in zip(sizes, others, strict=True):
        if guard_or_false(size != other):
            return False
        torch._check(size == other)
    return True


def check_class_indices(target: Tensor, n_classes: int, ignore_index: int, target_b: Tensor | None = None) -> None:
    """Raises IndexError naming the first class index out of range, of a row that counts, and its position. Reads the values: on a
    GPU this waits."""
    if not has_values(target):
        return
    every = [label.long() for label in (target, target_b) if label is not None]  # 256 classes are none to bytes
    counted = counted_rows(ignore_index, *every)
    for label in every:
        outside = ((label < 0) | (label >= n_classes)) & counted
        if outside.any():
            position = outside.nonzero()[0].tolist()
            value = label[tuple(position)].item()
            raise IndexError(f"Target {value} is out of bounds. (n_classes {n_classes}, at position {position})")
