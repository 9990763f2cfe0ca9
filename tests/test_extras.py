"""The extras on every path: z_loss, logit_scale, softcap, sample_weight, two labels, return_stats.

Their oracle is a composition of PyTorch's own operators in float64 (oracle.py), apart from fusedloss/reference.py, whose errors
it would share.
"""

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import check_against_torch
from oracle import torch_loss
from paths import AUTO, GPU, INTERPRETER, REFERENCE, Path, entered
from problems import make_logits, make_probabilities, make_target, make_weight
from torch import Tensor

import fusedloss
from fusedloss.backends import cpu

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# Each alone, then together.
EXTRAS: dict[str, dict[str, Any]] = {
    "z_loss": {"z_loss": 1e-2},
    "logit_scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 5.0},
    "wide softcap": {"softcap": 1000.0},
    "sample_weight": {"sample_weight": True},
    "all": {"z_loss": 1e-2, "logit_scale": -0.5, "softcap": 5.0, "sample_weight": True},
}
REDUCTIONS: list[dict[str, Any]] = [
    {"reduction": "mean"},
    {"reduction": "sum", "scale": 0.5},
    {"reduction": "none"},
    {"reduction": "max"},
    {"reduction": "topk", "top_k": 2},
]
# Tiles; one row a program; ragged rows in several blocks, or slices; pixels.
SHAPES = [(7, 10), (5, 1000), (3, 5001), (2, 5, 6, 7)]


def _check(logits: Tensor, target: Any, weight: Tensor | None = None, **options: Any) -> None:
    # Four roundings: PyTorch's composition may be exact by luck, where a tanh or a square is a few roundings off.
    __tracebackhide__ = True
    check_against_torch(logits, target, weight, dloss=1.5, roundings=4, **options)


