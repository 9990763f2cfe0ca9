"""Random problems on every path against float64: 2,000 in CI, 100,000 by `make fuzz`."""

import os
from typing import Any

import pytest
import torch
from budget import assert_within_budget
from exact import exact_loss_and_gradient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import torch_loss
from paths import AUTO, GPU, INTERPRETER, REFERENCE, Path, entered
from random_problems import Problem, problems

import fusedloss
from fusedloss import known

ASKED = int(os.environ.get("FUSEDLOSS_FUZZ", "0"))  # problems in the main process; `make fuzz` sets it

# In units of the result's last place. float32 and float64 results are as coarse as the arithmetic behind them: sums of a row,
# exp of a difference.
ROUNDINGS = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 4, torch.float64: 4}


def _settings(examples: int) -> settings:
    """The same problems on every run in CI; others for every --hypothesis-seed in `make fuzz`."""
    return settings(
        max_examples=examples,
        derandomize=not ASKED,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )


def _check(problem: Problem, path: Path) -> None:
    __tracebackhide__ = True
    logits, target, weight, options = problem.logits, problem.target, problem.weight, problem.options
    has_probabilities = isinstance(target, torch.Tensor) and target.is_floating_point()
    dtype = torch.promote_types(logits.dtype, target.dtype) if has_probabilities else logits.dtype
    exact = exact_loss_and_gradient(
        logits,
        target,
        weight,
        **{**options, "scale": float(options["scale"])},
        dloss=problem.dloss,
        resolution=1e-12 if dtype == torch.float64 else 1e-4,
    )
    if not (_settled(exact.loss, dtype) and _settled(exact.gradient, logits.dtype)):
        return
    before = logits.clone()
    ours = _on(path.device, logits).requires_grad_()
    theirs = logits.detach().clone().requires_grad_()
    there, weight_there, options_there = _arguments_on(path.device, problem)
    try:
        plan = fusedloss.plan(ours, there, weight_there, **options_there)
    except RuntimeError as error:
        if "no kernel" not in str(error):
            raise
        return  # a path that is asked for never falls back
    loss = fusedloss.cross_entropy(ours, there, weight_there, **options_there)
    # PyTorch takes uint8, but not with weight and label smoothing together.
    wide = target.long() if isinstance(target, torch.Tensor) and not has_probabilities else target
    torchs = torch_loss(theirs, wide, weight, **options).to(dtype)
    if plan.backend == "torch":  # its own loss: infinite, too, where float16 logits of a row lie further apart than 65504
        gradients = [torch.autograd.grad(one, of, problem.dloss.to(one))[0] for one, of in ((loss, ours), (torchs, theirs))]
        torch.testing.assert_close((loss.detach(), gradients[0]), (torchs.detach(), gradients[1]), equal_nan=True)
        return
    # Logits are transformed in float32 at least, whatever the dtype of the loss.
    loss_terms = exact.loss_terms * min(1.0, torch.finfo(torch.float32).eps / torch.finfo(dtype).eps)
    assert_within_budget(loss, torchs, exact.loss, "loss", ROUNDINGS[dtype], loss_terms)
    assert torch.equal(ours.detach().cpu().nan_to_num(), before.nan_to_num()), "the logits were changed"
    if exact.ambiguous:
        return
    (gradient,) = torch.autograd.grad(loss, ours, problem.dloss.to(loss))
    (torch_gradient,) = torch.autograd.grad(torchs, theirs, problem.dloss.to(torchs))
    # 0 times NaN, where the kernels do not look.
    if options["reduction"] in ("sum", "mean") or plan.strategy == "fused" or plan.backend == "reference":
        gradient = gradient.where(~(exact.unknown.to(gradient.device) & gradient.isnan()), 0)
    assert_within_budget(gradient, torch_gradient, exact.gradient, "gradient", ROUNDINGS[logits.dtype], exact.terms)


