"""The whole grid of options, dtypes and layouts on every path, too long for `make test`: `make test-all`.

The other files test options at one shape and shapes at one set of options, a sum; this is the product.
"""

from itertools import product
from typing import Any

import pytest
import torch
from compare import check_against_torch
from paths import Path
from problems import make_logits, make_probabilities, make_target, make_weight
from torch import Tensor

pytestmark = pytest.mark.sweep

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Several programs; off the tile; several blocks or slices; pixels; nothing.
SHAPES = [(2049, 10), (7, 100), (3, 1001), (2, 50257), (2, 19, 9, 7), (0, 10)]
TARGETS = ["indices", "two labels", "probabilities"]
REDUCTIONS: list[dict[str, Any]] = [
    {"reduction": "none"},
    {"reduction": "sum"},
    {"reduction": "mean"},
    {"reduction": "max"},
    {"reduction": "topk", "top_k": 0.4},
]
EXTRAS: list[dict[str, Any]] = [{}, {"z_loss": 1e-2, "logit_scale": 0.5, "softcap": 20.0, "scale": 0.25}]


def _target(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    if kind == "probabilities":
        return make_probabilities(*shape, dtype=dtype)
    a, b = (make_target(*shape[:1], *shape[2:], n_classes=shape[1], ignored=-100, seed=seed) for seed in (1, 2))
    return a if kind == "indices" else (a, b, 0.3)


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda options: options["reduction"])
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_everything_with_everything(
    path: Path, shape: tuple[int, ...], dtype: torch.dtype, kind: str, reduction: dict[str, Any]
) -> None:
    if path.backend == "triton" and path.device == "cpu" and shape[:2] in ((2049, 10), (2, 50257)):
        shape = (300, 10) if shape[1] == 10 else (2, 20001)  # the interpreter takes milliseconds for a row
    logits, target = make_logits(*shape, dtype=dtype), _target(kind, shape, dtype)
    rows = make_weight(max(1, shape[0]))[: shape[0]]
    for weighted, smoothing, extras in product((False, True), (0.0, 0.1), EXTRAS):
        weight: Tensor | None = make_weight(shape[1], dtype=dtype) if weighted else None
        options = {**reduction, **extras, "label_smoothing": smoothing, **({"sample_weight": rows} if extras else {})}
        if shape[0] == 0 and reduction["reduction"] in ("max", "topk"):
            continue  # nan, with nothing to differentiate: test_reductions.py
        check_against_torch(logits, target, weight, roundings=4, **options)
