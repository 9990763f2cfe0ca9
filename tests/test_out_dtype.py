"""out_dtype: the loss as it was accumulated, on every path; not a bit of the gradient, nor of the default, is another."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from paths import Path
from problems import make_logits, make_probabilities, make_target, make_weight
from torch import Tensor, nn

import fusedloss
from fusedloss.distributed import vocab_parallel_cross_entropy

HALVES = [torch.bfloat16, torch.float16]
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum", "scale": 0.125},
    "none": {"reduction": "none"},
    "max": {"reduction": "max"},
    "topk": {"reduction": "topk", "top_k": 3},
    "smoothing, weight": {"label_smoothing": 0.1, "weight": "classes"},
    "probabilities": {"target": "probabilities"},
    "two labels, statistics": {"target": "two labels", "return_stats": True},
}


def _problem(dtype: torch.dtype, options: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    rest, target = dict(options), make_target(9, n_classes=11, ignored=-100)
    kind = rest.pop("target", "indices")
    if kind == "probabilities":
        target = make_probabilities(9, 11, dtype=dtype)
    elif kind == "two labels":
        target = (target, target.roll(1), 0.25)
    if "weight" in rest:
        rest["weight"] = make_weight(11, dtype)
    return make_logits(9, 11, dtype=dtype).requires_grad_(), target, rest


def _assert_rounded(loss: Tensor, rounded: Tensor, path: Path) -> None:
    limit = 2**-7 if path.backend == "triton" and rounded.dtype == torch.bfloat16 else 0  # the interpreter cuts the last bits off
    torch.testing.assert_close(loss.to(rounded.dtype), rounded, rtol=limit, atol=0)


def _loss(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_float32_is_the_loss_before_it_is_rounded(path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    logits, target, rest = _problem(dtype, options)
    wide = {**rest, "weight": rest["weight"].float()} if "weight" in rest else rest
    exact = _loss(fusedloss.cross_entropy(logits.float(), target, **wide))
    for _ in range(3):  # the last calls are known from the first
        rounded, loss = (
            _loss(fusedloss.cross_entropy(logits, target, **rest, out_dtype=out_dtype)) for out_dtype in (None, torch.float32)
        )
        assert (rounded.dtype, loss.dtype) == (dtype, torch.float32)
        torch.testing.assert_close(loss, exact, rtol=2e-6, atol=1e-6)
        _assert_rounded(loss, rounded, path)
        assert not torch.equal(loss, rounded.float())
        found, expected = (torch.autograd.grad(3 * value.sum(), logits)[0] for value in (loss, rounded))
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [(torch.float64, torch.float32), (torch.float32, torch.float64), (torch.float32, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("target", ["indices", "probabilities"])
def test_any_other_floating_point_dtype(path: Path, dtype: torch.dtype, out_dtype: torch.dtype, target: str) -> None:
    """What the loss is rounded to says nothing of what it is computed in."""
    for reduction in ("mean", "none"):
        logits, labels, _ = _problem(dtype, {"target": target})
        plain = fusedloss.cross_entropy(logits, labels, reduction=reduction)
        loss = fusedloss.cross_entropy(logits, labels, reduction=reduction, out_dtype=out_dtype)
        assert loss.dtype == out_dtype
        if out_dtype == torch.float64:
            torch.testing.assert_close(loss, plain.double(), rtol=1e-6, atol=0)
        else:
            _assert_rounded(plain, loss, path)
        found, expected = (torch.autograd.grad(value.sum(), logits)[0] for value in (loss, plain))
        assert torch.equal(found, expected)


def test_second_derivatives_are_those_of_the_logits_dtype() -> None:
    """Of small logits, which are kept, and of large ones, which are recovered from their gradient."""
    for shape in ((9, 11), (40, 5000)):
        logits, target = make_logits(*shape, dtype=torch.float64, spread=1.0), make_target(shape[0], n_classes=shape[1])
        logits.requires_grad_()
        derivatives = []
        for out_dtype in (None, torch.float32):
            loss = fusedloss.cross_entropy(logits, target, out_dtype=out_dtype)
            (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
            derivatives.append(torch.autograd.grad(gradient.square().sum(), logits)[0])
        torch.testing.assert_close(derivatives[1], derivatives[0], rtol=1e-9, atol=1e-15)


def _linear(logits: Tensor, target: Any, **options: Any) -> Any:
    """Of a layer whose outputs are the logits."""
    return fusedloss.linear_cross_entropy(logits, torch.eye(11, dtype=logits.dtype), target, chunk_rows=4, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_fused_with_the_last_layer(path: Path, options: dict[str, Any]) -> None:
    logits, target, rest = _problem(torch.bfloat16, options)
    losses = [_loss(_linear(logits, target, **rest, out_dtype=out_dtype)) for out_dtype in (None, torch.float32)]
    assert losses[1].dtype == torch.float32
    _assert_rounded(losses[1], losses[0], path)
    assert not torch.equal(losses[1], losses[0].float())
    rounded, loss = (torch.autograd.grad(value.sum(), logits)[0] for value in losses)
    assert torch.equal(loss, rounded)


def _overwriting(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    return fusedloss.cross_entropy_overwriting_logits(logits * 1, target, **options)


def _module(logits: Tensor, target: Tensor, **options: Any) -> Any:
    return fusedloss.CrossEntropyLoss(**options)(logits, target)


def _linear_module(logits: Tensor, target: Tensor, **options: Any) -> Any:
    module = fusedloss.LinearCrossEntropyLoss(11, 11, dtype=logits.dtype, **options)
    with torch.no_grad():
        module.linear.weight.copy_(torch.eye(11))
    return module(logits, target)


FUNCTIONS = [fusedloss.cross_entropy, vocab_parallel_cross_entropy, _overwriting, _linear, _module, _linear_module]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function_has_it(function: Callable[..., Any]) -> None:
    logits, target, _ = _problem(torch.bfloat16, {})
    expected = fusedloss.cross_entropy(logits.float(), target)
    loss = function(logits, target, out_dtype=torch.float32)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    assert function(logits, target).dtype == torch.bfloat16
    for wrong, error, message in (
        (torch.int64, ValueError, r"out_dtype must be one of torch.float32, .* but got torch.int64"),
        (torch.complex64, ValueError, "but got torch.complex64"),
        ("float32", TypeError, "'out_dtype' must be torch.dtype, not str: 'float32'"),
        (float, TypeError, "'out_dtype' must be torch.dtype, not type: <class 'float'>"),
        ([32], TypeError, r"'out_dtype' must be torch.dtype, not list: \[32\]"),
    ):
        with pytest.raises(error, match=message):
            function(logits, target, out_dtype=wrong)


def test_modules_show_it_and_keep_it() -> None:
    logits, target, _ = _problem(torch.bfloat16, {})
    module = fusedloss.CrossEntropyLoss(out_dtype=torch.float32)
    assert repr(module) == "CrossEntropyLoss(out_dtype=torch.float32)"
    for found in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert found(logits, target).dtype == torch.float32
    with pytest.raises(NotImplementedError, match="has no out_dtype"):
        module.__prepare_scriptable__()  # which torch.jit.script asks
    assert "options=None, out_dtype=torch.float32\n" in repr(fusedloss.LinearCrossEntropyLoss(11, 11, out_dtype=torch.float32))


def test_under_patch_torch_the_caller_chooses() -> None:
    logits, target, _ = _problem(torch.bfloat16, {})
    with fusedloss.patch_torch(out_dtype=torch.float32) as outer:
        assert nn.CrossEntropyLoss()(logits, target).dtype == torch.float32
        inner = fusedloss.patch_torch()
        assert F.cross_entropy(logits, target).dtype == torch.bfloat16  # the latest decides
        inner.close()
        assert F.cross_entropy(logits, target).dtype == torch.float32
        inner = fusedloss.patch_torch(out_dtype=torch.float64)
        outer.close()
        assert F.cross_entropy(logits, target).dtype == torch.float64
        inner.close()
        assert F.cross_entropy(logits, target).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"'out_dtype' must be torch\.dtype"):
        fusedloss.patch_torch(out_dtype="float32")  # type: ignore[arg-type]
    if hasattr(F, "linear_cross_entropy"):
        with fusedloss.patch_torch(out_dtype=torch.float32):
            assert F.linear_cross_entropy(logits, torch.ones(11, 11, dtype=torch.bfloat16), target).dtype == torch.float32


def test_compilers_and_transforms() -> None:
    logits, target, _ = _problem(torch.bfloat16, {})

    def loss(logits: Tensor) -> Any:
        return fusedloss.cross_entropy(logits, target, out_dtype=torch.float32, scale=0.5)

    expected = loss(logits)
    assert "the logits are on the CPU" in fusedloss.plan(logits, target, out_dtype=torch.float32).reason
    (gradient,) = torch.autograd.grad(expected, logits)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits)
    assert compiled.dtype == torch.float32
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled, logits)[0], gradient)
    with torch.autocast("cpu", torch.bfloat16):
        assert fusedloss.cross_entropy(logits, target, out_dtype=torch.bfloat16).dtype == torch.bfloat16
    by_func, value = torch.func.grad_and_value(loss)(logits)
    assert value.dtype == torch.float32
    torch.testing.assert_close((by_func, value), (gradient, expected))
    program = torch.export.export(fusedloss.CrossEntropyLoss(out_dtype=torch.float32), (logits, target))
    torch.testing.assert_close(program.module()(logits, target), 2 * expected)


def test_pytorchs_own_loss_does_not_serve_it() -> None:
    """It is rounded already, and is unknown to tensors without strides."""
    logits, target, _ = _problem(torch.bfloat16, {})
    assert fusedloss.plan(logits.to_sparse(), target).backend == "torch"
    with pytest.raises(NotImplementedError, match=r"torch.sparse_coo tensor has no strides, .* without extras"):
        fusedloss.cross_entropy(logits.to_sparse(), target, out_dtype=torch.float32)
