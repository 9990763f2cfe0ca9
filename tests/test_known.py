"""Calls like one served before take a shorter way (fusedloss/known.py): who takes it, and that nobody can tell."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import check_against_torch
from known_calls import C, N, equal, kernel_path, none_known, outcome, problem, served, without_known
from paths import Path
from problems import make_logits, make_probabilities, make_target, make_weight
from torch import Tensor

import fusedloss
from fusedloss import known

path = kernel_path


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return none_known(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum", "scale": 0.5},
        {"reduction": "none"},
        {"reduction": "max"},
        {"label_smoothing": 0.1, "ignore_index": -100},
        {"z_loss": 1e-3, "logit_scale": 0.5, "softcap": 20.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_third_call_is_known_and_returns_the_same_bits(
    path: Path, calls: list[Any], options: dict[str, Any], dtype: torch.dtype, weighted: bool
) -> None:
    logits, target = problem(dtype)
    weight = make_weight(C, dtype=dtype) if weighted else None
    first = served(logits, target, weight, dloss=0.5, **options)
    served(logits, target, weight, dloss=0.5, **options)
    assert len(calls) == 2
    assert equal(served(logits, target, weight, dloss=0.5, **options), first)
    assert len(calls) == 2


@pytest.mark.parametrize("reduction", ["mean", "none", "max"])
@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 5, 3, 4), (1, 5, 1, 2, 3), (3, 1), (1, 5)], ids=str)
def test_known_pixels(path: Path, calls: list[Any], shape: tuple[int, ...], reduction: str) -> None:
    logits = make_logits(*shape).requires_grad_()
    target = make_target(shape[0], *shape[2:], n_classes=shape[1], ignored=-100)
    first = served(logits, target, reduction=reduction, dloss=0.5)
    served(logits, target, reduction=reduction, dloss=0.5)
    assert equal(served(logits, target, reduction=reduction, dloss=0.5), first)
    assert len(calls) == 2
    if path.backend == "cpu":
        target.view(-1)[-1] = shape[1]
        with pytest.raises(IndexError, match=f"Target {shape[1]} is out of bounds"):
            fusedloss.cross_entropy(logits, target, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "max", "none"])
@pytest.mark.parametrize("shape", [(N, C), (2, 5, 3, 4), (1, C)], ids=str)
def test_known_statistics(path: Path, calls: list[Any], shape: tuple[int, ...], reduction: str) -> None:
    """But of the rows' losses, where the entropies have a gradient."""
    logits = make_logits(*shape).requires_grad_()
    target = make_target(shape[0], *shape[2:], n_classes=shape[1], ignored=-100)

    def statistics(logits: Tensor = logits) -> tuple[Tensor, ...]:
        loss, stats = fusedloss.cross_entropy(logits, target, reduction=reduction, return_stats=True)
        gradients = torch.autograd.grad(loss, logits, torch.full_like(loss, 0.5)) if loss.requires_grad else ()
        assert not any(value.requires_grad for value in stats[:-1])
        assert stats.entropy.requires_grad == (loss.requires_grad and reduction == "none")
        return loss.detach(), *stats, *gradients

    for arguments in ((), (logits.detach(),)):
        first, _ = statistics(*arguments), statistics(*arguments)
        calls.clear()
        third = statistics(*arguments)
        assert [value.shape for value in third] == [value.shape for value in first]
        assert all(map(torch.equal, third, first))
        assert len(calls) == (reduction == "none")


@pytest.mark.parametrize("transposed", [False, True])
def test_known_statistics_of_one_row_and_of_pixels_in_columns(calls: list[Any], transposed: bool) -> None:
    logits, target = (
        (make_logits(2, C, 3, 4).mT, make_target(2, 4, 3, n_classes=C)) if transposed else (make_logits(C), torch.tensor(3))
    )
    first, _ = (fusedloss.cross_entropy(logits, target, return_stats=True)[1] for _ in range(2))
    calls.clear()
    for ours, expected in zip(fusedloss.cross_entropy(logits, target, return_stats=True)[1], first, strict=True):
        assert ours.shape == expected.shape
        assert torch.equal(ours, expected)
    assert not calls