def _check_known(problem: Problem, path: Path) -> None:
    """The third call of a kind, which may be known by then, returns the bits of the first."""
    __tracebackhide__ = True
    known.KNOWN.clear()
    target, weight, options = _arguments_on(path.device, problem)
    results = []
    for _ in range(3):
        logits = _on(path.device, problem.logits).requires_grad_()
        loss = fusedloss.cross_entropy(logits, target, weight, **options)
        results.append((loss.detach(), torch.autograd.grad(loss, logits, problem.dloss.to(loss))[0]))
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0, equal_nan=True, check_stride=True)


def _arguments_on(device: str, problem: Problem) -> tuple[Any, torch.Tensor | None, dict[str, Any]]:
    """What a call takes besides the logits: target, weight, options."""
    target = problem.target
    there = tuple(_on(device, part) for part in target) if isinstance(target, tuple) else _on(device, target)
    return there, _on(device, problem.weight), {name: _on(device, value) for name, value in problem.options.items()}


def _on(device: str, tensor: Any) -> Any:
    """The same values with the same strides; what is no tensor stays as it is."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    if device == "cpu":
        return tensor.detach()
    memory = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return memory.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _settled(exact: torch.Tensor, dtype: torch.dtype) -> bool:
    """Nothing so near the largest number of the dtype that rounding decides between it and infinity."""
    nearness = exact.abs() / torch.finfo(dtype).max
    return not ((nearness > 0.99) & (nearness < 1.01)).any()


# On a GPU most problems compile two kernels of their own. share: of the problems that `make fuzz` asks for.
@pytest.mark.parametrize(
    ("path", "examples", "share"),
    [
        pytest.param(*path.values, examples, share, id=path.id, marks=path.marks)
        for path, examples, share in ((AUTO, 1500, 0.75), (REFERENCE, 500, 0.25), (GPU, 40, 0.25))
    ],
)
def test_random_problems(path: Path, examples: int, share: float) -> None:
    @_settings(int(share * ASKED) or examples)
    @given(problem=problems(max_elements=4096))
    def run(problem: Problem) -> None:
        with entered(path):
            _check(problem, path)
            if path.backend == "auto":
                _check_known(problem, path)

    run()


def test_random_problems_fused_with_the_last_layer() -> None:
    """In float64 the loss and gradients of `cross_entropy`, which the tests above compare, whatever the chunks."""

    @_settings(max(100, ASKED // 20))
    @given(
        problem=problems(max_elements=2048).filter(lambda problem: problem.logits.dim() == 2),
        n_features=st.sampled_from([1, 2, 7, 16]),
        chunk_rows=st.sampled_from([1, 2, 7, None]),
        seed=st.integers(0, 2**32 - 1),
    )
    def run(problem: Problem, n_features: int, chunk_rows: int | None, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        n_rows, n_cols = problem.logits.shape
        layer = [torch.randn(n, n_features, generator=generator, dtype=torch.float64).requires_grad_() for n in (n_rows, n_cols)]
        weight = None if problem.weight is None else problem.weight.double()
        options = {name: value for name, value in problem.options.items() if name != "focal_gamma"}  # it has none
        expected = fusedloss.cross_entropy(torch.nn.functional.linear(*layer), problem.target, weight, **options)
        if not isinstance(problem.target, tuple) and problem.target.is_floating_point():
            del options["ignore_index"]
        loss = fusedloss.linear_cross_entropy(*layer, problem.target, weight=weight, chunk_rows=chunk_rows, **options)
        close = {"rtol": 1e-9, "atol": 1e-9, "equal_nan": True}
        torch.testing.assert_close(loss, expected, **close)
        dloss = problem.dloss.to(loss)
        found, exact = (torch.autograd.grad(value, layer, dloss) for value in (loss, expected))
        torch.testing.assert_close(found, exact, **close)

    run()


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # the interpreter's maximum is numpy's, which warns
@pytest.mark.parametrize("path", [INTERPRETER])
def test_random_problems_under_the_interpreter(path: Path) -> None:
    @_settings(ASKED // 100 or 60)  # a second each
    @given(problem=problems(max_elements=1100))
    def run(problem: Problem) -> None:
        with entered(path):
            _check(problem, path)

    run()
