"""Inputs for the tests: logits with outliers, targets with ignored rows, class weights."""

import torch
from torch import Tensor


def make_logits(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 2.0) -> Tensor:
    """Logits (N, C, ...) with outliers: about one in fifty is 8 times larger, so that probabilities are neither all alike nor
    all zero, and the maximum of a row is not where the target is."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    outliers = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu") < 0.02
    return torch.where(outliers, 8 * logits, logits).to(dtype).to(torch.get_default_device())


def make_target(*shape: int, n_classes: int, ignored: int | None = None, seed: int = 1) -> Tensor:
    """Class indices; with `ignored`, about a quarter of the rows, the first among them, carry that index."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(n_classes, shape, generator=generator, device="cpu")
    if ignored is not None and target.numel() > 1:
        mask = torch.rand(shape, generator=generator, device="cpu") < 0.25
        mask.view(-1)[0] = True
        mask.view(-1)[1] = False
        target[mask] = ignored
    return target.to(torch.get_default_device())


def make_probabilities(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    """Class probabilities (N, C, ...), a softmax along dim 1."""
    return make_logits(*shape, dtype=torch.float64, seed=seed).softmax(1).to(dtype)


def make_weight(n_classes: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    """One factor per class, between 0.25 and 1.75, exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    eighths = torch.randint(2, 15, (n_classes,), generator=generator, device="cpu")
    return (eighths.to(torch.float64) / 8).to(dtype).to(torch.get_default_device())
