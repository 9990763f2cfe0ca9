"""linear_cross_entropy's entropies: their gradient under reduction "none", from logits that are made again and never stored."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_problems import Layer, make_labels, make_layer
from paths import Path
from problems import make_probabilities, make_weight
from test_entropy import TRANSFORMS, entropies
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fusedloss

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
N_ROWS, N_FEATURES, N_CLASSES = 23, 8, 11


def both(layer: Layer, target: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Losses and entropies of the rows, in chunks."""
    losses, stats = fusedloss.linear_cross_entropy(
        layer.input,
        layer.weight,
        target,
        linear_bias=layer.bias,
        reduction="none",
        return_stats=True,
        **{"chunk_rows": 5, **options},
    )
    return losses, stats.entropy


def exact(layer: Layer, target: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The same with stored logits."""
    transforms = {name: value for name, value in options.items() if name in TRANSFORMS}
    labels = target if isinstance(target, Tensor) else target[0]
    labels = torch.zeros(N_ROWS) if labels.is_floating_point() else labels  # probabilities ignore no row
    logits = F.linear(*layer)
    return fusedloss.cross_entropy(logits, target, reduction="none", **options), entropies(logits, labels, **transforms)


def with_bonus(losses: Tensor, entropy: Tensor, share: float) -> Tensor:
    """A policy's loss with an entropy bonus; rows of either alone among them."""
    row_factors, bonus = torch.linspace(-1, 1, N_ROWS, dtype=FP64), torch.linspace(2, -1, N_ROWS, dtype=FP64)
    row_factors[3], bonus[4] = 0, 0
    return (share * row_factors * losses).sum() + (bonus * entropy).sum() if share else (bonus * entropy).sum()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "transforms": TRANSFORMS,
    "everything": {**TRANSFORMS, "weight": True, "label_smoothing": 0.1, "z_loss": 0.01, "sample_weight": True, "scale": 3.0},
    "two labels": {"two_labels": True},
}


