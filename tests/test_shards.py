"""Rows whose classes lie in shards, on every backend: as exact as whole rows, from statistics that each shard publishes."""

from types import ModuleType
from typing import Any

import pytest
import torch
from paths import Path
from problems import make_logits, make_target
from shard_problems import check_shards, make_sharded_problem, shard_call, sharded_entropies, sharded_rows

import fusedloss
from fusedloss import sharded, shards
from fusedloss.backends import cpu, triton
from fusedloss.plan import ClassShard, Inputs, Options

# Of Triton's interpreter: pixels are read with ignored neighbours.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def module_of(path: Path) -> ModuleType:
    return {"reference": shards, "cpu": cpu}.get(path.backend, triton)


OPTIONS: dict[str, dict[str, Any]] = {
    "index": {},
    "smoothing": {"label_smoothing": 0.1},
    "weight, smoothing": {"weight": True, "label_smoothing": 0.1},
    "two labels": {"target": "two labels", "weight": True},
    "two labels, smoothing": {"target": "two labels", "label_smoothing": 0.1},
    "probabilities": {"target": "probabilities"},
    "probabilities, weight, smoothing": {"target": "probabilities", "weight": True, "label_smoothing": 0.1},
    "softcap": {"softcap": 5.0, "logit_scale": 0.7},
    "z_loss": {"z_loss": 0.01, "weight": True},
    "all": {"target": "two labels", "weight": True, "label_smoothing": 0.1, "softcap": 5.0, "logit_scale": 0.7, "z_loss": 0.01},
}
# (N, C, d1, ...) and the widths of the shards, each here for the code it reaches.
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "packed rows": ((37, 10), (3, 6, 1)),
    "shared tiles": ((5, 300), (100, 200)),
    "ragged rows": ((5, 1338), (1001, 337)),
    "rows that begin inside a sector": ((3, 3084), (2056, 1028)),
    "shards of shards": ((2, 33301), (33001, 300)),
    "pixels": ((2, 5, 6, 7), (2, 3)),
    "pixels of more classes than registers hold": ((1, 3360, 3), (10, 3350)),
}
OFTEN = [(shape, options) for shape in ("packed rows", "ragged rows", "pixels") for options in OPTIONS]
OFTEN += [(shape, options) for shape in SHAPES for options in ("all", "weight, smoothing") if (shape, options) not in OFTEN]
SELDOM = [(shape, options) for shape in SHAPES for options in OPTIONS if (shape, options) not in OFTEN]


@pytest.mark.parametrize(
    ("shape", "options"), [*OFTEN, *(pytest.param(*case, marks=pytest.mark.sweep) for case in SELDOM)], ids=str
)
def test_shards_are_as_exact_as_whole_rows(path: Path, shape: str, options: str) -> None:
    check_shards(module_of(path), *SHAPES[shape], FP32, **OPTIONS[options])


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("options", ["index", "weight, smoothing", "probabilities", "all"])
@pytest.mark.parametrize("shape", ["packed rows", "ragged rows", "shards of shards", "pixels"])
def test_entropy(path: Path, shape: str, options: str, dtype: torch.dtype) -> None:
    given, (sizes, widths) = dict(OPTIONS[options]), SHAPES[shape]
    logits, target, weight = make_sharded_problem(sizes, given, dtype)
    logits[0, : widths[0]] = -torch.inf  # a shard may have no shard in a row
    z = logits.double() * given.get("logit_scale", 1.0)
    z = given["softcap"] * torch.tanh(z / given["softcap"]) if "softcap" in given else z
    counted = ~logits.isnan().any(1)
    expected = torch.where(counted, torch.special.entr(z.softmax(1)).sum(1), 0).flatten()
    found = sharded_entropies(module_of(path), logits, target, weight, widths, **given)
    limit = 1e-13 if dtype == FP64 else 2e-6
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)


@pytest.mark.gpu_sweep
@pytest.mark.parametrize("dtype", [BF16, FP64], ids=str)
@pytest.mark.parametrize("options", ["all", "probabilities, weight, smoothing"])
@pytest.mark.parametrize("shape", ["packed rows", "rows that begin inside a sector", "pixels"])
def test_other_dtypes(path: Path, shape: str, options: str, dtype: torch.dtype) -> None:
    check_shards(module_of(path), *SHAPES[shape], dtype, **OPTIONS[options])


