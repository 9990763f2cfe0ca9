"""Where fusedloss differs from PyTorch on purpose; the README lists the same."""

import math

import pytest
import torch
import torch.nn.functional as F
from paths import Path
from problems import make_logits

import fusedloss
from fusedloss import known


def test_ignored_row_of_nan_has_gradient_zero(path: Path) -> None:
    """PyTorch gives NaN (pytorch#11551)."""
    logits, target = make_logits(3, 5), torch.tensor([1, -100, 2])
    logits[1] = torch.nan
    for reduction in ("none", "sum", "mean", "max"):
        leaf = logits.clone().requires_grad_()
        fusedloss.cross_entropy(leaf, target, reduction=reduction).sum().backward()
        assert leaf.grad is not None
        assert (leaf.grad[1] == 0).all()
        assert leaf.grad[[0, 2]].isfinite().all()
        assert leaf.grad.abs().max() > 0
    leaf = logits.cpu().clone().requires_grad_()
    F.cross_entropy(leaf, target.cpu()).backward()
    assert leaf.grad is not None
    assert leaf.grad[1].isnan().all()


def test_half_precision_mean_of_many_rows(any_path: Path) -> None:
    """PyTorch's fp16 mean of 20000 rows is inf on the CPU."""
    logits = torch.zeros(20_000, 100, dtype=torch.float16)
    target = torch.arange(20_000) % 100
    assert fusedloss.cross_entropy(logits, target).item() == pytest.approx(math.log(100), rel=1e-3)
    assert F.cross_entropy(logits.cpu(), target.cpu()).isinf()


def test_bytes_with_weight_and_smoothing(path: Path) -> None:
    """PyTorch takes each of the two with uint8 class indices, but not both."""
    logits, target, weight = make_logits(3, 5), torch.tensor([1, 4, 2]), torch.tensor([0.5, 1.0, 2.0, 1.0, 0.25])
    expected = fusedloss.cross_entropy(logits, target, weight, label_smoothing=0.1)
    assert fusedloss.cross_entropy(logits, target.to(torch.uint8), weight, label_smoothing=0.1).item() == expected.item()
    with pytest.raises(RuntimeError, match="gather"):
        F.cross_entropy(logits.cpu(), target.to(torch.uint8).cpu(), weight.cpu(), label_smoothing=0.1)


@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (3, 1, 1)])
def test_a_weight_of_another_shape(any_path: Path, shape: tuple[int, ...]) -> None:
    """PyTorch refuses it as well, but for class indices of (N, C, d1, ...) without label smoothing."""
    weight = torch.ones(shape)
    for spatial in ((), (2,), (2, 2)):
        logits, target = make_logits(2, 3, *spatial), torch.zeros(2, *spatial, dtype=torch.long)
        with pytest.raises(RuntimeError, match="weight tensor should be defined either for all 3 classes or no classes"):
            fusedloss.cross_entropy(logits, target, weight)
        if spatial:
            assert F.cross_entropy(logits.cpu(), target.cpu(), weight.cpu()).isfinite()


def test_the_label_of_a_single_row_in_brackets_and_label_smoothing(any_path: Path) -> None:
    """PyTorch takes a label of shape (1,) for logits (C,), but not with label smoothing."""
    logits, label = make_logits(1, 5)[0], torch.tensor([3])
    expected = fusedloss.cross_entropy(logits, label[0], label_smoothing=0.1)
    assert fusedloss.cross_entropy(logits, label, label_smoothing=0.1).item() == expected.item()
    with pytest.raises(RuntimeError, match="shape"):
        F.cross_entropy(logits.cpu(), label.cpu(), label_smoothing=0.1)


