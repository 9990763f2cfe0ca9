"""What users pass besides plain tensors and numbers: served as by PyTorch, or its exception. PyTorch runs in each test."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from problems import make_logits, make_probabilities, make_target, make_weight
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss
from fusedloss.backends import cpu
from fusedloss.checks import check_class_indices
from fusedloss.distributed import global_scale

Problem = tuple[Tensor, Tensor, Tensor]


def _problem() -> Problem:
    return make_logits(8, 10), make_target(8, n_classes=10), make_weight(10)


def _outcome(call: Callable[[], Any]) -> Any:
    """The loss, or the type of the exception."""
    try:
        return round(float(call()), 4)
    except Exception as error:
        return type(error)


class _NoIndex:
    def __index__(self) -> int:
        raise DeprecationWarning("as a bool of numpy before 2.3, where warnings are errors")


ODD_NUMBERS: dict[str, dict[str, Any]] = {
    "ignore_index, 0-d array": {"ignore_index": numpy.array(1)},
    "ignore_index, 1-d array": {"ignore_index": numpy.array([1])},
    "ignore_index, float array": {"ignore_index": numpy.array(1.0)},
    "ignore_index, numpy bool": {"ignore_index": numpy.bool_(True)},
    "ignore_index, list": {"ignore_index": [1]},
    "ignore_index, an index that raises": {"ignore_index": _NoIndex()},
    "label_smoothing, numpy float": {"label_smoothing": numpy.float32(0.25)},
    "label_smoothing, 0-d array": {"label_smoothing": numpy.array(0.25)},
    "label_smoothing, list": {"label_smoothing": [0.25]},
    "label_smoothing, needs grad": {"label_smoothing": torch.tensor(0.25, requires_grad=True)},
    "label_smoothing, 0-d tensor": {"label_smoothing": torch.tensor(0.25)},
    "reduction, dict": {"reduction": {}},
    "reduction, list": {"reduction": ["mean"]},
    "reduction, bytes": {"reduction": b"mean"},
}


@pytest.mark.parametrize("options", ODD_NUMBERS.values(), ids=ODD_NUMBERS)
def test_odd_numbers(options: dict[str, Any]) -> None:
    logits, target, _ = _problem()
    for _ in range(3):
        assert _outcome(lambda: fusedloss.cross_entropy(logits, target, **options)) == _outcome(
            lambda: F.cross_entropy(logits, target, **options)
        )


@pytest.mark.parametrize("number", [numpy.float64(0.25), numpy.float32(0.25), numpy.array(0.25)], ids=lambda n: str(type(n)))
def test_the_extras_take_the_same_numbers(number: Any) -> None:
    logits, target, _ = _problem()
    for name in ("scale", "z_loss", "logit_scale", "softcap"):
        expected = fusedloss.cross_entropy(logits, target, **{name: 0.25})
        for _ in range(3):
            assert fusedloss.cross_entropy(logits, target, **{name: number}).equal(expected)
    expected = fusedloss.cross_entropy(logits, (target, target.flip(0), 0.25))
    assert fusedloss.cross_entropy(logits, (target, target.flip(0), number)).equal(expected)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")
def test_a_fraction_of_numpy_in_a_compiled_call() -> None:
    """The graph breaks at it, and the compiler goes on with what was made of it."""
    logits, target, _ = _problem()
    torch.compiler.reset()
    fraction = numpy.float64(0.25)
    call = torch.compile(lambda x, t: fusedloss.cross_entropy(x, t, reduction="topk", top_k=fraction), backend="eager")
    torch.testing.assert_close(call(logits, target), fusedloss.cross_entropy(logits, target, reduction="topk", top_k=0.25))


def test_two_labels_as_a_list() -> None:
    """A DataLoader's collate makes a list of tensors of them."""
    logits, target, _ = _problem()
    samples = [(int(a), int(b), 0.25) for a, b in zip(target, target.flip(0), strict=True)]
    batch = torch.utils.data.default_collate(samples)
    assert isinstance(batch, list)
    mixed = 0.25 * F.one_hot(target, 10) + 0.75 * F.one_hot(target.flip(0), 10)
    for _ in range(3):
        torch.testing.assert_close(fusedloss.cross_entropy(logits, batch), F.cross_entropy(logits, mixed))


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": Tensor.to_sparse,
    "csr": Tensor.to_sparse_csr,
    "mkldnn": Tensor.to_mkldnn,
    "nested": lambda tensor: torch.nested.nested_tensor([tensor, tensor]),
    "jagged": lambda tensor: torch.nested.nested_tensor([tensor, tensor], layout=torch.jagged),
    "quantised": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    "zeros": lambda tensor: torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested", "ignore:.*quantize", "ignore:.*[mM]kldnn")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["logits", "target", "weight", "probabilities"])
