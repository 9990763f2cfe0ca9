"""Upper bounds for what a forward and backward execute and ask of memory, counted by the emulator of the compiled PTX.

Bounds are a few per cent above what was counted; whoever makes a kernel better lowers them. `make report` prints the table at
full size, beside other libraries' figures.
"""

import sys
from pathlib import Path

import pytest
import torch

import fusedloss

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import emulated

if emulated.emulator() is None:
    pytest.skip("../shared/ptxsim is not there", allow_module_level=True)

BF16, FP32 = torch.bfloat16, torch.float32

# logits: instructions per logit, passes asked, narrowest access of the main loops. One row in seven is
# ignored: with none ignored 2 passes would be the floor, here it is 13/7 = 1.86; small rows have targets and partial sums on top,
# slices what they exchange.
BOUNDS = {
    (4096, 10, FP32): (74, 3.9, 8),
    (252, 1000, BF16): (15.1, 2.02, 16),
    (252, 4096, BF16): (11.5, 1.92, 16),
    (56, 32000, BF16): (11.9, 1.91, 16),
    (70, 50257, BF16): (12.6, 1.93, 16),
    (28, 128256, BF16): (12.0, 1.93, 16),
}


# The emulator leaves a file to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("logits", BOUNDS, ids=lambda logits: f"{logits[0]}x{logits[1]}")
def test_forward_and_backward_stay_below(logits: tuple[int, int, torch.dtype]) -> None:
    instructions, passes, width = BOUNDS[logits]
    mark = emulated.measure(fusedloss.cross_entropy, *logits)
    assert mark.instructions < instructions
    assert mark.passes < passes
    assert mark.narrowest >= width
    assert mark.launches <= 3
    assert mark.torch_launches == 1  # the upstream gradient, filled with 1
    assert (mark.syncs, mark.spills) == (0, 0)
