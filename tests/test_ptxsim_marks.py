"""Upper bounds for what a forward and backward execute and ask of memory, counted by the emulator of the compiled PTX.

Bounds are a few per cent above what was counted; whoever makes a kernel better lowers them. `make report` prints the table at
full size, beside other libraries' figures.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import ALLOWED_SPILLS, IS_EARLIER_TRITON
from problems import make_probabilities

import fusedloss

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import emulated

if emulated.emulator() is None:
    pytest.skip("../shared/ptxsim is not there", allow_module_level=True)

BF16, FP32 = torch.bfloat16, torch.float32
INSTRUCTIONS_OF_THIS_TRITON = 1.06 if IS_EARLIER_TRITON else 1

# logits (N, C, dtype, pixels): instructions per logit, passes asked, narrowest access of the main loops. One row in seven is
# ignored: with none ignored 2 passes would be the floor, here it is 13/7 = 1.86; slices have on top what they exchange. Packed
# rows and pixels are read with their ignored neighbours: 2 is their floor, and an int64 target per row.
BOUNDS = {
    (4096, 10, FP32): (34.4, 2.27, 16),
    (4096, 10, BF16): (34, 2.5, 16),
    (1024, 100, FP32): (31, 2.2, 16),
    (1024, 100, BF16): (35, 2.45, 8),
    (1, 19, BF16, 64, 64): (26.5, 2.3, 16),
    (1, 19, FP32, 64, 64): (20.5, 2.3, 16),
    (1, 150, BF16, 64, 64): (27, 2.35, 16),
    (1, 150, FP32, 64, 64): (21.7, 2.15, 16),
    (252, 1000, BF16): (14.9, 2.02, 16),
    (252, 4096, BF16): (11.5, 1.92, 16),
    (70, 32000, BF16): (11.6, 1.895, 16),
    (70, 50257, BF16): (12.3, 1.902, 16),
    (28, 128256, BF16): (11.7, 1.92, 16),
}


# The emulator leaves a file to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("logits", BOUNDS, ids=str)
def test_forward_and_backward_stay_below(logits: tuple[Any, ...]) -> None:
    instructions, passes, width = BOUNDS[logits]
    mark = emulated.measure(fusedloss.cross_entropy, *logits)
    assert mark.instructions < instructions * INSTRUCTIONS_OF_THIS_TRITON
    assert mark.passes < passes
    assert mark.narrowest >= width
    assert mark.launches <= 3
    assert mark.torch_launches == 1  # the upstream gradient, filled with 1
    assert mark.syncs == 0
    assert mark.spills <= ALLOWED_SPILLS


# A loss per row, and the half of them that are largest: 3 passes are the floor of "none", and for each row of 10 bfloat16 classes
# the bytes that the forward leaves of it and the backward reads.
BOUNDS_OF_ROW_LOSSES = {
    ("none", (4096, 10, BF16)): (46.5, 5.95, 16),
    ("none", (4096, 10, FP32)): (46, 4.25, 16),
    ("none", (252, 1000, BF16)): (28.5, 2.98, 16),
    ("none", (1, 19, BF16, 64, 64)): (41.5, 4.6, 16),
    ("topk", (4096, 10, BF16)): (60.5, 7.15, 16),
    ("topk", (252, 1000, BF16)): (30.5, 2.7, 16),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("case", BOUNDS_OF_ROW_LOSSES, ids=str)
def test_row_losses_stay_below(case: tuple[str, tuple[Any, ...]]) -> None:
    reduction, logits = case
    options: dict[str, Any] = {"reduction": reduction, "top_k": 0.5 if reduction == "topk" else None}
    mark = emulated.measure(lambda x, t: fusedloss.cross_entropy(x, t, **options).sum(), *logits)
    instructions, passes, width = BOUNDS_OF_ROW_LOSSES[case]
    assert IS_EARLIER_TRITON or mark.instructions < instructions  # Triton 3.6 takes half as many more for the selection
    assert mark.passes < passes
    assert mark.narrowest >= width
    assert (mark.launches, mark.torch_launches) == (2, 2)  # the sum, and its upstream gradient
    assert mark.syncs == 0
    assert mark.spills <= ALLOWED_SPILLS


# The same with class probabilities in the logits' dtype, where every row counts: 3 passes are the floor, two read, one written.
BOUNDS_WITH_PROBABILITIES = {
    (4096, 10, FP32): (36, 3.05, 16),
    (1024, 100, FP32): (38, 3.17, 16),
    (1, 19, BF16, 64, 64): (44, 3.06, 16),
    (252, 1000, BF16): (26.2, 3.1, 16),
    (70, 50257, BF16): (34, 3.24, 16),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("logits", BOUNDS_WITH_PROBABILITIES, ids=str)
def test_class_probabilities_stay_below(logits: tuple[Any, ...]) -> None:
    n_rows, n_cols, dtype, *pixels = logits
    target = make_probabilities(n_rows, n_cols, *pixels, dtype=dtype)
    mark = emulated.measure(lambda x, _: fusedloss.cross_entropy(x, target), *logits)
    instructions, passes, width = BOUNDS_WITH_PROBABILITIES[logits]
    assert mark.instructions < instructions * INSTRUCTIONS_OF_THIS_TRITON
    assert mark.passes < passes
    assert mark.narrowest >= width
    assert mark.launches == 2
    assert mark.spills <= ALLOWED_SPILLS