def test_tensors_without_strides(kind: str, where: str) -> None:
    logits, target, weight = _problem()
    tensors: dict[str, Any] = {"input": logits, "target": target, "weight": weight}
    if where == "probabilities":
        tensors = {"input": logits, "target": make_probabilities(8, 10)}
    name = {"logits": "input", "probabilities": "target"}.get(where, where)
    if kind == "csr" and tensors[name].dim() == 1:
        pytest.skip("a vector has no rows to compress")
    try:
        tensors[name] = KINDS[kind](tensors[name])
    except RuntimeError as error:
        pytest.skip(f"PyTorch makes no such tensor: {error}")
    expected = _outcome(lambda: F.cross_entropy(**tensors))
    for _ in range(3):
        found = _outcome(lambda: fusedloss.cross_entropy(**tensors))
        assert found == expected or (found != found and expected != expected)


def test_bytes_are_labels_like_others() -> None:
    """156 is -100 to uint8."""
    labels = torch.tensor([156, 3], dtype=torch.uint8)
    logits, weight = make_logits(2, 300, dtype=torch.float64), make_weight(300, torch.float64)
    for options in ({}, {"weight": weight}):
        loss = fusedloss.cross_entropy(logits, labels, **options, reduction="sum", scale=global_scale(labels, **options))
        torch.testing.assert_close(loss, F.cross_entropy(logits, labels, **options))
    assert global_scale(labels).item() == 0.5
    check_class_indices(labels, 300, -100)
    assert _outcome(lambda: F.cross_entropy(logits[:, :19], labels)) is IndexError
    assert _outcome(lambda: check_class_indices(labels, 19, -100)) is IndexError


@pytest.mark.parametrize("ignore_index", [-100, 3, 300])
@pytest.mark.parametrize("kind", ["auto", "reference", "a layer"])
def test_bytes_of_many_classes(kind: str, ignore_index: int) -> None:
    """To uint8 300 is 44, as a number of classes and as a label to ignore. Loss, statistics, and the entropies' gradient."""
    target = torch.tensor([156, 44, 3, 255, 0])
    layer, logits = make_logits(300, 4, dtype=torch.float64), make_logits(5, 300, dtype=torch.float64)
    logits[torch.arange(5), target] += 100  # all are correct
    x = (make_logits(5, 4, dtype=torch.float64) if kind == "a layer" else logits).requires_grad_()

    def served(labels: Tensor) -> list[Tensor]:
        options: dict[str, Any] = {"reduction": "none", "ignore_index": ignore_index, "return_stats": True}
        if kind == "a layer":
            loss, stats = fusedloss.linear_cross_entropy(x, layer, labels, **options)
        else:
            with fusedloss.backend(kind):
                loss, stats = fusedloss.cross_entropy(x, labels, **options)
        return [loss, *stats, *torch.autograd.grad((loss + stats.entropy).sum(), x)]

    found, whole = served(target.to(torch.uint8)), x @ layer.T if kind == "a layer" else x
    torch.testing.assert_close(found[0], F.cross_entropy(whole, target, reduction="none", ignore_index=ignore_index))
    assert all(map(torch.equal, found, served(target)))