@pytest.mark.interpreter
@pytest.mark.parametrize("n_cols", [5, 600])
@pytest.mark.parametrize("bad", [-1, 10**6, 2**62, -(2**63)])
def test_class_out_of_range_in_a_kernel_is_nan(bad: int, n_cols: int) -> None:
    """Not a stopped device: NaN in that row and in the loss, and nothing read outside the logits."""
    target = torch.tensor([0, bad, -100, 3])
    with fusedloss.backend("triton"):
        logits = make_logits(4, n_cols).requires_grad_()
        rows = fusedloss.cross_entropy(logits, target, torch.ones(n_cols), reduction="none", label_smoothing=0.1)
        assert rows.isnan().tolist() == [False, True, False, False]
        rows.sum().backward()
        assert logits.grad is not None
        assert logits.grad.isnan().all(1).tolist() == [False, True, False, False]
        for reduction in ("sum", "mean", "max"):
            assert fusedloss.cross_entropy(logits, target, reduction=reduction).isnan()


@pytest.mark.gpu
def test_class_out_of_range_on_a_gpu_is_nan() -> None:
    logits = make_logits(4, 5).cuda().requires_grad_()
    rows = fusedloss.cross_entropy(logits, torch.tensor([0, 5, -100, 3], device="cuda"), reduction="none")
    rows.sum().backward()
    assert rows.isnan().tolist() == [False, True, False, False]
    assert logits.grad is not None
    assert logits.grad.isnan().all(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("n_cols", [5, 0])
def test_class_out_of_range_in_the_reference_on_a_gpu(monkeypatch: pytest.MonkeyPatch, n_cols: int) -> None:
    """What the reference does where PyTorch would stop the device, run on the CPU. Without a class every index is wrong."""
    monkeypatch.setattr("fusedloss.reference._raises_index_error", lambda device: False)
    logits, target = make_logits(4, n_cols).requires_grad_(), torch.tensor([0, 5, -100, 3])
    wrong = [False, True, False, False] if n_cols else [True, True, False, True]
    with fusedloss.backend("reference"):
        rows = fusedloss.cross_entropy(logits, target, reduction="none")
        assert rows.isnan().tolist() == wrong
        assert fusedloss.cross_entropy(logits, target).isnan()
    rows.sum().backward()
    assert logits.grad is not None
    if n_cols:
        assert logits.grad.isnan().all(1).tolist() == wrong
        assert logits.grad.isnan().any(1).tolist() == wrong


def test_class_out_of_range_can_be_an_error_everywhere(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusedloss.serving._CHECK_TARGETS", True)
    monkeypatch.setattr(known, "KNOWN", {})  # calls that nobody checked
    with pytest.raises(IndexError, match=r"Target 7 is out of bounds\."):
        fusedloss.cross_entropy(make_logits(4, 5), torch.tensor([0, 7, -100, 3]))


def test_the_check_names_row_and_class() -> None:
    from fusedloss.checks import check_class_indices

    target = torch.tensor([[0, 1], [2, 9]])
    with pytest.raises(IndexError, match=r"Target 9 is out of bounds\..*position \[1, 1\]"):
        check_class_indices(target, 5, -100)
    check_class_indices(target, 5, 9)
    ignored = torch.tensor([[0, 1], [2, -100]])  # and so is the row whose other label is out of range, as the kernels ignore it
    for labels in ((target, ignored), (ignored, target)):
        check_class_indices(labels[0], 5, -100, labels[1])


def test_errors_of_arguments_name_no_other_function() -> None:
    logits, target, weight = make_logits(4, 5), torch.zeros(4, dtype=torch.long), make_logits(5, 5)
    for function, tensors in (
        (fusedloss.cross_entropy, (logits, target)),
        (fusedloss.distributed.vocab_parallel_cross_entropy, (logits, target)),
        (fusedloss.linear_cross_entropy, (logits, weight, target)),
        (fusedloss.cross_entropy_overwriting_logits, (logits.requires_grad_(), target)),
    ):
        with pytest.raises(TypeError, match=r"^argument 'ignore_index' must be int, not str$"):
            function(*tensors, ignore_index="a")
        with pytest.raises(TypeError, match=r"^argument 'target' must be Tensor, not int$"):
            function(*tensors[:-1], 3)
