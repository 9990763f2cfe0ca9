"""Every variant of the Triton kernels under the interpreter, and on a GPU where there is one."""

from typing import Any

import pytest
import torch
from compare import check_against_torch
from paths import Path
from problems import make_logits, make_probabilities, make_target, make_weight

import fusedloss

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


# Each shape is here for the code it reaches.
SHAPES = {
    "one class": (3, 1),
    "one row": (1, 10),
    "rows off the tile": (7, 10),
    "several programs": (513, 10),
    "rows of an odd number of columns": (7, 7),
    "more columns than a thread holds": (5, 70),
    "whole parts": (9, 128),
    "columns off the tile": (5, 100),
    "whole 16-byte groups": (3, 1024),
    "groups, off the block": (3, 1000),
    "ragged rows": (5, 1001),
    "longer than a block": (2, 10001),
    "rows that begin inside a sector": (3, 2056),
    "slices": (2, 33001),
    "slices that begin inside a sector": (2, 33012),
    "pixels": (2, 5, 6, 7),
    "many pixels": (1, 3, 20, 32),
    "pixels of many classes": (1, 150, 4, 8),
    "pixels of more classes than registers hold": (1, 3350, 3),
    "three dims": (3, 4, 9),
}


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(kernels: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    target = make_target(*shape[:1], *shape[2:], n_classes=shape[1], ignored=-100)
    check_against_torch(make_logits(*shape, dtype=dtype), target)


@pytest.mark.sweep  # four times as many steps of the interpreter as with three pixels
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
def test_aligned_pixels_of_more_classes_than_registers_hold(kernels: Path, dtype: torch.dtype) -> None:
    check_against_torch(make_logits(1, 3500, 4, dtype=dtype), make_target(1, 4, n_classes=3500))


@pytest.mark.pairs_on_a_gpu
@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none", "scale": -2.0},
        {"reduction": "sum", "scale": 1 / 3},
        {"reduction": "mean"},
        {"reduction": "max"},
        {"reduction": "topk", "top_k": 2},
        {"reduction": "topk", "top_k": 0.4},
    ],
    ids=str,
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize(
    "shape", [(7, 10), (5, 1001), (3, 1000), pytest.param((2, 32769), marks=pytest.mark.sweep), (2, 5, 6, 7)], ids=str
)
def test_options(kernels: Path, shape: tuple[int, ...], weighted: bool, smoothing: float, options: dict[str, Any]) -> None:
    target = make_target(*shape[:1], *shape[2:], n_classes=shape[1], ignored=-100)
    weight = make_weight(shape[1]) if weighted else None
    check_against_torch(make_logits(*shape), target, weight, label_smoothing=smoothing, **options)


LAYOUTS = {
    "transposed": lambda: make_logits(11, 30).t(),
    "every other row": lambda: make_logits(14, 1001)[::2],
    "every other column": lambda: make_logits(7, 40)[:, ::2],
    "columns of a padded row": lambda: make_logits(6, 1024)[:, :1001],
    "many columns of a padded row": lambda: make_logits(3, 3072)[:, :3001],
    "shifted by a column": lambda: make_logits(6, 1002)[:, 1:],
    "expanded rows": lambda: make_logits(1, 600).expand(5, 600),
    "channels last": lambda: make_logits(2, 5, 6, 7).to(memory_format=torch.channels_last),
    "every other image, channels last": lambda: make_logits(4, 5, 6, 7).to(memory_format=torch.channels_last)[::2],
    "every other image": lambda: make_logits(4, 5, 6, 7)[::2],
    "every other image of one class": lambda: make_logits(4, 1, 6, 7)[::2],
    "pixels that need a copy": lambda: make_logits(2, 5, 6, 14)[..., ::2],
    "batch and class swapped": lambda: make_logits(5, 3, 8).transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(kernels: Path, layout: str) -> None:
    logits = LAYOUTS[layout]()
    shape = logits.shape
    target = make_target(*shape[:1], *shape[2:], n_classes=shape[1], ignored=-100)
    check_against_torch(logits, target, make_weight(shape[1]), label_smoothing=0.1)


PROBABILITY_LAYOUTS = {
    "like the logits": lambda q: q,
    "transposed": lambda q: q.t().contiguous().t() if q.dim() == 2 else q.movedim(1, -1).contiguous().movedim(-1, 1),
    "rows of a padded tensor": lambda q: torch.nn.functional.pad(q, (0, 3))[..., :-3],
    "expanded": lambda q: q[:1].expand(q.shape),
}


@pytest.mark.parametrize("layout", PROBABILITY_LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(7, 10), (3, 1001), (2, 5, 6, 7)], ids=str)
def test_strides_of_probabilities(kernels: Path, shape: tuple[int, ...], reduction: str, layout: str) -> None:
    target = PROBABILITY_LAYOUTS[layout](make_probabilities(*shape))
    check_against_torch(make_logits(*shape), target, make_weight(shape[1]), label_smoothing=0.1, reduction=reduction)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_logits_with_probabilities(kernels: Path, layout: str) -> None:
    logits = LAYOUTS[layout]()
    check_against_torch(logits, make_probabilities(*logits.shape), make_weight(logits.shape[1]))


