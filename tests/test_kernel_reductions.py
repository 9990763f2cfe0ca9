"""The batch reduction of the Triton kernels: many programs, and the selections of "max" and "topk"."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton.language as tl
from compare import check_against_torch
from compiled import FACTS
from fusedloss.kernels import finish, radix, reduction, selection
from oracle import torch_loss
from paths import Path
from problems import make_logits, make_probabilities, make_target, make_weight

import fusedloss
from fusedloss import known, plan_triton
from fusedloss.backends import triton as backend
from fusedloss.backends.triton import given, launching
from fusedloss.plan_triton import ROWS_SELECTED_ALONE

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture
def few_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The number of groups made small: 21 programs in two of 11 and 10, three blocks of partials each."""
    for name, value in {"PARTIALS_BLOCK": 4, "TALLIES_BLOCK": 4, "MAX_UNGROUPED": 20, "N_GROUPS": 2}.items():
        for module in (radix, reduction, finish, selection):
            monkeypatch.setattr(module, name, tl.constexpr(value), raising=False)
        monkeypatch.setattr(plan_triton, name, value, raising=False)
    given._forward_launches.cache_clear()
    yield
    given._forward_launches.cache_clear()


def finishes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a launch of its own add up the sums of two programs or more, as on an MI300X."""
    monkeypatch.setattr(backend, "device_facts", lambda _: FACTS["gfx942"])
    monkeypatch.setattr(plan_triton, "TICKETS_ANYWHERE", 1)
    monkeypatch.setattr(plan_triton, "COUNTED_ROWS", 0)
    monkeypatch.setattr(known, "KNOWN", {})  # of another GPU


@pytest.fixture(params=[False, True], ids=["tickets", "a launch"])
def finishing(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.param:
        finishes_apart(monkeypatch)


@pytest.mark.interpreter
@pytest.mark.usefixtures("few_groups", "finishing")
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum"}, {"reduction": "max"}, {"reduction": "topk", "top_k": 0.5}, {"reduction": "none"}],
    ids=str,
)
@pytest.mark.parametrize("n_rows", [1, 5, 21])
def test_programs_in_groups(n_rows: int, options: dict[str, Any]) -> None:
    problem = make_logits(n_rows, 300), make_target(n_rows, n_classes=300, ignored=-100), make_weight(300)
    with fusedloss.backend("triton"):
        check_against_torch(*problem, **options)
        torch.testing.assert_close(fusedloss.cross_entropy(*problem, **options), torch_loss(*problem, **options))


@pytest.mark.interpreter
@pytest.mark.usefixtures("few_groups", "finishing")
@pytest.mark.parametrize("case", ["all differ", "twice in a group", "in both groups", "nan", "no row counts"])
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_statistics_of_programs_in_groups(reduction: str, dtype: torch.dtype, case: str) -> None:
    logits, target = make_logits(21, 300, dtype=dtype), make_target(21, n_classes=300, ignored=-100)
    target[[7, 11, 14]] = 5  # the first two in one group, but in different blocks
    for row in {"twice in a group": [7, 11, 14], "in both groups": [11, 14], "nan": [7, 14]}.get(case, []):
        logits[row] = torch.arange(300) if case != "nan" else torch.nan
    if case == "no row counts":
        target[:] = -100
    for needs_grad in (False, True):
        logits.requires_grad_(needs_grad)
        with fusedloss.backend("triton"):
            loss, stats = fusedloss.cross_entropy(logits, target, reduction=reduction, return_stats=True)
        with fusedloss.backend("reference"):
            expected_loss, expected = fusedloss.cross_entropy(logits, target, reduction=reduction, return_stats=True)
        torch.testing.assert_close(loss, expected_loss, equal_nan=True)
        assert stats[2:5] == expected[2:5]


# What a row's loss has as its factor comes from another place in each; slices; a tile; a scale that is a tensor.
FINISHED: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "mean of weights": ((9, 300), {"weight": True, "ignored": -100}),
    "mean, no row counts": ((9, 300), {"ignored": "all"}),
    "mean of slices": ((3, 33001), {}),
    "mean of pixels": ((2, 5, 20, 16), {"ignored": -100, "scale": torch.tensor(0.5)}),
    "mean of probabilities": ((9, 300), {"probabilities": True, "scale": 0.25}),
    "sum": ((1100, 10), {"reduction": "sum", "scale": torch.tensor(0.5), "weight": True}),
    "max of slices": ((3, 33001), {"reduction": "max", "no_grad": True}),
    "topk": ((1100, 10), {"reduction": "topk", "top_k": 0.3, "ignored": -100}),
    "no rows": ((0, 10), {"reduction": "sum"}),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [FP32, FP64, BF16], ids=str)
@pytest.mark.parametrize("case", FINISHED)
def test_a_launch_that_adds_up(monkeypatch: pytest.MonkeyPatch, case: str, dtype: torch.dtype) -> None:
    """As on an MI300X; that its kernels compile to no write-back of an L2 is tested in test_compiled.py."""
    finishes_apart(monkeypatch)
    given._forward_launches.cache_clear()
    shape, options = FINISHED[case]
    options = dict(options)
    is_soft, ignored = options.pop("probabilities", False), options.pop("ignored", None)
    target = make_probabilities(*shape, dtype=dtype) if is_soft else make_target(*shape[:1], *shape[2:], n_classes=shape[1])
    if ignored is not None:
        target[slice(None) if ignored == "all" else slice(None, None, 3)] = -100
    weight = make_weight(shape[1], dtype) if options.pop("weight", False) else None
    logits = make_logits(*shape, dtype=dtype).requires_grad_(not options.pop("no_grad", False))
    launched: list[str] = []
    launch = launching.launch

    def record(of: launching.Launch, *arguments: Any) -> None:
        launched.append(of.cut.kernel)
        launch(of, *arguments)

    monkeypatch.setattr(launching, "launch", record)
    results = []
    for path in ("triton", "reference"):
        with fusedloss.backend(path):
            result = fusedloss.cross_entropy(logits, target, weight, **options)
            results.append((result, *(torch.autograd.grad(result, logits) if logits.requires_grad else ())))
    assert launched.count("finish_kernel") == (case != "no rows")
    for found, expected in zip(*results, strict=True):
        tolerance = {"rtol": 2e-2, "atol": 1e-2} if dtype == BF16 else {}
        torch.testing.assert_close(found, expected, equal_nan=True, **tolerance)
    given._forward_launches.cache_clear()


MANY = ROWS_SELECTED_ALONE + 100


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((MANY, 2), FP32, {"reduction": "max"}),
        pytest.param((MANY, 2), FP32, {"top_k": 1000}, marks=pytest.mark.sweep),
        pytest.param((MANY, 2), BF16, {"top_k": 10**6}, marks=pytest.mark.sweep),
        ((MANY, 2), FP64, {"top_k": 0.3}),
        ((1, 3, 127, 131), BF16, {"top_k": 0.3}),
    ],
    ids=str,
)
def test_selection_among_many_rows(kernels: Path, shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]) -> None:
    target = make_target(*shape[:1], *shape[2:], n_classes=shape[1], ignored=-100)
    check_against_torch(make_logits(*shape, dtype=dtype), target, **{"reduction": "topk", **options})


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5000},
        pytest.param({"top_k": 20}, marks=pytest.mark.sweep),
        pytest.param({"reduction": "max"}, marks=pytest.mark.sweep),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ["ties", "infinite", "nan", "one row counts", "no row counts"])
def test_selection_among_many_rows_is_that_among_few(kernels: Path, case: str, options: dict[str, Any]) -> None:
    """What the reference, which has one way for both, makes of losses that tie, or are no numbers."""
    logits, target = make_logits(MANY, 2).round(), make_target(MANY, n_classes=2, ignored=-100)
    if case == "infinite":
        logits[::10] = torch.tensor([0.0, -torch.inf])
    elif case == "nan":
        logits[5] = torch.nan
        target[5] = 0
    elif case == "one row counts":
        target[:] = -100
        target[77] = 1
    elif case == "no row counts":
        target[:] = -100
    options = {"reduction": "topk", **options}
    logits.requires_grad_()
    ours = fusedloss.cross_entropy(logits, target, **options)
    (gradient,) = torch.autograd.grad(ours, logits)
    with fusedloss.backend("reference"):
        expected = fusedloss.cross_entropy(logits, target, **options)
        (expected_gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(ours, expected, equal_nan=True)
    torch.testing.assert_close(gradient, expected_gradient, equal_nan=True)


@pytest.mark.parametrize("n_cols", [10, pytest.param(1001, marks=pytest.mark.sweep)])
def test_top_k_among_many_rows(kernels: Path, n_cols: int) -> None:
    """More rows than the last program reads at a time; ties across the block boundary share the gradient."""
    n_rows = 1100
    logits = make_logits(n_rows, n_cols) if n_cols == 10 else make_logits(10, n_cols).repeat(n_rows // 10, 1)
    target = make_target(n_rows, n_classes=n_cols) if n_cols == 10 else torch.arange(n_rows, device=logits.device) % 10
    logits.requires_grad_()
    rows = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
    loss = fusedloss.cross_entropy(logits, target, reduction="topk", top_k=150)
    torch.testing.assert_close(loss.double(), rows.topk(150).values.mean(), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss, logits)
    threshold = rows.topk(150).values[-1]
    tied, above = (rows - threshold).abs() < 1e-5, rows > threshold + 1e-5
    coefficient = above.double() + tied * (150 - above.sum()) / tied.sum()
    (expected,) = torch.autograd.grad((rows * coefficient.detach() / 150).sum(), logits)
    torch.testing.assert_close(gradient, expected.float(), rtol=1e-4, atol=1e-9)
