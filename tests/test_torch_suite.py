"""PyTorch's own test material for cross-entropy, with fusedloss in its place: ModuleInfo, OpInfo, error inputs.

The material comes from torch.testing._internal, which has no stable interface: names are looked up here and nowhere else.
"""

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from compare import check_against_torch
from paths import Path
from torch import Tensor, nn

import fusedloss


def _material(module: str) -> Any:
    return pytest.importorskip(f"torch.testing._internal.{module}", reason="PyTorch's test material needs expecttest and numpy")


modules = _material("common_modules")
noncontiguous_like = _material("common_utils").noncontiguous_like
MODULE = next(info for info in modules.module_db if info.module_cls is nn.CrossEntropyLoss)
OPERATOR = next(info for info in _material("common_methods_invocations").op_db if info.name == "nn.functional.cross_entropy")
# make_dual() itself makes PyTorch script its decompositions.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
    pytest.mark.gpu_sweep,  # more than a thousand kernel variants
]

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def _module_inputs(path: Path, dtype: torch.dtype) -> list[Any]:
    torch.manual_seed(0)
    return MODULE.module_inputs_func(MODULE, device=path.device, dtype=dtype, requires_grad=False, training=True)


def _gradient(module: nn.Module, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = module(leaf, target)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss, gradient


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "noncontiguous"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module_inputs(any_path: Path, dtype: torch.dtype, contiguous: bool) -> None:
    inputs = _module_inputs(any_path, dtype)
    assert len(inputs) > 100
    for sample in inputs:
        logits, target = sample.forward_input.args
        if not contiguous:
            logits, target = noncontiguous_like(logits), noncontiguous_like(target)
        options = dict(sample.constructor_input.kwargs)
        if "weight" in options:  # drawn of both signs: the sum cancels, and every order of addition has an error of its own
            options["weight"] = options["weight"].abs()
        theirs = nn.CrossEntropyLoss(**options)
        exact = deepcopy(theirs).double()
        wide_target = target.double() if target.is_floating_point() else target
        results = (
            _gradient(fusedloss.CrossEntropyLoss(**options), logits, target),
            _gradient(theirs, logits, target),
            _gradient(exact, logits.double(), wide_target),
        )
        for what, actual, torchs, expected in zip(("loss", "gradient"), *results, strict=True):
            assert_within_budget(actual, torchs, expected, f"{sample.desc}: {what}")


def test_module_inputs_against_torchs_reference(path: Path) -> None:
    """PyTorch's own reference implementation in Python, in float64."""
    checked = 0
    for sample in _module_inputs(path, torch.float64):
        logits, target = sample.forward_input.args
        if logits.numel() < 200:
            module = fusedloss.CrossEntropyLoss(**sample.constructor_input.kwargs)
            torch.testing.assert_close(module(logits, target), sample.reference_fn(module, logits, target), equal_nan=True)
            checked += 1
    assert checked >= 30


@pytest.mark.skipif(MODULE.module_error_inputs_func is None, reason="this PyTorch lists none")
def test_module_error_inputs(path: Path) -> None:
    errors = MODULE.module_error_inputs_func(MODULE, device=path.device, dtype=torch.float32, requires_grad=False, training=True)
    assert errors
    for error in errors:
        assert error.error_on == modules.ModuleErrorEnum.FORWARD_ERROR
        module = fusedloss.CrossEntropyLoss(**error.module_error_input.constructor_input.kwargs)
        with pytest.raises(error.error_type, match=error.error_regex):
            module(*error.module_error_input.forward_input.args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_samples(path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    checked = 0
    for sample in OPERATOR.reference_inputs(path.device, dtype):
        for variant in (sample, sample.noncontiguous()):
            (target,) = variant.args
            options = dict(variant.kwargs)
            check_against_torch(variant.input, target, options.pop("weight", None), **options)
            checked += 1
    assert checked >= 20


@pytest.mark.parametrize("call", [F.cross_entropy, fusedloss.cross_entropy], ids=["torch", "fusedloss"])
def test_operator_gradients(call: Any) -> None:
    """What PyTorch's test_ops_gradients does: reverse and forward mode, batched, second order."""
    torch.manual_seed(0)
    for sample in OPERATOR.sample_inputs("cpu", torch.float64, requires_grad=True):

        def loss(logits: Tensor, sample: Any = sample) -> Tensor:
            return call(logits, *sample.args, **sample.kwargs)

        logits = sample.input.detach()[:3].requires_grad_() if sample.input.dim() == 1 else sample.input
        assert torch.autograd.gradcheck(
            loss,
            (logits,),
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
            check_undefined_grad=False,
            fast_mode=True,
        )
        assert torch.autograd.gradgradcheck(loss, (logits,), check_fwd_over_rev=True, fast_mode=True)