def test_global_scale_of_two_labels() -> None:
    a, b = make_target(8, n_classes=10, ignored=-100), make_target(8, n_classes=10, seed=1)
    counted = int((a != -100).sum())
    for share in (torch.rand(8), 0.3, torch.tensor(0.3)):
        for batch in ((a, b, share), [a, b, share], [(a, b, share)]):
            assert global_scale(batch).item() == 1 / counted
        assert global_scale([(a, b, share), (b, a, share)]).item() == 1 / (2 * counted)
        scale = global_scale((a, b, share))
        logits = make_logits(8, 10)
        torch.testing.assert_close(
            fusedloss.cross_entropy(logits, (a, b, share), reduction="sum", scale=scale),
            fusedloss.cross_entropy(logits, (a, b, share)),
        )
    assert global_scale([a, b, b]).item() == 1 / (counted + 16)


@pytest.mark.skipif(cpu.MISSING is not None, reason=f"no C++ kernel: {cpu.MISSING}")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of the compiler
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("upstream", [torch.inf, -torch.inf, torch.nan])
def test_an_ignored_row_has_gradient_0_whatever_comes_from_above(upstream: float, compiled: bool) -> None:
    ours: Any = torch.compile(fusedloss.cross_entropy, backend="aot_eager") if compiled else fusedloss.cross_entropy
    for reduction in ("mean", "sum"):
        for _ in range(3):
            gradients = []
            for function in (ours, F.cross_entropy):
                logits, target = make_logits(8, 10).requires_grad_(), make_target(8, n_classes=10)
                target[3] = -100
                loss = function(logits, target, reduction=reduction)
                gradients += torch.autograd.grad(loss, logits, torch.tensor(upstream))
            assert not gradients[1][3].any()  # PyTorch's
            assert not gradients[0][3].any()
            assert not gradients[0][[0, 1, 2, 4, 5, 6, 7]].isfinite().any()


