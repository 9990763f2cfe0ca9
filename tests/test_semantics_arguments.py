"""Points 14, 15, 18, 19, 34, 36 to 38 of PyTorch's semantics: types of arguments, and which error comes first."""

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from budget import approximation
from compare import BOTH
from paths import Path
from problems import make_logits, make_probabilities, make_weight
from torch import Tensor

import fusedloss

Function = Callable[..., Tensor]


def _indices() -> Tensor:
    return torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("target", [[0, 156], [255, 0]])
def test_14_byte_targets(cross_entropy: Function, target: list[int]) -> None:
    logits = make_logits(2, 256)
    as_bytes = cross_entropy(logits, torch.tensor(target, dtype=torch.uint8))
    assert as_bytes.item() == cross_entropy(logits, torch.tensor(target)).item()


def test_14_byte_targets_can_be_ignored(cross_entropy: Function) -> None:
    logits, target = make_logits(2, 5), torch.tensor([1, 255], dtype=torch.uint8)
    loss = cross_entropy(logits, target, ignore_index=255)
    assert loss.item() == cross_entropy(logits[:1], torch.tensor([1])).item()


def test_14_byte_targets_are_for_one_dimension(cross_entropy: Function) -> None:
    with pytest.raises(RuntimeError, match="expected scalar type Long but found Byte"):
        cross_entropy(make_logits(2, 5, 3), torch.zeros(2, 3, dtype=torch.uint8))


# Earlier versions look at a dtype later, in the kernel: after the sizes, and not at all of no example.
OTHERS = (torch.int32, torch.float32) if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13) else ()


def _outcome(loss: Function, *arguments: Tensor, **options: Any) -> Tensor | type:
    """The loss, or the type of what is raised."""
    try:
        return loss(*arguments, **options)
    except (RuntimeError, ValueError, IndexError) as error:
        return type(error)


@pytest.mark.parametrize("options", [{}, {"reduction": "sum", "label_smoothing": 0.1}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (2, 1), (0, 3, 2), (2, 3, 0), (0, 3, 2, 2), (2, 3, 0, 2), (0, 3, 2, 2, 2), (0, 0, 2)])
def test_14_which_targets_no_example_has(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """Shapes that are right or nearly so, in every kind of dtype: what is served, and which error comes first."""
    rows, logits = (shape[0], *shape[2:]), torch.zeros(shape)
    for of_target in {rows, (*rows, 1), (1, *rows), rows[:-1], rows[1:], (0,), ()}:
        for dtype in (torch.int64, torch.uint8, *OTHERS):
            target = torch.zeros(of_target, dtype=dtype)
            ours, torchs = (_outcome(call, logits, target, **options) for call in BOTH)
            if isinstance(torchs, Tensor):
                torch.testing.assert_close(ours, torchs, equal_nan=True, msg=lambda words: f"{words}: {target}")  # noqa: B023
            else:
                assert ours is torchs, target


def test_14_of_one_row_the_dtype_is_looked_at_before_the_size(cross_entropy: Function) -> None:
    for n_labels in (0, 2):
        for dtype in OTHERS:
            with pytest.raises(RuntimeError, match="expected target dtype to be Long or Byte"):
                cross_entropy(make_logits(1, 5)[0], torch.zeros(n_labels, dtype=dtype))
        with pytest.raises(ValueError, match=f"For 1D input, 1D target must have size 1, but got target size: {n_labels}"):
            cross_entropy(make_logits(1, 5)[0], torch.zeros(n_labels, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int32, "Int"),
        (torch.int16, "Short"),
        (torch.int8, "Char"),
        (torch.bool, "Bool"),
        (torch.float32, "Float"),
        (torch.float64, "Double"),
    ],
    ids=str,
)
def test_14_other_targets(cross_entropy: Function, dtype: torch.dtype, name: str) -> None:
    words = "expected target dtype to be Long or Byte, but got"
    if cross_entropy is F.cross_entropy:  # earlier ones, up to 2.11 at least, have other words
        words = f"({words}|expected scalar type Long but found)"
    with pytest.raises(RuntimeError, match=f"{words} {name}"):
        cross_entropy(make_logits(4, 5), torch.zeros(4, dtype=dtype))


@pytest.mark.parametrize("shape", [(4,), (6,), (1,), (), (5, 1)])
def test_15_weight_of_the_wrong_shape(cross_entropy: Function, shape: tuple[int, ...]) -> None:
    message = rf"all 5 classes or no classes but got weight tensor of shape: \[{', '.join(map(str, shape))}\]"
    with pytest.raises(RuntimeError, match=message):
        cross_entropy(make_logits(4, 5), _indices(), torch.ones(shape))