def _with(extras: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    options = dict(extras)
    if options.pop("sample_weight", False):
        options["sample_weight"] = make_weight(shape[0] * 2)[::2]  # one per example, also for pixels
    if options.pop("weight", False):
        options["weight"] = make_weight(shape[1])
    return options


@pytest.fixture(params=[REFERENCE, AUTO, INTERPRETER, GPU])
def path(request: pytest.FixtureRequest) -> Iterator[Path]:
    with entered(request.param):
        yield request.param


# In a mean, and beside what else a row's own loss may have.
BESIDE: list[dict[str, Any]] = [{}, {"weight": True, "label_smoothing": 0.1, "reduction": "none"}]
beside = pytest.mark.parametrize("beside", BESIDE, ids=["mean", "none"])


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@beside
def test_class_indices(path: Path, beside: dict[str, Any], shape: tuple[int, ...], extras: dict[str, Any]) -> None:
    target = make_target(*shape[:1], *shape[2:], n_classes=shape[1], ignored=-100)
    _check(make_logits(*shape), target, **_with({**extras, **beside}, shape))


@pytest.mark.parametrize("extras", [{}, *EXTRAS.values()], ids=["plain", *EXTRAS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@beside
def test_class_probabilities(path: Path, beside: dict[str, Any], shape: tuple[int, ...], extras: dict[str, Any]) -> None:
    _check(make_logits(*shape), make_probabilities(*shape), **_with({**extras, **beside}, shape))


@pytest.mark.parametrize("extras", [{}, *EXTRAS.values()], ids=["plain", *EXTRAS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lam", ["number", "tensor", "shares"])
@beside
def test_two_labels(path: Path, beside: dict[str, Any], lam: str, shape: tuple[int, ...], extras: dict[str, Any]) -> None:
    a, b = (make_target(*shape[:1], *shape[2:], n_classes=shape[1], ignored=-100, seed=seed) for seed in (1, 2))
    b[1] = a[1]
    share = {"number": 0.3, "tensor": torch.tensor(0.75), "shares": torch.linspace(0, 1, shape[0])}[lam]
    _check(make_logits(*shape), (a, b, share), **_with({**extras, **beside}, shape))


@pytest.mark.parametrize("options", REDUCTIONS, ids=str)
@pytest.mark.parametrize("target", ["indices", "two labels", "probabilities"])
@pytest.mark.parametrize("shape", [(7, 10), (5, 1001)], ids=str)
def test_reductions(path: Path, shape: tuple[int, int], target: str, options: dict[str, Any]) -> None:
    a, b = (make_target(shape[0], n_classes=shape[1], ignored=-100, seed=seed) for seed in (1, 2))
    targets = {"indices": a, "two labels": (a, b, 0.6), "probabilities": make_probabilities(*shape)}
    _check(make_logits(*shape), targets[target], **_with(EXTRAS["all"], shape), **options)


@pytest.mark.parametrize("dtype", [FP64, BF16, FP16], ids=str)
@pytest.mark.parametrize("target", ["indices", "two labels", "probabilities"])
def test_dtypes(path: Path, target: str, dtype: torch.dtype) -> None:
    a, b = (make_target(5, n_classes=100, seed=seed) for seed in (1, 2))
    targets = {"indices": a, "two labels": (a, b, 0.6), "probabilities": make_probabilities(5, 100, dtype=dtype)}
    _check(make_logits(5, 100, dtype=dtype), targets[target], z_loss=1e-2, softcap=20.0, logit_scale=0.5)


@pytest.mark.parametrize("n_cols", [10, 1001])
def test_small_logits_keep_their_digits_under_a_cap(path: Path, n_cols: int) -> None:
    """tanh of a small number is that number: 1 - 2 / (1 + exp) would have no digits of it."""
    logits = 1e-4 * make_logits(4, n_cols, spread=1.0)
    _check(logits, make_target(4, n_classes=n_cols), softcap=50.0)


@pytest.mark.parametrize("n_cols", [10, 1001])
def test_a_row_of_weight_zero_has_no_gradient(path: Path, n_cols: int) -> None:
    logits = make_logits(4, n_cols).requires_grad_()
    sample_weight = torch.tensor([1.0, 0.0, 2.0, 0.0])
    loss = fusedloss.cross_entropy(logits, make_target(4, n_classes=n_cols), sample_weight=sample_weight, z_loss=0.1)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[[1, 3]] == 0).all()
    assert (gradient[[0, 2]] != 0).any()


@pytest.mark.parametrize("n_cols", [10, 1001])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_may_hold_nan(path: Path, reduction: str, n_cols: int) -> None:
    logits = make_logits(4, n_cols)
    logits[1:3] = torch.nan
    logits.requires_grad_()
    a, b = torch.tensor([1, -100, 2, 3]), torch.tensor([1, 2, -100, 4])
    sample_weight = torch.tensor([1.0, torch.nan, torch.inf, 1.0])
    loss, stats = fusedloss.cross_entropy(
        logits, (a, b, 0.5), reduction=reduction, sample_weight=sample_weight, z_loss=0.1, softcap=9.0, return_stats=True
    )
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().all()
    assert (gradient[1:3] == 0).all()
    assert (stats.lse[1:3] == 0).all()
    assert (stats.row_loss[1:3] == 0).all()
    assert stats.n_counted == 2


def _stats_of(logits: Tensor, target: Any, ignore_index: int, rows: Tensor) -> dict[str, Tensor]:
    """By definition, from the losses of all rows."""
    a, b, lam = target if isinstance(target, tuple) else (target, target, torch.tensor(1.0))
    counted = (a != ignore_index) & (b != ignore_index)
    top = logits.amax(1, keepdim=True)
    hits = [(logits.gather(1, t.where(counted, 0).unsqueeze(1)) == top).squeeze(1) for t in (a, b)]
    lam = torch.as_tensor(lam)
    correct = counted & ((hits[0] & (lam >= 0.5)) | (hits[1] & (lam <= 0.5)))
    order = rows.where(counted, -torch.inf).flatten()
    return {
        "lse": logits.logsumexp(1).where(counted, 0),
        "row_loss": rows,
        "n_counted": counted.sum(),
        "n_correct": correct.sum(),
        "worst": order.argmax() if counted.any() else torch.tensor(-1),
        "entropy": torch.special.entr(logits.double().softmax(1)).sum(1).where(counted, 0).to(logits.dtype),
    }


STATS_SHAPES = [
    pytest.param((513, 10), marks=pytest.mark.sweep),  # several programs, as (258, 24) of test_kernels.py
    (7, 10),
    (5, 1001),
    (2, 5, 6, 7),
    pytest.param((2, 5001), marks=pytest.mark.sweep),
    pytest.param((2, 3, 40, 40), marks=pytest.mark.sweep),
]


@pytest.mark.parametrize("options", REDUCTIONS, ids=str)
@pytest.mark.parametrize("two_labels", [False, True], ids=["indices", "two labels"])
@pytest.mark.parametrize("shape", STATS_SHAPES, ids=str)
@pytest.mark.parametrize("needs_grad", [False, True], ids=["no_grad", "grad"])
def test_stats(path: Path, needs_grad: bool, shape: tuple[int, ...], two_labels: bool, options: dict[str, Any]) -> None:
    logits = make_logits(*shape).requires_grad_(needs_grad)
    a, b = (make_target(*shape[:1], *shape[2:], n_classes=shape[1], ignored=-100, seed=seed) for seed in (1, 2))
    with torch.no_grad():  # some rows right, some with two largest logits
        logits.scatter_(1, a.clamp(min=0)[::2].unsqueeze(1), 40.0)
        logits[:1, :2] = 50.0
    target = (a, b, 0.5) if two_labels else a
    loss, stats = fusedloss.cross_entropy(logits, target, return_stats=True, **options)
    assert isinstance(stats, fusedloss.LossStats)
    plain = fusedloss.cross_entropy(logits, target, **options)
    torch.testing.assert_close(loss, plain)
    rows = fusedloss.cross_entropy(logits.detach(), target, reduction="none")
    for name, expected in _stats_of(logits.detach(), target, -100, rows).items():
        value = getattr(stats, name)
        assert value.requires_grad == (needs_grad and name == "entropy" and options["reduction"] == "none")
        torch.testing.assert_close(value, expected, rtol=2e-6, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    if needs_grad:
        upstream = torch.linspace(0.5, 1.5, loss.numel()).reshape(loss.shape)
        torch.testing.assert_close(*(torch.autograd.grad(value, logits, upstream)[0] for value in (loss, plain)))


@pytest.mark.parametrize("n_cols", [3, 600])
def test_the_worst_row(path: Path, n_cols: int) -> None:
    logits = torch.zeros(5, n_cols)
    logits[[1, 3], 0] = -20.0
    target = torch.tensor([1, 0, -100, 0, 1])
    assert fusedloss.cross_entropy(logits, target, return_stats=True)[1].worst == 1  # the first of equal ones
    logits[3, 1] = torch.nan
    assert fusedloss.cross_entropy(logits, target, return_stats=True)[1].worst == 3
    logits[2] = torch.nan  # ignored
    stats = fusedloss.cross_entropy(logits, torch.full((5,), -100), return_stats=True)[1]
    assert (stats.n_counted, stats.n_correct, stats.worst) == (0, 0, -1)
    stats = fusedloss.cross_entropy(logits[:0], target[:0], return_stats=True)[1]
    assert (stats.n_counted, stats.n_correct, stats.worst) == (0, 0, -1)
    assert stats.lse.shape == stats.row_loss.shape == (0,)


@pytest.mark.parametrize("n_cols", [1, 3, 600])
def test_stats_of_infinite_logits(path: Path, n_cols: int) -> None:
    """The loss is NaN, as PyTorch's, but not the log-sum-exp, and the target has the largest logit."""
    logits = torch.zeros(3, n_cols)
    logits[1, 0] = torch.inf
    logits[2] = -torch.inf
    loss, stats = fusedloss.cross_entropy(logits, torch.zeros(3, dtype=torch.long), return_stats=True)
    assert loss.isnan()
    assert stats.n_correct == 3
    torch.testing.assert_close(stats.lse, logits.logsumexp(1))


def test_stats_of_probabilities(path: Path) -> None:
    logits, target = make_logits(6, 10), make_probabilities(6, 10)
    with fusedloss.backend("auto"):  # no kernel has them
        loss, stats = fusedloss.cross_entropy(logits, target, return_stats=True)
        assert fusedloss.plan(logits, target, return_stats=True).backend == "reference"
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))
    torch.testing.assert_close(stats.row_loss, F.cross_entropy(logits, target, reduction="none"))
    assert stats.n_correct == (logits.argmax(1) == target.argmax(1)).sum()


def test_one_row_without_a_batch(path: Path) -> None:
    logits, target = make_logits(1, 10), torch.tensor([3])
    for flat in (target[0], target):
        options: dict[str, Any] = {"z_loss": 0.1, "sample_weight": torch.tensor([0.5]), "return_stats": True}
        loss, stats = fusedloss.cross_entropy(logits[0], flat, **options)
        expected, expected_stats = fusedloss.cross_entropy(logits, target, **options)
        assert torch.equal(loss, expected)
        assert torch.equal(stats.lse, expected_stats.lse[0])
        assert stats.row_loss.shape == stats.entropy.shape == ()
    loss = fusedloss.cross_entropy(logits[0], (flat, flat, 0.5))
    torch.testing.assert_close(loss, F.cross_entropy(logits[0], flat[0]))


def test_class_out_of_range_in_either_label(path: Path) -> None:
    logits, right, wrong = make_logits(3, 5), torch.tensor([0, 1, 2]), torch.tensor([0, 5, 2])
    for target in ((right, wrong, 0.5), (wrong, right, 0.5)):
        if path.device == "cpu" and path.backend != "triton":
            with pytest.raises(IndexError, match="Target 5 is out of bounds"):
                fusedloss.cross_entropy(logits, target)
        else:
            rows = fusedloss.cross_entropy(logits, target, reduction="none")
            assert rows.isnan().tolist() == [False, True, False]


def test_gradients_to_other_arguments() -> None:
    """No kernel has them: the reference does, and the plan says so."""
    logits, a, b = make_logits(4, 5, dtype=FP64), make_target(4, n_classes=5), make_target(4, n_classes=5, seed=2)
    sample_weight = torch.rand(4, dtype=FP64, requires_grad=True)
    lam = torch.rand(4, dtype=FP64, requires_grad=True)
    reason = fusedloss.plan(logits, a, sample_weight=sample_weight).reason
    assert "sample_weight" in reason or reason == cpu.MISSING
    logits.requires_grad_()

    def loss(logits: Tensor, sample_weight: Tensor, lam: Tensor) -> Tensor:
        return fusedloss.cross_entropy(logits, (a, b, lam), sample_weight=sample_weight, z_loss=0.1, softcap=3.0)

    assert torch.autograd.gradcheck(loss, (logits, sample_weight, lam))
    assert torch.autograd.gradgradcheck(loss, (logits, sample_weight, lam))


def test_double_backward_and_transforms(path: Path) -> None:
    logits, target = make_logits(4, 5, dtype=FP64).requires_grad_(), make_target(4, n_classes=5)
    sample_weight = torch.rand(4, dtype=FP64)

    def loss(logits: Tensor) -> Tensor:
        return fusedloss.cross_entropy(logits, target, sample_weight=sample_weight, z_loss=0.1, softcap=3.0, logit_scale=0.5)

    assert torch.autograd.gradcheck(loss, (logits,))
    assert torch.autograd.gradgradcheck(loss, (logits,))
    with fusedloss.backend("auto"):
        (expected,) = torch.autograd.grad(loss(logits), logits)
        torch.testing.assert_close(torch.func.grad(loss)(logits.detach()), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles(path: Path, reduction: str) -> None:
    def call(logits: Tensor, a: Tensor, b: Tensor, sample_weight: Tensor) -> Any:
        return fusedloss.cross_entropy(
            logits, (a, b, 0.25), sample_weight=sample_weight, z_loss=0.1, softcap=9.0, return_stats=True, reduction=reduction
        )

    torch.compiler.reset()
    logits = make_logits(4, 10).requires_grad_()
    arguments = (make_target(4, n_classes=10), make_target(4, n_classes=10, seed=2), make_weight(4))
    loss, stats = call(logits, *arguments)
    compiled_loss, compiled_stats = torch.compile(call, fullgraph=True, backend="aot_eager")(logits, *arguments)
    torch.testing.assert_close(compiled_loss, loss)
    for ours, expected in zip(compiled_stats, stats, strict=True):
        torch.testing.assert_close(ours, expected)
    gradients = [torch.autograd.grad(value.sum(), logits)[0] for value in (compiled_loss, loss)]
    torch.testing.assert_close(*gradients)
    torch.compiler.reset()


def test_the_module_has_them(path: Path) -> None:
    logits, target = make_logits(4, 10), make_target(4, n_classes=10)
    module = fusedloss.CrossEntropyLoss(z_loss=0.1, logit_scale=0.5, softcap=7.0, return_stats=True)
    sample_weight = make_weight(4)
    for criterion in (module, pickle.loads(pickle.dumps(module))):
        loss, stats = criterion(logits, (target, target, 0.5), sample_weight=sample_weight)
        expected = torch_loss(
            logits, (target, target, 0.5), z_loss=0.1, logit_scale=0.5, softcap=7.0, sample_weight=sample_weight
        )
        torch.testing.assert_close(loss, expected)
        assert stats.n_counted == 4