class Copies(TorchDispatchMode):
    """Whether each copy between devices is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.non_blocking: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and "device" in kwargs:
            self.non_blocking.append(kwargs.get("non_blocking", False))
        return func(*args, **kwargs or {})


def test_a_scale_from_the_gpu_is_waited_for() -> None:
    """The CPU reads it at once."""
    with FakeTensorMode(), Copies() as copies:
        logits, target = torch.empty(4, 5), torch.empty(4, dtype=torch.long)
        fusedloss.cross_entropy(logits, target, reduction="sum", scale=torch.empty((), device="cuda"))
    assert copies.non_blocking == [False]


@pytest.mark.parametrize("name", ["FUSEDLOSS_BACKEND", "FUSEDLOSS_CHECK_TARGETS"])
def test_environment_variables_tell_their_values(name: str) -> None:
    for value, fails in (("yes", True), ("", False)):
        result = subprocess.run(
            [sys.executable, "-c", "import fusedloss"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, name: value},
        )
        assert (result.returncode != 0) == fails
        assert not fails or f"{name} must be one of" in result.stderr


def test_jit_script_compiles_pytorchs_loss() -> None:
    logits, target, weight = _problem()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = torch.jit.script(nn.ModuleList([fusedloss.CrossEntropyLoss(weight, label_smoothing=0.1)])[0])
        assert ours(logits, target).equal(F.cross_entropy(logits, target, weight, label_smoothing=0.1))
        with pytest.raises(NotImplementedError, match="z_loss"):
            torch.jit.script(fusedloss.CrossEntropyLoss(z_loss=0.1))


@pytest.mark.parametrize(
    "views",
    [
        lambda flat: flat.unfold(0, 10, 3),
        lambda flat: flat.as_strided((4, 10), (1, 1)),
        lambda flat: flat.as_strided((4, 10), (5, 2)),
    ],
)
@pytest.mark.skipif(cpu.MISSING is not None, reason=f"no C++ kernel: {cpu.MISSING}")
def test_logits_that_overlap_are_not_overwritten(views: Callable[[Tensor], Tensor]) -> None:
    flat = make_logits(100, 1).flatten().requires_grad_()
    logits = views(flat * 1)
    with pytest.raises(RuntimeError, match="cannot be overwritten"):
        fusedloss.cross_entropy_overwriting_logits(logits, make_target(len(logits), n_classes=10))


@pytest.mark.skipif(cpu.MISSING is not None, reason=f"no C++ kernel: {cpu.MISSING}")
def test_logits_that_lie_in_the_weights_are_not_overwritten() -> None:
    leaf, target, _ = _problem()
    logits = leaf.requires_grad_() * 1
    with pytest.raises(RuntimeError, match="memory of the logits"):
        fusedloss.cross_entropy_overwriting_logits(logits, target, logits.detach()[0].exp_())
    with pytest.raises(RuntimeError, match="memory of the logits"):
        fusedloss.cross_entropy_overwriting_logits(logits, logits.detach())
    with pytest.raises(RuntimeError, match="memory of the logits"):
        fusedloss.cross_entropy_overwriting_logits(logits, target, scale=logits.detach()[0, 0])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own call
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"scale": 0.5}, {"reduction": "max"}, {"reduction": "none"}], ids=str)
def test_forward_mode_has_the_logits_dtype(options: dict[str, Any]) -> None:
    logits, target, _ = _problem()
    torchs = torch.func.jacfwd(lambda x: F.cross_entropy(x, target))(logits)
    ours = torch.func.jacfwd(lambda x: fusedloss.cross_entropy(x, target, **options))(logits)
    assert ours.dtype == torchs.dtype == torch.float32
    assert options or torch.allclose(ours, torchs)


def test_one_row_of_probabilities_has_a_sample_weight() -> None:
    for n_cols in (1, 5):
        logits, target = make_logits(1, n_cols)[0], make_probabilities(1, n_cols)[0]
        for factor in (torch.tensor(0.5), torch.tensor([0.5])):
            ours = fusedloss.cross_entropy(logits, target, sample_weight=factor, reduction="sum")
            torch.testing.assert_close(ours, 0.5 * F.cross_entropy(logits, target, reduction="sum"))


ERRORS_OF_EXTRAS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "softcap of 0": ({"softcap": 0.0}, ValueError, "softcap must be positive, but got 0.0"),
    "negative softcap": ({"softcap": -1}, ValueError, "softcap must be positive, but got -1"),
    "infinite z_loss": ({"z_loss": float("inf")}, ValueError, "z_loss must be finite, but got inf"),
    "logit_scale that is nan": ({"logit_scale": float("nan")}, ValueError, "logit_scale must be finite, but got nan"),
    "a tensor as logit_scale": ({"logit_scale": torch.tensor(2.0)}, TypeError, "'logit_scale' must be float, not Tensor"),
    "sample_weight of integers": (
        {"sample_weight": torch.ones(4, dtype=torch.long)},
        RuntimeError,
        "expected floating point type for sample_weight, got Long",
    ),
    "too few sample weights": ({"sample_weight": torch.ones(3)}, ValueError, r"shape \[4\], but got shape \[3\]"),
    "sample_weight as a list": ({"sample_weight": [1.0] * 4}, TypeError, "'sample_weight' must be Tensor, not list"),
    "lam beyond 1": ({"target": (torch.zeros(4).long(),) * 2 + (1.5,)}, ValueError, r"must be in \[0, 1\], but got 1.5"),
    "labels of different shapes": (
        {"target": (torch.zeros(4).long(), torch.zeros(3).long(), 0.5)},
        RuntimeError,
        r"two labels must agree in shape and dtype, but got \[4\], Long and \[3\], Long",
    ),
    "two labels without a share": ({"target": (torch.zeros(4).long(),) * 2}, TypeError, "'target' must be Tensor, not tuple"),
    "probabilities as labels": (
        {"target": (torch.rand(4, 5), torch.rand(4, 5), 0.5)},
        RuntimeError,
        "multi-target not supported",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS_OF_EXTRAS.values(), ids=ERRORS_OF_EXTRAS)
def test_errors_of_extras_name_the_value(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = dict(arguments)
    target = arguments.pop("target", torch.zeros(4).long())
    with pytest.raises(error, match=message):
        fusedloss.cross_entropy(torch.zeros(4, 5), target, **arguments)
