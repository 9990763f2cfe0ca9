"""focal_gamma, (1 - p_t)^gamma times the loss of class indices, on every path; against a composition of PyTorch's operators."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import check_against_torch
from paths import Path
from problems import make_logits, make_target, make_weight
from torch import Tensor

import fusedloss

REDUCTIONS: list[dict[str, Any]] = [
    {"reduction": "mean"},
    {"reduction": "sum", "scale": 0.5},
    {"reduction": "none"},
    {"reduction": "max"},
    {"reduction": "topk", "top_k": 3},
]
SHAPES = [(7, 10), (5, 1001), (2, 5, 3, 3)]  # tiles; ragged rows, one a program; pixels


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("options", REDUCTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_reduction(path: Path, shape: tuple[int, ...], options: dict[str, Any], gamma: float) -> None:
    logits, target = make_logits(*shape), make_target(*shape[:1], *shape[2:], n_classes=shape[1], ignored=-100)
    options = {"focal_gamma": gamma, "sample_weight": make_weight(shape[0]), "dloss": 1.5, "roundings": 4, **options}
    check_against_torch(logits, target, make_weight(shape[1]), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_transformed_logits(path: Path, dtype: torch.dtype) -> None:
    logits, target = make_logits(5, 100, dtype=dtype), make_target(5, n_classes=100)
    check_against_torch(logits, target, focal_gamma=1.5, z_loss=1e-2, softcap=20.0, logit_scale=0.5, roundings=4)


def _focal(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """The definition, word for word, in float64."""
    p_t = logits.double().softmax(1).gather(1, target[:, None])[:, 0]
    return -((1 - p_t) ** gamma) * p_t.log()


@pytest.mark.parametrize("n_cols", [10, 1001])
def test_the_definition(path: Path, n_cols: int) -> None:
    logits, target = make_logits(6, n_cols, spread=2.0), make_target(6, n_classes=n_cols)
    loss = fusedloss.cross_entropy(logits, target, reduction="none", focal_gamma=2.0)
    torch.testing.assert_close(loss.double(), _focal(logits, target, 2.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("n_cols", [10, 1001])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_sure_and_hopeless_rows(path: Path, reduction: str, n_cols: int, gamma: float) -> None:
    """p_t of 1, where a power's slope is infinite; of 0, with a loss that is finite or not; as close to 1 as float32 can tell."""
    logits = torch.zeros(5, n_cols)
    logits[0, 1:] = -torch.inf
    logits[1, 0], logits[2, 0], logits[4, 0] = -torch.inf, -200.0, 30.0
    logits[3, 1:] = -120.0
    logits.requires_grad_()
    target = torch.zeros(5, dtype=torch.long)
    loss, stats = fusedloss.cross_entropy(logits, target, reduction=reduction, focal_gamma=gamma, return_stats=True)
    (gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, target, reduction="sum"), logits)
    rows = stats.row_loss.detach()
    assert rows[0] == rows[3] == 0
    assert rows[1] == torch.inf
    torch.testing.assert_close(rows[2], F.cross_entropy(logits[2:3], target[2:3]).detach())
    assert (gradient[[0, 3]] == 0).all()
    torch.testing.assert_close(gradient[[1, 2]], plain[[1, 2]])
    assert gradient[4].isfinite().all()
    assert gradient[4, 0] <= 0 <= rows[4] < 1e-4


def test_what_a_sure_row_keeps(path: Path) -> None:
    """1 - p_t is 1e-9 here, which 1 - softmax in float32 has no digit of."""
    if path.backend == "reference":
        pytest.skip("has the digits of PyTorch's log_softmax")
    logits = torch.zeros(1, 2)
    logits[0, 0] = 20.0
    logits.requires_grad_()
    exact = logits.detach().double().requires_grad_()
    nll = F.softplus(exact[:, 1] - exact[:, 0])
    expected = (-torch.expm1(-nll)) ** 0.5 * nll
    loss = fusedloss.cross_entropy(logits, torch.tensor([0]), focal_gamma=0.5, reduction="sum")
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(loss, logits)[0].double(), torch.autograd.grad(expected.sum(), exact)[0]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=0)