@pytest.mark.gpu_sweep
@pytest.mark.parametrize("dtype", [FP32, FP64, BF16, FP16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_gradient(path: Path, name: str, dtype: torch.dtype) -> None:
    layer, options, target = make_layer(N_ROWS, dtype=dtype), dict(OPTIONS[name]), make_labels(N_ROWS)
    given: Any = target
    if options.pop("two_labels", False):
        other = target.roll(3)
        given = (target, other.masked_fill(other == -100, 1), 0.3)
    if options.pop("weight", False):
        options["weight"] = make_weight(N_CLASSES, dtype)
    if options.pop("sample_weight", False):
        options["sample_weight"] = torch.linspace(0.5, 2, N_ROWS, dtype=dtype)
    exact_options = {key: value.double() if isinstance(value, Tensor) else value for key, value in options.items()}
    reference = layer.leaves(FP64)
    rounding = 2 * torch.finfo(dtype).eps if dtype != FP64 else 1e-13
    for share in (1.0, 0.0):
        expected = torch.autograd.grad(with_bonus(*exact(reference, given, **exact_options), share), reference.parts())
        for compact in (False, True):
            ours = layer.leaves()
            losses, entropy = both(ours, given, compact=compact, **options)
            found = torch.autograd.grad(with_bonus(losses, entropy, share), ours.parts())
            for gradient, answer in zip(found, expected, strict=True):
                assert gradient.dtype == dtype
                largest = answer.abs().max().item()  # of the rounded logits, of their gradient, and of the sum
                torch.testing.assert_close(gradient.double(), answer, rtol=0, atol=6 * rounding * max(1, largest))


def test_gradient_with_probabilities() -> None:
    """Whose statistics have no kernel: PyTorch's layer."""
    layer, target = make_layer(N_ROWS, dtype=FP64).leaves(), make_probabilities(N_ROWS, N_CLASSES, dtype=FP64)
    found, expected = (torch.autograd.grad(with_bonus(*of(layer, target), 1.0), layer.parts()) for of in (both, exact))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_without_a_loss_of_it_the_gradient_is_the_same(path: Path) -> None:
    layer, target = make_layer(N_ROWS).leaves(), make_labels(N_ROWS)
    found = torch.autograd.grad(both(layer, target)[0].sum(), layer.parts())
    losses = fusedloss.linear_cross_entropy(
        layer.input, layer.weight, target, linear_bias=layer.bias, reduction="none", chunk_rows=5
    )
    for gradient, expected in zip(found, torch.autograd.grad(losses.sum(), layer.parts()), strict=True):
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("reduction", "dtype"), [("mean", FP32), ("sum", FP16), ("max", FP32), ("none", FP32)])
def test_which_statistics_have_a_gradient(backend: str, reduction: str, dtype: torch.dtype) -> None:
    layer, target = make_layer(6, dtype=dtype).leaves(), make_labels(6)
    with fusedloss.backend(backend):
        loss, stats = fusedloss.linear_cross_entropy(layer.input, layer.weight, target, reduction=reduction, return_stats=True)
    assert loss.requires_grad
    assert [value.requires_grad for value in stats] == [False] * 5 + [reduction == "none"]


def test_no_matmul_more(path: Path) -> None:
    """Rows with neither gradient are left out, frozen parts have none: the entropies add no matmul."""
    if path.backend == "reference":
        pytest.skip("PyTorch's layer multiplies all")
    layer, target = make_layer(N_ROWS).leaves(), torch.arange(N_ROWS) % N_CLASSES
    for share in (1.0, 0.0):
        with FlopCounterMode(display=False) as counter:
            losses, entropy = both(Layer(layer.input, layer.weight.detach(), layer.bias), target, compact=True)
            (share * losses[:9].sum() + entropy[3:15].sum()).backward()
        n_rows = N_ROWS + 2 * (15 if share else 12)
        assert counter.get_total_flops() == n_rows * 2 * N_FEATURES * N_CLASSES


def test_derivatives_of_any_order(path: Path) -> None:
    layer, target = make_layer(4, n_classes=5, dtype=FP64).leaves(), torch.tensor([1, -100, 3, 4])

    def of_layer(*parts: Tensor) -> tuple[Tensor, Tensor]:
        return both(Layer(*parts), target, chunk_rows=3, z_loss=0.1, **TRANSFORMS)

    assert torch.autograd.gradcheck(of_layer, layer.parts())
    assert torch.autograd.gradgradcheck(of_layer, layer.parts())
    found = of_layer(*layer.parts())[1]
    (expected,) = torch.autograd.grad(found.sum(), layer.input, retain_graph=True)
    batch = torch.stack([torch.ones_like(found), torch.zeros_like(found)])
    (batched,) = torch.autograd.grad(found, layer.input, batch, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack([expected, torch.zeros_like(expected)]))


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_compiles(share: float) -> None:
    layer, target = make_layer(N_ROWS).leaves(), make_labels(N_ROWS)

    def step(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        losses, entropy = both(Layer(input, weight, bias), target)
        return share * losses.sum() - 0.5 * entropy.sum() if share else -0.5 * entropy.sum()

    torch.compiler.reset()
    compiled, expected = torch.compile(step, fullgraph=True, backend="aot_eager")(*layer), step(*layer)
    torch.testing.assert_close(compiled, expected)
    for found, gradient in zip(*(torch.autograd.grad(loss, layer.parts()) for loss in (compiled, expected)), strict=True):
        torch.testing.assert_close(found, gradient)
    torch.compiler.reset()


def test_ignored_rows_may_hold_nan(path: Path) -> None:
    if path.backend == "reference":
        pytest.skip("PyTorch's layer multiplies all")
    clean, target = make_layer(N_ROWS), make_labels(N_ROWS)
    dirty = Layer(clean.input.masked_fill((target == -100).unsqueeze(1), torch.nan), *clean[1:])
    found = []
    for layer in (clean.leaves(), dirty.leaves()):
        losses, entropy = both(layer, target)
        found.append([losses, entropy, *torch.autograd.grad(with_bonus(losses, entropy, 1.0), layer.parts())])
    for values, expected in zip(*found, strict=True):
        assert torch.equal(values, expected)


def test_shapes() -> None:
    """(N, d1, F) and (F,): the entropies have the losses' shape."""
    layer, labels = make_layer(2, 4).leaves(), torch.arange(8).reshape(2, 4)
    losses, entropy = both(layer, labels)
    (found,) = torch.autograd.grad(entropy.sum(), layer.input)
    assert losses.shape == entropy.shape == labels.shape
    for place in ((0, 1), (1, 3)):
        row = Layer(layer.input[place].detach().requires_grad_(), layer.weight, layer.bias)
        of_row = both(row, labels[place])[1]
        assert of_row.shape == ()
        torch.testing.assert_close(of_row, entropy[place])
        torch.testing.assert_close(torch.autograd.grad(of_row, row.input)[0], found[place])
