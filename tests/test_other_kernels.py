"""What other fused cross-entropies were found to get wrong, reproduced on their releases; each must hold here."""

import pytest
import torch
import torch.nn.functional as F
from compare import check_against_torch
from paths import Path
from problems import make_logits, make_target

import fusedloss


def test_liger_overwrites_the_logits(path: Path) -> None:
    logits = make_logits(8, 600).requires_grad_()
    before, version = logits.detach().clone(), logits._version
    fusedloss.cross_entropy(logits, make_target(8, n_classes=600)).backward()
    assert logits.equal(before)
    assert logits._version == version


def test_liger_writes_ignored_rows_under_no_grad(path: Path) -> None:
    logits = make_logits(4, 5)
    before = logits.clone()
    with torch.no_grad():
        fusedloss.cross_entropy(logits, torch.tensor([0, -100, -100, 3]))
    assert logits.equal(before)


def test_liger_gives_zero_for_all_ignored(path: Path) -> None:
    assert fusedloss.cross_entropy(make_logits(4, 5), torch.full((4,), -100)).isnan()


def test_liger_and_flaggems_raise_on_an_empty_batch(path: Path) -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    fusedloss.cross_entropy(logits, torch.zeros(0, dtype=torch.long), reduction="sum").backward()
    assert logits.grad is not None
    assert logits.grad.shape == (0, 5)


@pytest.mark.parametrize("n_cols", [40_000, 600])
def test_liger_gives_nan_after_a_block_of_infinities(path: Path, n_cols: int) -> None:
    """An online softmax whose first block is all -inf must not shift by that maximum."""
    logits = torch.full((2, n_cols), -torch.inf)
    logits[:, -50:] = make_logits(2, 50)
    check_against_torch(logits, torch.tensor([n_cols - 1, n_cols - 7]))


def test_liger_scales_twice_when_the_graph_is_retained(path: Path) -> None:
    logits = make_logits(4, 5).requires_grad_()
    loss = fusedloss.cross_entropy(logits, torch.tensor([0, 1, 2, 3]))
    first, second = (torch.autograd.grad(2 * loss, logits, retain_graph=True)[0] for _ in range(2))
    assert first.equal(second)


def test_liger_keeps_the_rows_of_a_bf16_sum_in_bf16(path: Path) -> None:
    """Rows rounded to bf16 before the sum leave an error of about 1e-4 in it."""
    logits, target = make_logits(64, 10, dtype=torch.bfloat16), make_target(64, n_classes=10)
    with torch.autocast(logits.device.type, torch.bfloat16):
        loss = fusedloss.cross_entropy(logits, target, reduction="sum")
    exact = F.cross_entropy(logits.double(), target, reduction="sum")
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_flash_attention_drops_the_second_order(path: Path) -> None:
    logits, target = make_logits(4, 5, dtype=torch.float64).requires_grad_(), torch.tensor([0, 1, -100, 3])
    (first,) = torch.autograd.grad(fusedloss.cross_entropy(logits, target), logits, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), logits)
    (first,) = torch.autograd.grad(F.cross_entropy(logits, target), logits, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), logits)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(second, expected)


def test_flash_attention_misreads_strided_targets(path: Path) -> None:
    check_against_torch(make_logits(6, 10), make_target(6, 3, n_classes=10)[:, 1])
    check_against_torch(make_logits(2, 10, 3, 2), make_target(2, 2, 3, n_classes=10).transpose(1, 2))


@pytest.mark.parametrize("bad", [-1, 5, 10**9])
def test_flash_attention_gives_zero_for_a_class_out_of_range(path: Path, bad: int) -> None:
    try:
        loss = fusedloss.cross_entropy(make_logits(4, 5), torch.tensor([0, bad, 2, 3]))
    except IndexError as error:
        assert f"Target {bad} is out of bounds" in str(error)  # noqa: PT017 (a kernel gives NaN instead)
    else:
        assert loss.isnan()


def test_flaggems_starts_the_maximum_at_zero(path: Path) -> None:
    for shape in ((2, 10), (2, 600), (2, 10, 3)):
        loss = fusedloss.cross_entropy(torch.full(shape, -200.0), torch.zeros(2, *shape[2:], dtype=torch.long))
        torch.testing.assert_close(loss, torch.tensor(float(shape[1])).log())


def test_flaggems_lets_an_ignored_nan_into_the_mean(path: Path) -> None:
    logits = make_logits(4, 10)
    logits[1] = torch.nan
    target = torch.tensor([0, -100, 2, 3])
    expected = F.cross_entropy(logits[[0, 2, 3]], target[[0, 2, 3]])
    torch.testing.assert_close(fusedloss.cross_entropy(logits, target), expected)


def test_flaggems_divides_by_zero_in_the_backward_of_all_ignored(path: Path) -> None:
    logits = make_logits(4, 5).requires_grad_()
    fusedloss.cross_entropy(logits, torch.full((4,), -100)).backward()
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_flaggems_has_no_gradient_for_probabilities(any_path: Path) -> None:
    logits, target = make_logits(4, 5), make_logits(4, 5, seed=5).softmax(1).requires_grad_()
    fusedloss.cross_entropy(logits, target).backward()
    assert target.grad is not None
    torch.testing.assert_close(target.grad, -logits.log_softmax(1) / 4)


def test_transformer_engine_returns_a_vector_of_one(path: Path) -> None:
    assert fusedloss.cross_entropy(make_logits(4, 5), torch.tensor([0, 1, 2, 3])).shape == ()


def test_transformer_engine_misreads_transposed_logits(path: Path) -> None:
    check_against_torch(make_logits(10, 6).t(), make_target(6, n_classes=10))


@pytest.mark.parametrize("n_rows", [130, 257])
def test_attorch_drops_the_last_rows(path: Path, n_rows: int) -> None:
    check_against_torch(make_logits(n_rows, 40), make_target(n_rows, n_classes=40), reduction="none", dloss=0.5)
    check_against_torch(make_logits(n_rows, 40), make_target(n_rows, n_classes=40))


def test_apex_ignores_class_zero(path: Path) -> None:
    check_against_torch(make_logits(4, 5), torch.tensor([0, 0, 0, 1]))
    assert fusedloss.cross_entropy(make_logits(4, 5), torch.zeros(4, dtype=torch.long)).item() > 0


def test_apex_edits_the_upstream_gradient(path: Path) -> None:
    logits = make_logits(4, 5).requires_grad_()
    dloss = torch.tensor([1.0, 2.0, 3.0, 4.0])
    fusedloss.cross_entropy(logits, torch.tensor([0, -100, 2, 3]), reduction="none").backward(dloss)
    assert dloss.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_none_of_them_computes_in_float64(path: Path) -> None:
    logits = make_logits(5, 30, dtype=torch.float64).requires_grad_()
    loss = fusedloss.cross_entropy(logits, make_target(5, n_classes=30))
    exact = F.cross_entropy(logits, make_target(5, n_classes=30))
    assert abs(loss.item() - exact.item()) < 1e-14 * exact.item()
    ours, expected = (torch.autograd.grad(value, logits)[0] for value in (loss, exact))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-15)