@pytest.mark.gpu_sweep
@pytest.mark.parametrize("options", ["smoothing", "probabilities"])
@pytest.mark.parametrize("shape", ["packed rows", "ragged rows"])
def test_a_common_offset_costs_no_digits(path: Path, shape: str, options: str) -> None:
    """A shard without the target must not measure its logits from the place where the target would be."""
    given = dict(OPTIONS[options])
    logits, target, _ = make_sharded_problem(SHAPES[shape][0], given, FP32)
    dlosses = torch.ones(logits.shape[0])
    moved = (logits + 1024).round()  # 10 bits of the integer, none of the fraction: the same differences
    for values, offset in ((moved, 0.0), (moved - 1024, 1024.0)):
        found = sharded_rows(module_of(path), values, target, None, SHAPES[shape][1], dlosses, **given)
        if offset == 0:
            expected = found
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("shape", "target_dtype"),
    [("packed rows", torch.int64), ("packed rows", torch.uint8), ("ragged rows", torch.int64), ("pixels", torch.uint8)],
    ids=str,
)
def test_a_class_of_no_shard(path: Path, shape: str, target_dtype: torch.dtype) -> None:
    """NaN for its row, in all shards; on the CPU, where the indices are looked at, an error."""
    (sizes, widths), n_classes = SHAPES[shape], SHAPES[shape][0][1]
    logits = make_logits(*sizes)
    target = make_target(sizes[0], *sizes[2:], n_classes=n_classes)
    bad = torch.zeros_like(target, dtype=torch.bool)
    bad.view(-1)[2] = True
    target = target.masked_fill(bad, n_classes).to(target_dtype)
    dlosses = torch.ones(target.shape)
    if path.backend == "cpu":
        with pytest.raises(IndexError, match=f"Target {n_classes} is out of bounds"):
            sharded_rows(cpu, logits, target, None, widths, dlosses)
        return
    losses, gradient = sharded_rows(module_of(path), logits, target, None, widths, dlosses)
    assert torch.equal(losses.isnan(), bad)
    assert torch.equal(gradient.isnan(), bad.unsqueeze(1).expand_as(gradient))


def test_the_backend_that_is_asked_for(path: Path) -> None:
    whole, none = (shard_call(make_logits(2, n), make_target(2, n_classes=9), None, ClassShard(0, 9))[0] for n in (9, 0))
    assert sharded._backend(whole) is module_of(path)
    assert sharded._backend(none) is shards  # a rank whose classes are all padding


def test_a_backend_that_is_asked_for_and_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = shard_call(make_logits(2, 9), make_target(2, n_classes=9), None, ClassShard(0, 9))
    monkeypatch.setattr(cpu, "MISSING", "the kernel is missing: a test")
    with fusedloss.backend("cpu"), pytest.raises(RuntimeError, match="backend 'cpu' was asked for, but the kernel is missing"):
        sharded._backend(whole)


@pytest.mark.parametrize("n_classes", [10, 600])
def test_padded_rows(path: Path, n_classes: int) -> None:
    """A shard's rows may lie apart, as those of a shard that is padded to a round number of classes."""
    logits = make_logits(5, n_classes + 24)
    target, dlosses = make_target(5, n_classes=n_classes), torch.ones(5)
    padded = sharded_rows(module_of(path), logits[:, :n_classes], target, None, (n_classes,), dlosses)
    dense = sharded_rows(module_of(path), logits[:, :n_classes].contiguous(), target, None, (n_classes,), dlosses)
    torch.testing.assert_close(padded, dense)


def test_bytes_lie_where_their_class_does() -> None:
    """156 is -100 to bytes."""
    labels = torch.tensor([156, 44, 3])
    for dtype in (torch.uint8, torch.int64):
        inputs = Inputs(torch.zeros(3, 300), labels.to(dtype))
        ((here, at),) = shards._positions(inputs, Options(), ClassShard(0, 300))
        assert here.all()
        assert at.squeeze(1).tolist() == labels.tolist()
