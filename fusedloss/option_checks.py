"""What the caller asks for, checked and normalised: the errors of torch.nn.functional.cross_entropy, and those of the extras."""

import math
import operator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction

from fusedloss.plan import ROW_REDUCTIONS, Extras, Options

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_options(
    reduction: str, ignore_index: int, label_smoothing: float, extras: Extras, lam: float | Tensor = 1.0
) -> Options:
    """Raises on options that no tensor could make right. Tensors for scale and lam stay with the caller, and are 1.0 here."""
    scale, _, top_k, return_stats, z_loss, logit_scale, softcap, focal_gamma, out_dtype = extras
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
    if top_k is not None and not isinstance(top_k, float):
        top_k = integer("top_k", top_k)
    scale, z_loss, lam = _float("scale", scale), _number("z_loss", z_loss), _float("lam", lam)
    logit_scale, softcap = _number("logit_scale", logit_scale), None if softcap is None else _number("softcap", softcap)
    focal_gamma = _number("focal_gamma", focal_gamma)
    options = _options.__wrapped__ if torch.compiler.is_compiling() else _options  # Dynamo traces no cache
    numbers = (scale, z_loss, logit_scale, softcap, focal_gamma, lam)
    return options(reduction, ignore_index, label_smoothing, top_k, *numbers, return_stats)


@lru_cache(maxsize=256, typed=True)  # typed: a top_k of 1 is a row, one of 1.0 all of them
def _options(
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    top_k: int | float | None,
    scale: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    focal_gamma: float,
    lam: float,
    return_stats: bool,
) -> Options:
    if reduction not in ("mean", "sum", "none", *ROW_REDUCTIONS):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    # A compiler's numbers fit, and of some it knows no more.
    if not torch.compiler.is_compiling() and not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit 64 bits, but got {ignore_index}: Overflow when unpacking long long")
    k, fraction = _check_top_k(reduction, top_k)
    z_loss, logit_scale = _finite("z_loss", z_loss), _finite("logit_scale", logit_scale)
    if softcap is None:
        softcap = 0.0
    elif not _finite("softcap", softcap) > 0:
        raise ValueError(f"softcap must be positive, but got {softcap}")
    if not _finite("focal_gamma", focal_gamma) >= 0:
        raise ValueError(f"focal_gamma must not be negative, but got {focal_gamma}")
    if not 0 <= lam <= 1:
        raise ValueError(f"lam, the share of the first of two labels, must be in [0, 1], but got {lam}")
    # nan and negative smoothing act as 0, as in PyTorch; more than 1 is an error once the shapes are known.
    smoothing = label_smoothing if label_smoothing > 0 else 0.0
    numbers = (scale, z_loss, logit_scale, float(softcap), focal_gamma, lam)
    return Options(reduction, ignore_index, smoothing, k, fraction, *numbers, bool(return_stats))


def check_out_dtype(out_dtype: Any) -> None:
    """Raises where it is no dtype of a loss."""
    if out_dtype is not None and not isinstance(out_dtype, torch.dtype):
        raise TypeError(
            f"cross_entropy(): argument 'out_dtype' must be torch.dtype, not {type(out_dtype).__name__}: {out_dtype!r}"
        )
    if out_dtype is not None and out_dtype not in FLOATING:
        raise ValueError(f"out_dtype must be one of {', '.join(map(str, FLOATING))}, but got {out_dtype}")


def integer(name: str, value: Any) -> int:
    if isinstance(value, (bool, float, str)) or not hasattr(value, "__index__"):
        raise TypeError(f"cross_entropy(): argument '{name}' must be int, not {type(value).__name__}")
    return operator.index(value)


def _float(name: str, value: Any) -> float:
    if type(value) is float:
        return value
    if isinstance(value, Tensor) and value.dim() == 0:
        return float(value.item())
    if isinstance(value, (str, bytes, Tensor)) or not hasattr(value, "__float__"):
        raise TypeError(f"cross_entropy(): argument '{name}' must be float, not {type(value).__name__}")
    return float(value)


def _smoothing(value: Any) -> float:
    """What PyTorch takes for a number: no array, and of the tensors those whose gradient would not be lost."""
    if hasattr(value, "__setitem__") and (not isinstance(value, Tensor) or value.requires_grad):
        raise TypeError(f"cross_entropy(): argument 'label_smoothing' must be float, not {type(value).__name__}")
    return _float("label_smoothing", value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor):  # whose gradient would be lost, and which would have to be waited for
        raise TypeError(f"cross_entropy(): argument '{name}' must be float, not Tensor")
    return _float(name, value)


def _finite(name: str, number: float) -> float:
    if not -math.inf < number < math.inf:  # not math.isfinite: numbers are symbols to a compiler
        raise ValueError(f"{name} must be finite, but got {number}")
    return number


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
    k = integer("top_k", top_k)
    if k < 1:
        raise ValueError(f"top_k must be at least 1, but got {k}")
    return min(k, 2**62), 0.0