def test_15_weight_of_another_dtype(cross_entropy: Function) -> None:
    with pytest.raises(RuntimeError, match="expected scalar type Float but found Double"):
        cross_entropy(make_logits(4, 5), _indices(), torch.ones(5, dtype=torch.float64))


def test_15_weight_of_another_dtype_promotes_with_probabilities(any_cross_entropy: Function) -> None:
    logits, target, weight = make_logits(4, 5), make_probabilities(4, 5), make_weight(5, torch.float64)
    loss = any_cross_entropy(logits, target, weight)
    expected = -(weight * target * logits.double().log_softmax(1)).sum(1).mean()
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("value", [1.5, 2.5, torch.tensor(1.25)])
def test_18_36_too_much_smoothing(cross_entropy: Function, value: Any) -> None:
    with pytest.raises(RuntimeError, match=f"label_smoothing must be between 0.0 and 1.0. Got: {float(value)}"):
        cross_entropy(make_logits(4, 5), _indices(), label_smoothing=value)


@pytest.mark.parametrize(
    ("value", "same_as"),
    [(-0.5, 0.0), (float("nan"), 0.0), (-torch.inf, 0.0), (1, 1.0), (True, 1.0), (0, 0.0), (torch.tensor(0.25), 0.25)],
    ids=str,
)
def test_18_36_smoothing_of_any_type(cross_entropy: Function, value: Any, same_as: float) -> None:
    logits = make_logits(4, 5)
    loss = cross_entropy(logits, _indices(), label_smoothing=value)
    assert loss.item() == cross_entropy(logits, _indices(), label_smoothing=same_as).item()


@pytest.mark.parametrize("reduction", ["average", "", "MEAN", None, 1])
def test_18_unknown_reduction(cross_entropy: Function, reduction: Any) -> None:
    with pytest.raises(ValueError, match=f"{reduction} is not a valid value for reduction"):
        cross_entropy(make_logits(4, 5), _indices(), reduction=reduction)


@pytest.mark.parametrize(
    ("size_average", "reduce", "same_as"),
    [(True, None, "mean"), (False, None, "sum"), (None, True, "mean"), (True, True, "mean"), (None, False, "none")],
)
@pytest.mark.parametrize("reduction", ["mean", "nonsense"])
def test_19_36_legacy_arguments_override_reduction(
    cross_entropy: Function, size_average: Any, reduce: Any, same_as: str, reduction: str
) -> None:
    logits = make_logits(4, 5)
    with pytest.warns(UserWarning, match=f"please use reduction='{same_as}' instead"):
        loss = cross_entropy(logits, _indices(), size_average=size_average, reduce=reduce, reduction=reduction)
    assert loss.equal(cross_entropy(logits, _indices(), reduction=same_as))


def test_36_elementwise_mean(cross_entropy: Function) -> None:
    logits = make_logits(4, 5)
    for _ in range(4):  # each time
        with pytest.warns(UserWarning, match="'elementwise_mean' is deprecated"):
            loss = cross_entropy(logits, _indices(), reduction="elementwise_mean")
        assert loss.equal(cross_entropy(logits, _indices()))


def test_34_weight_that_requires_grad(cross_entropy: Function) -> None:
    logits, weight = make_logits(4, 5), torch.ones(5, requires_grad=True)
    for smoothing in (0.0, 0.1):
        with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'"):
            cross_entropy(logits, _indices(), weight, label_smoothing=smoothing)
        with torch.no_grad():
            assert cross_entropy(logits, _indices(), weight, label_smoothing=smoothing).isfinite()


def test_37_batch_size_before_target_dtype(cross_entropy: Function) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        cross_entropy(make_logits(4, 5), torch.zeros(3, dtype=torch.int32))


def test_37_reduction_before_smoothing(cross_entropy: Function) -> None:
    with pytest.raises(ValueError, match="reduction"):
        cross_entropy(make_logits(4, 5), _indices(), reduction="nonsense", label_smoothing=2.0)


