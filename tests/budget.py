"""The error budget of every comparison: twice PyTorch's own error in the dtype plus one rounding of the largest value.

On a GPU, float32 may be off by more than roundings: its exp and its division have relative errors of up to 2^-22 (PTX:
ex2.approx, div.full), where a CPU's are rounded correctly. An element of the gradient, exp / sum, has three of them: of the exp,
of the sum of exps, of the division; a loss, log(sum) / denominator, has two. Shorter types round such errors away.

The softcap's gradient, 1 - t^2 of a rounded t, is within the same. sech^2 from the exponential, 4 e / (1 + e)^2, was tried: it is
more exact where t is near 1, and takes 8 to 20 % more instructions per logit; there the gradient is small beside the largest.
"""

import torch
from torch import Tensor

GPU_NOISE = 2.0  # times what PTX promises: log and tanh have errors of their own
noise = 0.0  # the same for the interpreter, as `pytest --noise` adds it


def approximation(actual: Tensor) -> float:
    """The relative error of a result that approximate exp and division explain."""
    if actual.dtype != torch.float32:
        return 0.0
    return 3 * 2.0**-22 * (GPU_NOISE if actual.is_cuda else noise)


def assert_within_budget(
    actual: Tensor, torchs: Tensor, exact: Tensor, what: str = "result", roundings: int = 1, terms: float = 0.0
) -> None:
    """Fails unless |actual - exact| <= 2 (max|torchs - exact| + roundings eps max|exact|), naming the worst element. On a GPU
    approximation(actual) max|exact| is added.

    Args:
        actual: what fusedloss computed.
        torchs: what PyTorch computed in the same dtype.
        exact: the same in float64. NaN and infinity must be where it has them; one that lies beyond actual's dtype is infinite.
        roundings: more than 1 where PyTorch's error may be 0 by luck and ours a few roundings: random problems.
        terms: the largest of the terms whose difference each element is; it stands for max|exact| where that is less.
    """
    __tracebackhide__ = True
    assert actual.shape == exact.shape == torchs.shape, f"{what}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    assert actual.dtype == torchs.dtype, f"{what}: {actual.dtype}, expected {torchs.dtype}"
    if exact.numel() == 0:
        return
    exact = exact.detach().double().cpu()
    special = ~exact.to(actual.dtype).isfinite()
    expected = exact.to(actual.dtype).double()
    found = actual.detach().double().cpu()
    theirs = torchs.detach().double().cpu()

    wrong_special = torch.where(
        special | ~found.isfinite(), (found != expected) & ~(found.isnan() & expected.isnan()), torch.zeros_like(special)
    )
    if wrong_special.any():
        at = tuple(wrong_special.nonzero()[0].tolist())
        raise AssertionError(f"{what}: {found[at].item()!r} at {list(at)}, expected {exact[at].item()!r}")

    usual = ~special
    if not usual.any():
        return
    errors = torch.where(usual, (found - exact).abs(), 0.0)
    torch_errors = torch.where(usual & theirs.isfinite(), (theirs - exact).abs(), 0.0)
    # What lies below the smallest normal number has that number's rounding, not its own.
    largest = torch.where(usual, exact.abs(), 0.0).max()
    largest = largest.clamp(min=max(terms, torch.finfo(actual.dtype).smallest_normal))
    rounding = roundings * torch.finfo(actual.dtype).eps * largest
    if actual.dtype == torch.float64:  # the reference is as rough as what it measures: x - max - log(sum), the log of order 1
        rounding = 4 * rounding.clamp(min=torch.finfo(torch.float64).eps)
    limit = 2 * (torch_errors.max() + rounding) + approximation(actual) * largest
    if (errors > limit).any():
        at = tuple(torch.unravel_index(errors.argmax(), errors.shape))
        place = [int(i) for i in at]
        raise AssertionError(
            f"{what}: worst element {place} of {list(errors.shape)}: {found[at].item()!r}, expected {exact[at].item()!r}; "
            f"error {errors[at].item():.3g} > {limit.item():.3g} = 2 x (torch's {torch_errors.max().item():.3g} + rounding "
            f"{rounding.item():.3g}) + {approximation(actual):.3g} x {largest.item():.3g}"
        )
