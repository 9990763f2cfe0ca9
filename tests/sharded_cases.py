"""Calls whose classes are sharded over 2, 3 and 4 ranks, what one rank computes of them, and the answer in float64."""

from typing import Any, NamedTuple

import torch
from oracle import exact_loss
from problems import make_logits, make_target, make_weight
from sharded_statistics import ROWS
from torch import Tensor

from fusedloss.distributed import vocab_parallel_cross_entropy

# The largest error of the loss and of the gradient, relative to the largest number in it.
LIMITS = {torch.float64: (1e-15, 1e-15), torch.float32: (2e-7, 5e-7), torch.bfloat16: (2**-8, 2**-8)}
# Here PyTorch's gradient in float64, the answer, is off by 3.3e-15 itself, and that of the unsharded kernel by 0.3e-15, as
# 80 bits show: PyTorch sums the shares of a smoothed label.
PIXELS_LIMIT = 4e-15
SHARDS = {  # of the first so many ranks; what lies beyond the classes is padding
    "even": ((7, 7), 14),
    "uneven": ((70, 1, 12), 83),
    "padded": ((6, 6, 6, 6), 17),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "max": {"reduction": "max"},
    "topk": {"reduction": "topk", "top_k": 0.4},
    "smoothing": {"label_smoothing": 0.1},
    "weight": {"weight": True},
    "smoothing and weight": {"weight": True, "label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.01},
    "softcap": {"softcap": 5.0, "logit_scale": 0.7},
    "sample_weight": {"sample_weight": True, "scale": 0.3},
    "ignore_index in range": {"ignore_index": 2},
    "two labels": {"target": "two labels"},
    "two labels, smoothing and weight": {"target": "two labels", "weight": True, "label_smoothing": 0.1},
    "probabilities": {"target": "probabilities"},
    "probabilities, smoothing and weight": {"target": "probabilities", "weight": True, "label_smoothing": 0.1},
    "pixels": {"pixels": True, "label_smoothing": 0.1},
    "max, two labels": {"reduction": "max", "target": "two labels"},
    "max, probabilities": {"reduction": "max", "target": "probabilities"},
    "topk, two labels, smoothing and weight": {
        "reduction": "topk",
        "top_k": 0.4,
        "target": "two labels",
        "weight": True,
        "label_smoothing": 0.1,
    },
    "topk, probabilities, smoothing and weight": {
        "reduction": "topk",
        "top_k": 5,
        "target": "probabilities",
        "weight": True,
        "label_smoothing": 0.1,
    },
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


class Case(NamedTuple):
    shards: str
    options: str
    dtype: torch.dtype


CASES = [Case(shards, options, torch.float64) for shards in SHARDS for options in OPTIONS]
CASES += [Case("uneven", options, torch.float32) for options in OPTIONS]
CASES += [Case("padded", options, torch.bfloat16) for options in ("mean", "smoothing and weight", "probabilities")]
SWEEP = [Case(shards, options, dtype) for shards in SHARDS for options in OPTIONS for dtype in DTYPES]
SWEEP = [case for case in SWEEP if case not in CASES]


def problem(case: Case) -> tuple[Tensor, Any, dict[str, Any]]:
    """Whole rows, their targets, and the other arguments."""
    n_classes, options = SHARDS[case.shards][1], dict(OPTIONS[case.options])
    shape = (3, n_classes, 2, 2) if options.pop("pixels", False) else (ROWS, n_classes)
    logits = make_logits(*shape, dtype=case.dtype)
    n_rows = logits.numel() // n_classes
    rows = (shape[0], *shape[2:])
    target: Any = make_target(n_rows, n_classes=n_classes).reshape(rows)
    target.view(-1)[5] = options.get("ignore_index", -100)
    kind = options.pop("target", "indices")
    if kind == "two labels":
        other = target.roll(1)
        other[3] = target[3]
        target = (target, other, torch.linspace(0, 1, n_rows, dtype=torch.float64).reshape(rows).to(case.dtype))
    if kind == "probabilities":
        target = make_logits(*shape, seed=5, dtype=case.dtype).softmax(1)
    if options.pop("weight", False):
        options["weight"] = make_weight(n_classes, case.dtype)
    if options.pop("sample_weight", False):
        options["sample_weight"] = torch.linspace(0.1, 2, n_rows, dtype=case.dtype).reshape(rows)
    return logits, target, options


def shard_of(logits: Tensor, case: Case, rank: int) -> tuple[Tensor, int]:
    """The columns of a rank, padded with NaN, which must reach nothing; and its first class."""
    sizes, n_classes = SHARDS[case.shards]
    first, size = sum(sizes[:rank]), sizes[rank]
    shard = logits.new_full((logits.shape[0], size, *logits.shape[2:]), torch.nan)
    present = logits[:, first : min(first + size, n_classes)]
    shard[:, : present.shape[1]] = present
    return shard, first


def run(case: Case, rank: int, group: Any) -> tuple[Tensor, Tensor]:
    logits, target, options = problem(case)
    shard, first_class = shard_of(logits, case, rank)
    shard.requires_grad_()
    if case.shards == "even":
        place = {}
    else:
        place = {"first_class": first_class, "n_classes": SHARDS[case.shards][1]}
    loss = vocab_parallel_cross_entropy(shard, target, group=group, **place, **options)
    (gradient,) = torch.autograd.grad((loss * upstream(loss)).sum(), shard)
    return loss.detach(), gradient


def upstream(loss: Tensor) -> Tensor:
    return torch.linspace(0.5, 1, loss.numel(), dtype=torch.float64).reshape(loss.shape)


def exact(case: Case) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the whole rows, in float64, padding included."""
    logits, target, options = problem(case)
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
    leaf = logits.double().requires_grad_()
    loss = exact_loss(leaf, (*target[:2], target[2].double()) if isinstance(target, tuple) else target, **wide)
    (gradient,) = torch.autograd.grad((loss * upstream(loss)).sum(), leaf)
    shards = [shard_of(gradient, case, rank)[0].nan_to_num(0.0) for rank in range(len(SHARDS[case.shards][0]))]
    return loss.detach(), torch.cat(shards, 1)


def limits(case: Case) -> tuple[float, float]:
    of_loss, of_gradient = LIMITS[case.dtype]
    return of_loss, max(of_gradient, PIXELS_LIMIT) if case.options == "pixels" else of_gradient


def assert_within(found: Tensor, expected: Tensor, limit: float) -> None:
    """Fails if an error is above limit times the largest number."""
    __tracebackhide__ = True
    assert found.shape == expected.shape
    assert found.isfinite().all()
    error = ((found.double() - expected).abs().max() / expected.abs().max()).item()
    assert error <= limit, f"an error of {error:.3g} times the largest is above {limit:.3g}"
