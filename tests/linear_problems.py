"""Problems and comparisons for the loss fused with the last linear layer."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from budget import assert_within_budget
from oracle import exact_loss, torch_loss
from problems import make_target
from torch import Tensor

import fusedloss


class Layer(NamedTuple):
    """A linear layer and its input; what is None is absent."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None

    def leaves(self, dtype: torch.dtype | None = None) -> "Layer":
        return Layer(*(None if part is None else part.detach().to(dtype or part.dtype).requires_grad_() for part in self))  # type: ignore[arg-type]

    def parts(self) -> list[Tensor]:
        return [part for part in self if part is not None]


def make_layer(
    *batch: int, n_features: int = 8, n_classes: int = 11, dtype: torch.dtype = torch.float32, bias: bool = True
) -> Layer:
    generator = torch.Generator().manual_seed(0)
    shapes = [(*batch, n_features), (n_classes, n_features), (n_classes,)]
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype) for shape in shapes]
    return Layer(
        *(part.to(torch.get_default_device()) for part in parts[:2]), parts[2].to(torch.get_default_device()) if bias else None
    )


def make_labels(n_rows: int, n_classes: int = 11) -> Tensor:
    return make_target(n_rows, n_classes=n_classes, ignored=-100)


def gradients(loss: Tensor, layer: Layer) -> list[Tensor]:
    """For an upstream gradient that is another for each row."""
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return list(torch.autograd.grad(loss, layer.parts(), upstream))


def check_layer(layer: Layer, target: Any, *, chunk_rows: int | None = None, roundings: int = 4, **options: Any) -> None:
    """Fails unless loss and gradients are within the budget of PyTorch's layer and loss, all measured against float64."""
    __tracebackhide__ = True
    ours, theirs, exact = layer.leaves(), layer.leaves(), layer.leaves(torch.float64)
    loss = fusedloss.linear_cross_entropy(
        ours.input, ours.weight, target, linear_bias=ours.bias, chunk_rows=chunk_rows, **options
    )
    torchs = torch_loss(F.linear(*theirs), target, **options)
    expected = exact_loss(F.linear(*exact), target, **options)
    assert_within_budget(loss, torchs, expected, "loss", roundings)
    for name, found, torch_gradient, exact_gradient in zip(
        Layer._fields, gradients(loss, ours), gradients(torchs, theirs), gradients(expected, exact), strict=False
    ):
        assert_within_budget(found, torch_gradient, exact_gradient, f"gradient of {name}", roundings)
