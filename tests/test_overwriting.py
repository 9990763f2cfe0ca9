"""cross_entropy_overwriting_logits: same loss and gradient in the logits' own memory, and every misuse an error."""

import pytest
import torch
import torch.nn.functional as F
from paths import GPU, INTERPRETER, Path
from problems import make_logits, make_probabilities, make_target
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

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


@pytest.mark.parametrize("shape", [(0, 10), (0, 10, 3), (2, 10, 0)], ids=str)
def test_no_rows(shape: tuple[int, ...]) -> None:
    """Memory of no elements has no address to compare."""
    results = []
    for call in (fusedloss.cross_entropy_overwriting_logits, F.cross_entropy):
        leaf = torch.zeros(shape, requires_grad=True)
        loss = call(leaf * 1, torch.zeros(shape[0], *shape[2:], dtype=torch.long), torch.ones(10))
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(*results, equal_nan=True)


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
    with pytest.raises(RuntimeError, match="negative view"):
        overwriting(leaf * 1, target, scale=torch._neg_view(torch.ones(())))
    with pytest.raises(RuntimeError, match="only the kernels"), fusedloss.backend("reference"):
        overwriting(leaf * 1, target)
    with pytest.raises(RuntimeError, match="no logits that could be overwritten"), fusedloss.backend("cpu"):
        overwriting((leaf * 1).to("meta"), target.to("meta"))
    with pytest.raises(RuntimeError, match="no logits that could be overwritten"), FakeTensorMode(allow_non_fake_inputs=True):
        overwriting(leaf * 1, target)
    with pytest.raises(IndexError, match="Target 10 is out of bounds"):
        overwriting(leaf * 1, torch.full((4,), 10))
    loss = overwriting(leaf * 1, target)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_graph_that_is_kept() -> None:
    """A copy is handed out, as often as asked; the gradient of the gradient is that of logits recovered from it."""
    leaf, target = make_logits(4, 10, dtype=torch.float64).requires_grad_(), make_target(4, n_classes=10)
    loss = fusedloss.cross_entropy_overwriting_logits(leaf * 1, target, label_smoothing=0.1) ** 2
    first, again = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
    expected_loss = torch.nn.functional.cross_entropy(leaf, target, label_smoothing=0.1) ** 2
    (expected_gradient,) = torch.autograd.grad(expected_loss, leaf, create_graph=True)
    (expected_second,) = torch.autograd.grad(expected_gradient.square().sum(), leaf)
    torch.testing.assert_close(gradient, expected_gradient)
    torch.testing.assert_close(second, expected_second)


def test_an_edit_of_the_gradient_raises() -> None:
    leaf, target = make_logits(4, 10).requires_grad_(), make_target(4, n_classes=10)
    logits = leaf * 1
    loss = fusedloss.cross_entropy_overwriting_logits(logits, target)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_through_the_hooks_of_saved_tensors() -> None:
    leaf, target = make_logits(40, 100).requires_grad_(), make_target(40, n_classes=100)
    (expected,) = torch.autograd.grad(fusedloss.cross_entropy(leaf, target), leaf)

    def from_checkpoint(leaf: Tensor) -> Tensor:
        return fusedloss.cross_entropy_overwriting_logits(leaf * 1, target)

    with torch.autograd.graph.save_on_cpu():
        loss = from_checkpoint(leaf)
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)
    loss = checkpoint(from_checkpoint, leaf, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)


def test_a_scale_that_is_learned() -> None:
    leaf, target = make_logits(4, 10).requires_grad_(), make_target(4, n_classes=10)
    scale = torch.tensor(2.0, requires_grad=True)
    loss = fusedloss.cross_entropy_overwriting_logits(leaf * 1, target, scale=scale)
    expected = fusedloss.cross_entropy(leaf, target, scale=scale)
    for gradient, expected_gradient in zip(
        torch.autograd.grad(loss, (leaf, scale)), torch.autograd.grad(expected, (leaf, scale)), strict=True
    ):
        assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("path", [INTERPRETER, GPU], indirect=True)
@pytest.mark.parametrize("shape", [(9, 10), (4, 300), (2, 19, 5, 3)], ids=str)
def test_on_triton(path: Path, shape: tuple[int, ...]) -> None:
    leaf = make_logits(*shape).requires_grad_()
    target = make_target(shape[0], *shape[2:], n_classes=shape[1], ignored=-100)
    loss, gradient, logits = _in_place(leaf, target, 3.0, label_smoothing=0.1)
    expected = fusedloss.cross_entropy(leaf, target, label_smoothing=0.1)
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected, leaf, torch.tensor(3.0))[0])
    assert gradient.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("path", [INTERPRETER], indirect=True)
def test_rows_that_are_read_twice_on_triton(path: Path) -> None:
    """The interpreter launches slices twice."""
    logits = make_logits(2, 40001).requires_grad_() * 1
    before = logits.detach().clone()
    with pytest.raises(RuntimeError, match="do not stay on chip"):
        fusedloss.cross_entropy_overwriting_logits(logits, make_target(2, n_classes=40001))
    assert torch.equal(logits, before)
