"""The losses that ours is compared with: each a function of (logits, target), the mean over the rows that count.

None of them is a dependency: `installed()` leaves out what cannot be imported.
"""

import importlib
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def liger(logits: Tensor, target: Tensor) -> Tensor:
    """Liger writes the gradient over the logits: they hold garbage afterwards."""
    function = importlib.import_module("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction
    return function.apply(logits, target, None, -100, 0.0, 0.0, "mean", None, False)[0]


def liger_linear(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Liger's loss fused with the last linear layer."""
    function = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    return function.apply(input, weight, target)[0]


def flash_attn(logits: Tensor, target: Tensor) -> Tensor:
    losses, _ = importlib.import_module("flash_attn.ops.triton.cross_entropy").cross_entropy_loss(logits, target)
    return losses.sum() / (target != -100).sum()


def quack(logits: Tensor, target: Tensor) -> Tensor:
    return importlib.import_module("quack").cross_entropy(logits, target, reduction="mean")


@cache
def compiled() -> Loss:
    return torch.compile(F.cross_entropy, dynamic=False)


MODULES = {"Liger": "liger_kernel.ops.cross_entropy", "flash-attn": "flash_attn.ops.triton.cross_entropy", "quack": "quack"}
CALLS: dict[str, Loss] = {"Liger": liger, "flash-attn": flash_attn, "quack": quack}


def installed() -> dict[str, Loss]:
    """The third-party losses that can be imported here."""
    return {name: CALLS[name] for name, module in MODULES.items() if _imports(module)}


def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except Exception:  # packages for GPUs raise whatever they like where there is none
        return False
    return True
