"""Statistics of rows whose classes are sharded over four ranks, and the gradient of their entropies: what a rank finds."""

from typing import Any

import torch
import torch.distributed as dist
from problems import make_logits, make_target
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

import fusedloss
from fusedloss.distributed import vocab_parallel_cross_entropy

N_RANKS = 4
ROWS = 13
STATISTICS: dict[str, dict[str, Any]] = {
    "none": {"reduction": "none"},
    "mean, smoothing": {"label_smoothing": 0.1},
    "none, two labels, softcap": {"reduction": "none", "target": "two labels", "softcap": 5.0, "logit_scale": 0.7},
    "none, probabilities": {"reduction": "none", "target": "probabilities"},
    "sum, float64 probabilities of float32 logits": {"reduction": "sum", "target": "probabilities", "dtype": torch.float32},
}


def _problem(name: str) -> tuple[Tensor, Any, dict[str, Any]]:
    options = dict(STATISTICS[name])
    target: Any = make_target(ROWS, n_classes=20)
    target[2] = -100
    kind = options.pop("target", "indices")
    if kind == "two labels":
        target = (target, target.flip(0), 0.3)
    logits = make_logits(ROWS, 20, dtype=options.pop("dtype", torch.float64))
    logits[3, :5] = -torch.inf  # all of the first rank's
    return logits, make_logits(ROWS, 20, seed=5, dtype=torch.float64).softmax(1) if kind == "probabilities" else target, options


def statistics() -> dict[str, Any]:
    """What ranks know of the rows, and the gradient of a policy's loss with an entropy bonus."""
    found: dict[str, Any] = {}
    for name in STATISTICS:
        logits, target, options = _problem(name)
        shard = logits.tensor_split(N_RANKS, 1)[dist.get_rank()].clone().requires_grad_()
        with CommDebugMode() as forward:
            losses, stats = vocab_parallel_cross_entropy(shard, target, return_stats=True, **options)
        with CommDebugMode() as backward:
            (gradient,) = torch.autograd.grad(_with_bonus(losses, stats.entropy), shard)
        collectives = forward.get_total_counts(), backward.get_total_counts()
        found[name] = losses.detach(), [value.detach() for value in stats], gradient, collectives, stats.entropy.requires_grad
        if stats.entropy.requires_grad:
            _, stats = vocab_parallel_cross_entropy(shard, target, return_stats=True, **options)
            found[name, "alone"] = torch.autograd.grad(stats.entropy.sum(), shard)[0]
    return found


def _with_bonus(losses: Tensor, entropy: Tensor) -> Tensor:
    return losses.sum() + (torch.linspace(-1, 1, ROWS, dtype=torch.float64) * entropy).sum()


def check_statistics(name: str, results: list[dict[str, Any]]) -> None:
    """Fails unless all ranks found those of whole rows."""
    __tracebackhide__ = True
    logits, target, options = _problem(name)
    logits.requires_grad_()
    with fusedloss.backend("reference"):
        expected, stats = fusedloss.cross_entropy(logits, target, return_stats=True, **options)
    (gradient,) = torch.autograd.grad(_with_bonus(expected, stats.entropy), logits, retain_graph=True)
    for rank, found in enumerate(results):
        losses, found_stats, found_gradient, collectives, has_gradient = found[name]
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-14, atol=1e-14)
        for value, exact in zip(found_stats, stats, strict=True):
            torch.testing.assert_close(value, exact.detach(), rtol=1e-13, atol=1e-14)
        assert all(torch.equal(*pair) for pair in zip(found_stats, results[0][name][1], strict=True))
        assert has_gradient == stats.entropy.requires_grad == (options.get("reduction") == "none")
        assert collectives == (1, 0)
        mine = gradient.tensor_split(N_RANKS, 1)[rank]
        rounding = 1e-13 if mine.dtype == torch.float64 else 2e-7
        torch.testing.assert_close(found_gradient, mine, rtol=rounding, atol=1e-14)
        if has_gradient:
            (alone,) = torch.autograd.grad(stats.entropy.sum(), logits, retain_graph=True)
            mine = alone.tensor_split(N_RANKS, 1)[rank]
            torch.testing.assert_close(found[name, "alone"], mine, rtol=1e-13, atol=1e-14)