def test_ignored_rows_may_hold_nan(path: Path) -> None:
    logits = make_logits(4, 10)
    logits[1] = torch.nan
    logits.requires_grad_()
    target = torch.tensor([1, -100, 2, 3])
    loss = fusedloss.cross_entropy(logits, target, focal_gamma=2.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    kept = logits.detach()[[0, 2, 3]].requires_grad_()
    expected = _focal(kept, target[[0, 2, 3]], 2.0).mean()
    torch.testing.assert_close(loss.double(), expected)
    assert (gradient[1] == 0).all()
    torch.testing.assert_close(gradient[[0, 2, 3]], torch.autograd.grad(expected, kept)[0])


def test_derivatives(path: Path) -> None:
    """Of both orders; a large problem's logits are not forgotten, from whose gradient nobody would find them again."""
    logits, target = make_logits(4, 5, dtype=torch.float64, spread=1.0).requires_grad_(), make_target(4, n_classes=5)

    def loss(logits: Tensor) -> Tensor:
        return fusedloss.cross_entropy(logits, target, focal_gamma=1.5, z_loss=0.1)

    assert torch.autograd.gradcheck(loss, (logits,))
    assert torch.autograd.gradgradcheck(loss, (logits,))


def test_second_order_of_large_logits() -> None:
    logits, target = make_logits(300, 1000, spread=1.0).requires_grad_(), make_target(300, n_classes=1000)
    second = []
    for backend in ("auto", "reference"):
        with fusedloss.backend(backend):
            loss = fusedloss.cross_entropy(logits, target, focal_gamma=2.0)
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        second.append(torch.autograd.grad(gradient.square().sum(), logits)[0])
    torch.testing.assert_close(*second, rtol=1e-4, atol=1e-9)


def test_none_at_all_and_the_module(path: Path) -> None:
    logits, target = make_logits(6, 10), make_target(6, n_classes=10)
    assert fusedloss.cross_entropy(logits, target, focal_gamma=0).equal(fusedloss.cross_entropy(logits, target))
    module = fusedloss.CrossEntropyLoss(focal_gamma=2.0)
    assert repr(module) == "CrossEntropyLoss(focal_gamma=2.0)"
    for _ in range(3):  # the third call is known from the second
        assert module(logits, target).equal(fusedloss.cross_entropy(logits, target, focal_gamma=2.0))
    assert not module(logits, target).equal(fusedloss.cross_entropy(logits, target, focal_gamma=1.0))


def test_compiles() -> None:
    def call(logits: Tensor, target: Tensor) -> Tensor:
        return fusedloss.cross_entropy(logits, target, focal_gamma=2.0)

    logits, target = make_logits(4, 10).requires_grad_(), make_target(4, n_classes=10)
    torch.compiler.reset()
    losses = torch.compile(call, fullgraph=True, backend="aot_eager")(logits, target), call(logits, target)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in losses))
    torch.compiler.reset()


INDICES = torch.zeros(4, dtype=torch.long)
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "negative": ({"focal_gamma": -1.0}, ValueError, "focal_gamma must not be negative, but got -1.0"),
    "infinite": ({"focal_gamma": float("inf")}, ValueError, "focal_gamma must be finite, but got inf"),
    "nan": ({"focal_gamma": float("nan")}, ValueError, "focal_gamma must be finite, but got nan"),
    "a tensor": ({"focal_gamma": torch.tensor(2.0)}, TypeError, "'focal_gamma' must be float, not Tensor"),
    "probabilities": ({"target": torch.rand(4, 5)}, ValueError, "focal_gamma=2.0 with class probabilities"),
    "two labels": ({"target": (INDICES, INDICES, 0.5)}, ValueError, "focal_gamma=2.0 with two labels"),
    "smoothing": ({"label_smoothing": 0.1}, ValueError, "focal_gamma=2.0 with label_smoothing=0.1"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_value(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"target": INDICES, "focal_gamma": 2.0, **arguments}
    with pytest.raises(error, match=message):
        fusedloss.cross_entropy(torch.zeros(4, 5), arguments.pop("target"), **arguments)
