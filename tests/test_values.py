"""Values and gradients against torch.nn.functional.cross_entropy in float64, on every path."""

from typing import Any

import pytest
import torch
from compare import check_against_torch
from paths import Path
from problems import make_logits, make_probabilities, make_target, make_weight

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


@pytest.mark.gpu_sweep  # the same kernels' grids are in test_kernels.py
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", REDUCTIONS, ids=_name)
def test_dtypes(path: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    logits = make_logits(9, 17, dtype=dtype)
    weight = make_weight(17, dtype=dtype)
    check_against_torch(logits, make_target(9, n_classes=17, ignored=-100), weight, label_smoothing=0.1, **options)


SHAPES = [
    (1, 1),  # one class: the loss is 0 whatever the logit
    (1, 10),
    (7, 10),  # CIFAR-10, fewer rows than any tile has
    (513, 10),  # one row more than a power of two
    (65, 100),
    (7, 513),  # just too many classes to share a tile
    (3, 1000),  # ImageNet: rows end inside a 16-byte group of 8 bf16
    (4, 1024),  # a power of two: nothing is masked
    (2, 50257),  # GPT-2: odd, every row starts at another alignment
    (1, 128256),  # Llama 3: several blocks of columns
]


@pytest.mark.gpu_sweep  # the same kernels' grids are in test_kernels.py
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
    n_rows, n_cols = shape
    check_against_torch(make_logits(*shape, dtype=dtype), make_target(n_rows, n_classes=n_cols))


@pytest.mark.gpu_sweep  # the same kernels' grids are in test_kernels.py
@pytest.mark.parametrize("options", REDUCTIONS, ids=_name)
@pytest.mark.parametrize("shape", [(3, 10, 5), (2, 10, 3, 4), (1, 10, 2, 3, 2), (20, 4, 2)], ids=str)
def test_spatial_shapes(path: Path, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    n_rows, n_cols, *spatial = shape
    target = make_target(n_rows, *spatial, n_classes=n_cols, ignored=-100)
    check_against_torch(make_logits(*shape), target, make_weight(n_cols), label_smoothing=0.1, **options)


@pytest.mark.parametrize("scale", [0.125, -3.0, 0.0, 1e-6])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("options", REDUCTIONS, ids=_name)
def test_scaled(path: Path, options: dict[str, Any], as_tensor: bool, scale: float) -> None:
    logits, target = make_logits(9, 10), make_target(9, n_classes=10, ignored=-100)
    factor = torch.tensor(scale) if as_tensor else scale
    check_against_torch(logits, target, label_smoothing=0.1, scale=factor, **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("shape", [(7, 10), (3, 1000), (2, 10, 3)], ids=str)
@pytest.mark.parametrize("options", REDUCTIONS, ids=_name)
def test_probabilities(path: Path, options: dict[str, Any], shape: tuple[int, ...], weighted: bool, smoothing: float) -> None:
    weight = make_weight(shape[1]) if weighted else None
    target = make_probabilities(*shape)
    check_against_torch(make_logits(*shape), target, weight, label_smoothing=smoothing, **options)
