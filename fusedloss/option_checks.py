"""What the caller asks for, checked and normalised: the errors of torch.nn.functional.cross_entropy, and those of the extras."""

import math
import operator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction

from fusedloss.plan import EXTRAS, NUMBERS, ROW_REDUCTIONS, Extras, Options

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_POSITIVE, _NOT_NEGATIVE = ("softcap",), ("focal_gamma",)  # all NUMBERS are finite


def check_options(
    reduction: str, ignore_index: int, label_smoothing: float, extras: Extras, lam: float | Tensor = 1.0
) -> Options:
    """Raises on options that no tensor could make right. Tensors for scale and lam stay with the caller, and are 1.0 here."""
    scale, _, top_k, return_stats, *numbers, out_dtype = extras
    if not isinstance(reduction, str):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if reduction == "elementwise_mean":
        _reduction.get_enum(reduction)  # warns
        reduction = "mean"
    if isinstance(scale, Tensor):
        if scale.dim() != 0 or not scale.is_floating_point():
            raise ValueError(
                f"scale must be a number or a 0-d floating point tensor, but got shape {list(scale.shape)}, {scale.dtype}"
            )
        scale = 1.0
    if isinstance(lam, Tensor):
        lam = 1.0
    if out_dtype is not None:
        check_out_dtype(out_dtype)
    # Python's own numbers from here on: not all that pass for a number can be looked up.
    if type(ignore_index) is not int:
        ignore_index = integer("ignore_index", ignore_index)
    if type(label_smoothing) is not float:
        label_smoothing = _smoothing(label_smoothing)
    if top_k is not None:
        top_k = _float("top_k", top_k) if isinstance(top_k, float) else integer("top_k", top_k)
    scale, lam = _float("scale", scale), _float("lam", lam)
    options = _options.__wrapped__ if torch.compiler.is_compiling() else _options  # Dynamo traces no cache
    return options(reduction, ignore_index, label_smoothing, top_k, scale, lam, return_stats, *map(_number, NUMBERS, numbers))


@lru_cache(maxsize=256, typed=True)  # typed: a top_k of 1 is a row, one of 1.0 all of them
def _options(
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    top_k: int | float | None,
    scale: float,
    lam: float,
    return_stats: bool,
    *asked: float | None,  # of NUMBERS
) -> Options:
    if reduction not in ("mean", "sum", "none", *ROW_REDUCTIONS):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    # A compiler's numbers fit, and of some it knows no more.
    if not torch.compiler.is_compiling() and not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit 64 bits, but got {ignore_index}: Overflow when unpacking long long")
    k, fraction = _check_top_k(reduction, top_k)
    numbers: dict[str, Any] = {name: _in_range(name, number) for name, number in zip(NUMBERS, asked, strict=True)}
    if not 0 <= lam <= 1:
        raise ValueError(f"lam, the share of the first of two labels, must be in [0, 1], but got {lam}")
    # nan and negative smoothing act as 0, as in PyTorch; more than 1 is an error once the shapes are known.
    smoothing = label_smoothing if label_smoothing > 0 else 0.0
    return Options(reduction, ignore_index, smoothing, k, fraction, scale, lam=lam, return_stats=bool(return_stats), **numbers)


def check_out_dtype(out_dtype: Any) -> None:
    """Raises where it is no dtype of a loss."""
    if out_dtype is not None and not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"argument 'out_dtype' must be torch.dtype, not {type(out_dtype).__name__}: {out_dtype!r}")
    if out_dtype is not None and out_dtype not in FLOATING:
        raise ValueError(f"out_dtype must be one of {', '.join(map(str, FLOATING))}, but got {out_dtype}")


def integer(name: str, value: Any) -> int:
    wrong = TypeError(f"argument '{name}' must be int, not {type(value).__name__}")
    if isinstance(value, (bool, float, str)) or not hasattr(value, "__index__"):
        raise wrong
    try:
        return operator.index(value)
    except Exception as error:
        if isinstance(value, Tensor):  # it says what is wrong: a fake tensor has no value
            raise
        # As PyTorch, whatever it is: a bool of numpy before 2.3 warns, and the warning may be raised as an error.
        raise wrong from error


def _float(name: str, value: Any) -> float:
    if type(value) is float:
        return value
    if isinstance(value, Tensor) and value.dim() == 0:
        return float(value.item())
    if isinstance(value, (str, bytes, Tensor)) or not hasattr(value, "__float__"):
        raise TypeError(f"argument '{name}' must be float, not {type(value).__name__}")
    return float(value)


def _smoothing(value: Any) -> float:
    """What PyTorch takes for a number: no array, and of the tensors those whose gradient would not be lost."""
    if hasattr(value, "__setitem__") and (not isinstance(value, Tensor) or value.requires_grad):
        raise TypeError(f"argument 'label_smoothing' must be float, not {type(value).__name__}")
    return _float("label_smoothing", value)


def _number(name: str, value: Any) -> float | None:
    """One of NUMBERS; None where that is its default."""
    if type(value) is float:
        return value
    if value is None and getattr(EXTRAS, name) is None:
        return None
    if isinstance(value, Tensor):  # whose gradient would be lost, and which would have to be waited for
        raise TypeError(f"argument '{name}' must be float, not Tensor")
    return _float(name, value)


def _in_range(name: str, number: float | None) -> float:
    if number is None:  # a softcap; not read from DEFAULTS: to a compiler with dynamic=True that is a number nobody knows
        return 0.0
    if not -math.inf < number < math.inf:  # not math.isfinite: numbers are symbols to a compiler
        raise ValueError(f"{name} must be finite, but got {number}")
    if name in _POSITIVE and not number > 0:
        raise ValueError(f"{name} must be positive, but got {number}")
    if name in _NOT_NEGATIVE and not number >= 0:
        raise ValueError(f"{name} must not be negative, but got {number}")
    return number


def _check_top_k(reduction: str, top_k: int | float | None) -> tuple[int, float]:
    if reduction != "topk":
        if top_k is not None:
            raise ValueError(f"top_k is for reduction 'topk', but got top_k={top_k} with reduction {reduction!r}")
        return 0, 0.0
    if top_k is None:
        raise ValueError("reduction 'topk' needs top_k: a number of rows, or a fraction of the counted rows")
    if isinstance(top_k, float):
        if not 0 < top_k <= 1:  # nan, too; no function of math, as above
            raise ValueError(f"a fractional top_k must be in (0, 1], but got {top_k}")
        return 0, top_k
    k = integer("top_k", top_k)
    if k < 1:
        raise ValueError(f"top_k must be at least 1, but got {k}")
    return min(k, 2**62), 0.0
