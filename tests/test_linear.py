"""linear_cross_entropy: the loss and the gradients of PyTorch's layer and loss, with the logits of one chunk at a time."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_problems import Layer, check_layer, gradients, make_labels, make_layer
from paths import CPU, GPU, INTERPRETER, Path
from problems import make_probabilities, make_weight
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fusedloss
from fusedloss import plan_linear
from fusedloss.plan_linear import BLOCK_CLASSES, MANY_CLASSES, class_ranges

N_ROWS, N_FEATURES, N_CLASSES = 23, 8, 11
REDUCTIONS: list[dict[str, Any]] = [
    {"reduction": "mean"},
    {"reduction": "sum", "scale": 0.25},
    {"reduction": "none", "scale": 0.25},
    {"reduction": "max"},
    {"reduction": "topk", "top_k": 4},
    {"reduction": "topk", "top_k": 0.3},
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1, "weight": "classes"},
    {"z_loss": 0.01, "logit_scale": 0.5, "softcap": 3.0, "sample_weight": "rows"},
    {"target": "probabilities", "weight": "classes"},
    {"target": "two labels"},
]


def _target_and_options(options: dict[str, Any], dtype: torch.dtype, n_classes: int = N_CLASSES) -> tuple[Any, dict[str, Any]]:
    rest, target = dict(options), make_labels(N_ROWS, n_classes)
    kind = rest.pop("target", "indices")
    if kind == "probabilities":
        target = make_probabilities(N_ROWS, n_classes, dtype=dtype)
    elif kind == "two labels":
        target = (target, target.roll(1), 0.25)
    if "weight" in rest:
        rest["weight"] = make_weight(n_classes, dtype)
    if "sample_weight" in rest:
        rest["sample_weight"] = torch.linspace(0, 2, N_ROWS).to(dtype)
    return target, rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    for reduction in REDUCTIONS if dtype == torch.float32 and path.backend != "triton" else REDUCTIONS[:3:2]:
        target, rest = _target_and_options(options, dtype)
        if dtype == torch.float64 and "weight" in rest:
            rest["weight"] = rest["weight"].double()
        check_layer(make_layer(N_ROWS, dtype=dtype), target, chunk_rows=10, **rest, **reduction)


@pytest.mark.parametrize("chunk_rows", [1, 7, 8, 23, 100, None])
@pytest.mark.parametrize("batch", [(23,), (1,), (0,), (2, 4), (3, 1, 2)], ids=str)
def test_shapes(batch: tuple[int, ...], chunk_rows: int | None) -> None:
    layer, n_rows = make_layer(*batch), torch.Size(batch).numel()
    target = make_labels(n_rows).reshape(batch)
    flat = Layer(layer.input.reshape(n_rows, N_FEATURES), layer.weight, layer.bias)
    for reduction in ("mean", "none"):
        ours, theirs = layer.leaves(), flat.leaves()
        loss = fusedloss.linear_cross_entropy(
            ours.input, ours.weight, target, linear_bias=ours.bias, reduction=reduction, chunk_rows=chunk_rows
        )
        expected = F.cross_entropy(F.linear(*theirs), target.reshape(-1), reduction=reduction)
        assert loss.shape == (batch if reduction == "none" else ())
        torch.testing.assert_close(loss.reshape(expected.shape), expected, equal_nan=True)
        for found, exact in zip(gradients(loss, ours), gradients(expected, theirs), strict=True):
            torch.testing.assert_close(found.reshape(exact.shape), exact)


def test_one_row_without_a_batch() -> None:
    layer = make_layer().leaves()
    for target in (torch.tensor(3), torch.tensor([3]), make_probabilities(1, N_CLASSES)[0]):
        for reduction in ("mean", "none"):
            loss = fusedloss.linear_cross_entropy(layer.input, layer.weight, target, linear_bias=layer.bias, reduction=reduction)
            # PyTorch's own backward takes no target of shape [1] there.
            expected = F.cross_entropy(F.linear(*layer), target.squeeze(), reduction=reduction)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(gradients(loss, layer), gradients(expected, layer))


def test_probabilities_and_two_labels_of_a_sequence() -> None:
    layer, labels = make_layer(2, 4), make_labels(8).reshape(2, 4)
    flat = Layer(layer.input.reshape(8, -1), layer.weight, layer.bias)
    soft = make_probabilities(8, N_CLASSES)
    share = torch.linspace(0, 1, 8).reshape(2, 4)
    for target, flat_target in (
        (soft.reshape(2, 4, N_CLASSES), soft),
        ((labels, labels.roll(1, 0), share), (labels.reshape(-1), labels.roll(1, 0).reshape(-1), share.reshape(-1))),
    ):
        loss = fusedloss.linear_cross_entropy(layer.input, layer.weight, target, linear_bias=layer.bias, reduction="none")
        expected = fusedloss.cross_entropy(F.linear(*flat), flat_target, reduction="none")
        torch.testing.assert_close(loss.reshape(8), expected)


@pytest.mark.parametrize("shape", [(3,), (2, 3)], ids=str)
def test_k_dimensional_loss(shape: tuple[int, ...]) -> None:
    input, weight = make_layer(5).input.requires_grad_(), torch.randn(N_CLASSES, *shape, N_FEATURES, requires_grad=True)
    bias, target = torch.randn(N_CLASSES, *shape), torch.randint(N_CLASSES, (5, *shape))
    loss = fusedloss.linear_cross_entropy(input, weight, target, linear_bias=bias, reduction="none")
    logits = torch.tensordot(input, weight, ([1], [weight.dim() - 1])) + bias
    expected = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), weight), torch.autograd.grad(expected.sum(), weight))


# Matmuls per counted row: logits, gradient of the input, gradient of the weight; 8 of 24 rows are ignored.
@pytest.mark.parametrize(
    ("options", "frozen", "matmuls"),
    [
        ({}, "", 3),
        ({"reduction": "sum"}, "", 3),
        ({"reduction": "none"}, "", 4),
        ({"reduction": "topk", "top_k": 4}, "", 1 + 3 * 4 / 16),
        ({"reduction": "topk", "top_k": 0.25}, "", 1 + 3 * 4 / 16),
        ({"reduction": "max"}, "", 1 + 3 * 1 / 16),
        ({}, "weight", 2),
        ({}, "input", 2),
        ({}, "input weight", 1),
        ({}, "input weight bias", 1),
        ({"reduction": "none"}, "weight", 3),
    ],
    ids=str,
)
def test_matmuls_per_counted_row(options: dict[str, Any], frozen: str, matmuls: float) -> None:
    layer = make_layer(24)
    for name, part in zip(Layer._fields, layer, strict=True):
        assert part is not None
        part.requires_grad_(name not in frozen.split())
    target = torch.arange(24) % N_CLASSES
    target[::3] = -100
    with FlopCounterMode(display=False) as counter:
        loss = fusedloss.linear_cross_entropy(layer.input, layer.weight, target, linear_bias=layer.bias, chunk_rows=5, **options)
        if loss.requires_grad:
            loss.sum().backward()
    assert counter.get_total_flops() == matmuls * 16 * 2 * N_FEATURES * N_CLASSES
    for name, part in zip(Layer._fields, layer, strict=True):
        assert part is not None
        assert (part.grad is None) == (name in frozen.split())


@pytest.mark.parametrize("path", [CPU, INTERPRETER, GPU], indirect=True)  # PyTorch's layer multiplies whatever it is given
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("options", [{}, {"reduction": "topk", "top_k": 4}], ids=str)
def test_rows_that_do_not_count_are_multiplied_on_a_gpu_unless_asked(path: Path, options: dict[str, Any], compact: bool) -> None:
    layer, target = make_layer(24), torch.arange(24) % N_CLASSES
    target[::3] = -100
    layer.input[::3] = torch.nan
    leaves = layer.leaves()
    with FlopCounterMode(display=False) as counter:
        loss = fusedloss.linear_cross_entropy(leaves.input, leaves.weight, target, compact=compact, chunk_rows=5, **options)
        gradient = torch.autograd.grad(loss, (leaves.input, leaves.weight))
    clean = Layer(layer.input.nan_to_num(0), layer.weight, None).leaves()
    expected = fusedloss.linear_cross_entropy(clean.input, clean.weight, target, compact=True, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, (clean.input, clean.weight)))
    if path.backend == "cpu" or compact:
        rows = 16 + 3 * 4 if options else 3 * 16
    else:
        rows = 24 * (4 if options else 3)
    assert counter.get_total_flops() == rows * 2 * N_FEATURES * N_CLASSES


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "max"])
def test_all_ignored(path: Path, reduction: str) -> None:
    layer = make_layer(5).leaves()
    target = torch.full((5,), -100)
    loss = fusedloss.linear_cross_entropy(layer.input, layer.weight, target, linear_bias=layer.bias, reduction=reduction)
    expected = fusedloss.cross_entropy(F.linear(*layer), target, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    if reduction != "max" or path.backend != "reference":
        for gradient in torch.autograd.grad(loss.sum(), layer.parts()):
            assert (gradient == 0).all()


@pytest.mark.parametrize("options", [{}, {"reduction": "topk", "top_k": 2}, {"reduction": "none"}], ids=str)
def test_an_ignored_row_may_hold_nan(options: dict[str, Any]) -> None:
    layer, target = make_layer(6), torch.tensor([1, -100, 3, 4, -100, 6])
    clean = layer.leaves()
    layer.input[target == -100] = torch.nan
    dirty = layer.leaves()
    results = []
    for used in (clean, dirty):
        loss = fusedloss.linear_cross_entropy(used.input, used.weight, target, linear_bias=used.bias, chunk_rows=4, **options)
        results.append([loss, *torch.autograd.grad(loss.sum(), used.parts())])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_statistics() -> None:
    layer, target = make_layer(2, 12), make_labels(24).reshape(2, 12)
    for reduction in ("mean", "none", "max"):
        for used in (layer, layer.leaves()):
            _, stats = fusedloss.linear_cross_entropy(
                used.input, used.weight, target, linear_bias=used.bias, reduction=reduction, chunk_rows=5, return_stats=True
            )
            logits = F.linear(*layer)
            _, expected = fusedloss.cross_entropy(logits.reshape(24, -1), target.reshape(-1), return_stats=True)
            assert stats.lse.shape == stats.row_loss.shape == (2, 12)
            for found, exact in zip(stats, expected, strict=True):
                torch.testing.assert_close(found.reshape(exact.shape), exact)


def test_scale_may_be_a_tensor_with_a_gradient() -> None:
    layer, target = make_layer(9).leaves(), make_labels(9)
    for reduction in ("mean", "none"):
        scale = torch.tensor(0.5, requires_grad=True)
        loss = fusedloss.linear_cross_entropy(layer.input, layer.weight, target, reduction=reduction, scale=scale)
        plain = F.cross_entropy(F.linear(layer.input, layer.weight), target, reduction=reduction)
        found = torch.autograd.grad(loss.sum(), (scale, layer.input))
        torch.testing.assert_close(found, (plain.sum(), 0.5 * torch.autograd.grad(plain.sum(), layer.input)[0]))


@pytest.mark.parametrize("n_chunks", [1, 2, 3, 4, 5, 16, 64, 256])
def test_the_sum_of_a_bfloat16_weights_gradient(n_chunks: int) -> None:
    """Its error is that of one rounding or two, whatever the number of chunks: a sum in bfloat16 over 256 would be off by 11."""
    layer, target = make_layer(512, n_classes=64, dtype=torch.bfloat16, bias=False), torch.arange(512) % 64
    exact = layer.leaves(torch.float64)
    logits = (exact.input @ exact.weight.t()).bfloat16().double()  # the logits, too, are rounded
    (dlogits,) = torch.autograd.grad(F.cross_entropy(logits.requires_grad_(), target), logits)
    expected = dlogits.t() @ exact.input
    rounding = (expected.bfloat16().double() - expected).norm()
    weight = layer.weight.detach().requires_grad_()
    loss = fusedloss.linear_cross_entropy(layer.input, weight, target, chunk_rows=512 // n_chunks)
    (found,) = torch.autograd.grad(loss, weight)
    assert (found.double() - expected).norm() <= 1.7 * rounding


@pytest.mark.parametrize("chunk_rows", [8, 4, 2])
def test_a_bfloat16_weights_gradient_in_two_ranges_of_classes(chunk_rows: int) -> None:
    """Which the CPU makes apart; one chunk, a rounded sum of two, and a sum in float32."""
    n_classes = MANY_CLASSES + BLOCK_CLASSES + 3
    assert class_ranges(n_classes, torch.bfloat16, "cpu") == [slice(0, n_classes - 3), slice(n_classes - 3, n_classes)]
    layer = make_layer(8, n_features=4, n_classes=n_classes, dtype=torch.bfloat16)
    target = torch.tensor([0, n_classes - 1, n_classes - 3, n_classes - 4, 5, 1000, n_classes - 2, n_classes - 2])
    check_layer(layer, target, chunk_rows=chunk_rows)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_from_blocks_of_classes(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """As the CPU makes them where no gradient is wanted: 4 blocks of 16 classes at most, chunks of 6 rows."""
    monkeypatch.setattr(plan_linear, "BLOCK_BYTES", 6 * 16 * dtype.itemsize)
    monkeypatch.setattr(plan_linear, "BLOCK_ROWS", 7)
    n_classes = 52
    is_soft = options.get("target") == "probabilities"
    cut = plan_linear.chunks_of(N_ROWS, n_classes, dtype, "cpu", None, losses_only=True)
    assert cut == (N_ROWS, 6, 4, 16)
    target, rest = _target_and_options(options, dtype, n_classes)
    layer = make_layer(N_ROWS, n_classes=n_classes, dtype=dtype)
    for reduction in REDUCTIONS[2:] if dtype == torch.float32 else REDUCTIONS[2:3]:
        check_layer(layer, target, **rest, **reduction)
    logits = F.linear(*layer)
    expected = fusedloss.cross_entropy(logits, target, return_stats=True, out_dtype=torch.float32, **rest)
    with FlopCounterMode(display=False) as counter:
        found = fusedloss.linear_cross_entropy(
            layer.input, layer.weight, target, linear_bias=layer.bias, return_stats=True, out_dtype=torch.float32, **rest
        )
    n_counted = int(expected[1].n_counted)
    assert counter.get_total_flops() == n_counted * 2 * N_FEATURES * n_classes
    assert is_soft == (n_counted == N_ROWS)
    torch.testing.assert_close(found, expected)
    if not is_soft:
        labels = torch.full((N_ROWS,), n_classes)
        labels[:7] = -100
        with pytest.raises(IndexError, match=r"Target 52 is out of bounds. \(n_classes 52, at position \[7\]\)"):
            fusedloss.linear_cross_entropy(layer.input, layer.weight, labels, linear_bias=layer.bias)


@pytest.mark.parametrize("at", [[0], [0, 1], [20, 40], [40]], ids=str)
@pytest.mark.parametrize("infinite", [torch.inf, -torch.inf], ids=str)
def test_blocks_of_classes_with_infinite_logits(monkeypatch: pytest.MonkeyPatch, infinite: float, at: list[int]) -> None:
    """Have the statistics of whole rows: the largest may be inf in one block, and in others not."""
    monkeypatch.setattr(plan_linear, "BLOCK_BYTES", 4 * 16 * 4)
    layer, target = make_layer(4, n_classes=52), torch.tensor([0, 20, 40, 51])
    assert layer.bias is not None
    layer.bias[at] = infinite
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.01}):
        arguments: dict[str, Any] = {"linear_bias": layer.bias, "reduction": "none", "return_stats": True, **options}
        found = fusedloss.linear_cross_entropy(layer.input, layer.weight, target, **arguments)
        whole = fusedloss.linear_cross_entropy(layer.input, layer.weight, target, chunk_rows=4, **arguments)
        torch.testing.assert_close(found, whole, equal_nan=True)


def test_no_logits_are_kept() -> None:
    """Neither by autograd, nor by checkpointing, which keeps what is packed."""
    layer, target = make_layer(64, n_features=2, n_classes=32).leaves(), torch.arange(64) % 32
    for reduction in ("mean", "none", "max"):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.append(tensor) or tensor, lambda tensor: tensor
        ):
            loss = fusedloss.linear_cross_entropy(
                layer.input, layer.weight, target, linear_bias=layer.bias, reduction=reduction, chunk_rows=16
            )
        assert max(tensor.numel() for tensor in saved) <= layer.input.numel()
        assert loss.grad_fn is not None


def test_the_plan() -> None:
    """Of a language model's head, which need not exist; matmuls as the test above counts them."""
    weight = torch.empty(50257, 768, dtype=torch.bfloat16, device="meta", requires_grad=True)
    input = torch.empty(2, 512, 768, dtype=torch.bfloat16, device="meta", requires_grad=True)
    target = torch.empty(2, 512, dtype=torch.int64, device="meta")
    with fusedloss.backend("cpu"):
        fused = fusedloss.plan(input, target, linear_weight=weight)
        assert (fused.strategy, fused.chunk_rows, fused.n_chunks, fused.matmuls) == ("fused", 512, 2, 3)
        assert fused.held_bytes == 512 * 50257 * 2
        many = fusedloss.plan(input, target, linear_weight=weight, chunk_rows=64)
        assert many.held_bytes == 64 * 50257 * 2 + 50257 * 768 * 4  # and a sum in float32
        few = fusedloss.plan(input, target, linear_weight=weight, reduction="topk", top_k=256)
        assert (few.strategy, few.matmuls) == ("recompute", 1 + 3 / 4)
        assert (few.chunk_rows, few.n_chunks, few.held_bytes) == (1024, 1, 512 * 50257 * 2)  # the backward's chunk
        losses = fusedloss.plan(input.detach(), target, linear_weight=weight.detach())
        assert (losses.matmuls, losses.chunk_rows, losses.held_bytes) == (1, 1024, 1024 * 12576 * 2)
        few_classes = fusedloss.plan(
            torch.empty(10**6, 16, device="meta"),
            torch.empty(10**6, dtype=torch.int64, device="meta"),
            linear_weight=torch.empty(10, 16, device="meta"),
        )
        assert (few_classes.chunk_rows, few_classes.n_chunks, few_classes.held_bytes) == (25_000, 40, 10**6)
    deep = torch.empty(5, 3, 8)
    unfused = fusedloss.plan(torch.empty(4, 8), torch.empty(4, 3, dtype=torch.int64), linear_weight=deep)
    assert unfused.strategy == "unfused"
    assert "(C, d1, ..., F)" in unfused.reason
    assert "3 per counted row" in str(fused)
    for backend in ("auto", "reference"):
        with fusedloss.backend(backend):
            one_row = fusedloss.plan(torch.empty(8), torch.tensor(2), linear_weight=torch.empty(5, 8))
        assert (one_row.chunk_rows, one_row.n_chunks) == (1, 1)
