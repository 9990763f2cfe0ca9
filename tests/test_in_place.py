"""Triton's gradient in the logits' own memory, under the interpreter; in any order of programs in test_ptxsim.py."""

from typing import Any

import pytest
import torch
from in_place import OPTIONS, check_in_place
from paths import INTERPRETER, Path

import fusedloss

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize("path", [INTERPRETER], indirect=True)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize(
    ("shape", "dtype"), [((37, 10), FP32), ((9, 150), BF16), ((5, 1000), BF16), ((5, 1003), FP32), ((3, 520), FP64)], ids=str
)
def test_under_the_interpreter(
    path: Path, shape: tuple[int, int], dtype: torch.dtype, options: dict[str, Any], reduction: str
) -> None:
    check_in_place(shape, dtype, in_place=True, reduction=reduction, **options)


@pytest.mark.parametrize("path", [INTERPRETER], indirect=True)
def test_beside_the_logits_where_rows_are_read_again(path: Path) -> None:
    """float16 has its gradient in a second launch; slices are launched twice by the interpreter."""
    check_in_place((5, 1003), FP16, in_place=False, reduction="sum")
    check_in_place((2, 40001), FP32, in_place=False, reduction="sum")


def test_the_plan_says_what_is_held() -> None:
    for dtype, n_classes, copies in ((BF16, 50257, 1), (FP32, 128256, 1), (FP16, 50257, 2), (FP32, 3_000_000, 2)):
        input = torch.empty(512, 64, dtype=dtype, device="meta", requires_grad=True)
        weight = torch.empty(n_classes, 64, dtype=dtype, device="meta")
        with fusedloss.backend("triton"):
            for options in ({}, {"reduction": "max"}):
                plan = fusedloss.plan(
                    input, torch.empty(512, dtype=torch.int64, device="meta"), linear_weight=weight, chunk_rows=128, **options
                )
                assert plan.held_bytes == copies * 128 * n_classes * dtype.itemsize, dtype