def test_37_smoothing_before_batch_size(cross_entropy: Function) -> None:
    with pytest.raises(RuntimeError, match="label_smoothing"):
        cross_entropy(make_logits(4, 5), torch.zeros(3, dtype=torch.long), label_smoothing=2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": [1.0] * 5}, "argument 'weight'.* must be Tensor, not list"),
        ({"ignore_index": True}, "argument 'ignore_index'.* must be int, not bool"),
        ({"ignore_index": 1.0}, "argument 'ignore_index'.* must be int, not float"),
        ({"ignore_index": "1"}, "argument 'ignore_index'.* must be int, not str"),
        ({"ignore_index": None}, "argument 'ignore_index'.* must be int, not NoneType"),
        ({"label_smoothing": "0.1"}, "argument 'label_smoothing'.* must be float, not str"),
        ({"label_smoothing": None}, "argument 'label_smoothing'.* must be float, not NoneType"),
        ({"input": [[0.0] * 5] * 4}, "must be Tensor, not list"),
        ({"nonsense": 1}, "unexpected keyword argument 'nonsense'"),
    ],
    ids=str,
)
def test_37_arguments_of_the_wrong_type(cross_entropy: Function, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        cross_entropy(**{"input": make_logits(4, 5), "target": _indices(), **arguments})


def test_37_ignore_index_beyond_64_bits(cross_entropy: Function) -> None:
    with pytest.raises(ValueError, match="Overflow when unpacking long"):
        cross_entropy(make_logits(4, 5), _indices(), ignore_index=2**70)


@pytest.mark.parametrize("index", [numpy.int64(2), numpy.int32(2), numpy.uint8(2), torch.tensor(2)], ids=lambda i: str(type(i)))
def test_37_ignore_index_of_integer_types(cross_entropy: Function, index: Any) -> None:
    logits = make_logits(4, 5)
    loss = cross_entropy(logits, _indices(), ignore_index=index)
    assert loss.item() == cross_entropy(logits, _indices(), ignore_index=2).item()


ODD_CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "0-d logits and index": lambda: {"input": torch.tensor(1.0), "target": torch.tensor(0)},
    "0-d logits and probability": lambda: {"input": torch.tensor(1.0), "target": torch.tensor(1.0)},
    "0-d logits, 1-d index": lambda: {"input": torch.tensor(1.0), "target": torch.tensor([0])},
    "0-d index for a batch": lambda: {"input": make_logits(4, 5), "target": torch.tensor(2)},
    "two indices for one sample": lambda: {"input": make_logits(1, 5)[0], "target": torch.tensor([0, 1])},
    "2-d index for one sample": lambda: {"input": make_logits(1, 5)[0], "target": torch.tensor([[0]])},
    "indices as a list": lambda: {"input": make_logits(4, 5), "target": [0, 1, 2, 3]},
    "no target": lambda: {"input": make_logits(4, 5), "target": None},
    "weight is a number": lambda: {"input": make_logits(4, 5), "target": _indices(), "weight": 2.0},
    "smoothing per row": lambda: {"input": make_logits(4, 5), "target": _indices(), "label_smoothing": torch.full((4,), 0.1)},
    "smoothing is complex": lambda: {"input": make_logits(4, 5), "target": _indices(), "label_smoothing": 1j},
    "ignore_index is a float tensor": lambda: {
        "input": make_logits(4, 5),
        "target": _indices(),
        "ignore_index": torch.tensor(1.0),
    },
    "8-bit floats": lambda: {"input": make_logits(4, 5).to(torch.float8_e4m3fn), "target": _indices()},
    "target elsewhere": lambda: {"input": make_logits(4, 5), "target": _indices().to("meta")},
    "weight elsewhere": lambda: {"input": make_logits(4, 5), "target": _indices(), "weight": torch.ones(5, device="meta")},
    "integer logits, probabilities and smoothing above 1": lambda: {
        "input": torch.zeros(4, 5, dtype=torch.long),
        "target": make_probabilities(4, 5),
        "label_smoothing": 1.5,
    },
    "complex probabilities": lambda: {"input": make_logits(4, 5), "target": torch.zeros(4, 5, dtype=torch.complex64)},
}


@pytest.mark.parametrize("arguments", ODD_CALLS.values(), ids=ODD_CALLS)
def test_37_odd_calls_raise_what_torch_raises(any_path: Path, arguments: Callable[[], dict[str, Any]]) -> None:
    with pytest.raises(Exception) as torchs:  # noqa: PT011 (which it is, is the question)
        F.cross_entropy(**arguments())
    with pytest.raises(Exception) as ours:  # noqa: PT011
        fusedloss.cross_entropy(**arguments())
    assert ours.type is torchs.type


def test_38_autocast_leaves_float64_alone(cross_entropy: Function) -> None:
    logits = make_logits(4, 5, dtype=torch.bfloat16)
    with (
        torch.autocast(logits.device.type, torch.bfloat16),
        pytest.raises(RuntimeError, match="expected scalar type Float but found Double"),
    ):
        cross_entropy(logits, _indices(), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_38_autocast(cross_entropy: Function, dtype: torch.dtype, weighted: bool) -> None:
    logits = make_logits(4, 5, dtype=dtype).requires_grad_()
    weight = make_weight(5, torch.float64 if dtype == torch.float64 else torch.float32) if weighted else None
    with torch.autocast(logits.device.type, torch.bfloat16):
        loss = cross_entropy(logits, _indices(), weight, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = logits.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(
        wide, _indices(), weight.double() if weight is not None else None, label_smoothing=0.1
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (exact,) = torch.autograd.grad(expected, wide)
    assert gradient.dtype == dtype
    least = torch.finfo(dtype).eps + approximation(gradient) * exact.abs().max().item()
    torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=least)
