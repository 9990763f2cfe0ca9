"""cross_entropy_overwriting_logits: same loss and gradient in the logits' own memory, and every misuse an error."""

import pytest
import torch
from problems import make_logits, make_probabilities, make_target
from torch import Tensor

import fusedloss
from fusedloss.backends import cpu

pytestmark = pytest.mark.skipif(cpu.MISSING is not None, reason=f"no C++ kernel: {cpu.MISSING}")


def _in_place(leaf: Tensor, target: Tensor, dloss: float = 1.0, **options: float) -> tuple[Tensor, Tensor, Tensor]:
    logits = leaf * 1
    loss = fusedloss.cross_entropy_overwriting_logits(logits, target, **options)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss, logits, torch.tensor(dloss, dtype=loss.dtype))
    return loss, gradient, logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(9, 10), (40, 100), (3, 9001), (2, 30, 4, 5), (2, 600, 3)], ids=str)
def test_the_same_bits_in_the_same_memory(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    leaf = make_logits(*shape, dtype=dtype).requires_grad_()
    indices = make_target(shape[0], *shape[2:], n_classes=shape[1], ignored=-100)
    for target in (indices, make_probabilities(*shape, dtype=dtype)):
        for smoothing in (0.0, 0.1):
            loss, gradient, logits = _in_place(leaf, target, 3.0, label_smoothing=smoothing)
            expected = fusedloss.cross_entropy(leaf, target, label_smoothing=smoothing)
            (expected_gradient,) = torch.autograd.grad(expected, leaf, torch.tensor(3.0, dtype=dtype))
            assert torch.equal(loss, expected)
            assert torch.equal(gradient, expected_gradient)
            assert gradient.data_ptr() == logits.data_ptr()


def test_without_gradient_the_logits_stay() -> None:
    logits, target = make_logits(4, 10), make_target(4, n_classes=10)
    before = logits.clone()
    assert fusedloss.cross_entropy_overwriting_logits(logits, target) == fusedloss.cross_entropy(logits, target)
    assert torch.equal(logits, before)


def test_autograd_notices_who_saved_the_logits() -> None:
    leaf, target = make_logits(4, 10).requires_grad_(), make_target(4, n_classes=10)
    logits = leaf.tanh()  # saves its output
    loss = fusedloss.cross_entropy_overwriting_logits(logits, target)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_misuse_raises() -> None:
    leaf, target = make_logits(4, 10).requires_grad_(), make_target(4, n_classes=10)
    overwriting = fusedloss.cross_entropy_overwriting_logits
    with pytest.raises(RuntimeError, match="leaf Variable"):
        overwriting(leaf, target)
    with pytest.raises(RuntimeError, match="reduction 'none'"):
        overwriting(leaf * 1, target, reduction="none")
    with pytest.raises(RuntimeError, match="cannot be overwritten"):
        overwriting((leaf * 1)[:1].expand(4, 10), target)
    with pytest.raises(RuntimeError, match="cannot be overwritten"):
        overwriting(torch._neg_view(leaf * 1), target)
    with pytest.raises(RuntimeError, match="negative view"):
        overwriting(leaf * 1, target, torch._neg_view(torch.ones(10)))
    with pytest.raises(RuntimeError, match="only the CPU kernel"), fusedloss.backend("reference"):
        overwriting(leaf * 1, target)
    with pytest.raises(IndexError, match="Target 10 is out of bounds"):
        overwriting(leaf * 1, torch.full((4,), 10))
    loss = overwriting(leaf * 1, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()
    with pytest.raises(RuntimeError, match="one backward"):
        torch.autograd.grad(overwriting(leaf * 1, target), leaf, create_graph=True)