@pytest.mark.parametrize("options", [{}, {"reduction": "none", "label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32), (FP32, BF16), (FP16, FP16), (FP64, FP32)], ids=str)
@pytest.mark.parametrize("shape", [(5, 10), (5, 70), (3, 1001), (2, 5, 4)], ids=str)
def test_dtypes_of_probabilities(
    kernels: Path, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], options: dict[str, Any]
) -> None:
    logits, target = make_logits(*shape, dtype=dtypes[0]), make_probabilities(*shape, dtype=dtypes[1])
    check_against_torch(logits, target, **options)


# The first takes the interpreter seconds; the second, which reaches the same code, fewer.
SMALLER = {(1, 3350, 3): (1, 2050, 3)}


@pytest.mark.parametrize("options", [{}, {"reduction": "max", "label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("shape", [SMALLER.get(shape, shape) for shape in SHAPES.values()], ids=SHAPES)
def test_shapes_of_probabilities(kernels: Path, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    check_against_torch(make_logits(*shape), make_probabilities(*shape), **options)


@pytest.mark.parametrize("shape", [(3, 10), (3, 1001), (2, 33001)], ids=str)
def test_probabilities_and_a_common_offset(kernels: Path, shape: tuple[int, int]) -> None:
    """1e4 in every logit leaves no digits of the loss where the shift is not near the maximum."""
    logits, target = make_logits(*shape) + 1e4, make_probabilities(*shape)
    expected = -(target.double() * logits.double().log_softmax(1)).sum(1)
    losses = fusedloss.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("scale", [0.0, -1.5, 0.1])
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
def test_scale_reaches_the_kernel_unrounded(kernels: Path, dtype: torch.dtype, scale: float, as_tensor: bool) -> None:
    factor = torch.tensor(scale, dtype=dtype) if as_tensor else scale
    check_against_torch(make_logits(4, 600, dtype=dtype), make_target(4, n_classes=600), scale=factor, reduction="sum")


@pytest.mark.parametrize("n_cols", [5, 700])
def test_target_of_bytes(kernels: Path, n_cols: int) -> None:
    target = torch.tensor([0, 4, 156, 3], dtype=torch.uint8)  # 156 is not -100
    check_against_torch(make_logits(4, n_cols), target, ignore_index=156 if n_cols == 5 else -100)


@pytest.mark.parametrize("n_cols", [6, 601])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "max"])
def test_class_out_of_range_is_nan(kernels: Path, reduction: str, n_cols: int) -> None:
    """On a GPU; the interpreter stands for it. The other rows keep their gradients."""
    logits = make_logits(4, n_cols).requires_grad_()
    target = torch.tensor([1, n_cols, -1, 3])
    loss = fusedloss.cross_entropy(logits, target, reduction=reduction)
    loss.sum().backward()
    assert loss.isnan().any()
    assert logits.grad[1:3].isnan().all()
    assert logits.grad[[0, 3]].isfinite().all()


@pytest.mark.parametrize("n_cols", [6, 601])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "max"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_nan_rows_have_no_gradient(kernels: Path, reduction: str, n_cols: int, smoothing: float) -> None:
    logits = make_logits(4, n_cols)
    logits[1] = torch.nan
    logits[2] = torch.inf
    logits.requires_grad_()
    target = torch.tensor([1, -100, -100, 3])
    loss = fusedloss.cross_entropy(logits, target, reduction=reduction, label_smoothing=smoothing)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert (logits.grad[1:3] == 0).all()
    assert (logits.grad[[0, 3]] != 0).any()


@pytest.mark.parametrize("n_cols", [7, 513, 1024])
def test_confident_rows_keep_their_digits(kernels: Path, n_cols: int) -> None:
    """A loss of 4e-18 is not 0: the target's own term is kept out of the sum."""
    logits = torch.full((3, n_cols), -40.0)
    logits[:, 2] = 0.0
    logits.requires_grad_()
    loss = fusedloss.cross_entropy(logits, torch.tensor([2, 2, 2]))
    loss.backward()
    exact = (n_cols - 1) * torch.exp(torch.tensor(-40.0, dtype=FP64))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(logits.grad[:, 2].double(), -exact.expand(3) / 3, rtol=1e-5, atol=0)


def test_same_bits_every_time(kernels: Path) -> None:
    logits = make_logits(2049, 10).requires_grad_()
    target = make_target(2049, n_classes=10)
    first = fusedloss.cross_entropy(logits, target)
    again = fusedloss.cross_entropy(logits, target)
    assert torch.equal(first, again)
    assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in (first, again)))


EXTRAS: dict[str, dict[str, Any]] = {
    "z_loss": {"z_loss": 1e-2},
    "logit_scale": {"logit_scale": -0.5},
    "softcap": {"softcap": 5.0},
    "sample_weight": {"sample_weight": True},
    "all": {"z_loss": 1e-2, "logit_scale": 0.5, "softcap": 5.0, "sample_weight": True},
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "max"])
@pytest.mark.parametrize("labels", ["one label", "two labels", "shares per row"])
@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("shape", [(4, 1000), (3, 1001)], ids=str)
def test_extras_of_rows(kernels: Path, shape: tuple[int, int], extras: dict[str, Any], labels: str, reduction: str) -> None:
    """Rows that begin inside a sector, ragged rows. Four roundings: a tanh or a square is a few roundings off."""
    a, b = (make_target(shape[0], n_classes=shape[1], ignored=-100, seed=seed) for seed in (1, 2))
    b[1] = a[1]
    target = {"one label": a, "two labels": (a, b, 0.3), "shares per row": (a, b, torch.linspace(0, 1, shape[0]))}[labels]
    options = {**extras, "sample_weight": make_weight(shape[0])} if "sample_weight" in extras else extras
    check_against_torch(make_logits(*shape), target, reduction=reduction, dloss=1.5, roundings=4, **options)
    if extras is EXTRAS["all"]:
        weight = make_weight(shape[1])
        check_against_torch(
            make_logits(*shape), target, weight, reduction=reduction, label_smoothing=0.1, dloss=1.5, roundings=4, **options
        )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_extras_of_slices(kernels: Path, reduction: str, smoothing: float) -> None:
    labels = [make_target(2, n_classes=33001, seed=seed) for seed in (1, 2)]
    options = {**EXTRAS["all"], "sample_weight": make_weight(2), "label_smoothing": smoothing}
    check_against_torch(make_logits(2, 33001), (*labels, 0.3), reduction=reduction, dloss=1.5, roundings=4, **options)


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("labels", ["one label", "two labels"])
def test_labels_in_any_slice(kernels: Path, labels: str, dtype: torch.dtype) -> None:
    """Of ragged rows in slices that are no power of two: three of 3072 columns, seven of 1024. A label of each, of both edges."""
    a = torch.tensor([0, 1, 3071, 3100, 6100, 6200, 6999, 7000])
    target = (a, a.roll(3), torch.linspace(0, 1, 8, dtype=dtype)) if labels == "two labels" else a
    logits = make_logits(8, 7001, dtype=dtype)
    logits[4, 6100] = -torch.inf
    check_against_torch(logits, target, softcap=5.0, logit_scale=0.7, roundings=4)


@pytest.mark.parametrize("labels", ["one label", "two labels"])
@pytest.mark.parametrize("reduction", ["mean", "none", "max"])
@pytest.mark.parametrize("shape", [(1, 1000), (23, 600), (2, 33001), (258, 24)], ids=str)
def test_statistics_of_rows(kernels: Path, shape: tuple[int, int], reduction: str, labels: str) -> None:
    """The reference has the definition: a NaN is the worst, the first of equal ones counts, and two labels share the target."""
    n_rows, n_cols = shape
    logits = make_logits(min(n_rows, 11), n_cols).repeat(-(-n_rows // 11), 1)[:n_rows] if n_rows > 1 else make_logits(*shape)
    target = torch.arange(n_rows, device=logits.device) % 11
    target[::7] = logits[::7].argmax(1)
    target[2::5] = -100
    labels = (target, target.roll(1), torch.linspace(0, 1, n_rows, device=logits.device)) if labels == "two labels" else target
    for poisoned in (False, True):
        if poisoned:
            logits[n_rows // 2, 5] = torch.nan
            target[n_rows // 2] = logits[n_rows // 2].nan_to_num(-torch.inf).argmax()
        loss, stats = fusedloss.cross_entropy(logits.requires_grad_(), labels, reduction=reduction, return_stats=True)
        with fusedloss.backend("reference"):
            _, expected = fusedloss.cross_entropy(logits.detach(), labels, reduction=reduction, return_stats=True)
        assert stats[2:5] == expected[2:5]
        of_rows, expected_of_rows = (found[:2] + found[5:] for found in (stats, expected))
        torch.testing.assert_close(of_rows, expected_of_rows, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert poisoned == loss.isnan().any()
        logits = logits.detach().clone()
