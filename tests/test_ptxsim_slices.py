"""Two shards of the classes in the emulator: they equal whole rows, and do not read what is not theirs."""

from typing import Any

import pytest
import torch
from emulation import emulated
from problems import make_logits, make_target
from shard_problems import check_shards, sharded_entropies

from fusedloss.backends import triton

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the emulator leaves a file open

SHAPES = [(37, 10), (11, 1003), (3, 33301), (2, 19, 33, 16)]
SEVERAL: dict[str, dict[str, Any]] = {
    "indices": {},
    "two labels": {"target": "two labels", "softcap": 5.0, "logit_scale": 0.7, "z_loss": 0.01},
    "probabilities": {"target": "probabilities"},
}
OFTEN = [(shape, "indices") for shape in SHAPES] + [((11, 1003), "probabilities")]
SELDOM = [(shape, options) for shape in SHAPES for options in SEVERAL if (shape, options) not in OFTEN]


def widths(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[1] - 3 * shape[1] // 10, 3 * shape[1] // 10


@pytest.mark.parametrize(
    ("shape", "options"), [*OFTEN, *(pytest.param(*case, marks=pytest.mark.sweep) for case in SELDOM)], ids=str
)
def test_loss_and_gradient(shape: tuple[int, ...], options: str) -> None:
    """A target in another place is no address here, and ignored rows are not read."""
    with emulated(order=3):
        check_shards(triton, shape, widths(shape), torch.float32, weight=True, label_smoothing=0.1, **SEVERAL[options])


@pytest.mark.parametrize(
    "shape", [(11, 1003), *(pytest.param(shape, marks=pytest.mark.sweep) for shape in SHAPES if shape[1] != 1003)], ids=str
)
def test_entropy(shape: tuple[int, ...]) -> None:
    logits, target = make_logits(*shape), make_target(shape[0], *shape[2:], n_classes=shape[1])
    logits[0, : widths(shape)[0]] = -torch.inf  # a place may have no part in a row
    expected = torch.special.entr(logits.double().softmax(1)).sum(1).flatten()
    with emulated(order=3):
        found = sharded_entropies(triton, logits, target, None, widths(shape), label_smoothing=0.1)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
