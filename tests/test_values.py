"""Values and gradients against torch.nn.functional.cross_entropy in float64, on every path."""

from typing import Any

import pytest
import torch
from compare import check_against_torch
from conftest import Path
from problems import make_logits, make_target, make_weight

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REDUCTIONS: list[dict[str, Any]] = [
    {"reduction": "none"},
    {"reduction": "sum"},
    {"reduction": "mean"},
    {"reduction": "max"},
    {"reduction": "topk", "top_k": 3},
    {"reduction": "topk", "top_k": 0.5},
]


def _name(options: dict[str, Any]) -> str:
    return "-".join(str(value) for value in options.values())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("ignored", [None, -100, 2], ids=lambda i: f"ignore{i}" if i is not None else "")
@pytest.mark.parametrize("options", REDUCTIONS, ids=_name)
def test_option_grid(path: Path, options: dict[str, Any], ignored: int | None, weighted: bool, smoothing: float) -> None:
    logits = make_logits(13, 10)
    target = make_target(13, n_classes=10, ignored=ignored)
    weight = make_weight(10) if weighted else None
    ignore_index = -100 if ignored is None else ignored
    check_against_torch(logits, target, weight, ignore_index=ignore_index, label_smoothing=smoothing, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", REDUCTIONS, ids=_name)
def test_dtypes(path: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    logits = make_logits(9, 17, dtype=dtype)
    weight = make_weight(17, dtype=dtype)
    check_against_torch(logits, make_target(9, n_classes=17, ignored=-100), weight, label_smoothing=0.1, **options)
