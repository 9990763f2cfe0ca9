"""Edges of the Triton kernels: infinite upstream gradients, memory that nobody writes, rows that nobody may share."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from compare import check_against_torch
from fusedloss.kernels.groups import TileShape
from fusedloss.kernels.tile import _packed_places
from paths import Path
from problems import make_logits, make_probabilities, make_target, make_weight
from torch import Tensor

import fusedloss
from fusedloss import ops
from fusedloss.autograd import kernel_inputs
from fusedloss.backends import triton as backend
from fusedloss.plan import Inputs, Options

FP16, FP32, FP64 = torch.float16, torch.float32, torch.float64

# Tiles; one row a program; slices; pixels.
SHAPES = [(7, 10), (5, 1001), (2, 33001), (2, 5, 3, 4)]


def _gradient(function: Any, logits: Tensor, target: Tensor, dloss: float, **options: Any) -> Tensor:
    logits = logits.clone().requires_grad_()
    loss = function(logits, target, **options)
    loss.backward(torch.full_like(loss, dloss))
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("dloss", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_infinite_upstream_gradient_leaves_ignored_rows_at_0(
    kernels: Path, shape: tuple[int, ...], reduction: str, dloss: float
) -> None:
    """As in PyTorch: 0 there, and nowhere else; no number in the other rows, whose gradients are infinite or NaN."""
    logits, target = make_logits(*shape), make_target(*shape[:1], *shape[2:], n_classes=shape[1], ignored=-100)
    logits[:, 0] = -torch.inf  # p is 0 there, and 0 times infinity is NaN
    target[target == 0] = 1
    assert (target == -100).any()
    ours = _gradient(fusedloss.cross_entropy, logits, target, dloss, reduction=reduction)
    torchs = _gradient(F.cross_entropy, logits, target, dloss, reduction=reduction)
    assert torch.equal(ours == 0, torchs == 0)
    assert torch.equal(ours.isfinite(), torchs.isfinite())
    assert ours.movedim(1, -1)[target == -100].eq(0).all()


@pytest.mark.parametrize("shape", [(7, 10), (5, 1001)], ids=str)
def test_an_infinite_upstream_gradient_of_the_largest_loss_leaves_the_other_rows_at_0(
    kernels: Path, shape: tuple[int, int]
) -> None:
    logits, target = make_logits(*shape), make_target(shape[0], n_classes=shape[1])
    largest = F.cross_entropy(logits, target, reduction="none").argmax()
    gradient = _gradient(fusedloss.cross_entropy, logits, target, torch.inf, reduction="max")
    assert not gradient[largest].isfinite().any()
    gradient[largest] = 0
    assert (gradient == 0).all()


CALLS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "none": (FP32, {"reduction": "none"}),
    "none, smoothing": (FP32, {"reduction": "none", "label_smoothing": 0.1}),
    "mean of float16": (FP16, {}),
    "sum, statistics": (FP32, {"reduction": "sum", "return_stats": True}),
    "max": (FP32, {"reduction": "max"}),
    "topk, smoothing": (FP64, {"reduction": "topk", "top_k": 2, "label_smoothing": 0.1}),
}


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", [(7, 10), (5, 1001), (2, 33001)], ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_operators_return_no_memory_that_nobody_wrote(
    kernels: Path, soft: bool, shape: tuple[int, int], call: str, needs_grad: bool
) -> None:
    """PyTorch fills new memory with NaN and the largest integers where it must be deterministic."""
    dtype, options = CALLS[call]
    if soft:  # whose statistics no kernel has
        options = {name: value for name, value in options.items() if name != "return_stats"}
    target = make_probabilities(*shape, dtype=dtype) if soft else make_target(shape[0], n_classes=shape[1])
    inputs = kernel_inputs(Inputs(make_logits(*shape, dtype=dtype), target, weight=make_weight(shape[1], dtype)))
    torch.use_deterministic_algorithms(True)
    try:
        outputs = ops.forward(inputs, Options(**options), dtype, needs_grad, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in outputs._asdict().items():
        if tensor is not None and tensor.is_floating_point():
            assert not tensor.isnan().any(), name
        elif tensor is not None:
            assert (tensor < shape[0] + 1).all(), name


@pytest.mark.parametrize("shape", [(6, 10), (6, 1001), (3, 33001)], ids=str)
def test_the_sum_of_the_class_weights_is_not_a_rows_own(kernels: Path, shape: tuple[int, int]) -> None:
    """Ragged rows begin at other places of 32 bytes, and add up the weights in another order: `saved` has the same W whichever
    row counts, were it none, or it would be that of the row which stores it last."""
    # Not make_weight's, whose sum is the same in any order.
    logits, weight = make_logits(*shape), torch.rand(shape[1], generator=torch.Generator().manual_seed(0))
    totals = []
    for row in (*range(shape[0]), None):
        target = torch.full(shape[:1], -100)
        if row is not None:
            target[row] = 1
        inputs = kernel_inputs(Inputs(logits, target, weight=weight))
        saved = ops.forward(inputs, Options(reduction="none", label_smoothing=0.1), FP32, True, "triton").saved
        totals.append(saved[3].cpu())
    assert torch.equal(torch.stack(totals), totals[0].expand(len(totals)))
    torch.testing.assert_close(totals[0].double(), weight.double().sum().cpu(), rtol=1e-6, atol=0)


@triton.jit
def _elements_left(out, ptr, n_rows, n_cols, shape: tl.constexpr):
    _, _, _, n_left = _packed_places(ptr, n_rows, n_cols, shape)
    tl.store(out + tl.program_id(0), n_left)


def test_packed_rows_that_nobody_reads_are_not_read_beyond_2_to_31_elements(kernels: Path) -> None:
    """A backward without a gradient in a tile reads no rows there: as many as were before the tile were missing, whose elements
    passed -2**31, and the tile was read, beyond its end perhaps."""
    shape = TileShape(rows=2**20, cols=1, n_blocks=1024, row_group=2**20)
    left = torch.full((4,), -1, dtype=torch.int32, device=kernels.device)
    _elements_left[(4,)](left, left, 0, 1024, shape)
    assert left.tolist() == [0] * 4
    _elements_left[(4,)](left, left, 2**21 + 1, 1024, shape)
    assert left.tolist() == [2**30, 2**30, 1024, 0]


@pytest.mark.parametrize("shape", [(2, 33001), (3, 46000)], ids=str)
def test_rows_too_long_for_a_program_where_none_may_wait(
    kernels: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    """They are read twice."""
    facts = backend.device_facts(torch.device(kernels.device))._replace(may_wait=False)
    monkeypatch.setattr(backend, "device_facts", lambda _: facts)
    check_against_torch(make_logits(*shape, dtype=torch.bfloat16), make_target(shape[0], n_classes=shape[1], ignored=-100))