def test_pixels_in_another_order(path: Path, calls: list[Any]) -> None:
    """What a kernel cannot read where it lies is converted, for the C++ kernel in a known call as well."""
    logits, target = make_logits(2, 5, 3, 4), make_target(2, 3, 4, n_classes=5)
    first = fusedloss.cross_entropy(logits, target, reduction="none")
    columns = target.transpose(1, 2).contiguous().transpose(1, 2)
    channels_last = logits.to(memory_format=torch.channels_last)
    for _ in range(3):
        assert torch.equal(fusedloss.cross_entropy(logits, columns, reduction="none"), first)
        torch.testing.assert_close(fusedloss.cross_entropy(channels_last, target, reduction="none"), first)
    assert len(calls) == (4 if path.backend == "cpu" else 7)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "one row": lambda: make_logits(1, C)[0],
    "transposed": lambda: make_logits(C, N).t(),
    "every other class": lambda: make_logits(N, 2 * C)[:, ::2],
    "some classes": lambda: make_logits(N, 2 * C)[:, :C],
    "every other row": lambda: make_logits(2 * N, C)[::2],
    "one row expanded": lambda: make_logits(1, C).expand(N, C),
    "one row, far from any other": lambda: make_logits(3, 2 * C)[:1, :C],
    "channels last": lambda: make_logits(2, C, 3, 4).to(memory_format=torch.channels_last),
    "shifted": lambda: make_logits(2, N + 1, C)[:, :-1].transpose(1, 2),
    "pixels in columns": lambda: make_logits(2, C, 3, 4).transpose(2, 3),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("soft", [False, True], ids=["class indices", "probabilities"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_known_layouts(calls: list[Any], layout: str, soft: bool, reduction: str) -> None:
    logits = LAYOUTS[layout]()
    if logits.dim() == 1:
        target = make_probabilities(1, C)[0] if soft else torch.tensor(3)
    else:
        target = make_probabilities(*logits.shape) if soft else make_target(N, *logits.shape[2:], n_classes=C)[: logits.shape[0]]
    logits.requires_grad_()
    first = served(logits, target, reduction=reduction, dloss=0.5)
    served(logits, target, reduction=reduction, dloss=0.5)
    calls.clear()
    assert equal(served(logits, target, reduction=reduction, dloss=0.5), first)
    assert bool(calls) == (layout == "one row, far from any other")  # whose strides tell nothing
    check_against_torch(logits.detach(), target, reduction=reduction, dloss=0.5)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"reduction": "max"}], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["class indices", "probabilities"])
@pytest.mark.parametrize("example", [(C,), (C, 3, 4)], ids=str)
def test_known_of_any_batch(calls: list[Any], example: tuple[int, ...], soft: bool, options: dict[str, Any]) -> None:
    def problem(n: int) -> tuple[Tensor, Tensor]:
        logits = make_logits(n, *example).requires_grad_()
        return logits, make_probabilities(n, *example) if soft else make_target(n, *example[1:], n_classes=C)

    for n in (1, 4):
        served(*problem(n), **options)
    for n in (3, 1, 130, 5, 0):
        logits, target = problem(n)
        calls.clear()
        found = outcome(lambda logits=logits, target=target: served(logits, target, **options))
        assert not calls
        expected = without_known(lambda logits=logits, target=target: served(logits, target, **options))
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    for other in (problem(2)[1], problem(9)[1]):
        calls.clear()
        found = outcome(lambda other=other: served(problem(5)[0], other, **options))
        assert found == without_known(lambda other=other: served(problem(5)[0], other, **options))
        assert isinstance(found[0], type)


def test_a_single_row_with_another_stride_tells_nothing_of_batches(calls: list[Any]) -> None:
    """What is_contiguous() overlooks: the stride of a dimension of size 1."""
    wide, labels = make_logits(1, 3 * C), torch.zeros((1, 7), dtype=torch.int64)
    for _ in range(3):
        served(torch.as_strided(wide, (1, C), (2 * C, 1)).requires_grad_(), torch.as_strided(labels, (1,), (7,)))
    for n in (1, 2, 5):
        logits = torch.as_strided(make_logits(n, 2 * C), (n, C), (2 * C, 1)).requires_grad_()
        target = make_target(7 * n, n_classes=C)[::7]
        assert equal(served(logits, target), without_known(lambda logits=logits, target=target: served(logits, target)))


def test_nothing_is_known_of_no_rows(calls: list[Any]) -> None:
    for shape in ((0, 5), (2, 5, 0)):
        logits = torch.empty(shape, requires_grad=True)
        for _ in range(3):
            loss, gradient = served(logits, torch.empty((shape[0], *shape[2:]), dtype=torch.int64))
            assert loss.isnan()
            assert gradient.shape == shape


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none", "label_smoothing": 0.1}, {"reduction": "sum", "scale": 0.5}], ids=str
)
def test_what_pytorchs_own_loss_serves_is_known(calls: list[Any], options: dict[str, Any]) -> None:
    """Class probabilities that need a gradient, which no kernel makes."""
    logits, target = make_logits(N, C).requires_grad_(), make_probabilities(N, C).requires_grad_()

    def gradients() -> tuple[Tensor, ...]:
        loss = fusedloss.cross_entropy(logits, target, **options)
        return loss.detach(), *torch.autograd.grad(loss.sum(), (logits, target))

    first, _, third = gradients(), gradients(), gradients()
    assert len(calls) == 2
    assert all(map(torch.equal, third, first))
    theirs = F.cross_entropy(logits, target, **{name: value for name, value in options.items() if name != "scale"})
    assert torch.equal(first[0], theirs.detach() * options.get("scale", 1.0))
    expected = torch.autograd.grad(theirs.sum() * options.get("scale", 1.0), (logits, target))
    torch.testing.assert_close(first[1:], expected)


def test_known_without_a_gradient(path: Path, calls: list[Any]) -> None:
    logits, target = problem()
    losses = []
    for _ in range(3):
        with torch.no_grad():
            losses.append(fusedloss.cross_entropy(logits, target))
        losses.append(fusedloss.cross_entropy(logits.detach(), target))
    assert len(calls) == 4
    assert not any(loss.requires_grad for loss in losses)
    assert len({loss.item() for loss in losses}) == 1


def test_no_tensor_is_kept(path: Path, calls: list[Any]) -> None:
    logits, target = problem()
    for _ in range(3):
        served(logits, target, scale=0.5, label_smoothing=torch.tensor(0.1))
        served(logits, target)
    kept = weakref.ref(logits), weakref.ref(target)
    del logits, target
    calls.clear()
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


def test_what_is_remembered_is_bounded(calls: list[Any]) -> None:
    target = make_target(N, n_classes=C)
    for n_cols in range(C, C + 20):
        logits = make_logits(N, n_cols)
        for _ in range(2):
            fusedloss.cross_entropy(logits, target)
    assert {len(of_one_key) for of_one_key in known.KNOWN.values()} == {known.MAX_CALLS}
    logits = make_logits(N, C)
    for ignored in range(2 * known.MAX_KEYS):
        for _ in range(2):
            fusedloss.cross_entropy(logits, target, ignore_index=-1 - ignored)
    assert len(known.KNOWN) <= known.MAX_KEYS
    for _ in range(3):
        fusedloss.cross_entropy(logits, target)
    for ignored in range(known.MAX_SEEN):
        fusedloss.cross_entropy(logits, target, ignore_index=-1000 - ignored)
    assert len(known._seen) <= known.MAX_SEEN


def test_a_shape_that_comes_often_takes_the_place_of_another(calls: list[Any]) -> None:
    target = make_target(N, n_classes=C)
    for n_cols in range(C, C + known.MAX_CALLS):
        for _ in range(2):
            fusedloss.cross_entropy(make_logits(N, n_cols), target)
    for labels in (target, target.to(torch.uint8), make_probabilities(N, 50)):  # each is counted on its own
        calls.clear()
        for _ in range(20):
            fusedloss.cross_entropy(make_logits(N, 50), labels)
        assert len(calls) == 16


def test_many_shapes_that_vary_do_not_replace_each_other(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    remembered: list[Any] = []
    remember = known.remember
    monkeypatch.setattr(known, "remember", lambda *arguments: remembered.append(arguments) or remember(*arguments))
    for n in range(1, 13):
        for n_cols in range(C, C + 2 * known.MAX_CALLS):
            fusedloss.cross_entropy(make_logits(n, n_cols), make_target(n, n_classes=C))
    assert len(remembered) == known.MAX_CALLS


def test_the_number_of_threads_is_no_part_of_it(calls: list[Any]) -> None:
    logits, target = make_logits(64, 1000).requires_grad_(), make_target(64, n_classes=1000)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            found.append(served(logits, target))
    finally:
        torch.set_num_threads(before)
    assert len(calls) == 2
    assert all(equal(each, found[0]) for each in found)


@pytest.mark.parametrize("guards", [None, lambda *tensors: None, lambda *tensors, dynamic_dims_sizes, dynamic_dims_strides: None])
def test_a_torch_without_these_guards_takes_the_long_way(
    guards: Callable[..., Any] | None, monkeypatch: pytest.MonkeyPatch, calls: list[Any]
) -> None:
    """They are private: another PyTorch may have none, or with other parameters or methods."""
    monkeypatch.setattr(known, "_TensorGuards", guards)
    logits, target = problem()
    results = [served(logits, target) for _ in range(3)]
    assert len(calls) == 3
    assert all(equal(result, results[0]) for result in results)
